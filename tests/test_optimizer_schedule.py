"""The learning rate under LR, torch's schedulers and user-defined schedules."""

import math
import warnings

import numpy as np
import pytest
import torch
from small_optimizers import give_gradients, param, train

from sharded_bf16_adamw import LR, AdamW_BF16


class TestSchedule:
    def test_default_schedule_is_lr(self):
        optimizer = AdamW_BF16([param(2)])
        seen = []
        for _ in range(3):
            train(optimizer, 1)
            seen.append(optimizer.param_groups[0]["lr"])
        assert seen == [LR()(0), LR()(1), LR()(2)]

    def test_group_with_own_lr_ignores_the_schedule(self):
        optimizer = AdamW_BF16([{"params": [param(2)], "lr": 0.5}, {"params": [param(2)]}])
        train(optimizer, 2)
        assert [group["lr"] for group in optimizer.param_groups] == [0.5, LR()(1)]

    def test_torch_scheduler_changes_a_constant_lr(self):
        optimizer = AdamW_BF16([param(2)], lr=1.0)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        seen = []
        for _ in range(3):
            seen.append(optimizer.param_groups[0]["lr"])
            train(optimizer, 1)
            scheduler.step()
        assert seen == [1.0, 0.5, 0.25]

    @pytest.mark.filterwarnings("ignore:a torch learning-rate scheduler was built")
    def test_torch_scheduler_overrides_lr_function(self):
        optimizer = AdamW_BF16([param(2)], lr_function=lambda step: 1.0 / (step + 1))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 7.0 + epoch)
        used = []
        for _ in range(3):
            train(optimizer, 1)
            used.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
        assert used == [7.0, 8.0, 9.0]

    def test_overwritten_lr_stands_until_restored(self):
        """torch's checkpoint code steps at lr 0 with zero gradients, then restores the lr."""
        p = param(100)
        optimizer = AdamW_BF16([p], lr_function=lambda step: 0.1 * (step + 1), weight_decay=1.0)
        before = p.detach().clone()
        p.grad = torch.zeros_like(p)
        written, optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"], 0.0
        optimizer.step(closure=None)
        assert torch.equal(p, before), "a step at lr 0 must not decay"
        optimizer.param_groups[0]["lr"] = written
        train(optimizer, 1)
        assert optimizer.param_groups[0]["lr"] == 0.1 * 2

    def test_torch_scheduler_on_lr_function_warns_once(self):
        """The scheduler takes the first lr of a warm-up as its base lr."""
        optimizer = AdamW_BF16([param(2)])
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
        with pytest.warns(
            UserWarning,
            match=r"lr_function=LR\(lr=0.001.*first value, 3.33333e-07; pass lr=",
        ):
            train(optimizer, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(optimizer, 1)

    @pytest.mark.parametrize("wrong", [None, -1.0, math.nan, math.inf, "0.1"])
    def test_invalid_lr_is_rejected_at_any_step(self, wrong):
        lrs = [0.5, 0.5, 0.5, wrong]  # the constructor calls twice, for the default and the group
        p = param(4)
        optimizer = AdamW_BF16([p], lr_function=lambda step: lrs.pop(0))
        train(optimizer, 1)
        before = p.detach().clone()
        with pytest.raises(
            ValueError,
            match=rf"invalid learning rate: lr_function\(1\) is {wrong!r}; it must be a finite",
        ):
            train(optimizer, 1)
        assert torch.equal(p, before) and optimizer.param_groups[0]["schedule_step"] == 1
        with pytest.raises(ValueError, match=r"invalid learning rate: lr_function\(0\) is"):
            AdamW_BF16([p], lr_function=lambda step: wrong)

    def test_group_is_not_added_if_the_schedule_fails(self):
        lrs = [0.5, 0.5, math.nan]
        optimizer = AdamW_BF16([param(4)], lr_function=lambda step: lrs.pop(0))
        for error in (ValueError, IndexError):
            with pytest.raises(error):
                optimizer.add_param_group({"params": [param(3)]})
            assert len(optimizer.param_groups) == 1

    def test_numpy_lr_becomes_a_float(self):
        optimizer = AdamW_BF16([param(2)], lr_function=lambda step: np.float32(0.5) / (step + 1))
        train(optimizer, 2)
        assert (
            type(optimizer.param_groups[0]["lr"]) is float
            and optimizer.param_groups[0]["lr"] == 0.25
        )

    def test_schedule_continues_at_torch_adamws_step(self):
        groups = [[{"params": [param(3)]}, {"params": [param(2)]}] for _ in range(2)]
        source = torch.optim.AdamW(groups[0], lr=0.5)
        for _ in range(7):
            give_gradients(source.param_groups[0]["params"])  # the other group stays frozen
            source.step()
        optimizer = AdamW_BF16(groups[1], lr_function=float)
        optimizer.load_state_dict(source.state_dict())
        train(optimizer, 1)
        assert [group["lr"] for group in optimizer.param_groups] == [7.0, 7.0]

    def test_overwriting_tensor_lr_stands_even_if_equal(self):
        """Comparing the values would wait for the tensor's device."""
        optimizer = AdamW_BF16([param(2)], lr_function=lambda step: 0.5)
        own = optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
        train(optimizer, 2)
        assert optimizer.param_groups[0]["lr"] is own

    def test_schedule_may_return_tensors(self):
        optimizer = AdamW_BF16([param(2)], lr_function=lambda step: torch.tensor(float(step)))
        train(optimizer, 3)
        assert optimizer.param_groups[0]["lr"] == 2.0

    def test_failing_schedule_leaves_all_groups_unchanged(self):
        p, q = param(4), param(4)
        calls = iter([0.1, 0.1, 0.1])  # the constructor's, for the default and both groups
        optimizer = AdamW_BF16(
            [{"params": [p]}, {"params": [q]}],
            lr_function=lambda step: next(calls) if step == 0 else 0.1,
        )
        calls = iter([0.2])
        before = [p.detach().clone(), q.detach().clone()]
        with pytest.raises(StopIteration):
            train(optimizer, 1)
        assert torch.equal(p, before[0]) and torch.equal(q, before[1])
        assert [(group["lr"], group["schedule_step"]) for group in optimizer.param_groups] == [
            (0.1, 0),
            (0.1, 0),
        ]
        assert not optimizer.state, "no state is created before the schedule is called"

    def test_late_group_joins_at_the_schedules_position(self):
        optimizer = AdamW_BF16([param(2)], lr_function=lambda step: float(step))
        train(optimizer, 5)
        optimizer.add_param_group({"params": [param(3)]})
        train(optimizer, 1)
        assert [group["lr"] for group in optimizer.param_groups] == [5.0, 5.0]

    def test_load_restores_position_and_keeps_own_schedule(self):
        saved = AdamW_BF16([param(2)], lr_function=lambda step: 1.0)
        train(saved, 4)
        resumed = AdamW_BF16([param(2)], lr_function=lambda step: 100.0 + step)
        resumed.load_state_dict(saved.state_dict())
        train(resumed, 1)
        assert resumed.param_groups[0]["lr"] == 104.0
