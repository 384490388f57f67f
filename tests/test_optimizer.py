"""The conventions of torch.optim that users and frameworks rely on."""

import inspect

import pytest
import torch
from small_optimizers import BF16, equal, give_gradients, param, snapshot, train
from torch import nn

from sharded_bf16_adamw import LR, AdamW_BF16
from sharded_bf16_adamw.kernels import backend_for
from sharded_bf16_adamw.validation import param_name


class TestConstructor:
    def test_positional_arguments_match_torch_adamw(self):
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
    def test_bad_hyperparams_raise_torchs_messages(self, arguments):
        with pytest.raises(ValueError) as expected:  # noqa: PT011 - the messages are compared
            torch.optim.AdamW([param(2)], **arguments)
        with pytest.raises(ValueError) as raised:  # noqa: PT011
            AdamW_BF16([param(2)], **arguments)
        assert str(raised.value) == str(expected.value)

    @pytest.mark.parametrize("lr", [LR(), "1e-3"])
    def test_schedule_or_string_as_lr_is_rejected(self, lr):
        with pytest.raises(
            ValueError,
            match=r"Invalid learning rate: .*; it must be a number or a tensor; pass a schedule as",
        ):
            AdamW_BF16([param(2)], lr)

    @pytest.mark.parametrize("betas", [0.9, (0.9,), (0.9, 0.99, 0.999), (0.9, "b"), None])
    def test_betas_must_be_two_numbers(self, betas):
        with pytest.raises(ValueError, match=r"Invalid betas: .*; it must be two numbers"):
            AdamW_BF16([param(2)], betas=betas)
        with pytest.raises(ValueError, match=r"Invalid betas: .*; it must be two numbers"):
            AdamW_BF16([{"params": [param(2)], "betas": betas}])

    def test_betas_of_a_group_become_floats(self):
        optimizer = AdamW_BF16([{"params": [param(2)], "betas": iter(["0.8", "0.9"])}])
        assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)

    def test_tensor_lr_must_have_one_element(self):
        lr = torch.full((2,), 1e-3)
        for params, defaults in (
            ([param(2)], {"lr": lr}),
            ([{"params": [param(2)], "lr": lr}], {}),
        ):
            with pytest.raises(ValueError, match="Tensor lr must be 1-element"):
                AdamW_BF16(params, **defaults)

    def test_lazy_parameter_is_rejected_with_advice(self):
        lazy = nn.LazyLinear(3, dtype=BF16)
        with pytest.raises(
            ValueError,
            match=r"parameter 0 \(of a lazy module\) has no shape yet; run one forward pass before",
        ):
            AdamW_BF16(lazy.parameters())
        lazy(torch.ones(1, 2, dtype=BF16))
        AdamW_BF16(lazy.parameters())

    def test_empty_parameter_list_raises_torchs_error(self):
        with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
            AdamW_BF16([])

    def test_lr_and_lr_function_are_exclusive(self):
        with pytest.raises(
            ValueError,
            match="lr and lr_function are both given; pass lr for a constant or lr_function for",
        ):
            AdamW_BF16([param(2)], lr=1e-3, lr_function=LR())

    def test_lr_function_must_be_callable(self):
        with pytest.raises(ValueError, match="lr_function must be a callable"):
            AdamW_BF16([param(2)], lr_function=1e-3)

    def test_unknown_backend_error_lists_the_choices(self):
        with pytest.raises(ValueError, match="Invalid backend: 'cobol'; choose one of reference"):
            AdamW_BF16([param(2)], backend="cobol")

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.complex64])
    def test_wrong_dtype_error_names_parameter_and_dtype(self, dtype):
        with pytest.raises(
            TypeError, match=f"parameter 'w' is {dtype}; AdamW_BF16 takes bfloat16 and float32"
        ):
            AdamW_BF16([("ok", param(2)), ("w", param(2, dtype=dtype))])

    def test_meta_parameter_is_rejected_with_advice(self):
        with pytest.raises(
            ValueError,
            match=r"parameter 0 \(shape \(2,\)\) is on the meta device; call model.to_empty",
        ):
            AdamW_BF16([nn.Parameter(torch.empty(2, device="meta", dtype=BF16))])

    def test_rejected_group_leaves_optimizer_unchanged(self):
        optimizer = AdamW_BF16([param(2)])
        with pytest.raises(TypeError, match="float16"):
            optimizer.add_param_group({"params": [param(3, dtype=torch.float16)]})
        assert len(optimizer.param_groups) == 1

    def test_groups_have_every_default_as_plain_data(self):
        group = AdamW_BF16([param(2)], lr_function=lambda step: 0.5).param_groups[0]
        assert {"lr", "betas", "eps", "weight_decay", "maximize", "capturable"} <= set(group)
        assert not any(callable(value) for value in group.values())

    def test_unknown_group_keys_are_kept(self):
        p = param(2)
        optimizer = AdamW_BF16(
            [{"params": [p], "fused": True, "foreach": None, "name": "decay"}], lr=1e-3
        )
        train(optimizer, 1)
        assert optimizer.param_groups[0]["fused"] is True and optimizer.state[p]["step"] == 1

    def test_named_parameters_keep_their_names(self):
        model = nn.Linear(2, 2).to(BF16)
        optimizer = AdamW_BF16(model.named_parameters(), lr=1e-3)
        assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
        assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]

    def test_messages_name_no_other_parameter_after_a_group_was_edited(self):
        group = AdamW_BF16([("a", param(2)), ("b", param(3))], lr=1e-3).param_groups[0]
        assert param_name(group, 1) == "'b'"
        del group["params"][0]
        assert param_name(group, 0) == "0 (shape (3,))"
        group["params"] += [param(4), param(5)]
        assert param_name(group, 2) == "2 (shape (5,))"


