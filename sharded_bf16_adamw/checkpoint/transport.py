"""Send blocks of tensors between rank 0 and the other ranks, in one order for all ranks.

Blocks are sent from and to CPU memory, where rank 0 holds the full tensors. NCCL would create a
communicator, with buffers on both GPUs, for every pair of ranks that send and receive.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..sharding.collectives import cpu_group
from .blocks import Block, local_blocks
from .object_collectives import Group, global_rank, rank, world_size

Key = tuple[str, str]  # parameter and state, such as ("layer.weight", "exp_avg")


class ShardInfo(NamedTuple):
    """The global shape and dtype of a tensor, and the blocks that one rank holds."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: tuple[Block, ...]


class Transfer(NamedTuple):
    """A block that is sent between rank 0 and other ranks.

    Attributes:
        key: key of the tensor.
        block: the block of the full tensor.
        index_on: maps each rank whose shard takes part to the block's index in its local blocks.
    """

    key: Key
    block: Block
    index_on: dict[int, int]


def shard_infos(tensors: dict[Key, Tensor]) -> dict[Key, ShardInfo]:
    """Return shape, dtype and local blocks of each tensor of this rank."""
    return {
        key: ShardInfo(
            tuple(tensor.shape), tensor.dtype, tuple(block for block, _ in local_blocks(tensor))
        )
        for key, tensor in tensors.items()
    }


def plan_transfers(
    infos_of_ranks: list[dict[Key, ShardInfo]], full_tensors: dict[Key, ShardInfo], replicas: bool
) -> list[list[Transfer]]:
    """Plan the blocks that each rank exchanges with rank 0, in one order for all ranks.

    Args:
        infos_of_ranks: results of :func:`shard_infos`, in rank order.
        full_tensors: the tensors to move.
        replicas: True to give a block to every rank that holds it, False to take it from the first.

    Returns:
        A list for each rank. Rank 0's has all transfers.

    Raises:
        ValueError: the ranks' blocks do not make up a full tensor.
    """
    plan: list[list[Transfer]] = [[] for _ in infos_of_ranks]
    for key, full_tensor in full_tensors.items():
        holders: dict[Block, dict[int, int]] = {}
        for holder, infos in enumerate(infos_of_ranks):
            for index, block in enumerate(infos[key].blocks if key in infos else ()):
                holders.setdefault(block, {})[holder] = index
        covered = sum(block.numel for block in holders)
        expected = Block((), full_tensor.shape).numel
        if covered != expected:
            raise ValueError(
                f"the shards of {'.'.join(key)} have {covered} elements, but the full tensor has "
                f"{expected}; this uneven sharding is not supported, so choose sizes divisible by "
                "the mesh size"
            )
        for block, index_on in holders.items():
            chosen = index_on if replicas else dict([next(iter(index_on.items()))])
            for participant in {0, *chosen}:
                plan[participant].append(Transfer(key, block, chosen))
    return plan


def local_block(tensor: Tensor, transfer: Transfer, group: Group) -> Tensor:
    """Return this rank's memory of the transfer's block."""
    return list(local_blocks(tensor))[transfer.index_on[rank(group)]][1]


def scatter_block(
    transfer: Transfer, block: Tensor | None, tensors: dict[Key, Tensor], group: Group
) -> None:
    """Copy ``block``, given on rank 0, into the tensors of all ranks of the transfer."""
    if len(transfer.index_on) == world_size(group) > 1:
        local = local_block(tensors[transfer.key], transfer, group)
        if block is not None:
            local.copy_(block)
        _broadcast(local, group)
    elif block is not None:
        for receiver in transfer.index_on:
            if receiver == 0:
                local_block(tensors[transfer.key], transfer, group).copy_(block)
            else:
                send(block, receiver, group)
    else:
        receive(local_block(tensors[transfer.key], transfer, group), 0, group)


def send(tensor: Tensor, receiver: int, group: Group) -> None:
    """Send a tensor to a rank of ``group``."""
    buffer = _cpu_buffer(tensor, copy_values=True)
    dist.send(buffer, dst=global_rank(receiver, group), group=cpu_group(group))


def receive(tensor: Tensor, sender: int, group: Group) -> None:
    """Receive into ``tensor`` from a rank of ``group`` that calls :func:`send`."""
    buffer = _cpu_buffer(tensor, copy_values=False)
    dist.recv(buffer, src=global_rank(sender, group), group=cpu_group(group))
    _copy_out(buffer, tensor)


def _broadcast(tensor: Tensor, group: Group) -> None:
    buffer = _cpu_buffer(tensor, copy_values=rank(group) == 0)
    dist.broadcast(buffer, src=global_rank(0, group), group=cpu_group(group))
    _copy_out(buffer, tensor)


def _cpu_buffer(tensor: Tensor, copy_values: bool) -> Tensor:
    """Return a 1-D uint8 CPU tensor for ``tensor``: its own memory if possible, else a buffer."""
    if copy_values:
        tensor = tensor.cpu().contiguous()
    elif not tensor.is_cpu or not tensor.is_contiguous():
        tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return tensor.view(-1).view(torch.uint8)


def _copy_out(buffer: Tensor, tensor: Tensor) -> None:
    if buffer.data_ptr() != tensor.data_ptr():
        tensor.copy_(buffer.view(tensor.dtype).view(tensor.shape))
