"""torch.optim's conventions, as users and frameworks rely on them."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn

from sharded_bf16_adamw import LR, AdamW_BF16

BF16 = torch.bfloat16


def param(*shape, dtype=BF16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(*shape, generator=generator).to(dtype))


def give_gradients(params, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def train(optimizer, steps, seed=0):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(steps):
        give_gradients(params, seed=seed * 1000 + step)
        optimizer.step(zero_grad=True)


def snapshot(optimizer):
    """Copies of all weights and states, to compare bit for bit."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [[p.detach().clone(), *[value.clone() for _, value in sorted(optimizer.state[p].items())]] for p in params]


def equal(a, b):
    return len(a) == len(b) and all(
        len(x) == len(y) and all(torch.equal(s, t) for s, t in zip(x, y, strict=True)) for x, y in zip(a, b, strict=True)
    )


class TestConstructor:
    def test_positional_order_is_that_of_torch_adamw(self):
        ours = list(inspect.signature(AdamW_BF16).parameters)[:5]
        assert ours == list(inspect.signature(torch.optim.AdamW).parameters)[:5]

    @pytest.mark.parametrize(
        "arguments",
        [
            {"lr": -1.0},
            {"eps": -1.0},
            {"betas": (1.0, 0.9)},
            {"betas": (0.9, -0.1)},
            {"weight_decay": -1.0},
            {"lr": torch.tensor([1.0, 2.0])},
        ],
    )
    def test_bad_hyperparameters_raise_torchs_own_messages(self, arguments):
        with pytest.raises(ValueError) as theirs:  # noqa: PT011 - its message is what is compared
            torch.optim.AdamW([param(2)], **arguments)
        with pytest.raises(ValueError) as ours:  # noqa: PT011
            AdamW_BF16([param(2)], **arguments)
        assert str(ours.value) == str(theirs.value)

    def test_empty_parameter_list_raises_as_in_torch(self):
        with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
            AdamW_BF16([])

    def test_lr_with_lr_function_is_refused(self):
        with pytest.raises(ValueError, match="lr and lr_function are both given; pass lr for a constant or lr_function for a schedule"):
            AdamW_BF16([param(2)], lr=1e-3, lr_function=LR())

    def test_lr_function_must_be_callable(self):
        with pytest.raises(ValueError, match="lr_function must be a callable"):
            AdamW_BF16([param(2)], lr_function=1e-3)

    def test_unknown_backend_names_the_choices(self):
        with pytest.raises(ValueError, match="Invalid backend: 'cobol'; choose one of reference"):
            AdamW_BF16([param(2)], backend="cobol")

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.complex64])
    def test_wrong_dtype_names_parameter_and_dtype(self, dtype):
        with pytest.raises(TypeError, match=f"parameter 'w' is {dtype}; AdamW_BF16 takes bfloat16 and float32"):
            AdamW_BF16([("ok", param(2)), ("w", param(2, dtype=dtype))])

    def test_meta_parameter_says_what_to_do(self):
        with pytest.raises(ValueError, match=r"parameter 0 \(shape \(2,\)\) is on the meta device; call model.to_empty"):
            AdamW_BF16([nn.Parameter(torch.empty(2, device="meta", dtype=BF16))])

    def test_refused_group_leaves_the_optimizer_as_it_was(self):
        optimizer = AdamW_BF16([param(2)])
        with pytest.raises(TypeError, match="float16"):
            optimizer.add_param_group({"params": [param(3, dtype=torch.float16)]})
        assert len(optimizer.param_groups) == 1

    def test_groups_hold_every_default_as_plain_data(self):
        group = AdamW_BF16([param(2)], lr_function=lambda step: 0.5).param_groups[0]
        assert {"lr", "betas", "eps", "weight_decay", "maximize", "capturable"} <= set(group)
        assert not any(callable(value) for value in group.values())

    def test_unknown_group_keys_are_tolerated(self):
        p = param(2)
        optimizer = AdamW_BF16([{"params": [p], "fused": True, "foreach": None, "name": "decay"}], lr=1e-3)
        train(optimizer, 1)
        assert optimizer.param_groups[0]["fused"] is True and optimizer.state[p]["step"] == 1

    def test_named_parameters(self):
        model = nn.Linear(2, 2).to(BF16)
        optimizer = AdamW_BF16(model.named_parameters(), lr=1e-3)
        assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
        assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


