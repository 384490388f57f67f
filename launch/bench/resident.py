"""Memory in use, as Linux or CUDA's allocator reports it, to compare with a count of tensors."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # written to clear_refs, it resets VmHWM to VmRSS
SAMPLE_S = 0.001


def used_bytes(device: torch.device) -> int | None:
    """Return the bytes in use: resident memory, or on CUDA what its allocator has given out.

    On the CPU, freed memory is first returned to the system. None if the system reports no bytes.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc keeps what is freed
        libc.malloc_trim(0)
    return _status("VmRSS")


@contextmanager
def peak_bytes(device: torch.device) -> Iterator[list[int]]:
    """Yield a list to which the peak of :func:`used_bytes` in the context is appended, if known.

    On the CPU, Linux records the peak (VmHWM). If this process may not reset VmHWM, a thread
    samples VmRSS instead, and may miss a short peak.
    """
    peak: list[int] = []
    resident = used_bytes(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.append(torch.cuda.max_memory_allocated(device))
    elif resident is None:
        yield peak
    elif _reset_peak():
        yield peak
        if (highest := _status("VmHWM")) is not None:
            peak.append(highest)
    else:
        with _sampled_peak(resident, peak):
            yield peak


def _status(key: str) -> int | None:
    """Return an entry of the process's status in bytes; None without such a file or entry."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(key)), None)


def _reset_peak() -> bool:
    try:
        CLEAR_REFS.write_text(RESET_PEAK)
    except OSError:
        return False
    return True


@contextmanager
def _sampled_peak(resident: int, peak: list[int]) -> Iterator[None]:
    done = threading.Event()
    largest = resident

    def sample() -> None:
        nonlocal largest
        while not done.wait(SAMPLE_S):
            largest = max(largest, _status("VmRSS") or 0)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    peak.append(largest)
