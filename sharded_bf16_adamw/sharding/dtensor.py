"""Local shards and process groups of parameters that torch shards or replicates.

An elementwise update needs no communication: each rank updates its local shard. A global gradient
norm is summed over the groups of :func:`shard_groups`. The ranks of :func:`replica_groups` hold the
same shard.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..torch_types import is_dtensor
from .fsdp1 import is_flattened, replica_group, shard_group


def to_local(tensor: Tensor) -> Tensor:
    """Return the local shard of a DTensor, sharing its memory; any other tensor as it is."""
    if not is_dtensor(tensor):
        return tensor
    # Like tensor.to_local(), but without the cost of its autograd function for each tensor.
    local = tensor._local_tensor
    if type(local) is Tensor or not isinstance(local, _async_collective_tensor()):
        return local
    return local.wait()


@functools.cache
def _async_collective_tensor() -> Any:
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    return AsyncCollectiveTensor


def local_grad(param: Tensor) -> Tensor:
    """Return the local shard of ``param.grad``, with the parameter's placements.

    Reduces partial sums, which tensor parallelism may leave.
    """
    grad = param.grad
    assert grad is not None
    if is_dtensor(grad) and is_dtensor(param) and grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    return to_local(grad)


def shard_groups(param: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """Return the process groups over which ``param`` is sharded, outermost first.

    A DTensor has one for each mesh dimension that shards it, an FSDP1 parameter at most one, any
    other parameter none.

    Raises:
        RuntimeError: the groups of an FSDP1 parameter are unknown; see :func:`.fsdp1.shard_group`.
    """
    if is_dtensor(param):
        mesh = param.device_mesh
        placements = enumerate(param.placements)
        return tuple(mesh.get_group(axis) for axis, each in placements if not each.is_replicate())
    group = shard_group(param) if is_flattened(param) else None
    return () if group is None else (group,)


def replica_groups(param: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """Return the process groups whose ranks are known to hold replicas of this rank's shard.

    A DTensor has one for each mesh dimension that replicates it, an FSDP1 parameter at most one,
    any other parameter none.
    """
    if is_dtensor(param):
        mesh = param.device_mesh
        axes = [axis for axis, placement in enumerate(param.placements) if placement.is_replicate()]
        return tuple(mesh.get_group(axis) for axis in axes if mesh.size(axis) > 1)
    group = replica_group(param) if is_flattened(param) else None
    return () if group is None or dist.get_world_size(group) == 1 else (group,)


def group_by(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """Group ``items`` by ``key(item)``, keeping the order of keys and of items."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