class TestState:
    def test_state_is_lazy_and_bfloat16(self):
        p = param(4, 3)
        optimizer = AdamW_BF16([p], lr=1e-3)
        assert not optimizer.state
        train(optimizer, 1)
        state = optimizer.state[p]
        assert {key: value.dtype for key, value in state.items()} == {
            "step": torch.float32, "exp_avg": BF16, "exp_avg_sq": BF16, "correction": BF16,
        }  # fmt: skip
        assert state["step"].shape == () and all(
            state[key].shape == p.shape for key in state if key != "step"
        )

    def test_float32_parameter_matches_torch_adamw(self):
        ours, expected = param(50, dtype=torch.float32), param(50, dtype=torch.float32)
        bf16 = param(50)
        optimizer = AdamW_BF16([bf16, ours], lr=1e-2, weight_decay=0.1)
        torch_optimizer = torch.optim.AdamW([expected], lr=1e-2, weight_decay=0.1)
        for seed in range(10):
            give_gradients([bf16, ours], seed)
            expected.grad = ours.grad.clone()
            optimizer.step()
            torch_optimizer.step()
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
        assert set(optimizer.state[ours]) == {"step", "exp_avg", "exp_avg_sq"}
        assert optimizer.state[ours]["exp_avg"].dtype == torch.float32

    def test_params_swapped_after_construction_are_updated(self):
        """accelerate swaps ``param_groups[i]["params"]`` and reloads the empty state."""
        old, new = param(4), param(4)
        optimizer = AdamW_BF16([old], lr=1e-2)
        optimizer.param_groups[0]["params"] = [new]
        optimizer.load_state_dict(optimizer.state_dict())
        before = new.detach().clone()
        train(optimizer, 3)
        assert not torch.equal(new, before) and torch.equal(old, before)
        assert list(optimizer.state) == [new]

    def test_parameter_without_gradient_is_unchanged(self):
        used, unused = param(4), param(4)
        optimizer = AdamW_BF16([used, unused], lr=1e-2, weight_decay=0.5)
        before = unused.detach().clone()
        give_gradients([used])
        optimizer.step()
        assert torch.equal(unused, before) and unused not in optimizer.state

    def test_in_place_update_keeps_storage_and_strides(self):
        p = nn.Parameter(
            torch.randn(2, 3, 4, 5).to(BF16).contiguous(memory_format=torch.channels_last)
        )
        pointer, stride = p.data_ptr(), p.stride()
        optimizer = AdamW_BF16([p], lr=1e-2)
        train(optimizer, 3)
        assert (
            p.data_ptr() == pointer
            and p.stride() == stride == optimizer.state[p]["exp_avg"].stride()
        )

    def test_step_does_not_use_the_global_rng(self):
        state = torch.get_rng_state()
        p = param(100)
        optimizer = AdamW_BF16([p], lr=1e-2)
        give_gradients([p])
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        assert torch.equal(torch.get_rng_state(), state)

    def test_frozen_parameter_keeps_weight_and_step(self):
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
    def test_closure_runs_with_grad_enabled_and_returns_its_loss(self):
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

    def test_step_leaves_gradients_unchanged(self):
        p = param(64)
        optimizer = AdamW_BF16([p])
        give_gradients([p])
        before = p.grad.clone()
        optimizer.clip_grad_norm_(0.1)
        optimizer.step()
        assert torch.equal(p.grad, before)

    def test_step_hooks_run(self):
        p = param(4)
        optimizer, calls = AdamW_BF16([p]), []
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
        optimizer.register_step_post_hook(lambda *_: calls.append("post"))
        train(optimizer, 1)
        assert calls == ["pre", "post"]

    def test_hyperparams_are_read_at_every_step(self):
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

    def test_tensor_lr_gives_same_bits_as_float(self):
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

    def test_sparse_gradient_is_rejected_and_changes_nothing(self):
        good = param(4)
        embedding = nn.Embedding(10, 3, sparse=True, dtype=BF16)
        optimizer = AdamW_BF16(
            [("good", good), ("table", embedding.weight)], lr_function=lambda step: 1.0 + step
        )
        give_gradients([good])
        embedding(torch.tensor([1, 2])).sum().backward()
        before, group = good.detach().clone(), dict(optimizer.param_groups[0])
        with pytest.raises(
            RuntimeError, match="does not support sparse gradients, but parameter 'table' has one"
        ):
            optimizer.step()
        assert (
            torch.equal(good, before) and not optimizer.state and optimizer.param_groups[0] == group
        )

    def test_complex_gradient_is_rejected_and_changes_nothing(self):
        good, bad = param(4), param(4)
        optimizer = AdamW_BF16([good, bad], lr=1e-2)
        give_gradients([good])
        bad.grad_dtype = None
        bad.grad = torch.zeros(4, dtype=torch.complex64)
        before = good.detach().clone()
        with pytest.raises(
            TypeError, match=r"the gradient of parameter 1 \(shape \(4,\)\) is torch.complex64"
        ):
            optimizer.step()
        assert torch.equal(good, before) and not optimizer.state

    def test_groups_have_their_own_hyperparams(self):
        p, q = param(4), param(4)
        optimizer = AdamW_BF16([{"params": [p], "lr": 0.0}, {"params": [q]}], lr=1e-1)
        before = p.detach().clone()
        train(optimizer, 1)
        assert torch.equal(p, before) and not torch.equal(q, before)


