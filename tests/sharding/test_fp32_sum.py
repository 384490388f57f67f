"""Fp32SumReduceScatter: FSDP2's gradients are float32 sums in rank order, sent in bfloat16."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from bits import same_bits
from distributed import run_ranks
from torch import nn
from torch.distributed import ReduceOp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from sharded_bf16_adamw import LR, AdamW_BF16, Fp32SumReduceScatter, ZeRO
from sharded_bf16_adamw.sharding import fp32_sum as module_of_sum

from .strategy_cases import (
    Layers,
    Wrapped,
    backward,
    collect,
    fp32_sum,
    fsdp2,
    hsdp,
    make_batch,
    over_all_ranks,
)

BF16, FP32 = torch.bfloat16, torch.float32
STEPS = 3
# the ranks of each replica of the model, by name
MESHES = {"1": [[0]], "2": [[0, 1]], "3": [[0, 1, 2]], "4": [[0, 1, 2, 3]], "2x2": [[0, 1], [2, 3]]}


def layers():
    return Layers().bfloat16()


def batch_of(step):
    """Return a batch whose gradients round in every sum."""
    return {name: (x.bfloat16(), c.bfloat16()) for name, (x, c) in make_batch(step, False).items()}


def wrap(name, model, world, reduce_dtype):
    return fp32_sum(hsdp if name == "2x2" else fsdp2(), reduce_dtype)(model, world)


# -------------------------------------------------------------------------------- the gradients


def of_all_ranks(rank, world, step=0):
    """Return the gradients of every rank, by name."""
    plain = layers()
    backward(Wrapped(plain, rank, world), batch_of(step))
    own = {name: param.grad for name, param in plain.named_parameters()}
    gathered = [None] * world
    dist.all_gather_object(gathered, own)
    return {name: [each[name] for each in gathered] for name in own}


def mean(grads, ranks, dtype, divisor=None):
    """Return the float32 sum in the order of ``ranks``, divided, then rounded once."""
    total = grads[ranks[0]].float()
    for rank in ranks[1:]:
        total = total + grads[rank].float()
    return (total / (divisor or len(ranks))).to(dtype)


def grads_worker(rank, world, name):
    grads = of_all_ranks(rank, world)
    for dtype in (BF16, FP32):
        wrapped = wrap(name, layers(), world, dtype)
        backward(wrapped, batch_of(0))
        for fqn, param in wrapped.module.named_parameters():
            parts = [mean(grads[fqn], ranks, dtype) for ranks in MESHES[name]]
            # FSDP2 all-reduces between replicas in reduce_dtype.
            expected = (sum(parts[1:], parts[0]) / len(parts)).to(BF16)
            assert same_bits(param.grad.full_tensor(), expected), (fqn, dtype)


@pytest.mark.parametrize("name", MESHES)
def test_gradients_are_float32_sums_in_rank_order_rounded_once(name):
    run_ranks(sum(map(len, MESHES[name])), grads_worker, name)


def divided_worker(rank, world):
    """``set_gradient_divide_factor``, with and without ``set_force_sum_reduction_for_comms``."""
    grads = of_all_ranks(rank, world)
    for dtype, only_sums in ((BF16, False), (FP32, False), (FP32, True)):
        wrapped = wrap(str(world), layers(), world, dtype)
        for module in wrapped.module.modules():
            module.set_gradient_divide_factor(7.0)
            module.set_force_sum_reduction_for_comms(only_sums)
        backward(wrapped, batch_of(0))
        for fqn, param in wrapped.module.named_parameters():
            expected = mean(grads[fqn], range(world), BF16, divisor=7.0)
            assert same_bits(param.grad.full_tensor(), expected), (fqn, dtype, only_sums)


def test_divide_factor_is_applied_to_the_float32_sum():
    run_ranks(3, divided_worker)


def accumulating_worker(rank, world):
    first, second = of_all_ranks(rank, world, 0), of_all_ranks(rank, world, 1)
    wrapped = wrap(str(world), layers(), world, FP32)
    wrapped.module.set_requires_gradient_sync(False)
    backward(wrapped, batch_of(0))
    wrapped.module.set_requires_gradient_sync(True)
    backward(wrapped, batch_of(1))
    for fqn, param in wrapped.module.named_parameters():
        pairs = zip(first[fqn], second[fqn], strict=True)
        sent = [(a.float() + b.float()).to(BF16) for a, b in pairs]
        assert same_bits(param.grad.full_tensor(), mean(sent, range(world), BF16)), fqn


def test_float32_accumulated_gradients_are_rounded_to_be_sent():
    run_ranks(3, accumulating_worker)


# --------------------------------------------------------------------------------- training runs


def train(wrapped, in_backward=False):
    optimizer = AdamW_BF16(
        wrapped.module.parameters(),
        lr_function=LR(lr=1e-2, preheat_steps=5),
        sharding=wrapped.sharding,
        step_in_backward=in_backward,
    )
    for step in range(STEPS):
        backward(wrapped, batch_of(step))
        optimizer.step(zero_grad=True)
    return collect(wrapped.module, optimizer)


def train_worker(rank, world, name):
    shape = (len(MESHES[name]), len(MESHES[name][0]))
    mesh = init_device_mesh("cpu", shape if name == "2x2" else shape[1:])
    model = layers()
    expected = train(over_all_ranks(model, sharding=ZeRO(mesh, stage=2)))
    for in_backward in (False, True):
        assert same_bits(train(wrap(name, layers(), world, BF16), in_backward), expected)
        if name != "2x2":  # ZeRO rounds between its reduce-scatter and its all-reduce
            assert same_bits(train(wrap(name, layers(), world, FP32), in_backward), expected)


@pytest.mark.parametrize("name", ["2", "3", pytest.param("4", marks=pytest.mark.exhaustive), "2x2"])
def test_training_has_the_bits_of_zero2_with_bfloat16_on_the_wire(name):
    run_ranks(sum(map(len, MESHES[name])), train_worker, name)


# -------------------------------------------------------------------------------- the collective


def sent_worker(rank, world):
    sent = []
    original = dist.all_to_all_single

    def all_to_all_single(output, input, **options):
        sent.append((input.dtype, input.numel()))
        return original(output, input, **options)

    wrapped = wrap(str(world), layers(), world, FP32)
    with (
        mock.patch.object(dist, "all_to_all_single", all_to_all_single),
        mock.patch.object(dist, "reduce_scatter_single", None, create=True),  # not called
        mock.patch.object(dist, "reduce_scatter_tensor", None),
    ):
        backward(wrapped, batch_of(0))
    return sent, sum(param.numel() for param in wrapped.module.parameters())


def test_bfloat16_is_sent():
    for sent, numel in run_ranks(2, sent_worker):
        assert {dtype for dtype, _ in sent} == {BF16}
        assert numel <= sum(numel for _, numel in sent) < 1.1 * numel  # padding


def late_worker(rank, world, late):
    """Rank ``late`` enters the collective after the others."""
    group = dist.group.WORLD
    store = dist.distributed_c10d._get_default_store()
    # In float32: (2^24 + 1) - 2^24 = 0, but (2^24 - 2^24) + 1 = 1.
    grads = torch.tensor([2.0**24, 1.0, -(2.0**24)][rank]).repeat(world)
    output = torch.empty(1)
    if rank == late:
        store.wait([f"{late} {other}" for other in range(world) if other != late])
    else:
        store.set(f"{late} {rank}", "here")
    Fp32SumReduceScatter()(output, grads, group, ReduceOp.SUM)
    return output.item()


@pytest.mark.parametrize("late", range(3))
def test_sum_does_not_depend_on_arrival(late):
    assert run_ranks(3, late_worker, late) == [0.0] * 3


def test_sum_is_rounded_once():
    output = torch.empty(1, dtype=BF16)
    grads = torch.tensor([[256.0], [1.0], [1.0]], dtype=BF16)  # in bfloat16, 256 + 1 is 256
    module_of_sum.sum_over_ranks(grads, output, 1)
    assert output.item() == 258.0


@pytest.mark.parametrize("numel", [0, 1, 5, 64])
def test_blocks_of_a_sum_are_those_of_the_whole(numel, monkeypatch):
    grads = torch.randn(3, numel, generator=torch.Generator().manual_seed(0)).to(BF16)
    whole, blocks = torch.empty(2, numel)
    module_of_sum.sum_over_ranks(grads, whole, 3)
    monkeypatch.setattr(module_of_sum, "SUM_BLOCK_NUMEL", 2)
    module_of_sum.sum_over_ranks(grads, blocks, 3)
    assert same_bits(blocks, whole)
    assert same_bits(whole, mean(list(grads), range(3), FP32))


# ------------------------------------------------------------------------------ what it refuses


REFUSED = [
    (FP32, ReduceOp.MAX, False, "but supports only sums and averages"),
    (BF16, ReduceOp.SUM, False, r"set_force_sum_reduction_for_comms\(True\) makes FSDP2 divide"),
    (FP32, ReduceOp.AVG, True, "got async_op=True"),
]


def refused_worker(rank, world):
    group, comm = dist.group.WORLD, Fp32SumReduceScatter()
    grads = torch.zeros(world)
    with mock.patch.object(dist, "all_to_all_single", side_effect=RuntimeError("reset by peer")):
        for dtype, op, async_op, message in REFUSED:
            with pytest.raises(ValueError, match=message):
                comm(torch.empty(1, dtype=dtype), grads.to(dtype), group, op, async_op=async_op)
        with pytest.raises(RuntimeError, match="averaging gradients between ranks 0, 1 failed on"):
            comm(torch.empty(1), grads, group, ReduceOp.AVG)
    from torch.distributed._composable.replicate_with_fsdp import replicate

    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("replicate",))
    replicated = replicate(nn.Linear(4, 4), mesh=mesh)  # built on FSDP2, but it all-reduces
    with pytest.raises(ValueError, match="without FSDP2 modules"):
        Fp32SumReduceScatter.install(replicated)


def test_what_is_refused():
    run_ranks(2, refused_worker)


def float16_worker(rank, world):
    model = nn.Linear(4, 4).bfloat16()
    fully_shard(model, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float16))
    Fp32SumReduceScatter.install(model)
    with pytest.raises(ValueError, match="sends bfloat16, but FSDP2 reduces gradients in"):
        model(torch.ones(2, 4, dtype=BF16)).sum().backward()
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize("world", [1, 2])
def test_float16_is_refused_before_anything_is_sent(world):
    run_ranks(world, float16_worker)


def test_model_without_fsdp2_is_refused():
    with pytest.raises(ValueError, match="without FSDP2 modules; call fully_shard on the model"):
        Fp32SumReduceScatter.install(nn.Linear(2, 2))
