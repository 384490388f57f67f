"""Replicas: the guard skips on all or none of them, and a flipped bit is reported."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from sharded_bf16_adamw import AdamW_BF16, ModelParallel, ZeRO
from sharded_bf16_adamw.sharding.dtensor import to_local
from sharded_bf16_adamw.sharding.replica_checksum import checksums


def model_and_mesh(kind: str, world: int) -> tuple[nn.Module, dict[str, Any]]:
    """Return a linear layer whose shards have replicas, and the optimizer's arguments."""
    torch.manual_seed(0)
    model = nn.Linear(8, 8, bias=False).bfloat16()
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    if kind == "HSDP":
        return fully_shard(model, mesh=mesh), {}
    if kind == "tensor parallel":
        both = init_device_mesh("cpu", (world,))
        model.weight = nn.Parameter(
            distribute_tensor(model.weight.detach(), both, [Replicate()], src_data_rank=None)
        )
        model.other = nn.Parameter(
            distribute_tensor(torch.ones(8, 8).bfloat16(), both, [Shard(0)], src_data_rank=None)
        )
        return model, {}
    if kind == "ZeRO":
        return model, {"sharding": ZeRO(mesh, stage=2)}
    if kind == "DDP":
        return DistributedDataParallel(model), {
            "model_parallel": ModelParallel(dp=dist.group.WORLD)
        }
    options: dict[str, Any] = {"use_orig_params": True, "device_id": torch.device("cpu")}
    if kind == "FSDP1 HYBRID_SHARD":
        return FullyShardedDataParallel(
            model, device_mesh=mesh, sharding_strategy=ShardingStrategy.HYBRID_SHARD, **options
        ), {}
    assert kind == "FSDP1 NO_SHARD"
    mesh = init_device_mesh("cpu", (world,))
    return FullyShardedDataParallel(
        model, device_mesh=mesh, sharding_strategy=ShardingStrategy.NO_SHARD, **options
    ), {}


KINDS = ("HSDP", "tensor parallel", "ZeRO", "DDP", "FSDP1 HYBRID_SHARD", "FSDP1 NO_SHARD")


def give_gradient(optimizer: AdamW_BF16, fill: float) -> None:
    for param in optimizer.param_groups[0]["params"]:
        if param.numel():
            param.grad = torch.full_like(param, fill)


def guard_worker(rank: int, world: int, kind: str) -> tuple[int, bool]:
    model, options = model_and_mesh(kind, world)
    optimizer = AdamW_BF16(model.parameters(), lr=1e-2, skip_nonfinite=True, **options)
    give_gradient(optimizer, 1.0)
    optimizer.step(zero_grad=True)
    before = [to_local(param).clone() for param in model.parameters()]
    give_gradient(optimizer, 1.0)
    if rank == world - 1:
        for param in model.parameters():  # a bit that flips after the reduction
            if param.grad is not None:
                to_local(param.grad).view(-1)[:1] = torch.inf
                break
    if kind == "ZeRO":  # it reduces gradients itself, so its own copy can break
        optimizer._sharding.reduce_grads()
        for grad in optimizer._sharding._sharded_grads.values():
            grad.fill_(1.0)
            if rank == world - 1:
                grad.view(-1)[:1] = torch.inf
    optimizer.step()
    same = all(
        torch.equal(to_local(param), old)
        for param, old in zip(model.parameters(), before, strict=True)
    )
    give_gradient(optimizer, 1.0)
    optimizer.zero_grad()
    return optimizer.skipped_steps, same


@pytest.mark.parametrize("kind", KINDS)
def test_inf_on_one_replica_skips_the_step_on_all(kind):
    assert run_ranks(4, guard_worker, kind) == [(1, True)] * 4


FLIPPED = ("weight", "exp_avg_sq", "correction")


def check_worker(rank: int, world: int, kind: str) -> list[str]:
    return [check_with_a_flipped_bit(rank, world, kind, what) for what in FLIPPED]


