"""AdamW_BF16(step_in_backward=True) in one process: the bits of ``step()`` in less memory."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from small_optimizers import BF16, equal, snapshot
from step_in_backward_cases import MODELS, loss_of, make_input, make_layers, make_optimizer, run
from torch import nn

from sharded_bf16_adamw import AdamW_BF16
from sharded_bf16_adamw.step_in_backward import batch
from sharded_bf16_adamw.step_plan import StepPlan


class TestSameBitsAsStep:
    @pytest.mark.parametrize("name", MODELS)
    def test_models(self, name, update_each_param_alone):
        (plain, groups), (ours, our_groups) = [run(MODELS[name], flag) for flag in (False, True)]
        assert equal(plain, ours) and groups == our_groups
        assert our_groups[0]["schedule_step"] == 4

    @pytest.mark.parametrize(  # all pairs of values
        ("micro_batches", "groups", "batch_bytes"),
        [
            (1, 1, 1),
            (3, 3, 1),
            (1, 3, 3 * 2 * 16 * 16),
            (3, 1, 3 * 2 * 16 * 16),
            (1, 1, 2**20),
            (3, 3, 2**20),
        ],
        indirect=["batch_bytes"],
    )
    def test_groups_micro_batches_and_batch_bytes(self, micro_batches, groups, batch_bytes):
        plain, ours = [
            run(make_layers, flag, micro_batches, groups=groups) for flag in (False, True)
        ]
        assert equal(plain[0], ours[0]) and plain[1] == ours[1]

    def test_with_create_graph(self, update_each_param_alone):
        plain, ours = [run(make_layers, flag, create_graph=True) for flag in (False, True)]
        assert equal(plain[0], ours[0])

    @pytest.mark.parametrize("in_backward", [True, False])
    def test_lr_scheduler_of_torch(self, in_backward):
        model = make_layers()
        optimizer = make_optimizer(model.parameters(), in_backward, lr=1e-2)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        alone = [nn.Parameter(param.detach().clone()) for param in model.parameters()]
        reference = AdamW_BF16(alone, lr=1e-2)
        for step in range(3):
            copied = copy.deepcopy(model)
            loss_of(copied(make_input(step))).backward()
            for param, other in zip(alone, copied.parameters(), strict=True):
                param.grad = other.grad
            reference.param_groups[0]["lr"] = 1e-2 * 0.5**step
            reference.step()
            loss_of(model(make_input(step))).backward()
            optimizer.step(zero_grad=True)
            scheduler.step()
            assert equal(snapshot(optimizer), snapshot(reference))


def test_lr_function_is_called_once_per_step(update_each_param_alone):
    asked = []

    def schedule(step):
        asked.append(step)
        return 1e-3 * len(asked)

    model = make_layers()
    optimizer = make_optimizer(model.parameters(), lr_function=schedule)
    asked.clear()
    for step in range(3):
        loss_of(model(make_input(step))).backward()
        assert asked == list(range(step + 1))
        optimizer.step()
    assert asked == [0, 1, 2]


def test_a_closure(update_each_param_alone):
    plain, ours = [], []
    for in_backward, result in ((False, plain), (True, ours)):
        model = make_layers()
        optimizer = make_optimizer(model.parameters(), in_backward)
        for step in range(3):

            def closure(step=step, model=model, optimizer=optimizer):
                optimizer.zero_grad()
                loss = loss_of(model(make_input(step)))
                loss.backward()
                return loss

            result.append(optimizer.step(closure))
        result += snapshot(optimizer)
    assert torch.equal(torch.stack(plain[:3]), torch.stack(ours[:3]))
    assert equal(plain[3:], ours[3:])


def test_no_hooks_without_the_option():
    model = make_layers()
    AdamW_BF16(model.parameters())
    assert not any(param._post_accumulate_grad_hooks for param in model.parameters())


class TestMemory:
    @pytest.mark.parametrize("weights_a_batch", [1, 4])
    def test_gradients_alive_are_those_of_one_batch(self, weights_a_batch, monkeypatch):
        model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(32)]).to(BF16)
        params = list(model.parameters())
        size = params[0].nbytes
        monkeypatch.setattr(batch, "BATCH_BYTES", weights_a_batch * size)
        refs, peaks = [], []

        def watch(param):
            refs.append(weakref.ref(param.grad))
            peaks.append(sum(grad.nbytes for ref in refs if (grad := ref()) is not None))

        for param in params:
            param.register_post_accumulate_grad_hook(watch)
        optimizer = make_optimizer(params)
        for _ in range(2):
            loss_of(model(torch.randn(2, 64).to(BF16))).backward()
            assert all(ref() is None for ref in refs)
            optimizer.step()
        assert max(peaks) == weights_a_batch * size
        states = sum(value.nbytes for p in params for value in optimizer.state[p].values())
        weights = sum(param.nbytes for param in params)
        numel = sum(param.numel() for param in params)
        assert 8 < (weights + states + max(peaks)) / numel < 8.3  # 10 if all gradients were alive

    def test_small_parameters_share_launches(self, monkeypatch):
        model = make_layers(8)
        optimizer = make_optimizer(model.parameters())
        sizes = []
        update = StepPlan.update_

        def count(plan, grads, *args, **more):
            sizes.append(len(grads))
            update(plan, grads, *args, **more)

        monkeypatch.setattr(StepPlan, "update_", count)
        for _ in range(2):
            loss_of(model(make_input(0))).backward()
            optimizer.step()
        assert sizes == [16, 16]

    def test_plans_are_kept_between_steps(self, update_each_param_alone):
        model = make_layers()
        optimizer = make_optimizer(model.parameters())
        plans = []
        for step in range(3):
            loss_of(model(make_input(step))).backward()
            optimizer.step()
            plans.append([plan for plan, _ in optimizer._in_backward._plans.values()])
        assert len(plans[0]) == 8 and plans[0] == plans[1] == plans[2]

    def test_deleting_the_optimizer_removes_its_hooks(self):
        model = make_layers()
        optimizer = make_optimizer(model.parameters())
        ref = weakref.ref(optimizer)
        loss_of(model(make_input(0))).backward()
        optimizer.step()
        del optimizer
        gc.collect()
        assert ref() is None
        assert not any(param._post_accumulate_grad_hooks for param in model.parameters())


class TestHookCoverage:
    def compare(self, act, steps=3, make_model=make_layers):
        """Compare with the plain step; ``act(model, optimizer, step)`` makes the gradients."""
        results = []
        for in_backward in (False, True):
            model = make_model()
            optimizer = make_optimizer(model.parameters(), in_backward)
            for step in range(steps):
                act(model, optimizer, step)
                optimizer.step(zero_grad=True)
            params = [p for group in optimizer.param_groups for p in group["params"]]
            results.append([[p.detach().clone(), *optimizer.state[p].values()] for p in params])
        assert equal(*results)

    def test_autograd_grad_and_gradients_by_hand(self, update_each_param_alone):
        def act(model, optimizer, step):
            params = list(model.parameters())
            grads = torch.autograd.grad(loss_of(model(make_input(step))), params)
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad

        self.compare(act)

    def test_some_gradients_by_hand_and_the_rest_by_backward(self, update_each_param_alone):
        def act(model, optimizer, step):
            loss_of(model[2:](make_input(step))).backward()
            for param in model[:2].parameters():
                param.grad = torch.full_like(param, 0.1)

        self.compare(act)

    def test_frozen_and_unfrozen_parameters(self, update_each_param_alone):
        def act(model, optimizer, step):
            model[1].requires_grad_(step not in (0, 3))
            loss_of(model(make_input(step))).backward()

        self.compare(act, steps=6)

    def test_unfrozen_parameter_is_hooked_from_the_next_step_on(self):
        model = make_layers()
        model[1].requires_grad_(False)
        optimizer = make_optimizer(model.parameters())
        model[1].requires_grad_(True)
        num_unhooked = []
        for step in range(2):
            loss_of(model(make_input(step))).backward()
            num_unhooked.append(sum(param.grad is not None for param in model.parameters()))
            optimizer.step(zero_grad=True)
        assert num_unhooked == [2, 0]

    def test_groups_added_later(self, update_each_param_alone):
        def act(model, optimizer, step):
            if step == 2:
                optimizer.add_param_group(
                    {"params": list(model.late.parameters()), "weight_decay": 0.3}
                )
            x = make_input(step)
            loss_of(model(x) + (model.late(x) if step >= 2 else 0)).backward()
            if optimizer._in_backward is not None:
                assert all(p.grad is None for p in model.late.parameters())

        class Late(nn.Module):
            def __init__(self):
                super().__init__()
                self.early = make_layers()
                object.__setattr__(self, "late", make_layers(2))

            def forward(self, x):
                return self.early(x)

        self.compare(act, steps=4, make_model=Late)

    def test_parameter_removed_from_its_group_is_not_updated(self, update_each_param_alone):
        model = make_layers()
        optimizer = make_optimizer(model.parameters())
        removed = optimizer.param_groups[0]["params"].pop(0)
        before = removed.detach().clone()
        loss_of(model(make_input(0))).backward()
        optimizer.step()
        assert torch.equal(removed, before) and removed.grad is not None
        removed.sum().backward()
        optimizer.state_dict()  # does not raise, since that gradient has started no step

    def test_user_hook_registered_earlier_runs_first(self, update_each_param_alone):
        def halve(param):
            param.grad.mul_(0.5)

        def make_model():
            model = make_layers()
            for param in model.parameters():
                param.register_post_accumulate_grad_hook(halve)
            return model

        plain, ours = [run(make_model, flag) for flag in (False, True)]
        assert equal(plain[0], ours[0])


class TestCopies:
    @pytest.mark.parametrize(
        "duplicate",
        [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))],
        ids=["deepcopy", "pickle"],
    )
    def test_have_hooks_of_their_own(self, duplicate, update_each_param_alone):
        model = make_layers()
        optimizer = AdamW_BF16(model.parameters(), lr=1e-2, step_in_backward=True)
        loss_of(model(make_input(0))).backward()
        optimizer.step()
        other, its_optimizer = duplicate((model, optimizer))
        before = snapshot(optimizer)
        loss_of(other(make_input(1))).backward()
        assert all(param.grad is None for param in other.parameters())
        its_optimizer.step()
        assert equal(before, snapshot(optimizer))
        loss_of(model(make_input(1))).backward()
        optimizer.step()
        assert equal(snapshot(its_optimizer), snapshot(optimizer))

    def test_of_the_model_alone_have_none(self):
        model = make_layers()
        optimizer = make_optimizer(model.parameters())
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            loss_of(other(make_input(0))).backward()
            assert all(param.grad is not None for param in other.parameters())
        assert not optimizer.state


def test_a_newer_optimizer_takes_the_gradients(update_each_param_alone):
    model = make_layers()
    older = make_optimizer(model.parameters())
    newer = make_optimizer(model.parameters())
    loss_of(model(make_input(0))).backward()
    older.step()
    newer.step()
    assert not older.state and len(newer.state) == 8


def test_load_state_dict_between_steps(update_each_param_alone):
    model = make_layers()
    optimizer = make_optimizer(model.parameters())
    other = make_layers()
    reference = make_optimizer(other.parameters(), False)
    for some, each in ((model, optimizer), (other, reference)):
        for step in range(4):
            loss_of(some(make_input(step))).backward()
            each.step(zero_grad=True)
            each.load_state_dict(copy.deepcopy(each.state_dict()))
    assert equal(snapshot(optimizer), snapshot(reference))
