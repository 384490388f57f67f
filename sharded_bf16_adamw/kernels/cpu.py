"""The CPU backend: ctypes over the library that ``setup.py`` compiles from ``csrc/``.

The library is plain C and needs neither torch nor Python headers. One C source serves every
instruction set (``ISAS``). The fastest is selected at run time; the environment variable
``SHARDED_BF16_ADAMW_ISA`` forces one. Every instruction set and number of threads gives the bits of
:mod:`sharded_bf16_adamw.kernels.reference`. The library's own thread pool has
``torch.get_num_threads()`` threads, including the caller. ctypes releases the GIL during a call.
"""

from __future__ import annotations

import ctypes
import math
import os
import struct
import weakref
from array import array
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .backend import PRECISION_SUMS, Runs, StepArgs, TensorLists, check_grad_dtypes
from .device_memory import NormScratch

# in the order of csrc/native.h; every processor supports the baseline of its architecture
ISAS = ("baseline", "avx2", "avx512")
ISA_VARIABLE = "SHARDED_BF16_ADAMW_ISA"
LIBRARY = Path(__file__).with_name("_native.so")
SOURCE_FOLDER = "its source folder"  # marks a reason that a C compiler does not remove
ABI_VERSION = 5

# sba_hyper of csrc/native.h: lr, beta1, beta2, eps, weight_decay, grad_scale
_HYPER = struct.Struct("6d")
_dtype_of = attrgetter("dtype")
_library: ctypes.CDLL | None = None
_unavailable_reason: str | None = None
_isa: int | None = None


def unavailable_reason(device: torch.device | None = None) -> str | None:
    """Return in one clause why the library is not available, or None if it is.

    Raises:
        ValueError: ``SHARDED_BF16_ADAMW_ISA`` names an instruction set that is unknown, or that
            this processor lacks.
    """
    if _load() is not None:
        _selected_isa()
    return _unavailable_reason


def supported_isas() -> list[str]:
    """Return the library's instruction sets that this processor supports, slowest first."""
    library = _load()
    if library is None:
        return []
    return [name for i, name in enumerate(ISAS) if library.sba_isa_supported(i)]


def select_isa(name: str | None) -> None:
    """Use one instruction set from now on.

    Args:
        name: one of ``ISAS``; None for that of ``SHARDED_BF16_ADAMW_ISA``, or else the fastest.

    Raises:
        ValueError: ``name`` is unknown, or this processor lacks it.
    """
    global _isa
    _isa = None if name is None else _isa_number(name, "the instruction set")


def selected_isa() -> str:
    """Return the instruction set in use.

    Raises:
        ValueError: see :func:`unavailable_reason`.
    """
    return ISAS[_selected_isa()]


