"""Misuse of ``step_in_backward`` and failed backward passes raise errors that say what to do."""

import copy

import pytest
import torch
from small_optimizers import BF16, equal, snapshot
from step_in_backward_cases import Checkpointed, loss_of, make_input, make_layers, make_optimizer
from torch import nn

from sharded_bf16_adamw import AdamW_BF16

SECOND = r"got a second gradient before step\(\)"
HALF_A_STEP = r"between a backward pass that has updated parameters and step\(\)"
FAILED = r"after a backward pass that raised when \d+ of \d+ parameters were updated"


class TestSecondGradient:
    """Several backward passes before ``step()`` would update parameters several times."""

    def test_raises_before_anything_is_updated_again(self, batch_bytes):
        model = make_layers()
        optimizer = make_optimizer(model.parameters())
        loss_of(model(make_input(0))).backward()
        before = snapshot(optimizer)
        with pytest.raises(RuntimeError, match=SECOND):
            loss_of(model(make_input(1))).backward()
        assert equal(before, snapshot(optimizer))
        with pytest.raises(RuntimeError, match=FAILED):
            optimizer.step()

    def test_of_a_weight_used_twice_under_reentrant_checkpointing_raises(self, batch_bytes):
        model = Checkpointed(use_reentrant=True, times=2)
        optimizer = make_optimizer(model.parameters())
        with pytest.raises(RuntimeError, match=SECOND + ".* pass use_reentrant=False"):
            loss_of(model(make_input(0))).backward()
        with pytest.raises(RuntimeError, match=FAILED):
            optimizer.step()

    def test_losses_of_disjoint_parameters_may_follow_each_other(self, update_each_param_alone):
        models = [make_layers(2), make_layers(3)]
        optimizer = make_optimizer([p for model in models for p in model.parameters()])
        copies = copy.deepcopy(models)
        plain = make_optimizer([p for model in copies for p in model.parameters()], False)
        for some, each in ((models, optimizer), (copies, plain)):
            for model in some:
                loss_of(model(make_input(0))).backward()
            each.step()
        assert equal(snapshot(optimizer), snapshot(plain))

    def test_accumulate_after_an_update_is_refused(self):
        model = make_layers()
        optimizer = make_optimizer(model.parameters())
        loss_of(model(make_input(0))).backward()
        with pytest.raises(RuntimeError, match=HALF_A_STEP), optimizer.accumulate():
            pass
        optimizer.step()
        with optimizer.accumulate():
            loss_of(model(make_input(0))).backward()
        assert all(param.grad is not None for param in model.parameters())

    def test_given_by_hand_to_an_updated_parameter_is_refused_by_step(self):
        model = make_layers()
        optimizer = make_optimizer(model.parameters())
        loss_of(model(make_input(0))).backward()
        before = snapshot(optimizer)
        weight = next(model.parameters())
        weight.grad = torch.ones_like(weight)
        with pytest.raises(RuntimeError, match=r"was updated in the backward pass and has another"):
            optimizer.step()
        assert equal(before, snapshot(optimizer))
        weight.grad = None
        optimizer.step()
        assert optimizer.param_groups[0]["schedule_step"] == 1


class TestUpstreamOfItself:
    """The backward pass must not update a weight that it has yet to read."""

    def test_a_detached_use_raises_autograds_error(self, update_each_param_alone):
        weight, other = [nn.Parameter(torch.ones(3, 3, dtype=BF16)) for _ in range(2)]
        optimizer = make_optimizer([weight, other])
        hidden = (torch.ones(3, 3, dtype=BF16) @ other) @ weight.detach()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (hidden @ weight).sum().backward()
        with pytest.raises(RuntimeError, match=FAILED):
            optimizer.step()

    def test_a_second_pass_over_a_retained_graph_raises(self, update_each_param_alone):
        model = make_layers()
        optimizer = make_optimizer(model.parameters())
        loss = loss_of(model(make_input(0)))
        loss.backward(retain_graph=True)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise MemoryError("in the middle of backward")


def fail_in_backward(model, seed):
    hidden = model[:2](make_input(seed))
    with pytest.raises(MemoryError):
        loss_of(model[2:](Failing.apply(hidden))).backward()


