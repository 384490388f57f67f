"""Arrays of addresses on the device, and other plumbing between torch and Triton.

Nothing here waits for the device, and everything may be captured into a CUDA graph:

* What changes from step to step (the gradients' addresses, hyper-parameters) reaches the device by one asynchronous copy from pinned
  memory. torch's host allocator does not reuse pinned memory before a copy from it is done.
* Such an array is never overwritten on the device. A captured graph goes on reading the one that it was captured with,
  and the owner keeps that one alive: it must live as long as the graph.
"""

from __future__ import annotations

import contextlib
import functools
import struct
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes of one vector load
WARM_UP = "take a step like it before each capture, as for every captured torch.optim optimizer"


class DeviceArray:
    """An int64 matrix on the device, uploaded anew only where it changed."""

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        self._shape = shape
        self._device = device
        self._values: list[list[int]] | None = None
        self._array = torch.empty(0, device="cpu")
        self._spare: Tensor | None = (
            None  # pinned memory for a capture, during which none can be allocated
        )
        self.captured: list[tuple[Tensor, Tensor | None]] = []  # what CUDA graphs go on reading
        self.keep_spare()

    def holding(self, values: list[list[int]]) -> Tensor:
        """The matrix with these values."""
        capturing = is_capturing(self._device)
        if values == self._values:
            if capturing:
                self.captured.append((self._array, None))
            else:
                self.keep_spare()
            return self._array
        host = torch.tensor(values, dtype=torch.int64, device="cpu")
        if capturing:  # the copy belongs to the graph: the array is not filled before a replay, so steps outside must not use it
            if self._spare is None:
                raise RuntimeError(
                    f"a CUDA graph captures new gradients or hyper-parameters for a second time; {WARM_UP}"
                )
            self._spare.copy_(host)
            array = self._spare.to(self._device, non_blocking=True)
            self.captured.append((array, self._spare))
            self._spare = None
            return array
        if (
            self._array.is_cuda
        ):  # a kernel of another stream than the one that it was made on may still read the old one
            self._array.record_stream(torch.cuda.current_stream(self._device))
        self._array, self._values = upload(host, self._device), values
        self.keep_spare()
        return self._array

    def keep_spare(self) -> None:
        """Set pinned memory aside for the next capture, if there is none."""
        if self._spare is None and self._device.type == "cuda":
            self._spare = torch.empty(self._shape, dtype=torch.int64, device="cpu", pin_memory=True)


class NormScratch:
    """Memory in which the norm of one set of gradients is computed, step after step.

    It belongs to whoever asks for that norm. Two owners share none, so their kernels may run at the same time on two streams,
    and one CUDA graph may capture both.
    """

    def __init__(self) -> None:
        self.layouts: dict[
            tuple[Any, ...], Any
        ] = {}  # of the back end, the least recently used first


class GradientAddresses:
    """Addresses and kinds of a list of gradients on the device: int64 ``[2, n]``."""

    def __init__(self, row_kinds: list[int], device: torch.device) -> None:
        from . import triton_adamw as kernels

        self._of_fp32, self._of_unaligned = kernels.FP32_GRAD.value, kernels.UNALIGNED_GRAD.value
        self._row_kinds = row_kinds
        self._key: tuple[list[int], list[torch.dtype]] | None = None
        self.kinds: list[int] = []  # of the last list
        self.array = DeviceArray((2, len(row_kinds)), device)

    def on_device(self, grads: list[Tensor]) -> tuple[Tensor, list[int]]:
        """The array and the kinds that occur in it."""
        pointers, dtypes = data_pointers(grads), [g.dtype for g in grads]
        if (pointers, dtypes) != self._key:
            fp32, unaligned, is_fp32 = self._of_fp32, self._of_unaligned, torch.float32
            self.kinds = [
                kind | (fp32 if dtype is is_fp32 else 0) | (unaligned if pointer % ALIGNMENT else 0)
                for pointer, dtype, kind in zip(pointers, dtypes, self._row_kinds, strict=True)
            ]
            self._key = (pointers, dtypes)
        return self.array.holding([pointers, self.kinds]), sorted(set(self.kinds))


def chunk_map(numels: list[int], chunk: int) -> Tensor:
    """int32 ``[programs, 2]`` on the CPU: the row and the chunk of each program. An empty row has one, so that its step counts."""
    counts = torch.tensor([max(1, -(-n // chunk)) for n in numels], dtype=torch.int64, device="cpu")
    row = torch.arange(len(numels), device="cpu").repeat_interleave(counts)
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    return torch.stack([row, torch.arange(len(row), device="cpu") - first], dim=1).to(torch.int32)


def upload(host: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting for it."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def data_pointers(tensors: list[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def double_bits(x: float) -> int:
    """The bits of a double as a signed integer: a Python float argument would reach the kernel as float32."""
    return int(struct.unpack("<q", struct.pack("<d", x))[0])


def is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def on_device_of(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on torch's current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def warps(threads: int, device: torch.device) -> int:
    """Warps of 32 threads, or of 64 on most AMD devices."""
    return threads // (
        torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32
    )


@functools.cache
def interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)