class NativeTable:
    """Addresses of the parameters and their states: a :class:`.backend.BackendTable`.

    Raises:
        RuntimeError: the library is not available, see :func:`unavailable_reason`.
    """

    def __init__(self, tensors: TensorLists) -> None:
        self._tensors = tensors
        self._library = _required_library()
        count = len(tensors.params)
        # Buffers for the arguments of a step. ctypes and struct fill them with less code than
        # numpy, which matters with cold caches.
        self._grad_is_f32 = (ctypes.c_uint8 * count)()
        self._grad_address = (ctypes.c_int64 * count)()
        self._grad_dtypes: list[torch.dtype] = []  # encoded in _grad_is_f32
        columns = [[0 if x is None else x.data_ptr() for x in column] for column in tensors[:5]]
        self._address = np.array(columns, np.int64)
        numel = np.array([p.numel() for p in tensors.params], np.int64)
        self._is_f32 = np.array([p.dtype == torch.float32 for p in tensors.params], np.uint8)
        self._group = np.array(tensors.group_indices(), np.int64)
        self._groups = int(self._group.max(initial=0)) + 1
        self._hypers = ctypes.create_string_buffer(self._groups * _HYPER.size)
        self._handle = _new_table(self._library, self._address, numel, self._is_f32, self._group)
        weakref.finalize(self, self._library.sba_table_free, self._handle)

    def update_(self, args: StepArgs) -> None:
        """Take one step in place; see :class:`.backend.BackendTable`.

        Several threads may step different tables at the same time.

        Raises:
            TypeError: a gradient is neither bfloat16 nor float32. Nothing was changed.
        """
        if args.found_inf is not None and args.found_inf.item() != 0:
            return
        self._library.sba_table_update(*self._arguments(args))

    def precision_sums(self, args: StepArgs, runs: Runs | None = None) -> Tensor:
        """Add up the sums of one step; see :meth:`.backend.FusedAdamW.precision_sums`.

        Their last bits depend on the instruction set, but not on the number of threads.
        """
        n_rows = len(args.hypers) if runs is None else runs.n_rows
        sums = torch.zeros((n_rows, len(PRECISION_SUMS)), dtype=torch.float64, device="cpu")
        arguments = self._arguments(args)
        if runs is None:
            self._add_precision_sums(sums, arguments)
        elif len(runs.params):
            self._add_precision_sums_of_runs(runs, sums, arguments)
        return sums

    def _add_precision_sums(self, sums: Tensor, arguments: tuple[Any, ...]) -> None:
        if self._library.sba_table_precision_sums(*arguments, sums.data_ptr()):
            raise MemoryError("no memory for the partial sums of precision_stats")

    def _add_precision_sums_of_runs(
        self, runs: Runs, sums: Tensor, arguments: tuple[Any, ...]
    ) -> None:
        """Add up runs with a temporary table, whose parameters are the runs."""
        params, begins, counts, rows, n_rows = runs
        _, grads, grad_is_f32, hypers, threads, isa = arguments
        is_f32 = self._is_f32[params]
        address = self._address.take(params, axis=1)  # in C order, unlike [:, params]
        address[:4] += begins * np.where(is_f32, 4, 2)
        address[3, is_f32 != 0] = 0  # a float32 parameter has no correction
        run_grad_is_f32 = np.frombuffer(grad_is_f32, np.uint8)[params]
        run_grads = np.frombuffer(grads, np.int64)[params] + begins * np.where(
            run_grad_is_f32, 4, 2
        )
        # The library adds up by group, so each row of the result becomes a group of that table.
        group_of_row = np.zeros(n_rows, np.int64)
        group_of_row[rows] = self._group[params]
        row_hypers = np.frombuffer(hypers, np.float64).reshape(self._groups, -1)[group_of_row]
        handle = _new_table(self._library, address, counts, is_f32, rows)
        try:
            pointers = (x.ctypes.data for x in (run_grads, run_grad_is_f32, row_hypers))
            self._add_precision_sums(sums, (handle, *pointers, threads, isa))
        finally:
            self._library.sba_table_free(handle)

    def _arguments(self, args: StepArgs) -> tuple[Any, ...]:
        """Check the gradients' dtypes, and return the arguments of the library's functions."""
        grads, hypers, grad_scale, _ = args
        dtypes = list(map(_dtype_of, grads))
        if dtypes != self._grad_dtypes:
            self._grad_is_f32[:] = list(_float32_flags(dtypes))
            self._grad_dtypes = dtypes
        self._grad_address[:] = list(map(Tensor.data_ptr, grads))
        scale = 1.0 if grad_scale is None else float(grad_scale)
        for i in range(self._groups):
            lr, beta1, beta2, eps, weight_decay, maximize = hypers[i]
            signed = -scale if maximize else scale
            at = i * _HYPER.size
            _HYPER.pack_into(self._hypers, at, float(lr), beta1, beta2, eps, weight_decay, signed)
        return (
            self._handle,
            self._grad_address,
            self._grad_is_f32,
            self._hypers,
            torch.get_num_threads(),
            _selected_isa(),
        )


make_table = NativeTable


def grad_sum_sq(grads: list[Tensor], scratch: NormScratch | None = None) -> Tensor:
    """Sum the squares of all elements in fp64; see :func:`.clip.grad_sum_sq`.

    The bits depend neither on the number of threads nor on the instruction set.

    Raises:
        TypeError: a gradient is neither bfloat16 nor float32.
    """
    return torch.tensor(_sum_sq(grads), dtype=torch.float64, device="cpu")