class TestState:
    def test_is_lazy_bf16_and_three_values_a_parameter(self):
        p = param(4, 3)
        optimizer = AdamW_BF16([p], lr=1e-3)
        assert not optimizer.state
        train(optimizer, 1)
        state = optimizer.state[p]
        assert {key: value.dtype for key, value in state.items()} == {
            "step": torch.float32, "exp_avg": BF16, "exp_avg_sq": BF16, "correction": BF16,
        }  # fmt: skip
        assert state["step"].shape == () and all(state[key].shape == p.shape for key in state if key != "step")

    def test_float32_parameter_in_the_same_model_follows_torch(self):
        ours, theirs, bf16 = param(50, dtype=torch.float32), param(50, dtype=torch.float32), param(50)
        optimizer = AdamW_BF16([bf16, ours], lr=1e-2, weight_decay=0.1)
        torch_optimizer = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1)
        for seed in range(10):
            give_gradients([bf16, ours], seed)
            theirs.grad = ours.grad.clone()
            optimizer.step()
            torch_optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert set(optimizer.state[ours]) == {"step", "exp_avg", "exp_avg_sq"}
        assert optimizer.state[ours]["exp_avg"].dtype == torch.float32

    def test_params_swapped_after_construction_are_followed(self):
        """accelerate replaces ``param_groups[i]["params"]`` and round-trips the empty state."""
        old, new = param(4), param(4)
        optimizer = AdamW_BF16([old], lr=1e-2)
        optimizer.param_groups[0]["params"] = [new]
        optimizer.load_state_dict(optimizer.state_dict())
        before = new.detach().clone()
        train(optimizer, 3)
        assert not torch.equal(new, before) and torch.equal(old, before)
        assert list(optimizer.state) == [new]

    def test_parameter_without_gradient_is_left_alone(self):
        used, unused = param(4), param(4)
        optimizer = AdamW_BF16([used, unused], lr=1e-2, weight_decay=0.5)
        before = unused.detach().clone()
        give_gradients([used])
        optimizer.step()
        assert torch.equal(unused, before) and unused not in optimizer.state

    def test_in_place_update_keeps_storage_and_strides(self):
        p = nn.Parameter(torch.randn(2, 3, 4, 5).to(BF16).contiguous(memory_format=torch.channels_last))
        pointer, stride = p.data_ptr(), p.stride()
        optimizer = AdamW_BF16([p], lr=1e-2)
        train(optimizer, 3)
        assert p.data_ptr() == pointer and p.stride() == stride == optimizer.state[p]["exp_avg"].stride()

    def test_global_rng_is_not_used(self):
        state = torch.get_rng_state()
        p = param(100)
        optimizer = AdamW_BF16([p], lr=1e-2)
        give_gradients([p])
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        assert torch.equal(torch.get_rng_state(), state)

    def test_frozen_midway_and_unfrozen(self):
        p, q = param(4), param(4)
        optimizer = AdamW_BF16([p, q], lr=1e-2)
        train(optimizer, 2)
        q.requires_grad_(False)
        q.grad = None
        frozen = q.detach().clone()
        give_gradients([p])
        optimizer.step()
        assert torch.equal(q, frozen)
        assert (optimizer.state[p]["step"].item(), optimizer.state[q]["step"].item()) == (3, 2)


