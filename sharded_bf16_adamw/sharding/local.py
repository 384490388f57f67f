"""From a parameter to this rank's local tensors, where torch does the communication (one process, DDP, FSDP, tensor parallel).

An elementwise update needs no communication of its own: a rank updates the shard that it holds. Only a global gradient norm
does: :func:`shard_groups` says over which ranks a parameter is spread, and :func:`all_reduce_sums` adds up over them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor

from .collectives import exchange
from .fsdp1 import is_flattened, shard_group


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
    if isinstance(grad, DTensor) and isinstance(param, DTensor) and grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    return to_local(grad)


def zeros_like_shard(param: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros sharded as ``param`` is: a DTensor of its mesh, placements and global shape (uneven and empty shards included) or a
    plain tensor of its shape and strides."""
    return torch.zeros_like(param, dtype=dtype, requires_grad=False, memory_format=torch.preserve_format)


def shard_groups(param: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The process groups over which the elements of ``param`` are spread, outermost first; those that hold replicas do not count.

    A DTensor has one for each mesh axis that it is not replicated on, an FSDP1 parameter at most one, any other parameter none.

    Raises:
        RuntimeError: it is a parameter of FSDP1 whose groups cannot be known; see :func:`.fsdp1.shard_group`.
    """
    if isinstance(param, DTensor):
        mesh = param.device_mesh
        return tuple(mesh.get_group(axis) for axis, placement in enumerate(param.placements) if not placement.is_replicate())
    if is_flattened(param):
        group = shard_group(param)
        return () if group is None else (group,)
    return ()


def all_reduce_sums(sums: dict[tuple[dist.ProcessGroup, ...], Tensor]) -> Tensor:
    """Add up per-rank sums so that every element of every parameter counts once.

    Args:
        sums: by :func:`shard_groups` of the parameters summed, 0-dim float64. Reduced in place. Collective over those groups; every rank
            passes the same keys in the same order, also those of parameters of which it holds no element or no gradient.

    Returns:
        The total, 0-dim float64, the same on every rank.

    Raises:
        RuntimeError: another rank has died or hangs.
    """
    for groups, value in sums.items():
        for group in groups:
            with exchange("summing the gradient norm", dist.get_process_group_ranks(group)):
                dist.all_reduce(value, group=group)
    values = list(sums.values())
    return (
        torch.stack([value.to(values[0].device) for value in values]).sum()
        if values
        else torch.zeros((), dtype=torch.float64, device="cpu")
    )


def group_by(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """Group ``items`` by ``key(item)``, both in order of first appearance."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
