"""Copies in CPU memory of what a rank is to write, so that training may change the originals.

The memory is kept for the next asynchronous save: getting it from the operating system takes longer than copying.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem

_COPIERS = 4  # threads: training stands still meanwhile, and one core does not reach the memory's full speed
_buffers: dict[MetadataIndex, Tensor] = {}  # of one checkpoint; pinned where they are copied to from a GPU


class Staged(DefaultSavePlanner):
    """Stands for a planner that has a plan; gives out copies of the data, of what this rank is to write alone.

    Args:
        planner: knows the originals.
        plan: what this rank writes. The save before this one is done: its copies are overwritten.
    """

    def __init__(self, planner: SavePlanner, plan: SavePlan) -> None:
        super().__init__()
        kept = dict(_buffers)
        _buffers.clear()
        gpus, on_cpu = set(), []
        for item in plan.items:
            original = planner.resolve_data(item)
            assert isinstance(original, Tensor)
            buffer = kept.pop(item.index, None)
            if buffer is None or buffer.shape != original.shape or buffer.dtype != original.dtype:
                buffer = torch.empty(original.shape, dtype=original.dtype, device="cpu", pin_memory=original.is_cuda)
            _buffers[item.index] = buffer
            if original.is_cuda:
                buffer.copy_(original.detach(), non_blocking=True)
                gpus.add(original.device)
            else:
                on_cpu.append((buffer, original.detach()))
        with ThreadPoolExecutor(_COPIERS) as pool:
            list(pool.map(lambda pair: pair[0].copy_(pair[1]), on_cpu))
        for gpu in gpus:  # not the current one alone, which may be another: each copy was queued where its original lies
            torch.cuda.current_stream(gpu).synchronize()

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return _buffers[write_item.index]