class TestStep:
    def test_closure_runs_with_gradients_enabled_and_its_loss_is_returned(self):
        p = param(4)
        optimizer = AdamW_BF16([p], lr=1e-2)

        def closure():
            optimizer.zero_grad()
            loss = p.float().square().sum()
            loss.backward()
            return loss

        first = optimizer.step(closure)
        assert first.requires_grad and optimizer.step(closure) < first

    def test_zero_grad_sets_gradients_to_none(self):
        p = param(4)
        optimizer = AdamW_BF16([p])
        give_gradients([p])
        optimizer.step(zero_grad=True)
        assert p.grad is None

    def test_gradients_are_untouched_without_zero_grad(self):
        p = param(64)
        optimizer = AdamW_BF16([p])
        give_gradients([p])
        before = p.grad.clone()
        optimizer.clip_grad_norm_(0.1)
        optimizer.step()
        assert torch.equal(p.grad, before)

    def test_hooks_run(self):
        p = param(4)
        optimizer, calls = AdamW_BF16([p]), []
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
        optimizer.register_step_post_hook(lambda *_: calls.append("post"))
        train(optimizer, 1)
        assert calls == ["pre", "post"]

    def test_hyperparameters_are_read_at_every_step(self):
        p = param(8)
        optimizer = AdamW_BF16([p], lr=1e-2, weight_decay=0.0)
        train(optimizer, 1)
        before = p.detach().clone()
        optimizer.param_groups[0].update(lr=0.0, weight_decay=0.3)
        give_gradients([p])
        optimizer.step()
        assert torch.equal(p, before)
        optimizer.param_groups[0].update(lr=1.0, maximize=True)
        p.grad = torch.ones_like(p)
        optimizer.state[p]["exp_avg"].zero_()
        optimizer.param_groups[0]["weight_decay"] = 0.0
        optimizer.step()
        assert (p > before).all()

    def test_tensor_lr_gives_the_same_bits_as_a_float(self):
        lr = torch.tensor(1e-2)
        p, q = param(100), param(100)
        a, b = AdamW_BF16([p], lr=lr), AdamW_BF16([q], lr=lr.item())
        train(a, 3)
        train(b, 3)
        assert equal(snapshot(a), snapshot(b))
        lr.fill_(0.0)
        before = p.detach().clone()
        train(a, 1)
        assert torch.equal(p, before)

    def test_sparse_gradient_is_refused_and_nothing_changes(self):
        good = param(4)
        embedding = nn.Embedding(10, 3, sparse=True, dtype=BF16)
        optimizer = AdamW_BF16([("good", good), ("table", embedding.weight)], lr_function=lambda step: 1.0 + step)
        give_gradients([good])
        embedding(torch.tensor([1, 2])).sum().backward()
        before, group = good.detach().clone(), dict(optimizer.param_groups[0])
        with pytest.raises(RuntimeError, match="does not support sparse gradients, which parameter 'table' has"):
            optimizer.step()
        assert torch.equal(good, before) and not optimizer.state and optimizer.param_groups[0] == group

    def test_complex_gradient_is_refused_and_nothing_changes(self):
        good, bad = param(4), param(4)
        optimizer = AdamW_BF16([good, bad], lr=1e-2)
        give_gradients([good])
        bad.grad_dtype = None
        bad.grad = torch.zeros(4, dtype=torch.complex64)
        before = good.detach().clone()
        with pytest.raises(TypeError, match=r"the gradient of parameter 1 \(shape \(4,\)\) is torch.complex64"):
            optimizer.step()
        assert torch.equal(good, before) and not optimizer.state

    def test_two_groups_have_their_own_hyperparameters(self):
        p, q = param(4), param(4)
        optimizer = AdamW_BF16([{"params": [p], "lr": 0.0}, {"params": [q]}], lr=1e-1)
        before = p.detach().clone()
        train(optimizer, 1)
        assert torch.equal(p, before) and not torch.equal(q, before)


class TestSchedule:
    def test_default_is_lr(self):
        optimizer = AdamW_BF16([param(2)])
        seen = []
        for _ in range(3):
            train(optimizer, 1)
            seen.append(optimizer.param_groups[0]["lr"])
        assert seen == [LR()(0), LR()(1), LR()(2)]

    def test_group_with_its_own_lr_does_not_get_the_default_schedule(self):
        optimizer = AdamW_BF16([{"params": [param(2)], "lr": 0.5}, {"params": [param(2)]}])
        train(optimizer, 2)
        assert [group["lr"] for group in optimizer.param_groups] == [0.5, LR()(1)]

    def test_constant_lr_may_be_changed_by_torch_schedulers(self):
        optimizer = AdamW_BF16([param(2)], lr=1.0)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        seen = []
        for _ in range(3):
            seen.append(optimizer.param_groups[0]["lr"])
            train(optimizer, 1)
            scheduler.step()
        assert seen == [1.0, 0.5, 0.25]

    def test_torch_scheduler_wins_over_lr_function(self):
        optimizer = AdamW_BF16([param(2)], lr_function=lambda step: 1.0 / (step + 1))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 7.0 + epoch)
        used = []
        for _ in range(3):
            train(optimizer, 1)
            used.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
        assert used == [7.0, 8.0, 9.0]

    def test_changed_lr_holds_until_it_is_put_back(self):
        """torch's checkpoint code sets lr to 0, steps with zero gradients to make the state, and puts the lr back."""
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

    def test_late_group_joins_at_the_position_of_the_others(self):
        optimizer = AdamW_BF16([param(2)], lr_function=lambda step: float(step))
        train(optimizer, 5)
        optimizer.add_param_group({"params": [param(3)]})
        train(optimizer, 1)
        assert [group["lr"] for group in optimizer.param_groups] == [5.0, 5.0]

    def test_loading_restores_the_position_and_keeps_the_codes_schedule(self):
        saved = AdamW_BF16([param(2)], lr_function=lambda step: 1.0)
        train(saved, 4)
        resumed = AdamW_BF16([param(2)], lr_function=lambda step: 100.0 + step)
        resumed.load_state_dict(saved.state_dict())
        train(resumed, 1)
        assert resumed.param_groups[0]["lr"] == 104.0


