"""AdamW_BF16(step_in_backward=True) in one process: the bits of ``step()`` in less memory."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from small_optimizers import BF16, equal, snapshot
from torch import nn
from torch.utils.checkpoint import checkpoint

from sharded_bf16_adamw import LR, AdamW_BF16, step_in_backward

WIDTH = 16
BATCHES = (1, 3 * 2 * WIDTH * WIDTH, 2**20)  # one parameter, three weights, everything
SECOND = r"got a second gradient before step\(\)"
HALF_A_STEP = r"between a backward pass that has updated parameters and step\(\)"
FAILED = r"after a backward pass that raised when \d+ of \d+ parameters were updated"


@pytest.fixture(params=BATCHES)
def batch_bytes(request, monkeypatch):
    monkeypatch.setattr(step_in_backward, "BATCH_BYTES", request.param)
    return request.param


@pytest.fixture
def one_each(monkeypatch):
    monkeypatch.setattr(step_in_backward, "BATCH_BYTES", 1)


def make_layers(count=4):
    torch.manual_seed(0)
    return nn.Sequential(
        *[nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(count)]
    ).to(BF16)


def make_input(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, WIDTH, generator=generator).to(BF16)


def make_optimizer(params, in_backward=True, **more):
    more.setdefault("lr_function", None if "lr" in more else LR(lr=1e-2, preheat_steps=3))
    return AdamW_BF16(params, step_in_backward=in_backward, **more)


class Tied(nn.Module):
    """An embedding that is also the head, and a layer that is called twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(WIDTH, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = self.embedding.weight
        self.unused = nn.Linear(3, 3)
        self.to(BF16)

    def forward(self, x):
        hidden = self.layer(torch.tanh(self.layer(self.embedding(x.argmax(-1)))))
        return self.head(hidden) + self.head.weight.square().sum()


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant, times=1):
        super().__init__()
        self.layers = make_layers()
        self.options = {"use_reentrant": use_reentrant}
        self.times = times

    def forward(self, x):
        x = x.requires_grad_()
        for layer in self.layers:
            for _ in range(self.times):
                x = checkpoint(layer, x, **self.options)
        return x


