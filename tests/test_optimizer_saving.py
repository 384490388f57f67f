"""Tests of state_dict, load_state_dict, pickle and deepcopy."""

import copy
import io
import pickle

import pytest
import torch
from small_optimizers import equal, give_gradients, param, snapshot, train
from torch import nn

from sharded_bf16_adamw import LR, AdamW_BF16


class TestSaving:
    def test_state_dict_round_trip_is_exact_with_weights_only(self):
        a = AdamW_BF16([param(30), param(7, dtype=torch.float32)])
        train(a, 5)
        assert list(a.state_dict()["state"]) == [0, 1]
        buffer = io.BytesIO()
        torch.save(a.state_dict(), buffer)
        buffer.seek(0)
        b = AdamW_BF16([nn.Parameter(p.detach().clone()) for p in a.param_groups[0]["params"]])
        b.load_state_dict(state_dict=torch.load(buffer, weights_only=True))
        assert equal(snapshot(a), snapshot(b))
        train(a, 3, seed=9)
        train(b, 3, seed=9)
        assert equal(snapshot(a), snapshot(b))

    def test_loaded_states_have_a_fixed_order(self):
        """torch's FSDP1 code gathers states in dict order; on load that order comes from a set."""
        a, b = AdamW_BF16([param(30)]), AdamW_BF16([param(30)])
        train(a, 2)
        shuffled = a.state_dict()
        shuffled["state"] = {0: dict(reversed(shuffled["state"][0].items()))}
        b.load_state_dict(shuffled)
        assert [list(state) for state in b.state.values()] == [
            ["step", "exp_avg", "exp_avg_sq", "correction"]
        ]

    def test_load_state_dict_copies_its_input(self):
        a, b = AdamW_BF16([param(30)]), AdamW_BF16([param(30)])
        train(a, 2)
        b.load_state_dict(a.state_dict())
        before = snapshot(a)
        train(b, 2)
        assert equal(snapshot(a), before)

    def test_copies_continue_with_the_same_bits(self):
        model = nn.ParameterList([param(30)])
        optimizer = AdamW_BF16(
            model.parameters(), lr_function=LR(lr=0.1, preheat_steps=2), skip_nonfinite=True
        )
        train(optimizer, 3)
        copies = [pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)]
        train(optimizer, 3, seed=5)
        for other in copies:
            train(other, 3, seed=5)
            assert equal(snapshot(other), snapshot(optimizer)) and other.skip_nonfinite

    def test_deepcopy_keeps_a_lambda_schedule(self):
        optimizer = copy.deepcopy(AdamW_BF16([param(3)], lr_function=lambda step: 0.25))
        train(optimizer, 1)
        assert optimizer.param_groups[0]["lr"] == 0.25

    def test_state_of_torch_adamw_loads_with_zero_correction(self):
        source = torch.optim.AdamW([param(30)], lr=0.5, amsgrad=True)
        give_gradients(source.param_groups[0]["params"])
        source.step()
        p = param(30)
        optimizer = AdamW_BF16([p])
        optimizer.load_state_dict(source.state_dict())
        state = optimizer.state[p]
        assert torch.equal(
            state["exp_avg"], source.state[source.param_groups[0]["params"][0]]["exp_avg"]
        )
        assert not state["correction"].any() and set(state) == {
            "step",
            "exp_avg",
            "exp_avg_sq",
            "correction",
        }
        train(optimizer, 1)
        assert state["step"].item() == 2

    def test_state_of_adamw_bfloat16_loads_with_its_correction(self):
        """Version 0.2.0 writes the step as a float, and the correction as ``shift``."""
        p = param(30)
        shift = torch.linspace(-1e-3, 1e-3, 30).bfloat16()
        source = {
            "state": {
                0: {
                    "step": 7.0,
                    "exp_avg": torch.full((30,), 0.5).bfloat16(),
                    "exp_avg_sq": torch.full((30,), 0.25).bfloat16(),
                    "shift": shift,
                    "accumulated_decay": 0.003,
                }
            },
            "param_groups": [
                {
                    "lr_function": LR(lr=0.5),  # stands for the library's own class
                    "betas": (0.8, 0.99),
                    "eps": 1e-6,
                    "weight_decay": 0.0,
                    "params": [0],
                }
            ],
        }
        schedule = LR(lr=0.1, preheat_steps=20)
        optimizer = AdamW_BF16([p], lr_function=schedule)
        optimizer.load_state_dict(source)
        state, group = optimizer.state[p], optimizer.param_groups[0]
        assert list(state) == ["step", "exp_avg", "exp_avg_sq", "correction"]
        assert torch.equal(state["correction"], shift) and state["step"].item() == 7
        assert group["betas"] == (0.8, 0.99) and group["weight_decay"] == 0.0
        assert "lr_function" not in group
        train(optimizer, 1)
        assert group["lr"] == schedule(7) and "shift" in source["state"][0]
        constant = AdamW_BF16([param(30)], lr=0.25)
        constant.load_state_dict(source)
        assert constant.param_groups[0]["lr"] == 0.25

    def test_size_mismatch_is_rejected_and_changes_nothing(self):
        other = AdamW_BF16([param(5)])
        train(other, 1)
        optimizer = AdamW_BF16([("w", param(4))])
        train(optimizer, 2)
        before, group = snapshot(optimizer), dict(optimizer.param_groups[0])
        with pytest.raises(
            ValueError,
            match=r"size mismatch: the loaded exp_avg of parameter 'w' .* \(5,\) but .*\(4,",
        ):
            optimizer.load_state_dict(other.state_dict())
        assert equal(snapshot(optimizer), before) and optimizer.param_groups[0] == group

    def test_subclass_without_init_takes_steps(self):
        """Lightning Fabric creates such a class around the wrapped optimizer's attributes."""
        optimizer = AdamW_BF16([param(10)], lr=1e-2)
        wrapped = type("Fabric", (AdamW_BF16,), {"__init__": lambda self: None})()
        wrapped.__dict__ = dict(optimizer.__dict__)
        train(wrapped, 2)
        assert optimizer.state[optimizer.param_groups[0]["params"][0]]["step"].item() == 2
