"""Plain loops on the CPU, whose memory bandwidth ``benchmark.py`` compares steps with.

The first call compiles ``bandwidth.c`` and the thread pool of the package into a temporary folder,
with the flags of ``setup.py``.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sharded_bf16_adamw.kernels import cpu

CSRC = Path(cpu.__file__).with_name("csrc")
SOURCES = [Path(__file__).with_suffix(".c"), CSRC / "pool.c", CSRC / "plan.c"]
FLAGS = "-std=gnu11 -O3 -ffp-contract=off -fno-math-errno -Wno-psabi -pthread -fPIC -shared"


def copy_bandwidth(arrays: Sequence[Tensor]) -> None:
    """Read five arrays and write all but the first back unchanged: the traffic of a step.

    Args:
        arrays: five contiguous bfloat16 tensors of one size, in the roles g, p, m, v, c.
    """
    assert len(arrays) == 5 and all(a.is_contiguous() and a.dtype == torch.bfloat16 for a in arrays)
    assert len({a.numel() for a in arrays}) == 1
    addresses = _int64(map(Tensor.data_ptr, arrays))
    _library().copy_bandwidth(addresses, arrays[0].nbytes, *_threads_and_isa())


def read_bandwidth(tensors: Sequence[Tensor]) -> int:
    """Read contiguous bfloat16 tensors: the traffic of a gradient norm.

    Returns:
        The XOR of all whole 64-byte blocks, folded to 32 bits.
    """
    assert all(x.is_contiguous() and x.dtype == torch.bfloat16 for x in tensors)
    address, numel = _int64(map(Tensor.data_ptr, tensors)), _int64(map(Tensor.numel, tensors))
    return int(_library().read_bandwidth(len(tensors), address, numel, *_threads_and_isa()))


def _int64(values: map[int]) -> ctypes.Array[ctypes.c_int64]:
    numbers = array("q", values)
    return (ctypes.c_int64 * len(numbers)).from_buffer(numbers)


def _threads_and_isa() -> tuple[int, int]:
    """Return the thread count and the index of the instruction set that the package uses."""
    return torch.get_num_threads(), cpu.ISAS.index(cpu.selected_isa())


@functools.cache
def _library() -> ctypes.CDLL:
    compiler = os.environ.get("CC", "").split() or [
        next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), "cc")
    ]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "bandwidth.so")
        command = [*compiler, *FLAGS.split(), f"-I{CSRC}", *map(str, SOURCES), "-o", str(target)]
        subprocess.run(command, check=True)
        library = ctypes.CDLL(str(target))
    pointer, int64, int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.copy_bandwidth.argtypes = [pointer, int64, int32, int32]
    library.copy_bandwidth.restype = None
    library.read_bandwidth.argtypes = [int64, pointer, pointer, int32, int32]
    library.read_bandwidth.restype = ctypes.c_uint32
    return library