class Mixed(nn.Module):
    """Parameters of both dtypes, one of no element, one 0-dim, one with strides of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = make_layers(2)
        self.single = nn.Linear(WIDTH, 5)
        self.empty = nn.Parameter(torch.zeros(0, 3, dtype=BF16))
        self.scalar = nn.Parameter(torch.ones((), dtype=BF16))
        self.transposed = nn.Parameter(torch.randn(7, WIDTH).to(BF16).t())

    def forward(self, x):
        x = self.layers(x) * self.scalar
        return self.single(x.float()).sum() + (x @ self.transposed).sum() + self.empty.sum()


MODELS = {
    "layers": make_layers,
    "tied": Tied,
    "mixed": Mixed,
    "lstm": lambda: nn.LSTM(WIDTH, WIDTH, num_layers=2).to(BF16),
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, 5).to(BF16)),
    "encoder": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 32, 0.0).to(BF16),
    "checkpoint": lambda: Checkpointed(use_reentrant=False, times=2),
    "reentrant checkpoint": lambda: Checkpointed(use_reentrant=True),
    "compiled eager": lambda: torch.compile(make_layers(), backend="eager"),
    "compiled aot_eager": lambda: torch.compile(make_layers(), backend="aot_eager"),
}


def loss_of(output):
    output = output[0] if isinstance(output, tuple) else output
    return output.float().square().mean()


def run(make_model, in_backward, micro_batches=1, steps=4, groups=1, **backward_options):
    torch.manual_seed(0)
    model = make_model()
    params = list(model.parameters())
    optimizer = make_optimizer(
        [
            {"params": params[index::groups], "weight_decay": 0.1 * index, "betas": (0.8, 0.95)}
            for index in range(groups)
        ],
        in_backward,
    )
    for step in range(steps):
        for micro in range(micro_batches - 1):
            with optimizer.accumulate():
                loss_of(model(make_input(100 * step + micro))).backward(**backward_options)
        loss_of(model(make_input(100 * step + 99))).backward(**backward_options)
        if in_backward:
            assert all(param.grad is None for param in params)
        optimizer.step(zero_grad=True)
    return snapshot(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])


class TestBits:
    @pytest.mark.parametrize("name", MODELS)
    def test_are_those_of_step(self, name, one_each):
        (plain, groups), (ours, our_groups) = [run(MODELS[name], flag) for flag in (False, True)]
        assert equal(plain, ours) and groups == our_groups
        assert our_groups[0]["schedule_step"] == 4

    @pytest.mark.parametrize("groups", [1, 3])
    @pytest.mark.parametrize("micro_batches", [1, 3])
    def test_with_groups_micro_batches_and_batches(self, micro_batches, groups, batch_bytes):
        plain, ours = [
            run(make_layers, flag, micro_batches, groups=groups) for flag in (False, True)
        ]
        assert equal(plain[0], ours[0]) and plain[1] == ours[1]

    def test_with_create_graph(self, one_each):
        plain, ours = [run(make_layers, flag, create_graph=True) for flag in (False, True)]
        assert equal(plain[0], ours[0])

    @pytest.mark.parametrize("in_backward", [True, False])
    def test_a_learning_rate_of_torchs_scheduler(self, in_backward):
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


def test_a_schedule_is_read_once_a_step(one_each):
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


def test_a_closure(one_each):
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


def test_a_step_without_the_option_has_no_hooks():
    model = make_layers()
    AdamW_BF16(model.parameters())
    assert not any(param._post_accumulate_grad_hooks for param in model.parameters())


class TestMemory:
    @pytest.mark.parametrize("weights_a_batch", [1, 4])
    def test_gradients_alive_are_those_of_one_batch(self, weights_a_batch, monkeypatch):
        model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(32)]).to(BF16)
        params = list(model.parameters())
        size = params[0].nbytes
        monkeypatch.setattr(step_in_backward, "BATCH_BYTES", weights_a_batch * size)
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
        assert 8 < (weights + states + max(peaks)) / numel < 8.3  # with all gradients: 10

    def test_small_parameters_share_launches(self, monkeypatch):
        model = make_layers(8)
        optimizer = make_optimizer(model.parameters())
        sizes = []
        update = step_in_backward.StepPlan.update_

        def count(plan, grads, *args, **more):
            sizes.append(len(grads))
            update(plan, grads, *args, **more)

        monkeypatch.setattr(step_in_backward.StepPlan, "update_", count)
        for _ in range(2):
            loss_of(model(make_input(0))).backward()
            optimizer.step()
        assert sizes == [16, 16]

    def test_plans_are_kept_between_steps(self, one_each):
        model = make_layers()
        optimizer = make_optimizer(model.parameters())
        plans = []
        for step in range(3):
            loss_of(model(make_input(step))).backward()
            optimizer.step()
            plans.append([plan for plan, _ in optimizer._in_backward._plans.values()])
        assert len(plans[0]) == 8 and plans[0] == plans[1] == plans[2]

    def test_an_optimizer_that_is_dropped_takes_its_hooks_with_it(self):
        model = make_layers()
        optimizer = make_optimizer(model.parameters())
        ref = weakref.ref(optimizer)
        loss_of(model(make_input(0))).backward()
        optimizer.step()
        del optimizer
        gc.collect()
        assert ref() is None
        assert not any(param._post_accumulate_grad_hooks for param in model.parameters())


class TestSecondGradient:
    """Trap: several backward passes before a step would take several steps."""

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

    def test_losses_of_disjoint_parameters_may_follow_each_other(self, one_each):
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
    """Trap: a weight that the backward pass has yet to read when it is updated."""

    def test_a_detached_use_raises_autograds_error(self, one_each):
        weight, other = [nn.Parameter(torch.ones(3, 3, dtype=BF16)) for _ in range(2)]
        optimizer = make_optimizer([weight, other])
        hidden = (torch.ones(3, 3, dtype=BF16) @ other) @ weight.detach()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (hidden @ weight).sum().backward()
        with pytest.raises(RuntimeError, match=FAILED):
            optimizer.step()

    def test_a_second_pass_over_a_retained_graph_raises(self, one_each):
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
    def test_is_refused_until_the_step_is_abandoned(self, one_each):
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

    def test_of_a_gradient_that_cannot_be_used_updates_nothing(self, one_each):
        embedding = nn.Embedding(5, 4, sparse=True, dtype=BF16)
        optimizer = make_optimizer(embedding.named_parameters())
        with pytest.raises(RuntimeError, match="sparse gradients, but parameter 'weight' has one"):
            embedding(torch.tensor([1])).sum().backward()
        assert not optimizer.state

    def test_of_a_state_that_no_longer_fits(self, one_each):
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


class TestWhatNoHookSees:
    def compare(self, act, steps=3, make_model=make_layers):
        """``act(model, optimizer, step)`` runs a backward pass of its own making."""
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

    def test_autograd_grad_and_gradients_by_hand(self, one_each):
        def act(model, optimizer, step):
            params = list(model.parameters())
            grads = torch.autograd.grad(loss_of(model(make_input(step))), params)
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad

        self.compare(act)

    def test_some_gradients_by_hand_and_the_rest_by_backward(self, one_each):
        def act(model, optimizer, step):
            loss_of(model[2:](make_input(step))).backward()
            for param in model[:2].parameters():
                param.grad = torch.full_like(param, 0.1)

        self.compare(act)

    def test_frozen_and_unfrozen_parameters(self, one_each):
        def act(model, optimizer, step):
            model[1].requires_grad_(step not in (0, 3))
            loss_of(model(make_input(step))).backward()

        self.compare(act, steps=6)

    def test_a_thawed_parameter_is_hooked_from_the_next_step_on(self):
        model = make_layers()
        model[1].requires_grad_(False)
        optimizer = make_optimizer(model.parameters())
        model[1].requires_grad_(True)
        left = []
        for step in range(2):
            loss_of(model(make_input(step))).backward()
            left.append(sum(param.grad is not None for param in model.parameters()))
            optimizer.step(zero_grad=True)
        assert left == [2, 0]

    def test_groups_added_later(self, one_each):
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

    def test_a_parameter_taken_out_of_its_group_is_left_alone(self, one_each):
        model = make_layers()
        optimizer = make_optimizer(model.parameters())
        removed = optimizer.param_groups[0]["params"].pop(0)
        before = removed.detach().clone()
        loss_of(model(make_input(0))).backward()
        optimizer.step()
        assert torch.equal(removed, before) and removed.grad is not None
        removed.sum().backward()
        optimizer.state_dict()  # no step has begun

    def test_a_hook_of_the_user_comes_before_if_it_was_registered_before(self, one_each):
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
        "duplicate", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))]
    )
    def test_have_hooks_of_their_own(self, duplicate, one_each):
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

    def test_a_newer_optimizer_takes_the_gradients(self, one_each):
        model = make_layers()
        older = make_optimizer(model.parameters())
        newer = make_optimizer(model.parameters())
        loss_of(model(make_input(0))).backward()
        older.step()
        newer.step()
        assert not older.state and len(newer.state) == 8

    def test_load_state_dict_between_steps(self, one_each):
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