def norm_and_clip_coefficient(
    grads: list[Tensor], max_norm: float, scratch: NormScratch | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return :func:`clip_coefficient` of :func:`grad_sum_sq`."""
    return _clip(_sum_sq(grads), max_norm)


def clip_coefficient(sum_sq: Tensor, max_norm: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the clip coefficient; see :func:`.clip.clip_coefficient`."""
    return _clip(sum_sq.item(), max_norm)


def _clip(sum_sq: float, max_norm: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the coefficient in Python floats: tensor operations cost more than a small step."""
    norm = math.sqrt(sum_sq)
    coefficient = min(max_norm / (norm + 1e-6), 1.0)
    values = array("f", (norm, coefficient, 0.0 if math.isfinite(sum_sq) else 1.0))
    return torch.frombuffer(values, dtype=torch.float32).unbind()  # type: ignore[return-value]


def _sum_sq(grads: list[Tensor]) -> float:
    library = _required_library()
    is_f32 = array("B", _float32_flags(list(map(_dtype_of, grads))))
    if not all(map(Tensor.is_contiguous, grads)):
        # even dense ones: the sum has the order of the elements, not of their memory
        grads = [g.contiguous() for g in grads]
    address = array("q", list(map(Tensor.data_ptr, grads)))
    numel = array("q", list(map(Tensor.numel, grads)))
    pointers = (column.buffer_info()[0] for column in (address, numel, is_f32))
    threads, isa = torch.get_num_threads(), _selected_isa()
    total = float(library.sba_sum_sq(len(grads), *pointers, threads, isa))
    if total < 0:
        raise MemoryError("no memory for the partial sums of the gradient norm")
    return total


def _load() -> ctypes.CDLL | None:
    """Load the library once per process; on failure set ``_unavailable_reason`` and return None."""
    global _library, _unavailable_reason
    if _library is None and _unavailable_reason is None:
        if not LIBRARY.exists():
            folder = LIBRARY.parents[2]
            if (folder / "setup.py").is_file():
                _unavailable_reason = (
                    f"Python imports the package from {SOURCE_FOLDER} {folder}, where the native "
                    "library was not built; run from another directory to use an installed "
                    "package, or build the library there with pip install -e ."
                )
            else:
                _unavailable_reason = (
                    "the native library was not built (no C compiler when the package was "
                    "installed?)"
                )
            return None
        try:
            library = _declare(ctypes.CDLL(str(LIBRARY)))
            if library.sba_abi_version() != ABI_VERSION:
                raise OSError(
                    "it was built from another version of the sources; install the package again"
                )
            _library = library
        except (OSError, AttributeError) as error:
            _unavailable_reason = f"the native library {LIBRARY} does not load: {error}"
    return _library


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the signatures of csrc/api.c; without them ctypes truncates pointers to 32 bits."""
    pointer, int64, int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    signatures: dict[str, tuple[list[type], type | None]] = {
        "sba_table_new": ([int64, pointer, pointer, pointer, pointer], pointer),
        "sba_table_free": ([pointer], None),
        "sba_table_update": ([pointer, pointer, pointer, pointer, int32, int32], None),
        "sba_table_precision_sums": (
            [pointer, pointer, pointer, pointer, int32, int32, pointer],
            int32,
        ),
        "sba_sum_sq": ([int64, pointer, pointer, pointer, int32, int32], ctypes.c_double),
        "sba_isa_supported": ([int32], int32),
        "sba_abi_version": ([], int32),
    }
    for name, (arguments, result) in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    return library


def _new_table(library: ctypes.CDLL, address: Any, numel: Any, is_f32: Any, group: Any) -> int:
    """Return a new table's handle. The library copies the arrays."""
    pointers = (column.ctypes.data for column in (address, numel, is_f32, group))
    handle = library.sba_table_new(len(numel), *pointers)
    if not handle:
        raise MemoryError("no memory for the pointer table of the optimizer step")
    return int(handle)


def _required_library() -> ctypes.CDLL:
    library = _load()
    if library is None:
        raise RuntimeError(f"the CPU backend is not available: {_unavailable_reason}")
    return library


def _selected_isa() -> int:
    """Return the index of the selected instruction set in ``ISAS``; read the environment once."""
    global _isa
    if _isa is None:
        forced = os.environ.get(ISA_VARIABLE)
        origin = f"the environment variable {ISA_VARIABLE}"
        _isa = _isa_number(forced or supported_isas()[-1], origin)
    return _isa


def _isa_number(name: str, origin: str) -> int:
    if name not in ISAS:
        raise ValueError(f"{origin} is {name!r}; choose one of {', '.join(ISAS)}")
    if name not in supported_isas():
        raise ValueError(
            f"{origin} is {name!r}, which this processor lacks; choose one of "
            f"{', '.join(supported_isas())}"
        )
    return ISAS.index(name)


def _float32_flags(dtypes: list[torch.dtype]) -> bytes:
    """Return one byte for each gradient: 1 if it is float32, else 0."""
    found = set(dtypes)
    check_grad_dtypes(found)
    if torch.float32 not in found:
        return bytes(len(dtypes))
    return bytes(dtype is torch.float32 for dtype in dtypes)
