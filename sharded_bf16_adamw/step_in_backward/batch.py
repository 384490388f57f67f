"""Batches of gradients that are used in one update, because each kernel launch has a fixed cost.

[Note: gradients that share memory]
All gradients of one FSDP2 group are views of one buffer, which is freed only with the last view. So
the size of a batch counts the storages that it keeps alive, and a batch ends only where a storage
ends. The previous backward pass shows which parameter is the last in its storage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

BATCH_BYTES = 2**20  # a launch costs about as much as the update of this many bytes of gradients


@dataclass
class Batch:
    """Gradients that wait for their update, all on one device and one stream."""

    device: torch.device
    stream: torch.cuda.Stream | None
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)  # local
    storages: set[int] = field(default_factory=set)
    nbytes: int = 0  # of the storages

    def add(self, param: Tensor, grad: Tensor) -> None:
        """Add one parameter and its local gradient."""
        storage = grad.untyped_storage()
        if storage._cdata not in self.storages:
            self.storages.add(storage._cdata)
            self.nbytes += storage.nbytes()
        self.params.append(param)
        self.grads.append(grad)


class Batcher:
    """A collector of gradients into a batch, until it is full.

    Attributes:
        batch: the gradients that wait for their update; the update sets this to None.
    """

    def __init__(self) -> None:
        self.batch: Batch | None = None
        self._storage_ends: set[int] = set()  # ids of the parameters that are last in a storage

    def add(self, param: Tensor, grad: Tensor, flush: Callable[[], None]) -> None:
        """Add one parameter and its local gradient. ``flush`` updates a batch that is full."""
        storage, batch = grad.untyped_storage(), self.batch
        stream = torch.cuda.current_stream(grad.device) if grad.is_cuda else None
        is_shared = storage.nbytes() > grad.nbytes
        if batch is not None and storage._cdata not in batch.storages:
            if batch.grads[-1].untyped_storage().nbytes() > batch.grads[-1].nbytes:
                self._storage_ends.add(id(batch.params[-1]))
            if batch.nbytes >= BATCH_BYTES:
                flush()
        elif batch is None and is_shared and grad.storage_offset():
            # The last batch ended inside this storage, so a recorded end was wrong: record anew.
            self._storage_ends.clear()
        if batch is not None and (batch.device, batch.stream) != (grad.device, stream):
            flush()
        if self.batch is None:
            self.batch = Batch(grad.device, stream)
        self.batch.add(param, grad)
        is_last = not is_shared or id(param) in self._storage_ends
        if is_last and self.batch.nbytes >= BATCH_BYTES:
            flush()

    def forget_params(self) -> None:
        """Forget which parameters are last in a storage, after parameters were replaced."""
        self._storage_ends.clear()
