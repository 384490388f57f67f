"""The step inside the backward pass gives the bits of ``step()``, or is refused."""

from __future__ import annotations

import functools
import warnings
import weakref

import pytest
import torch
from bits import same_bits
from distributed import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import sharded_bf16_adamw
from sharded_bf16_adamw import LR, AdamW_BF16
from sharded_bf16_adamw.sharding.dtensor import to_local
from sharded_bf16_adamw.step_in_backward import batch
from sharded_bf16_adamw.step_plan import StepPlan

from .strategy_cases import BY_NAME, CASES, Layers, Wrapped, backward, collect, make_batch

STEPS = 3
SUPPORTED = [case for case in CASES if case.name.startswith(("FSDP2", "HSDP", "tensor parallel"))]
RUNS = [(case.name, 2 if 2 in case.worlds else 4) for case in SUPPORTED]


def make_optimizer(module, in_backward):
    return AdamW_BF16(
        module.parameters(),
        lr_function=LR(lr=1e-2, preheat_steps=5),
        weight_decay=0.1,
        step_in_backward=in_backward,
    )


def train(wrapped, in_backward, exact=True, batch_bytes=2**20):
    original, batch.BATCH_BYTES = batch.BATCH_BYTES, batch_bytes
    try:
        optimizer = make_optimizer(wrapped.module, in_backward)
        for step in range(STEPS):
            backward(wrapped, make_batch(step, exact))
            if in_backward:
                assert all(param.grad is None for param in wrapped.module.parameters())
            optimizer.step(zero_grad=True)
        return collect(wrapped.module, optimizer)
    finally:
        batch.BATCH_BYTES = original


def table_worker(rank, world, name):
    """Return a run with batches of one gradient, and two whose reductions round."""
    wrap = BY_NAME[name].wrap
    exact = train(wrap(Layers(), world), True, batch_bytes=1)
    rounded = [train(wrap(Layers(), world), flag, exact=False) for flag in (False, True)]
    return exact, rounded


@functools.cache
def expected():
    return train(Wrapped(Layers()), False)


@pytest.mark.parametrize(("name", "world"), RUNS)
def test_bits_are_those_of_step(name, world):
    for exact, (plain, in_backward) in run_ranks(world, table_worker, name):
        assert same_bits(exact, expected())
        assert same_bits(in_backward, plain)


# ------------------------------------------------------- layers that feed each other, under FSDP2


def chain(world, layers=8, width=32):
    torch.manual_seed(0)
    model = nn.Sequential(
        *[
            nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
            for _ in range(layers)
        ]
    ).bfloat16()
    mesh = init_device_mesh("cpu", (world,))
    for module in (*model, model):
        fully_shard(module, mesh=mesh)
    return model


def make_input(step, rank, width=32):
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(6, width, generator=generator).bfloat16().requires_grad_()


def chain_worker(rank, world, with_sync):
    """Train on two micro-batches per step; return the results of ``step()`` and of the option."""
    results = []
    for in_backward in (False, True):
        model = chain(world)
        optimizer = make_optimizer(model, in_backward)
        for step in range(STEPS):
            model.set_requires_gradient_sync(with_sync)
            with optimizer.accumulate():
                model(make_input(2 * step, rank)).square().mean().backward()
            model.set_requires_gradient_sync(True)
            model(make_input(2 * step + 1, rank)).square().mean().backward()
            assert not in_backward or all(param.grad is None for param in model.parameters())
            optimizer.step(zero_grad=True)
        results.append(collect(model, optimizer))
    return results


@pytest.mark.parametrize("with_sync", [False, True])
def test_micro_batches(with_sync):
    for plain, in_backward in run_ranks(2, chain_worker, with_sync):
        assert same_bits(plain, in_backward)


