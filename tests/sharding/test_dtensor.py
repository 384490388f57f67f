"""Local shards, and the process groups that a norm is summed over."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from sharded_bf16_adamw import AdamW_BF16
from sharded_bf16_adamw.sharding.dtensor import shard_groups, to_local
from sharded_bf16_adamw.sharding.global_norm import all_reduce_sums

BF16 = torch.bfloat16


def test_plain_parameters_have_no_group():
    param = nn.Parameter(torch.zeros(3, 4).t())
    assert shard_groups(param) == ()
    assert to_local(param) is param


def test_empty_sums_are_zero():
    total, mismatch = all_reduce_sums({}, {}, [], None)
    assert total.item() == mismatch.item() == 0.0 and total.dtype == torch.float64


def groups_worker(rank, world):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    outer, inner = mesh.get_group("outer"), mesh.get_group("inner")
    cases = [
        (mesh, (Shard(0), Shard(1)), (outer, inner)),
        (mesh, (_StridedShard(0, split_factor=2), Shard(0)), (outer, inner)),
        (mesh, (Replicate(), Shard(0)), (inner,)),
        (mesh, (Shard(1), Replicate()), (outer,)),
        (mesh["inner"], (Shard(0),), (inner,)),
        (mesh, (Replicate(), Replicate()), ()),
    ]
    for where, placements, expected in cases:
        param = DTensor.from_local(
            torch.zeros(2, 2), where, placements, shape=torch.Size((4, 4)), stride=(4, 1)
        )
        assert shard_groups(param) == expected, placements
    return [dist.get_process_group_ranks(group) for group in (outer, inner)]


def test_shard_groups_of_dtensors():
    assert run_ranks(4, groups_worker) == [
        [[0, 2], [0, 1]],
        [[1, 3], [0, 1]],
        [[0, 2], [2, 3]],
        [[1, 3], [2, 3]],
    ]


def missing_gradients_worker(rank, world, with_gradient):
    """Two parameters on different groups; only ranks ``with_gradient`` have one for ``shared``."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("outer", "inner"))
    shared = nn.Parameter(
        DTensor.from_local(
            torch.zeros(2, dtype=BF16), init_device_mesh("cpu", (world,)), (Shard(0),)
        )
    )
    inner = nn.Parameter(DTensor.from_local(torch.zeros(3, dtype=BF16), mesh["inner"], (Shard(0),)))
    optimizer = AdamW_BF16([shared, inner], lr=1e-2, skip_nonfinite=True)
    inner.grad = torch.ones_like(inner)
    if rank in with_gradient:
        shared.grad = torch.ones_like(shared)
    return optimizer.clip_grad_norm_(1.0).item() ** 2


@pytest.mark.parametrize("with_gradient", [(0, 1, 2, 3), (2,), ()])
def test_ranks_without_a_gradient_join_its_norm(with_gradient):
    for squared in run_ranks(4, missing_gradients_worker, with_gradient):
        assert squared == pytest.approx(2 * len(with_gradient) + 3 * 2, rel=1e-6)


def no_gradient_worker(rank, world):
    model = fully_shard(nn.Linear(4, 4).to(BF16))
    return AdamW_BF16(model.parameters(), lr=1e-2).clip_grad_norm_(1.0).item()


def test_norm_without_gradients_is_zero():
    assert run_ranks(2, no_gradient_worker) == [0.0, 0.0]
    assert AdamW_BF16(nn.Linear(2, 2).parameters(), lr=1e-2).clip_grad_norm_(1.0).item() == 0.0
