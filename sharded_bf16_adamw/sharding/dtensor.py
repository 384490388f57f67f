"""From a parameter to this rank's local tensors, where torch does the communication (one process, DDP, FSDP, tensor parallel).

An elementwise update needs no communication of its own: a rank updates the shard that it holds. Only a global gradient norm
does: :func:`shard_groups` says over which ranks a parameter is spread, :func:`replica_groups` which ranks hold the same part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor

from .fsdp1 import is_flattened, replica_group, shard_group


def to_local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; any other tensor as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    local = tensor._local_tensor  # what to_local() gives, less its step of autograd, which every tensor would pay at every step
    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local


def local_grad(param: Tensor) -> Tensor:
    """This rank's part of ``param.grad``, laid out as the parameter is. Tensor parallelism may leave partial sums: they are reduced."""
    grad = param.grad
    assert grad is not None
    if (
        isinstance(grad, DTensor)
        and isinstance(param, DTensor)
        and grad.placements != param.placements
    ):
        grad = grad.redistribute(placements=param.placements)
    return to_local(grad)


def zeros_like_shard(param: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros sharded as ``param`` is: a DTensor of its mesh, placements and global shape (uneven and empty shards included) or a
    plain tensor of its shape and strides."""
    return torch.zeros_like(
        param, dtype=dtype, requires_grad=False, memory_format=torch.preserve_format
    )


def shard_groups(param: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The process groups over which the elements of ``param`` are spread, outermost first; those that hold replicas do not count.

    A DTensor has one for each mesh axis that it is not replicated on, an FSDP1 parameter at most one, any other parameter none.

    Raises:
        RuntimeError: it is a parameter of FSDP1 whose groups cannot be known; see :func:`.fsdp1.shard_group`.
    """
    if isinstance(param, DTensor):
        mesh = param.device_mesh
        return tuple(
            mesh.get_group(axis)
            for axis, placement in enumerate(param.placements)
            if not placement.is_replicate()
        )
    if is_flattened(param):
        group = shard_group(param)
        return () if group is None else (group,)
    return ()


def replica_groups(param: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """Return the process groups whose ranks hold replicas of this rank's part of ``param``, as far as the parameter says.

    A DTensor has one for each mesh axis that it is replicated on, an FSDP1 parameter at most one, any other parameter none.
    """
    if isinstance(param, DTensor):
        mesh = param.device_mesh
        axes = [axis for axis, placement in enumerate(param.placements) if placement.is_replicate()]
        return tuple(mesh.get_group(axis) for axis in axes if mesh.size(axis) > 1)
    group = replica_group(param) if is_flattened(param) else None
    return () if group is None or dist.get_world_size(group) == 1 else (group,)


def group_by(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """Group ``items`` by ``key(item)``, both in order of first appearance."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