class TestSaving:
    def test_round_trip_is_exact_keyed_by_integer_and_loads_weights_only(self):
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

    def test_loaded_states_have_one_order(self):
        """torch's FSDP1 code gathers by the order of each rank's own dict, which its loading code takes from a set."""
        a, b = AdamW_BF16([param(30)]), AdamW_BF16([param(30)])
        train(a, 2)
        shuffled = a.state_dict()
        shuffled["state"] = {0: dict(reversed(shuffled["state"][0].items()))}
        b.load_state_dict(shuffled)
        assert [list(state) for state in b.state.values()] == [["step", "exp_avg", "exp_avg_sq", "correction"]]

    def test_loading_copies_its_input(self):
        a, b = AdamW_BF16([param(30)]), AdamW_BF16([param(30)])
        train(a, 2)
        b.load_state_dict(a.state_dict())
        before = snapshot(a)
        train(b, 2)
        assert equal(snapshot(a), before)

    def test_pickle_and_deepcopy_go_on_with_the_same_bits(self):
        model = nn.ParameterList([param(30)])
        optimizer = AdamW_BF16(model.parameters(), lr_function=LR(lr=0.1, preheat_steps=2), skip_nonfinite=True)
        train(optimizer, 3)
        copies = [pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)]
        train(optimizer, 3, seed=5)
        for other in copies:
            train(other, 3, seed=5)
            assert equal(snapshot(other), snapshot(optimizer)) and other.skip_nonfinite

    def test_deepcopy_with_a_lambda(self):
        optimizer = copy.deepcopy(AdamW_BF16([param(3)], lr_function=lambda step: 0.25))
        train(optimizer, 1)
        assert optimizer.param_groups[0]["lr"] == 0.25

    def test_state_of_torch_adamw_loads_with_a_zero_correction(self):
        source = torch.optim.AdamW([param(30)], lr=0.5, amsgrad=True)
        give_gradients(source.param_groups[0]["params"])
        source.step()
        p = param(30)
        optimizer = AdamW_BF16([p])
        optimizer.load_state_dict(source.state_dict())
        state = optimizer.state[p]
        assert torch.equal(state["exp_avg"], source.state[source.param_groups[0]["params"][0]]["exp_avg"])
        assert not state["correction"].any() and set(state) == {"step", "exp_avg", "exp_avg_sq", "correction"}
        train(optimizer, 1)
        assert state["step"].item() == 2

    def test_state_of_another_model_is_refused_and_nothing_changes(self):
        other = AdamW_BF16([param(5)])
        train(other, 1)
        optimizer = AdamW_BF16([("w", param(4))])
        train(optimizer, 2)
        before, group = snapshot(optimizer), dict(optimizer.param_groups[0])
        with pytest.raises(ValueError, match=r"the loaded exp_avg of parameter 'w' has shape \(5,\) but the parameter has \(4,\)"):
            optimizer.load_state_dict(other.state_dict())
        assert equal(snapshot(optimizer), before) and optimizer.param_groups[0] == group

    def test_subclass_built_without_init_steps(self):
        """Lightning's Fabric makes such a class around the attributes of the wrapped optimizer."""
        optimizer = AdamW_BF16([param(10)], lr=1e-2)
        wrapped = type("Fabric", (AdamW_BF16,), {"__init__": lambda self: None})()
        wrapped.__dict__ = dict(optimizer.__dict__)
        train(wrapped, 2)
        assert optimizer.state[optimizer.param_groups[0]["params"][0]]["step"].item() == 2


