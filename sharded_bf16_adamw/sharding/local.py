"""From a parameter to this rank's local tensors, where torch does the communication (one process, DDP, FSDP, tensor parallel).

An elementwise update needs no communication of its own: a rank updates the shard that it holds. Only a global gradient norm
does, and :func:`all_reduce_sums` is the one place that knows over which mesh axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor


def to_local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; any other tensor as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        local = tensor.to_local()
    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local


def local_grad(param: Tensor) -> Tensor:
    """This rank's part of ``param.grad``, laid out as the parameter is. Tensor parallelism may leave partial sums: they are reduced."""
    grad = param.grad
    assert grad is not None
    if isinstance(grad, DTensor) and isinstance(param, DTensor) and grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    return to_local(grad)


def zeros_like_shard(param: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros sharded as ``param`` is: a DTensor of its mesh, placements and global shape (uneven and empty shards included) or a
    plain tensor of its shape and strides."""
    return torch.zeros_like(param, dtype=dtype, requires_grad=False, memory_format=torch.preserve_format)


def shard_axes(param: Tensor) -> tuple[tuple[Any, int], ...]:
    """The mesh axes over which the elements of ``param`` are spread, as (mesh, axis) pairs: those that do not hold replicas."""
    if not isinstance(param, DTensor):
        return ()
    return tuple((param.device_mesh, axis) for axis, placement in enumerate(param.placements) if not placement.is_replicate())


def all_reduce_sums(sums: dict[tuple[tuple[Any, int], ...], Tensor]) -> Tensor:
    """Add up per-rank sums so that every element of every parameter counts once.

    Args:
        sums: by :func:`shard_axes` of the parameters summed, 0-dim float64. Collective over those axes; every rank passes the same keys
            in the same order.

    Returns:
        The total, 0-dim float64, the same on every rank.
    """
    for axes, value in sums.items():
        for mesh, axis in axes:
            dist.all_reduce(value, group=mesh.get_group(axis))
    return torch.stack([value.to(next(iter(sums.values())).device) for value in sums.values()]).sum()


def group_by(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """Group ``items`` by ``key(item)``, both in order of first appearance."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
