"""Which part of a tensor this rank holds, whatever the strategy.

Vocabulary: a *block* is a box of a whole tensor, from ``offsets`` on with the shape ``sizes``. A plain tensor is one block on every rank
(all replicas of each other); a DTensor is one block a rank, which may be empty.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor

from ..sharding.dtensor import to_local


class Block(NamedTuple):
    """A box of a tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    def of(self, whole: Tensor) -> Tensor:
        """This box of ``whole``: a view."""
        for dim, (offset, size) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            whole = whole.narrow(dim, offset, size)
        return whole


def local_blocks(tensor: Tensor) -> Iterator[tuple[Block, Tensor]]:
    """What this rank holds of ``tensor``: each block that is not empty, with the memory that holds it."""
    if isinstance(tensor, ShardedTensor):  # FSDP1 without a device mesh
        for shard in tensor.local_shards():
            yield (
                Block(tuple(shard.metadata.shard_offsets), tuple(shard.metadata.shard_sizes)),
                shard.tensor.detach(),
            )
        return
    local = to_local(tensor).detach()
    if isinstance(tensor, DTensor):
        if local.numel() == 0:  # its shape may be (0,), and this rank may not even be of the mesh
            return
        (chunk,) = (
            tensor.__create_chunk_list__()
        )  # what torch.distributed.checkpoint asks of a tensor, too
        yield Block(tuple(chunk.offsets), tuple(chunk.sizes)), local
    elif local.numel():
        yield Block((0,) * local.ndim, tuple(local.shape)), local
