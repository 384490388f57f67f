"""Copies in CPU memory of what a rank is to write, so that training may change the originals.

The memory belongs to one save at a time. Afterwards it is kept with the optimizer for its next
asynchronous save: getting it from the operating system takes longer than copying.
"""

from __future__ import annotations

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.optim import Optimizer

_COPIERS = 4  # threads: training stands still meanwhile, and one core does not reach the memory's full speed
_Buffers = dict[
    MetadataIndex, Tensor
]  # of one rank's part of a checkpoint; pinned where they are copied to from a GPU
_spare: weakref.WeakKeyDictionary[Optimizer, _Buffers] = (
    weakref.WeakKeyDictionary()
)  # of the saves that are done
_spare_lock = threading.Lock()


class Staged(DefaultSavePlanner):
    """A planner that gives out copies of what this rank is to write.

    Args:
        planner: knows the originals.
        plan: what this rank writes.
        optimizer: with whom the memory is kept between saves. Without a spare one, as in two saves
            at once, memory is allocated.
    """

    def __init__(self, planner: SavePlanner, plan: SavePlan, optimizer: Optimizer) -> None:
        super().__init__()
        self._optimizer = weakref.ref(optimizer)
        self._buffers: _Buffers = {}
        with _spare_lock:
            kept = _spare.pop(optimizer, {})
        gpus, on_cpu = set(), []
        for item in plan.items:
            original = planner.resolve_data(item)
            assert isinstance(original, Tensor)
            buffer = kept.pop(item.index, None)
            if buffer is None or buffer.shape != original.shape or buffer.dtype != original.dtype:
                buffer = torch.empty(
                    original.shape, dtype=original.dtype, device="cpu", pin_memory=original.is_cuda
                )
            self._buffers[item.index] = buffer
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
        return self._buffers[write_item.index]

    def give_back(self) -> None:
        """Keep the memory for the optimizer's next save. The copies are gone."""
        optimizer, buffers, self._buffers = self._optimizer(), self._buffers, {}
        if optimizer is not None:
            with _spare_lock:
                _spare[optimizer] = buffers
