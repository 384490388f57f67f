"""Whatever a training loop does, ZeRO does as one process would: each scenario is run on both and compared bit for bit."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from torch import nn
from torch.distributed.tensor import DTensor

from sharded_bf16_adamw import AdamW_BF16

from .zero_cases import SHAPES, Parameters, assert_same_bits, collect, new_optimizer, patience, rank_gradients, traffic, train, zero

ALL = frozenset(SHAPES)


class Loop:
    """A model, an optimizer and backward passes: on one process the gradients of all ``ranks`` averaged, else those of this rank."""

    def __init__(self, ranks, options=None):
        self.ranks = ranks
        self.alone = options is None
        self.model = Parameters()
        self.optimizer = new_optimizer(self.model, None if options is None else zero(**options), skip_nonfinite=True)

    def backward(self, step, names_of=lambda rank: ALL):
        """``names_of(rank)``: the parameters that the rank uses."""
        if self.alone:
            used = frozenset().union(*(names_of(rank) for rank in range(self.ranks)))
            contributions = [{name: grad for name, grad in self._grads(step, rank) if name in names_of(rank)} for rank in range(self.ranks)]
            sums = {name: sum(each[name].double() for each in contributions if name in each) for name in ALL if name in used}
            self.run({name: (total / self.ranks).to(self.model.get_parameter(name).dtype) for name, total in sums.items()})
        else:
            self.run({name: grad for name, grad in self._grads(step, dist.get_rank()) if name in names_of(dist.get_rank())})

    def run(self, grads):
        if any(self.model.get_parameter(name).requires_grad for name in grads):
            self.model(grads).backward()

    def _grads(self, step, rank):
        return rank_gradients(step, rank, self.ranks).items()

    def no_sync(self):
        return contextlib.nullcontext() if self.alone else self.optimizer.no_sync()

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()


def unused_on_some_ranks(loop):
    for step in range(6):
        loop.backward(step, lambda rank: ALL - {"even", "large"} if rank == 0 else {"even", "scalar", "uneven"})
        loop.step()


def unused_on_changing_ranks(loop):
    for step in range(8):
        loop.backward(step, lambda rank, step=step: {name for i, name in enumerate(SHAPES) if (i + rank + step) % 3})
        loop.step()


def unused_everywhere_for_a_while(loop):
    for step in range(9):
        loop.backward(step, lambda rank, step=step: ALL - {"conv", "fp32", "wide"} if 2 <= step < 7 else ALL)
        loop.step()


def a_rank_without_any_gradient(loop):
    for step in range(4):
        loop.backward(step, lambda rank, step=step: ALL if rank == step % loop.ranks else frozenset())
        loop.step()


def several_backwards(loop):
    for step in range(4):
        for micro in range(3):
            loop.backward(7 * step + micro)
        loop.step()


def several_backwards_with_other_uses(loop):
    for step in range(4):
        loop.backward(7 * step, lambda rank: ALL if rank == 0 else {"even", "conv"})
        loop.backward(7 * step + 1, lambda rank: {"uneven", "scalar"} if rank == 0 else ALL - {"conv"})
        loop.step()


def no_sync(loop):
    for step in range(4):
        with loop.no_sync():
            loop.backward(7 * step)
            loop.backward(7 * step + 1, lambda rank: {"even", "fp32", "scalar"} if rank == 0 else ALL)
        loop.backward(7 * step + 2, lambda rank: ALL - {"large", "scalar"})
        loop.step()


def frozen_and_unfrozen(loop):
    loop.model.conv.requires_grad_(False)
    for step in range(9):
        if step in (2, 5):
            loop.model.uneven.requires_grad_(step == 5)
        if step == 4:
            loop.model.conv.requires_grad_(True)
        loop.backward(step)
        loop.step()


def kept_gradients(loop):
    """Without ``zero_grad`` gradients add up, and stay for the next step."""
    for step in range(3):
        loop.backward(step)
        loop.optimizer.step()
    loop.optimizer.step()


def discarded_gradients(loop):
    for step in range(3):
        loop.backward(100 + step, lambda rank: ALL if rank == 0 else {"even"})
        loop.optimizer.zero_grad()
        loop.backward(step)
        loop.step()


def gradients_set_by_hand(loop):
    class Setting:
        def __call__(self, grads):
            for name, grad in grads.items():
                loop.model.get_parameter(name).grad = grad

    loop.run = Setting()
    for step in range(3):
        loop.backward(step, lambda rank: ALL if rank == 0 else {"even", "scalar", "empty"})
        loop.step()


def gradients_that_are_views(loop):
    """Of other strides than their parameters."""

    def run(grads):
        for name, grad in grads.items():
            strided = torch.empty(*grad.shape, 2, dtype=grad.dtype)[..., 0] if grad.dim() else grad
            loop.model.get_parameter(name).grad = strided.copy_(grad)

    loop.run = run
    for step in range(3):
        loop.backward(step)
        loop.step()


def memory_of_parameters_replaced(loop):
    for step in range(4):
        if step == 2:
            for p in loop.model.parameters():
                p.data = p.data.clone()
        loop.backward(step)
        loop.step()


def state_reloaded(loop):
    for step in range(4):
        if step == 2:
            loop.optimizer.load_state_dict(loop.optimizer.state_dict())
        loop.backward(step)
        loop.step()


def clipped_before_and_after_the_last_backward(loop):
    for step in range(3):
        loop.backward(7 * step)
        loop.optimizer.clip_grad_norm_(0.25)
        loop.backward(7 * step + 1)
        loop.optimizer.clip_grad_norm_(0.5)
        loop.step()


def closure(loop):
    for step in range(3):
        loop.optimizer.zero_grad()
        loop.optimizer.step(lambda step=step: loop.backward(step))


SCENARIOS = [
    unused_on_some_ranks,
    unused_on_changing_ranks,
    unused_everywhere_for_a_while,
    a_rank_without_any_gradient,
    several_backwards,
    several_backwards_with_other_uses,
    no_sync,
    frozen_and_unfrozen,
    kept_gradients,
    discarded_gradients,
    gradients_set_by_hand,
    gradients_that_are_views,
    memory_of_parameters_replaced,
    state_reloaded,
    clipped_before_and_after_the_last_backward,
    closure,
]
FP32_SUMS = {"reduce_dtype": torch.float32, "accumulate_dtype": torch.float32}


def scenarios_worker(rank, world, options):
    results = {}
    for scenario in SCENARIOS:
        loop = Loop(world, options)
        try:
            with patience(0.05):  # in some scenarios another rank cannot keep up
                scenario(loop)
        except Exception as error:
            raise AssertionError(scenario.__name__) from error
        results[scenario.__name__] = collect(loop.model, loop.optimizer)
    return results


@pytest.mark.parametrize(("world", "options"), [(2, {}), (4, FP32_SUMS)], ids=str)
def test_every_loop_gives_the_bits_of_one_process(world, options):
    found = run_ranks(world, scenarios_worker, options)
    for scenario in SCENARIOS:
        loop = Loop(world)
        scenario(loop)
        expected = collect(loop.model, loop.optimizer)
        for each in found:
            try:
                assert_same_bits(each[scenario.__name__], expected)
            except AssertionError as error:
                raise AssertionError(scenario.__name__) from error


def fp32_accumulation_worker(rank, world):
    """1 + 8 * 2^-9: bfloat16 drops each of the small ones."""
    expected = torch.full((4,), 1 + 8 * 2.0**-9)
    found = {}
    for name, options in {"bf16": {}, "fp32": {"accumulate_dtype": torch.float32, "reduce_dtype": torch.float32}}.items():
        for syncs in (True, False):
            p = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
            optimizer = AdamW_BF16([p], lr=0.0, betas=(0.0, 0.0), sharding=zero(**options))
            with traffic() as calls:
                for size in [1.0] + 7 * [2.0**-9]:
                    with contextlib.nullcontext() if syncs else optimizer.no_sync():
                        (p * size).sum().backward()
                assert bool(calls) == syncs, "no_sync() sends nothing"
                assert (p.grad is None) == (syncs or name == "fp32")
                (p * 2.0**-9).sum().backward()
            norm = optimizer.clip_grad_norm_(1e9)
            found[name, syncs] = norm.item() == expected.norm().item()
    return found


def test_accumulates_in_float32_if_asked():
    for found in run_ranks(2, fp32_accumulation_worker):
        assert found == {("bf16", True): False, ("bf16", False): False, ("fp32", True): True, ("fp32", False): True}


def nonfinite_worker(rank, world, stage):
    model = Parameters()
    optimizer = new_optimizer(model, zero(stage), skip_nonfinite=True)
    train(model, optimizer, 2, averaged=stage == 1)
    before = collect(model, optimizer)
    for name in ("large", "scalar"):
        bad = torch.zeros_like(model.get_parameter(name))
        if stage == 1 or rank == world - 1:
            bad.view(-1)[-1] = torch.inf
        model({name: bad}).backward()
        optimizer.step(zero_grad=True)
    assert_same_bits(collect(model, optimizer), before)
    return optimizer.skipped_steps


@pytest.mark.parametrize("stage", [1, 2])
def test_one_ranks_infinity_makes_every_rank_skip(stage):
    assert run_ranks(3, nonfinite_worker, stage) == [2, 2, 2]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(12, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.embedding(x))


def tied_worker(rank, world):
    models = [Tied().bfloat16(), Tied().bfloat16()]
    optimizers = [AdamW_BF16(models[0].parameters(), lr=1e-2, sharding=zero()), AdamW_BF16(models[1].parameters(), lr=1e-2)]
    for _ in range(5):
        for model, optimizer in zip(models, optimizers, strict=True):
            model(torch.arange(12)).float().logsumexp(-1).sum().backward()
            optimizer.step(zero_grad=True)
    assert len(optimizers[0].state) == 1
    assert torch.equal(models[0].head.weight, models[1].head.weight)


def test_tied_weights():
    run_ranks(2, tied_worker)


def late_group_worker(rank, world):
    results = []
    for sharding in (zero(), None):
        model = Parameters()
        optimizer = new_optimizer(model, sharding)
        late = nn.Parameter(torch.linspace(-1, 1, 30).bfloat16().view(10, 3))
        for step in range(4):
            model(rank_gradients(step, 0, 1)).backward()
            if step == 2:
                optimizer.add_param_group({"params": [("late", late)], "weight_decay": 0.5})
            (late * 0.5).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            late.grad = None
        results.append([p.detach() for p in (*model.parameters(), late)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_group_added_between_backward_and_step():
    run_ranks(2, late_group_worker)


def one_process_state_worker(rank, world, saved):
    model = Parameters()
    optimizer = new_optimizer(model, zero())
    optimizer.load_state_dict(saved)
    for p in model.parameters():
        assert all(isinstance(value, DTensor) for key, value in optimizer.state[p].items() if key != "step")
    return {key: value for key, value in collect(model, optimizer).items() if "." in key}


def test_loads_the_state_dict_of_one_process():
    model = Parameters()
    optimizer = new_optimizer(model)
    train(model, optimizer, 3, averaged=True)
    expected = {key: value for key, value in collect(model, optimizer).items() if "." in key}
    for found in run_ranks(3, one_process_state_worker, optimizer.state_dict()):
        assert_same_bits(found, expected)


def broadcast_worker(rank, world):
    model = Parameters(seed=rank)
    new_optimizer(model, zero(broadcast_initial=True))
    first = Parameters(seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), first.parameters(), strict=True))


def test_initial_weights_are_broadcast_if_asked():
    run_ranks(3, broadcast_worker)


def true_weights_worker(rank, world):
    model = Parameters()
    optimizer = new_optimizer(model, zero())
    train(model, optimizer, 3, averaged=False)
    for p, weight in optimizer.true_weights():
        correction = optimizer.state[p].get("correction")
        whole = weight.full_tensor()
        assert weight.dtype == torch.float32 and torch.equal(
            whole, p.float() + (0 if correction is None else correction.full_tensor().float())
        )
    optimizer.reset_correction()
    assert all(not weight.full_tensor().sub(p.float()).any() for p, weight in optimizer.true_weights())


def test_true_weights():
    run_ranks(3, true_weights_worker)
