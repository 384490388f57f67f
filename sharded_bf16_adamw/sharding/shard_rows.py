"""The rows of a full tensor in this rank's shard, to sample the same elements in any sharding."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ..torch_types import is_dtensor
from .dtensor import to_local
from .fsdp1 import is_flattened, unsharded_range


class ShardRows(NamedTuple):
    """Ranges of consecutive rows of a full tensor, in the order of the shard's memory.

    A *row* holds the elements along the last dimension. A row of a 1-D tensor is one element. A
    shard holds the same number of elements of each of its rows. FSDP1 cuts rows anywhere; there,
    each element counts as a row.

    Attributes:
        n_rows: number of rows of the full tensor.
        row_numel: number of elements in a row of the full tensor.
        local_row_numel: number of elements of a row in the shard.
        starts: first row of each range, int64.
        range_rows: number of rows in each range.
        unit: number of elements in a row of the parameter with FSDP1, else 1.
    """

    n_rows: int
    row_numel: int
    local_row_numel: int
    starts: np.ndarray
    range_rows: int
    unit: int = 1

    def block_rows(self, numel: int) -> int:
        """Return the number of rows in a block of at least ``numel`` elements, for any sharding."""
        return -(-numel // max(self.row_numel * self.unit, 1)) * self.unit


def shard_rows(shard: Tensor) -> ShardRows | None:
    """Return the rows of a parameter's shard (see :meth:`.base.Sharding.shard`).

    None if the elements are not stored in the order of their indices.
    """
    local = to_local(shard)
    if is_flattened(shard):
        shape, numel, start = unsharded_range(shard)
        unit = _matrix(tuple(shape))[-1]
        return ShardRows(numel, 1, 1, np.array([start]), local.numel(), unit)
    if not (shard.is_contiguous() and _is_in_order(local)):
        return None
    offset: tuple[int, ...] = (0,) * shard.ndim
    if is_dtensor(shard):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        mesh, placements = shard.device_mesh, shard.placements
        local_shape, offset = compute_local_shape_and_global_offset(shard.shape, mesh, placements)
        if tuple(local_shape) != tuple(local.shape):
            return None
    *sizes, row_numel = _matrix(tuple(shard.shape))
    *local_sizes, local_row_numel = _matrix(tuple(local.shape))
    offsets = (*offset, 0)[: len(sizes)]
    # A range spans the last sharded dimension and those after it. The dimensions before it
    # enumerate the ranges.
    sharded = [dim for dim, size in enumerate(sizes) if local_sizes[dim] != size]
    outer = sharded[-1] if sharded else 0
    inner_rows = math.prod(sizes[outer + 1 :])
    starts = np.zeros(1, np.int64)
    for dim in range(outer):
        indices = offsets[dim] + np.arange(local_sizes[dim])
        starts = (starts[:, None] * sizes[dim] + indices).reshape(-1)
    starts = (starts * sizes[outer] + offsets[outer]) * inner_rows
    range_rows = local_sizes[outer] * inner_rows
    return ShardRows(math.prod(sizes), row_numel, local_row_numel, starts, range_rows)


def _matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape, extended to two dimensions by trailing ones."""
    return shape if len(shape) > 1 else (*shape, 1) if shape else (1, 1)


def _is_in_order(tensor: Tensor) -> bool:
    """Return True if memory addresses increase with the index."""
    strides = [s for s, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
    return strides == sorted(strides, reverse=True)
