"""Staging: copy this rank's part of a save to CPU memory, so that training may continue.

The memory belongs to one save at a time. It is then kept for the optimizer's next asynchronous
save, because allocation takes longer than the copies.
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

# Training is blocked while staging copies, and one core does not reach the memory's full bandwidth.
_COPY_THREADS = 4
_SMALL = 1 << 16  # bytes below which a copy is faster than handing it to a thread
_Buffers = dict[MetadataIndex, Tensor]  # of one rank; pinned if the original is on a GPU
_spare: weakref.WeakKeyDictionary[Optimizer, _Buffers] = weakref.WeakKeyDictionary()
_spare_lock = threading.Lock()


class StagedPlanner(DefaultSavePlanner):
    """A planner that resolves this rank's write items to copies.

    Args:
        planner: the planner that resolves them to the originals.
        plan: this rank's write items.
        optimizer: owner of the memory between saves. New memory is allocated if there is none, or
            if a concurrent save uses it.
    """

    def __init__(self, planner: SavePlanner, plan: SavePlan, optimizer: Optimizer) -> None:
        super().__init__()
        self._optimizer = weakref.ref(optimizer)
        self._buffers: _Buffers = {}
        with _spare_lock:
            spare = _spare.pop(optimizer, {})
        gpus, on_cpu = set(), []
        for item in plan.items:
            original = planner.resolve_data(item)
            assert isinstance(original, Tensor)
            buffer = spare.pop(item.index, None)
            if buffer is None or buffer.shape != original.shape or buffer.dtype != original.dtype:
                buffer = torch.empty(
                    original.shape, dtype=original.dtype, device="cpu", pin_memory=original.is_cuda
                )
            self._buffers[item.index] = buffer
            if original.is_cuda:
                buffer.copy_(original.detach(), non_blocking=True)
                gpus.add(original.device)
            elif original.nbytes < _SMALL:
                buffer.copy_(original.detach())
            else:
                on_cpu.append((buffer, original.detach()))
        with ThreadPoolExecutor(_COPY_THREADS) as pool:
            list(pool.map(lambda pair: pair[0].copy_(pair[1]), on_cpu))
        for gpu in gpus:  # copies run on these GPUs, whichever is the current one
            torch.cuda.current_stream(gpu).synchronize()

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """Return the copy."""
        return self._buffers[write_item.index]

    def give_back(self) -> None:
        """Keep the memory for the optimizer's next asynchronous save."""
        optimizer, buffers, self._buffers = self._optimizer(), self._buffers, {}
        if optimizer is not None:
            with _spare_lock:
                _spare[optimizer] = buffers
