"""The memory of emulated programs: allowed ranges of this process's memory, and shared memory.

Addresses are signed integers, one for each active thread.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from .ptx_instructions import Array

BASE = 64  # numpy refuses an array at address zero


class Memory:
    """This process's memory.

    Args:
        allowed: the ranges (address, bytes) that programs may access. They may overlap.
    """

    base = BASE

    def __init__(self, allowed: Sequence[tuple[int, int]]) -> None:
        ranges = sorted(allowed)
        self._starts = np.array([start for start, _ in ranges], dtype=np.int64)
        self._ends = np.maximum.accumulate(
            np.array([start + size for start, size in ranges], dtype=np.int64)
        )

    def cells(self, dtype: Any) -> Array:
        return _address_space(dtype)

    def objection(self, addresses: Array, size: int, writes: bool) -> str:
        """Return what is wrong with an access of ``size`` bytes at the addresses, or ""."""
        if (addresses % size).any():
            return f"{hex(addresses[addresses % size != 0][0])} is not a multiple of {size}"
        before = np.searchsorted(self._starts, addresses, "right") - 1
        outside = (before < 0) | (addresses + size > self._ends[before])
        return (
            f"{size} bytes at {hex(addresses[outside][0])} are in no tensor"
            if outside.any()
            else ""
        )


class Shared:
    """The shared memory of one program."""

    base = 0

    def __init__(self, size: int) -> None:
        self._bytes = np.zeros(-(-size // 16) * 16, dtype=np.uint8)
        self._written = np.zeros(size, dtype=np.bool_)

    def cells(self, dtype: Any) -> Array:
        return self._bytes.view(dtype)

    def objection(self, addresses: Array, size: int, writes: bool) -> str:
        """Return what is wrong, as Memory does. Reading what was never written is wrong too."""
        if (
            (addresses % size).any()
            or addresses.min() < 0
            or addresses.max() + size > len(self._written)
        ):
            places = sorted(set(addresses.tolist()))
            return f"{size} bytes at one of {places} of {len(self._written)} in shared memory"
        touched = (addresses[:, None] + np.arange(size)).ravel()
        if writes:
            self._written[touched] = True
        return "" if self._written[touched].all() else "reads shared memory that was never written"


@functools.cache
def _address_space(dtype: Any) -> Array:
    """Return the whole address space as one array. numpy accesses only the indexed elements."""
    size = np.dtype(dtype).itemsize

    class Everything:
        __array_interface__: ClassVar = {
            "data": (BASE, False),
            "shape": ((1 << 48) // size - BASE,),
            "typestr": np.dtype(dtype).str,
            "version": 3,
        }

    return np.asarray(Everything())
