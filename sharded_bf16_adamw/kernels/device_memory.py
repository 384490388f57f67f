"""Arrays of addresses on the device, and helpers between torch and Triton.

No function in this module waits for the device, and a CUDA graph may capture all uploads of a step:

* Values that change from step to step (the gradients' addresses, hyper-parameters) reach the device
  by one asynchronous copy from pinned memory. torch's host allocator does not reuse pinned memory
  before a copy from it has completed.
* An array on the device never gets other values. A captured graph keeps reading the array that it
  was captured with. Its owner keeps that array alive, so the owner must live as long as the graph.
"""

from __future__ import annotations

import contextlib
import functools
import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 16  # bytes of one vector load
WARM_UP = (
    "take an eager step of the same parameters before each capture, as for every captured "
    "torch.optim optimizer"
)


class DeviceArray:
    """An int64 matrix on the device, uploaded only if its values have changed."""

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        self._shape = shape
        self._device = device
        self._values: list[list[int]] | None = None
        self._array = torch.empty(0, device="cpu")
        # pinned memory for the next capture, during which none can be allocated
        self._reserved: Tensor | None = None
        # device arrays that CUDA graphs read, each with the pinned memory that a graph copies to it
        self.captured: list[tuple[Tensor, Tensor | None]] = []
        self.reserve_pinned()

    def upload_if_changed(self, values: list[list[int]]) -> Tensor:
        """Return the matrix on the device with these values.

        Raises:
            RuntimeError: a CUDA graph captures new values, and no step since the last capture has
                reserved pinned memory.
        """
        capturing = is_capturing(self._device)
        if values == self._values:
            if capturing:
                self.captured.append((self._array, None))
            else:
                self.reserve_pinned()
            return self._array
        host = torch.tensor(values, dtype=torch.int64, device="cpu")
        if capturing:
            # The copy is part of the graph: only a replay fills the array, so steps outside of the
            # graph must not use it.
            if self._reserved is None:
                raise RuntimeError(
                    "a CUDA graph captures gradients at new addresses or other hyper-parameters, "
                    f"but no eager step has run since the last capture; {WARM_UP}"
                )
            self._reserved.copy_(host)
            array = self._reserved.to(self._device, non_blocking=True)
            self.captured.append((array, self._reserved))
            self._reserved = None
            return array
        if self._array.is_cuda:  # a kernel on another stream may still read the old array
            self._array.record_stream(torch.cuda.current_stream(self._device))
        self._array, self._values = upload(host, self._device), values
        self.reserve_pinned()
        return self._array

    def reserve_pinned(self) -> None:
        """Reserve pinned memory for the next capture, unless it is reserved already."""
        if self._reserved is None and self._device.type == "cuda":
            self._reserved = torch.empty(
                self._shape, dtype=torch.int64, device="cpu", pin_memory=True
            )


class NormScratch:
    """Memory for the norm of one set of gradients, reused from step to step.

    Each caller that computes a norm owns one. Callers cannot share it, because their kernels may
    run at the same time on two streams, and one CUDA graph may capture both.
    """

    def __init__(self) -> None:
        self.layouts: dict[tuple[Any, ...], Any] = {}  # of cuda_norm.py, least recently used first


def chunk_map(numels: Sequence[int] | np.ndarray, chunk: int) -> Tensor:
    """Return the row and the chunk of each program: int32 ``[programs, 2]`` on the CPU.

    An empty row has one program too: without any program, the kernel would not count its step.
    """
    counts = np.maximum(-(-np.asarray(numels, np.int64) // chunk), 1)
    row = np.repeat(np.arange(len(counts)), counts)
    first = np.repeat(counts.cumsum() - counts, counts)
    return torch.from_numpy(np.stack([row, np.arange(len(row)) - first], 1).astype(np.int32))


def upload(host: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting for it."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def double_bits(x: float) -> int:
    """Return the bits of a double as a signed integer.

    Triton would pass a Python float to a kernel as float32.
    """
    return int(struct.unpack("<q", struct.pack("<d", x))[0])


def is_capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph captures the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def device_context(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context that makes ``device`` current: Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def warps(threads: int, device: torch.device) -> int:
    """Return the number of warps of ``threads``. A warp has 32 threads, or 64 on most AMD GPUs."""
    return threads // (
        torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32
    )


@functools.cache
def interpreted() -> bool:
    """Return whether Triton interprets kernels on the CPU (``TRITON_INTERPRET``)."""
    import triton

    return bool(triton.knobs.runtime.interpret)
