"""A cache of save plans: the next save of an optimizer reuses its plan if the layout is the same.

Each rank stores its part of the plan after a save that succeeded on all ranks. The next save
removes it from the cache first, so the plan of a failed save is never reused. Ranks compare the
plans' identities: either all of them reuse the plan, or all build a new one.
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
        layout: result of :func:`layout_of` for the tensors of this rank.
        identity: unique string of the plan, the same on all ranks.
        plan: the items that this rank writes.
        to_chunks: :attr:`.save_plan.MergedPlan.to_chunks` on rank 0, None on other ranks.
    """

    layout: Layout | None
    identity: str
    plan: SavePlan
    to_chunks: Callable[[list[Locations]], ChunkTable] | None


_plans: weakref.WeakKeyDictionary[Optimizer, PlannedSave] = weakref.WeakKeyDictionary()
_lock = threading.Lock()  # guards _plans


def pop_plan(optimizer: Optimizer, layout: Layout | None) -> PlannedSave | None:
    """Remove the optimizer's plan from the cache, and return it if it has the same layout."""
    with _lock:
        cached = _plans.pop(optimizer, None)
    return cached if cached and layout is not None and cached.layout == layout else None


def store_plan(optimizer: Optimizer, planned: PlannedSave) -> None:
    """Store the plan of a save that succeeded on all ranks, for the optimizer's next save."""
    with _lock:
        _plans[optimizer] = planned


def layout_of(tensors: dict[str, Any], group: Group) -> Layout | None:
    """Return everything that this rank's local plan depends on, or None if some is unknown."""
    ranks = tuple(dist.get_process_group_ranks(group)) if dist.is_initialized() else ()
    layout: list[Any] = [ranks, rank(group)]
    for key, tensor in tensors.items():
        if type(tensor) is DTensor:
            local = to_local(tensor)
            if type(local) not in (Tensor, nn.Parameter):
                return None  # a subclass may create its own write items, as torchrec's does
            sharding = tensor.device_mesh, tensor.placements
            layout.append((key, tensor.shape, sharding, _properties(local)))
        elif type(tensor) is ShardedTensor:
            metadata = tensor.metadata()
            shards = [
                (list(shard.metadata.shard_offsets), list(shard.metadata.shard_sizes))
                for shard in tensor.local_shards()
            ]
            layout.append((key, metadata.size, shards, metadata.tensor_properties))
        elif type(tensor) in (Tensor, nn.Parameter):
            layout.append((key, tensor.shape, _properties(tensor)))
        else:
            return None
    return tuple(layout)


def _properties(tensor: Tensor) -> tuple[Any, ...]:
    """Return the fields of DCP's ``TensorProperties`` without the constant ``memory_format``."""
    return tensor.dtype, tensor.layout, tensor.requires_grad, tensor.is_pinned()