class TestClipping:
    def test_norm_is_exact_and_the_scale_goes_into_the_step(self):
        p, q, r = param(1000), param(10, dtype=torch.float32), param(0)
        optimizer = AdamW_BF16([p, q, r], lr=1e-2)
        give_gradients([p, q, r])
        expected = torch.cat([p.grad.double(), q.grad.double()]).norm()
        norm = optimizer.clip_grad_norm_(0.5)
        assert norm.dtype == torch.float32 and norm == expected.float()
        optimizer.step()
        scaled = AdamW_BF16([param(10, dtype=torch.float32)], lr=1e-2)
        scaled.param_groups[0]["params"][0].grad = q.grad * (0.5 / (expected + 1e-6)).float()
        scaled.step()
        assert torch.equal(scaled.param_groups[0]["params"][0], q)

    def test_scale_lasts_one_step(self):
        p, q = param(100), param(100)
        a, b = AdamW_BF16([p], lr=1e-2), AdamW_BF16([q], lr=1e-2)
        for optimizer, max_norm in ((a, 1e-3), (b, 1e9)):
            give_gradients([optimizer.param_groups[0]["params"][0]], seed=1)
            optimizer.clip_grad_norm_(max_norm)
            optimizer.step()
        assert not torch.equal(a.state[p]["exp_avg"], b.state[q]["exp_avg"])
        for state in (a.state[p], b.state[q]):
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()
        give_gradients([p, q], seed=1)
        q.grad = p.grad.clone()
        a.step()
        b.step()
        torch.testing.assert_close(a.state[p]["exp_avg"], b.state[q]["exp_avg"], rtol=0.02, atol=0)

    def test_small_gradients_are_not_scaled_up(self):
        p, q = param(100), param(100)
        a, b = AdamW_BF16([p], lr=1e-2), AdamW_BF16([q], lr=1e-2)
        give_gradients([p])
        give_gradients([q])
        a.clip_grad_norm_(1e6)
        a.step()
        b.step()
        assert equal(snapshot(a), snapshot(b))

    def test_max_norm_must_be_positive(self):
        with pytest.raises(ValueError, match=r"Invalid max_norm: 0\.0"):
            AdamW_BF16([param(2)]).clip_grad_norm_(0.0)


class TestSkipNonfinite:
    @pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
    @pytest.mark.parametrize("clip", [False, True])
    def test_nothing_changes_and_the_step_is_counted(self, bad, clip):
        p, q = param(100), param(3)
        optimizer = AdamW_BF16([p, q], lr=1e-2, skip_nonfinite=True)
        train(optimizer, 2)
        before = snapshot(optimizer)
        give_gradients([p, q])
        p.grad[37] = bad
        if clip:
            optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        assert equal(snapshot(optimizer), before) and optimizer.skipped_steps == 1
        train(optimizer, 1)
        assert optimizer.skipped_steps == 1 and optimizer.state[q]["step"].item() == 3

    def test_off_by_default(self):
        p = param(4)
        optimizer = AdamW_BF16([p], lr=1e-2)
        p.grad = torch.full_like(p, float("nan"))
        optimizer.step()
        assert p.isnan().all() and optimizer.skipped_steps == 0


class TestTrueWeights:
    def test_is_parameter_plus_correction_in_float32(self):
        p, q, r = param(1000), param(5, dtype=torch.float32), param(2)
        optimizer = AdamW_BF16([p, q, r], lr=1e-5)
        before = p.detach().double()
        give_gradients([p, q])
        optimizer.step()
        weights = dict(optimizer.true_weights())
        assert list(weights) == [p, q, r] and all(weight.dtype == torch.float32 for weight in weights.values())
        moved = (weights[p].double() - before).abs().mean()
        assert moved == pytest.approx(1e-5, rel=0.01), "updates far below a bf16 step of the weight are kept"
        assert torch.equal(weights[q], q) and torch.equal(weights[r], r.float())

    def test_reset_correction(self):
        p, q = param(100), param(100)
        optimizer = AdamW_BF16([p, q], lr=1e-3)
        train(optimizer, 2)
        optimizer.reset_correction([p])
        assert not optimizer.state[p]["correction"].any() and optimizer.state[q]["correction"].any()
        optimizer.reset_correction()
        assert not optimizer.state[q]["correction"].any()
