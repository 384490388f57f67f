"""The plan of an optimizer's last save, for its next save with the same layouts.

Each rank keeps its part of the plan from the end of a save that succeeded on all ranks until the
next save takes it out. So the plan of a failed save is never used again. Ranks compare the plan's
identity before they use it: they all use it, or all build a new plan.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..sharding.dtensor import to_local
from .chunk_table import ChunkTable
from .object_collectives import Group, rank
from .plan_table import Locations

Layout = tuple[Any, ...]


@dataclass
class PlannedSave:
    """One rank's part of the plan of a save.

    Attributes:
        layout: of the tensors on this rank, as :func:`layout_of` returns it.
        identity: a text that no other plan has; the same on all ranks.
        plan: the items that this rank writes.
        to_chunks: on rank 0, :attr:`.save_plan.MergedPlan.to_chunks`.
    """

    layout: Layout | None
    identity: str
    plan: SavePlan
    to_chunks: Callable[[list[Locations]], ChunkTable] | None


_kept: weakref.WeakKeyDictionary[Optimizer, PlannedSave] = weakref.WeakKeyDictionary()
_lock = threading.Lock()  # guards _kept


def take(optimizer: Optimizer, layout: Layout | None) -> PlannedSave | None:
    """Take the optimizer's plan out of the cache. Return it if it is of the same layout."""
    with _lock:
        known = _kept.pop(optimizer, None)
    return known if known is not None and layout is not None and known.layout == layout else None


def keep(optimizer: Optimizer, planned: PlannedSave) -> None:
    """Keep the plan of a save that succeeded on all ranks for the optimizer's next save."""
    with _lock:
        _kept[optimizer] = planned


def layout_of(tensors: dict[str, Any], group: Group) -> Layout | None:
    """Return all that this rank's local plan depends on, or None if some of it is unknown."""
    ranks = tuple(dist.get_process_group_ranks(group)) if dist.is_initialized() else ()
    layout: list[Any] = [ranks, rank(group)]
    for key, tensor in tensors.items():
        if type(tensor) is DTensor:
            local = to_local(tensor)
            if type(local) not in (Tensor, nn.Parameter):
                return None  # it may plan its own items, as torchrec's does
            where = tensor.device_mesh, tensor.placements
            layout.append((key, tensor.shape, where, _properties(local)))
        elif type(tensor) is ShardedTensor:
            whole = tensor.metadata()
            shards = [
                (list(shard.metadata.shard_offsets), list(shard.metadata.shard_sizes))
                for shard in tensor.local_shards()
            ]
            layout.append((key, whole.size, shards, whole.tensor_properties))
        elif type(tensor) in (Tensor, nn.Parameter):
            layout.append((key, tensor.shape, _properties(tensor)))
        else:
            return None
    return tuple(layout)


def _properties(tensor: Tensor) -> tuple[Any, ...]:
    """Return the fields of DCP's ``TensorProperties`` without the constant ``memory_format``."""
    return tensor.dtype, tensor.layout, tensor.requires_grad, tensor.is_pinned()
