"""Blocks of tensors between rank 0 and the others, one at a time, in an order that all ranks follow.

They travel between CPUs, where rank 0 wants them or has them. NCCL would make a communicator, with buffers on both GPUs,
for every pair of ranks that send and receive.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..sharding.collectives import cpu_group
from .blocks import Block, local_blocks
from .rank_errors import Group, rank, world_size

Key = tuple[str, str]  # parameter name and what of its state, such as ("layer.weight", "exp_avg")


class Entry(NamedTuple):
    """What one rank holds of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: tuple[Block, ...]


class Transfer(NamedTuple):
    """A block that travels between rank 0 and others: ``places`` is its place among the blocks of each of ``ranks``, which all hold it."""

    key: Key
    block: Block
    places: dict[int, int]

    @property
    def ranks(self) -> list[int]:
        return list(self.places)


def table_of(tensors: dict[Key, Tensor]) -> dict[Key, Entry]:
    """What this rank holds, without the values."""
    table = {}
    for key, tensor in tensors.items():
        blocks = tuple(block for block, _ in local_blocks(tensor))
        table[key] = Entry(tuple(tensor.shape), tensor.dtype, blocks)
    return table


def plan_transfers(
    tables: list[dict[Key, Entry]], wholes: dict[Key, Entry], replicas: bool
) -> list[list[Transfer]]:
    """Which blocks each rank exchanges with rank 0, in one order for all.

    Args:
        tables: of each rank.
        wholes: the tensors to move.
        replicas: whether every rank that holds a block takes part (to receive it), or the first alone (to send it).

    Returns:
        The list of each rank; that of rank 0 has all of them.

    Raises:
        ValueError: the ranks' blocks do not add up to a whole tensor.
    """
    plan: list[list[Transfer]] = [[] for _ in tables]
    for key, whole in wholes.items():
        holders: dict[Block, dict[int, int]] = {}
        for owner, table in enumerate(tables):
            for index, block in enumerate(table[key].blocks if key in table else ()):
                holders.setdefault(block, {})[owner] = index
        covered = sum(block.numel for block in holders)
        expected = Block((), whole.shape).numel
        if covered != expected:
            raise ValueError(
                f"the ranks hold {covered} elements of {'.'.join(key)} in blocks that should make up {expected}; its sharding "
                f"is too uneven to be described by blocks, so choose sizes that divide by the mesh"
            )
        for block, places in holders.items():
            chosen = places if replicas else dict([next(iter(places.items()))])
            transfer = Transfer(key, block, chosen)
            for participant in {0, *chosen}:
                plan[participant].append(transfer)
    return plan


def held(tensor: Tensor, transfer: Transfer, group: Group) -> Tensor:
    """This rank's memory of the block."""
    blocks = list(local_blocks(tensor))
    return blocks[transfer.places[rank(group)]][1]


def deliver(
    transfer: Transfer, block: Tensor | None, tensors: dict[Key, Tensor], group: Group
) -> None:
    """Bring a block from rank 0 (where it is ``block``) to all ranks of the transfer."""
    ranks = transfer.ranks
    if len(ranks) == world_size(group) > 1:
        place = held(tensors[transfer.key], transfer, group)
        if block is not None:
            place.copy_(block)
        _broadcast(place, group)
    elif block is not None:
        for receiver in ranks:
            if receiver == 0:
                held(tensors[transfer.key], transfer, group).copy_(block)
            else:
                send(block, receiver, group)
    else:
        receive(held(tensors[transfer.key], transfer, group), 0, group)


def connect(group: Group) -> None:
    """Prepare for what follows, on every rank of the group: also on those that will exchange nothing."""
    if dist.is_initialized():
        cpu_group(group)


def send(tensor: Tensor, receiver: int, group: Group) -> None:
    dist.send(
        _buffer(tensor, copy_values=True), dst=_global_rank(receiver, group), group=cpu_group(group)
    )


def receive(place: Tensor, sender: int, group: Group) -> None:
    """Inverse of :func:`send`, into ``place``."""
    buffer = _buffer(place, copy_values=False)
    dist.recv(buffer, src=_global_rank(sender, group), group=cpu_group(group))
    _take(place, buffer)


def _broadcast(place: Tensor, group: Group) -> None:
    """From rank 0's ``place`` to that of every rank."""
    buffer = _buffer(place, copy_values=rank(group) == 0)
    dist.broadcast(buffer, src=_global_rank(0, group), group=cpu_group(group))
    _take(place, buffer)


def _global_rank(rank_in_group: int, group: Group) -> int:
    return rank_in_group if group is None else dist.get_global_rank(group, rank_in_group)


def _buffer(tensor: Tensor, copy_values: bool) -> Tensor:
    """The bytes of ``tensor`` in CPU memory, 1-D: its own memory where it can be, else a copy."""
    if copy_values:
        tensor = tensor.cpu().contiguous()
    elif not tensor.is_cpu or not tensor.is_contiguous():
        tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return tensor.view(-1).view(torch.uint8)


def _take(place: Tensor, buffer: Tensor) -> None:
    if buffer.data_ptr() != place.data_ptr():
        place.copy_(buffer.view(place.dtype).view(place.shape))