class TestTrueWeights:
    def test_true_weight_is_parameter_plus_correction_in_float32(self):
        p, q, r = param(1000), param(5, dtype=torch.float32), param(2)
        optimizer = AdamW_BF16([p, q, r], lr=1e-5)
        before = p.detach().double()
        give_gradients([p, q])
        optimizer.step()
        weights = dict(optimizer.true_weights())
        assert list(weights) == [p, q, r] and all(
            weight.dtype == torch.float32 for weight in weights.values()
        )
        moved = (weights[p].double() - before).abs().mean()
        assert moved == pytest.approx(1e-5, rel=0.01), (
            "updates far below a bf16 step of the weight are kept"
        )
        assert torch.equal(weights[q], q) and torch.equal(weights[r], r.float())

    def test_true_weights_are_new_tensors(self):
        p, q = param(10), param(5, dtype=torch.float32)
        before = [p.detach().clone(), q.detach().clone()]
        for _, weight in AdamW_BF16([p, q], lr=1e-5).true_weights():
            weight.zero_()  # as an average of weights would, in place
        assert torch.equal(p, before[0]) and torch.equal(q, before[1])

    def test_reset_correction_zeroes_given_or_all_params(self):
        p, q = param(100), param(100)
        optimizer = AdamW_BF16([p, q], lr=1e-3)
        train(optimizer, 2)
        optimizer.reset_correction([p])
        assert not optimizer.state[p]["correction"].any() and optimizer.state[q]["correction"].any()
        optimizer.reset_correction()
        assert not optimizer.state[q]["correction"].any()