def check_with_a_flipped_bit(rank: int, world: int, kind: str, what: str) -> str:
    model, options = model_and_mesh(kind, world)
    optimizer = AdamW_BF16(model.parameters(), lr=1e-2, **options)
    for _ in range(2):
        give_gradient(optimizer, 1.0)
        optimizer.step(zero_grad=True)
    optimizer.check_replicas()  # raises nothing
    if rank == world - 1:
        param = next(param for param in model.parameters() if to_local(param).numel())
        tensor = to_local(param if what == "weight" else optimizer.state[param][what]).detach()
        if tensor.dim():
            tensor.view(-1)[-1:].view(torch.int16).bitwise_xor_(1)
    try:
        optimizer.check_replicas()
        return "no error"
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bit_is_reported_on_every_rank(kind):
    for messages in run_ranks(4, check_worker, kind):
        for message, what in zip(messages, FLIPPED, strict=True):
            name = "parameter" if what == "weight" else what
            assert message.startswith(f"replicas of {name}"), message
            assert "suspect the hardware" in message
            assert re.search(
                r"differ (on rank 3 from those on rank 0, 1, 2|between ranks [01], [23])", message
            ), message


def guard_of_a_mesh_worker(rank: int, world: int) -> tuple[int, float]:
    """Replicas over both dimensions of a mesh: what one rank finds must reach all ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    weight = nn.Parameter(
        distribute_tensor(
            torch.ones(4, 4).bfloat16(), mesh, [Replicate(), Replicate()], src_data_rank=None
        )
    )
    optimizer = AdamW_BF16([weight], lr=0.5, skip_nonfinite=True)
    weight.grad = torch.ones_like(weight)
    if rank == world - 1:
        to_local(weight.grad)[0, 0] = torch.nan
    optimizer.step()
    return optimizer.skipped_steps, float(to_local(weight.detach()).sum())


def test_nan_on_one_rank_of_a_2d_mesh_skips_on_all():
    assert run_ranks(4, guard_of_a_mesh_worker) == [(1, 16.0)] * 4


@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.bfloat16, torch.int16), (torch.float32, torch.int32)]
)
def test_every_flipped_bit_changes_the_checksum(dtype, bits):
    width = torch.iinfo(bits).bits
    tensors = [torch.ones(11, dtype=dtype)]
    for place in range(8):
        for bit in range(width):
            flipped = tensors[0].clone()
            flipped[place : place + 1].view(bits).bitwise_xor_(
                -(1 << bit) if bit == width - 1 else 1 << bit
            )
            tensors.append(flipped)
    assert len(set(checksums(tensors))) == 1 + 8 * width


def different_parameters_worker(rank: int, world: int) -> str:
    params = [nn.Parameter(torch.ones(4).bfloat16()) for _ in range(1 + rank)]
    with pytest.raises(RuntimeError, match="ModelParallel") as caught:
        AdamW_BF16(params, lr=1e-2).check_replicas()
    return str(caught.value)


def test_different_parameters_are_reported():
    for message in run_ranks(2, different_parameters_worker):
        assert message.startswith("replicas of the list of parameters differ between ranks 0, 1")


def nothing_to_compare_worker(rank: int, world: int) -> str:
    fully_sharded = fully_shard(nn.Linear(4, 4).bfloat16())
    AdamW_BF16(fully_sharded.parameters(), lr=1e-2).check_replicas()  # has no replicas
    parallel = ModelParallel(pp=dist.group.WORLD)
    fully_sharded = FullyShardedDataParallel(
        nn.Linear(4, 4).bfloat16(), use_orig_params=True, device_id=torch.device("cpu")
    )
    AdamW_BF16(fully_sharded.parameters(), lr=1e-2, model_parallel=parallel).check_replicas()
    optimizer = AdamW_BF16(
        [nn.Parameter(torch.ones(4).bfloat16())], lr=1e-2, model_parallel=parallel
    )
    with pytest.raises(RuntimeError) as caught:
        optimizer.check_replicas()
    return str(caught.value)


def test_check_without_replicas_is_an_error():
    for message in run_ranks(2, nothing_to_compare_worker):
        assert message.startswith("rank 0 has no replicas to compare")


def alone() -> AdamW_BF16:
    return AdamW_BF16([nn.Parameter(torch.ones(4).bfloat16())], lr=1e-2)


def test_check_on_a_single_process_passes():
    optimizer = alone()
    optimizer.check_replicas()
    optimizer.init_state()
    optimizer.check_replicas()


def mixed_worker(rank: int, world: int, drifted: bool, declared: bool) -> str:
    """A model with an FSDP2 module and a plain one."""
    torch.manual_seed(0)
    model = nn.Module()
    model.sharded = fully_shard(nn.Linear(8, 8, bias=False).bfloat16())
    model.plain = nn.Linear(8, 8, bias=False).bfloat16()
    parallel = ModelParallel(ep=dist.group.WORLD, experts=model.plain) if declared else None
    optimizer = AdamW_BF16(model.parameters(), lr=1e-2, model_parallel=parallel)
    give_gradient(optimizer, 1.0)
    model.plain.weight.grad.fill_(1.0 + rank * drifted)
    try:
        return f"{optimizer.clip_grad_norm_(1.0).item():.4f}"
    except RuntimeError as error:
        assert isinstance(model.sharded.weight, DTensor)
        return str(error)


def differing_gradients_worker(rank: int, world: int, kind: str) -> str:
    """Gradients are not averaged, which only replica or expert groups can detect."""
    torch.manual_seed(0)
    model = nn.Module()
    model.plain = nn.Linear(8, 8, bias=False).bfloat16()
    parallel = None
    if kind == "HSDP":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
        model.sharded = fully_shard(nn.Linear(8, 8, bias=False).bfloat16(), mesh=mesh)
    elif kind == "dp":
        parallel = ModelParallel(dp=dist.group.WORLD)
    else:
        model.expert = nn.Linear(8, 8, bias=False).bfloat16()
        parallel = ModelParallel(ep=dist.group.WORLD, experts=model.expert)
    optimizer = AdamW_BF16(
        model.parameters(), lr=1e-2, skip_nonfinite=True, model_parallel=parallel
    )
    give_gradient(optimizer, 1.0)
    model.plain.weight.grad.fill_(1.0 + rank // (world // 2))
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    assert not optimizer.state
    return str(caught.value)


@pytest.mark.parametrize("kind", ["HSDP", "dp", "ep"])
def test_differing_gradients_are_an_error_on_every_rank(kind):
    for message in run_ranks(4, differing_gradients_worker, kind):
        assert message.startswith("ranks that should have equal gradients have different ones")


def mixed_guard_worker(rank: int, world: int) -> int:
    model = nn.Module()
    model.sharded = fully_shard(nn.Linear(8, 8, bias=False).bfloat16())
    model.plain = nn.Linear(8, 8, bias=False).bfloat16()
    optimizer = AdamW_BF16(model.parameters(), lr=1e-2, skip_nonfinite=True)
    give_gradient(optimizer, 1.0)
    if rank == 1:
        model.plain.weight.grad[0, 0] = torch.inf
    optimizer.step()
    return optimizer.skipped_steps


def test_inf_in_plain_gradient_beside_shards_skips_on_all():
    assert run_ranks(2, mixed_guard_worker) == [1, 1]


def test_norm_of_differing_plain_gradients_is_an_error():
    assert run_ranks(2, mixed_worker, False, False) == [f"{128**0.5:.4f}"] * 2
    for message in run_ranks(2, mixed_worker, True, False):
        assert message.startswith("ranks that should have equal gradients have different ones")
    total = 64 + 64 + 64 * 4  # each rank's plain parameter counts as another one
    assert run_ranks(2, mixed_worker, True, True) == [f"{total**0.5:.4f}"] * 2
