"""Which part of a tensor this rank holds, and this rank's part of model and optimizer by parameter name, whatever the strategy.

Vocabulary: a *block* is a box of a whole tensor, from ``offsets`` on with the shape ``sizes``. A plain tensor is one block on every rank
(all replicas of each other); a DTensor is one block a rank, which may be empty.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from ..sharding.local import to_local
from .contents import _put_in_one_order


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
            yield Block(tuple(shard.metadata.shard_offsets), tuple(shard.metadata.shard_sizes)), shard.tensor.detach()
        return
    local = to_local(tensor).detach()
    if isinstance(tensor, DTensor):
        if local.numel() == 0:  # its shape may be (0,), and this rank may not even be of the mesh
            return
        (chunk,) = tensor.__create_chunk_list__()  # what torch.distributed.checkpoint asks of a tensor, too
        yield Block(tuple(chunk.offsets), tuple(chunk.sizes)), local
    elif local.numel():
        yield Block((0,) * local.ndim, tuple(local.shape)), local


def has_fsdp1(model: nn.Module) -> bool:
    """Whether FSDP1 wraps any of the model. What torch then gives as its state are copies, not the live tensors."""
    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules())


def sharded_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state as ``get_optimizer_state_dict`` gives it: by parameter name, each tensor sharded as it is held. Collective
    under FSDP1. The tensors are the live ones, except under FSDP1."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # an evaluation leaves plain parameters in the place of those that the optimizer knows
    _put_in_one_order(optimizer)  # or torch's FSDP1 code takes one moment for another
    with _quiet():
        return get_optimizer_state_dict(model, optimizer)


def set_sharded_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Inverse of :func:`sharded_optimizer_state`, where its tensors are copies."""
    with _quiet():
        set_optimizer_state_dict(model, optimizer, state)
    _put_in_one_order(optimizer)


def sharded_model_state(model: nn.Module) -> dict[str, Any]:
    """The model's state as ``get_model_state_dict`` gives it: by name, sharded, live except under FSDP1. Collective under FSDP1."""
    with _quiet():
        return get_model_state_dict(model)


def set_sharded_model_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Inverse of :func:`sharded_model_state`, where its tensors are copies."""
    with _quiet():
        set_model_state_dict(model, state)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that torch's FSDP1 gives of its own functions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