class TestRepr:
    def test_repr_shows_backend_sharding_and_local_state_bytes(self):
        optimizer = AdamW_BF16([param(100), param(3, dtype=torch.float32)], lr=1e-3, eps=1e-7)
        optimizer.init_state()
        lines = repr(optimizer).splitlines()
        assert lines[:4] == [
            "AdamW_BF16 (",
            f"backend: {backend_for(torch.device('cpu'), None)}",
            "sharding: torch",
            f"state: {3 * 2 * 100 + 4 + 2 * 4 * 3 + 4} bytes on this rank",
        ]
        assert torch.optim.Optimizer.__repr__(optimizer).splitlines()[1:] == lines[5:]

    def test_repr_counts_names(self):
        optimizer = AdamW_BF16([("weight", param(2)), ("bias", param(2))])
        assert "\n    param_names: <2 names>\n" in repr(optimizer)

    def test_repr_of_a_given_backend_names_it(self):
        assert "\nbackend: reference\n" in repr(AdamW_BF16([param(2)], backend="reference"))

    def test_repr_reads_no_tensor_on_an_accelerator(self):
        optimizer = AdamW_BF16([param(2)])
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1, device="meta")  # printing it would show
        assert "    lr: <torch.float32 on meta>\n" in repr(optimizer)

    @pytest.mark.parametrize("entry", [None, {"step": 1}, {"exp_avg": None}])
    def test_repr_never_raises(self, entry):
        optimizer = AdamW_BF16([param(2)], lr=1e-3)
        optimizer.state[optimizer.param_groups[0]["params"][0]] = entry
        optimizer.param_groups[0][3] = "a key that is no string"
        assert "\nstate: 0 bytes on this rank\n" in repr(optimizer)
        assert repr(AdamW_BF16.__new__(AdamW_BF16)).startswith("<sharded_bf16_adamw.optimizer.")


def test_profiler_shows_clip_and_update():
    p = param(4)
    optimizer = AdamW_BF16([p], lr=1e-3)
    give_gradients([p])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
    names = [event.name for event in profile.events()]
    for name in ("AdamW_BF16::clip_grad_norm_", "AdamW_BF16::update"):
        assert names.count(name) == 1


class OnGPU(torch.nn.Parameter):
    """A parameter that claims to be on a GPU."""

    device = property(lambda self: torch.device("cuda", 1))


@pytest.mark.parametrize(
    ("lr", "found"),
    [
        (torch.tensor(0.1), "torch.float32 on cpu"),
        (torch.tensor(0.1, dtype=torch.bfloat16), "torch.bfloat16 on cpu"),
        (None, "a number"),
    ],
)
def test_capturable_needs_lr_on_the_parameters_device(lr, found):
    param = OnGPU(torch.ones(3, dtype=torch.bfloat16))
    on_cpu = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    message = (
        r"^capturable=True needs lr as a float32 or float64 tensor on cuda:1, "
        rf".* but lr is {found}; pass lr=torch\.tensor"
    )
    if lr is not None:
        with pytest.raises(ValueError, match=message):
            AdamW_BF16([param], lr=lr, capturable=True)
        AdamW_BF16([param], lr=lr)
    optimizer = AdamW_BF16([on_cpu], lr=torch.tensor(0.1), capturable=True)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [param], "lr": 0.1 if lr is None else lr})
    assert len(optimizer.param_groups) == 1
