"""The blocks of a tensor that a rank holds, under every sharding strategy.

A *block* is a rectangular part of a full tensor. Each rank holds all of a plain tensor as one
block, and at most one non-empty block of a DTensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor

from ..sharding.dtensor import to_local


class Block(NamedTuple):
    """A rectangular part of a tensor: its offset and size in each dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)

    def view_in(self, full_tensor: Tensor) -> Tensor:
        """Return a view of this block of ``full_tensor``."""
        for dim, (offset, size) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            full_tensor = full_tensor.narrow(dim, offset, size)
        return full_tensor


def local_blocks(tensor: Tensor) -> Iterator[tuple[Block, Tensor]]:
    """Yield each non-empty block of ``tensor`` on this rank, with its local tensor."""
    if isinstance(tensor, ShardedTensor):  # FSDP1 without a device mesh
        for shard in tensor.local_shards():
            metadata = shard.metadata
            block = Block(tuple(metadata.shard_offsets), tuple(metadata.shard_sizes))
            yield block, shard.tensor.detach()
        return
    local = to_local(tensor).detach()
    # An empty DTensor shard may have shape (0,), and this rank may not be in the mesh at all.
    if local.numel() == 0:
        return
    if isinstance(tensor, DTensor):
        (chunk,) = tensor.__create_chunk_list__()  # torch.distributed.checkpoint calls it too
        yield Block(tuple(chunk.offsets), tuple(chunk.sizes)), local
    else:
        yield Block((0,) * local.ndim, tuple(local.shape)), local


def local_boxes(tensor: Tensor, known: dict[Any, list[Block]]) -> list[Block]:
    """Return each non-empty block of ``tensor`` on this rank.

    Args:
        tensor: the tensor.
        known: cache of results by DTensor layout; a weight and its states share one layout.
    """
    if not isinstance(tensor, DTensor):
        return [block for block, _ in local_blocks(tensor)]
    layout = tensor.device_mesh, tensor.placements, tensor.shape
    if layout not in known:
        known[layout] = [block for block, _ in local_blocks(tensor)]
    return known[layout]