class Shared(nn.Module):
    """An embedding that is the head too, and a block that is called twice and checkpointed."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 32)
        self.block = nn.Sequential(nn.Linear(32, 32), nn.Tanh())
        self.unused = nn.Linear(32, 32)
        self.head = nn.Linear(32, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        for _ in range(2):
            hidden = checkpoint(self.block, hidden, use_reentrant=False)
        return self.head(hidden)


def shared_worker(rank, world):
    results = []
    for in_backward in (False, True):
        model = Shared().bfloat16()
        mesh = init_device_mesh("cpu", (world,))
        for module in (model.block, model.unused, model):
            fully_shard(module, mesh=mesh)
        optimizer = make_optimizer(model, in_backward)
        for step in range(STEPS):
            tokens = torch.arange(7) + step + rank
            model(tokens).square().mean().backward()
            assert not in_backward or all(param.grad is None for param in model.parameters())
            optimizer.step(zero_grad=True)
        results.append(collect(model, optimizer))
    return results


def test_weights_that_are_used_several_times():
    for plain, in_backward in run_ranks(2, shared_worker):
        assert same_bits(plain, in_backward)


def memory_worker(rank, world, batch_groups):
    """Return one FSDP group's gradient bytes, the peak bytes alive in each step, and a count.

    The count is the number of updates in the last step.
    """
    model = chain(world)
    alive: dict[int, weakref.ref] = {}
    peaks, updates = [], []
    update = StepPlan.update_

    def count(*args, **more):
        updates[-1] += 1
        update(*args, **more)

    StepPlan.update_ = count

    def watch(param):
        local = param.grad._local_tensor
        alive[id(local)] = weakref.ref(local)
        tensors = [tensor for ref in alive.values() if (tensor := ref()) is not None]
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
        peaks[-1] = max(peaks[-1], sum(storages.values()))

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(watch)
    group = sum(to_local(param).nbytes for param in model[0].parameters())
    batch.BATCH_BYTES = batch_groups * group
    try:
        optimizer = make_optimizer(model, True)
        for step in range(STEPS):
            peaks.append(0)
            updates.append(0)
            model(make_input(step, rank)).square().mean().backward()
            optimizer.step()
    finally:
        batch.BATCH_BYTES = 2**20
        StepPlan.update_ = update
    return group, peaks, updates[-1]


@pytest.mark.parametrize(("batch_groups", "updates"), [(1, 8), (3, 3)])
def test_gradients_alive_are_those_of_one_batch_of_fsdp_groups(batch_groups, updates):
    for group, peaks, count in run_ranks(2, memory_worker, batch_groups):
        assert peaks[0] <= (batch_groups + 1) * group  # the first step learns where groups end
        assert peaks[1:] == [batch_groups * group] * (STEPS - 1)
        assert count == updates


def second_pass_worker(rank, world):
    model = chain(world)
    optimizer = make_optimizer(model, True)
    model(make_input(0, rank)).square().mean().backward()
    before = [to_local(param).clone() for param in model.parameters()]
    with pytest.raises(RuntimeError, match=r"got a second gradient before step\(\)"):
        model(make_input(1, rank)).square().mean().backward()
    assert all(map(torch.equal, before, map(to_local, model.parameters())))
    with pytest.raises(RuntimeError, match=REMEDY):
        optimizer.step()


def test_a_second_backward_pass_raises_before_it_updates_anything():
    run_ranks(2, second_pass_worker)


CAN_RECOVER = hasattr(FSDPModule, "reset_iter_state")  # not in torch 2.11
REMEDY = (
    r"call reset_iter_state\(\) of the root FSDP2 module, optimizer.abandon_step\(\), then load"
    if CAN_RECOVER
    else "FSDP2 of this torch cannot go on after that: restart the processes"
)


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise MemoryError("in the middle of backward")


def one_step(model, optimizer, rank, step):
    model(make_input(step, rank)).square().mean().backward()
    optimizer.step()


def fail_and_recover(root, model, optimizer, rank):
    # between two groups: torch 2.13 keeps the unsharded gradients of a group that fails
    handle = model[2].register_forward_hook(lambda _, args, output: Failing.apply(output))
    loss = model(make_input(1, rank)).square().mean()
    with pytest.raises(MemoryError):
        loss.backward()
    handle.remove()
    for refused in (
        optimizer.step,
        lambda: sharded_bf16_adamw.save(root, 2, model, optimizer),
        lambda: sharded_bf16_adamw.load(root, model, optimizer),
    ):
        with pytest.raises(RuntimeError, match=REMEDY):
            refused()
    if not CAN_RECOVER:
        return
    model.reset_iter_state()
    optimizer.abandon_step()
    sharded_bf16_adamw.load(root, model, optimizer)


def recovery_worker(rank, world, folder):
    """Fail in the middle of a backward pass, load, and end where an undisturbed run does."""
    results = []
    batch.BATCH_BYTES = 1
    for fails in (False, True):
        model = chain(world)
        optimizer = make_optimizer(model, True)
        one_step(model, optimizer, rank, 0)
        sharded_bf16_adamw.save(f"{folder}/{fails}", 1, model, optimizer)
        if fails:
            fail_and_recover(f"{folder}/{fails}", model, optimizer, rank)
            if not CAN_RECOVER:
                return
        one_step(model, optimizer, rank, 1)
        results.append(collect(model, optimizer))
    batch.BATCH_BYTES = 2**20
    assert same_bits(*results)
    model(make_input(0, rank)).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"between a backward pass .* call step\(\) first"):
        sharded_bf16_adamw.save(f"{folder}/half", 0, model, optimizer)


def test_a_failed_backward_pass_is_recovered_from_by_load(tmp_path):
    run_ranks(2, recovery_worker, str(tmp_path))


# ------------------------------------------------------------------------------ what is refused


def ddp_worker(rank, world):
    model = DistributedDataParallel(nn.Linear(4, 4).bfloat16())
    before = model.module.weight.detach().clone()
    optimizer = make_optimizer(model, True)
    with pytest.raises(RuntimeError, match="wrapped by DistributedDataParallel, which averages"):
        model(torch.ones(1, 4).bfloat16()).sum().backward()
    assert torch.equal(model.module.weight, before) and not optimizer.state


def fsdp1_worker(rank, world):
    options = {"device_id": torch.device("cpu"), "use_orig_params": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = nn.Linear(4, 4).bfloat16()
        optimizer = make_optimizer(model, True)  # keeps the parameters that FSDP1 flattens
        model = FullyShardedDataParallel(model, **options)
        with pytest.raises(ValueError, match="belongs to FullyShardedDataParallel"):
            make_optimizer(model, True)
        model(torch.ones(1, 4).bfloat16()).sum().backward()
        with pytest.raises(ValueError, match="belongs to FullyShardedDataParallel"):
            optimizer.step()
        assert not optimizer.state


@pytest.mark.parametrize("worker", [ddp_worker, fsdp1_worker])
def test_strategies_that_reduce_gradients_later_are_refused(worker):
    run_ranks(2, worker)