class TestFailure:
    def test_is_refused_until_the_step_is_abandoned(self, update_each_param_alone):
        model = make_layers()
        optimizer = make_optimizer(model.parameters())
        loss_of(model(make_input(0))).backward()
        optimizer.step()
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        good = snapshot(optimizer)
        fail_in_backward(model, 1)
        assert not equal(good, snapshot(optimizer))
        for refused in (
            optimizer.step,
            optimizer.zero_grad,
            optimizer.state_dict,
            lambda: optimizer.load_state_dict(saved[1]),
            lambda: list(optimizer.true_weights()),
        ):
            with pytest.raises(RuntimeError, match=FAILED + r".*abandon_step\(\), then load"):
                refused()
        optimizer.abandon_step()
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        assert equal(good, snapshot(optimizer))
        loss_of(model(make_input(1))).backward()
        optimizer.step()

        other = make_layers()
        reference = make_optimizer(other.parameters(), False)
        for seed in range(2):
            loss_of(other(make_input(seed))).backward()
            reference.step(zero_grad=True)
        assert equal(snapshot(reference), snapshot(optimizer))

    def test_before_any_update_needs_zero_grad_alone(self):
        model = make_layers()
        optimizer = make_optimizer(model.parameters())
        fail_in_backward(model, 0)
        with pytest.raises(RuntimeError, match=r"raised before any parameter was updated; call ze"):
            optimizer.step()
        optimizer.zero_grad()
        loss_of(model(make_input(1))).backward()
        optimizer.step()
        other = make_layers()
        reference = make_optimizer(other.parameters(), False)
        loss_of(other(make_input(1))).backward()
        reference.step()
        assert equal(snapshot(reference), snapshot(optimizer))

    def test_of_a_schedule_leaves_everything_as_it_was(self):
        model = make_layers()
        optimizer = make_optimizer(model.parameters(), lr_function=lambda step: -step)
        loss_of(model(make_input(0))).backward()
        optimizer.step()
        before = snapshot(optimizer)
        with pytest.raises(ValueError, match=r"invalid learning rate: lr_function\(1\) is -1"):
            loss_of(model(make_input(1))).backward()
        assert equal(before, snapshot(optimizer))

    def test_of_a_gradient_that_cannot_be_used_updates_nothing(self, update_each_param_alone):
        embedding = nn.Embedding(5, 4, sparse=True, dtype=BF16)
        optimizer = make_optimizer(embedding.named_parameters())
        with pytest.raises(RuntimeError, match="sparse gradients, but parameter 'weight' has one"):
            embedding(torch.tensor([1])).sum().backward()
        assert not optimizer.state

    def test_of_a_state_that_no_longer_fits(self, update_each_param_alone):
        model = make_layers()
        optimizer = make_optimizer(model.named_parameters())
        loss_of(model(make_input(0))).backward()
        optimizer.step()
        bias = model[0][0].bias
        optimizer.state[bias] = {**optimizer.state[bias], "exp_avg": torch.zeros(3, dtype=BF16)}
        with pytest.raises(
            RuntimeError, match=r"'0.0.bias' has local shape \(16,\) but its exp_avg"
        ):
            loss_of(model(make_input(0))).backward()
        with pytest.raises(RuntimeError, match=FAILED):
            optimizer.step()


class TestWithinAStep:
    @pytest.mark.parametrize(
        ("name", "call"),
        {
            "zero_grad": lambda model, optimizer: optimizer.zero_grad(),
            "state_dict": lambda model, optimizer: optimizer.state_dict(),
            "load_state_dict": lambda model, optimizer: optimizer.load_state_dict({}),
            "true_weights": lambda model, optimizer: next(optimizer.true_weights()),
            "check_replicas": lambda model, optimizer: optimizer.check_replicas(),
            "copy": lambda model, optimizer: copy.deepcopy(optimizer),
            "add_param_group": lambda model, optimizer: optimizer.add_param_group(
                {"params": [nn.Parameter(torch.zeros(1, dtype=BF16))]}
            ),
        }.items(),
    )
    def test_what_would_see_half_a_step_raises(self, name, call):
        model = make_layers()
        optimizer = make_optimizer(model.parameters())
        optimizer.zero_grad()
        loss_of(model(make_input(0))).backward()
        before = snapshot(optimizer)
        with pytest.raises(RuntimeError, match=f"{name}.* {HALF_A_STEP}, .* call step"):
            call(model, optimizer)
        assert equal(before, snapshot(optimizer))
        optimizer.step()
        if name != "load_state_dict":
            call(model, optimizer)

    def test_a_changed_learning_rate_is_refused_by_step(self):
        model = make_layers()
        optimizer = make_optimizer(model.parameters(), lr=1e-2)
        loss_of(model(make_input(0))).backward()
        optimizer.param_groups[0]["lr"] = 1e-3
        with pytest.raises(RuntimeError, match="hyper-parameters in param_groups were changed"):
            optimizer.step()
        optimizer.param_groups[0]["lr"] = 1e-2
        optimizer.step()

    def test_gradients_in_a_batch_can_be_discarded(self):
        """FSDP2 calls a hook outside a backward pass in pipeline schedules."""
        weight = nn.Parameter(torch.ones(3, dtype=BF16))
        optimizer = make_optimizer([weight])
        for hook in weight._post_accumulate_grad_hooks.values():
            weight.grad = torch.ones_like(weight)
            hook(weight)
        assert weight.grad is None and torch.equal(weight, torch.ones_like(weight))
        optimizer.zero_grad()
        optimizer.step()
        assert torch.equal(weight, torch.ones_like(weight))
        for hook in weight._post_accumulate_grad_hooks.values():
            weight.grad = torch.ones_like(weight)
            hook(weight)
        optimizer.step()
        assert not torch.equal(weight, torch.ones_like(weight))


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"skip_nonfinite": True}, "skip_nonfinite=True are both given; the last gradient can"),
            (
                {"capturable": True, "lr": torch.tensor(0.1)},
                "capturable=True and step_in_backward=True are both given; the hooks read",
            ),
        ],
    )
    def test_options(self, options, sentence):
        with pytest.raises(ValueError, match=sentence):
            AdamW_BF16(make_layers().parameters(), step_in_backward=True, **options)

    def test_clipping(self):
        optimizer = make_optimizer(make_layers().parameters())
        with pytest.raises(
            RuntimeError, match=r"clip_grad_norm_\(\) needs all gradients before an"
        ):
            optimizer.clip_grad_norm_(1.0)

    def test_compiled_autograd(self):
        model = make_layers()
        optimizer = make_optimizer(model.parameters())
        compiler = torch.compile(backend="eager")
        with (
            torch._dynamo.compiled_autograd._enable(compiler),
            pytest.raises(RuntimeError, match="compiled autograd runs this backward pass"),
        ):
            loss_of(model(make_input(0))).backward()
        assert not optimizer.state
