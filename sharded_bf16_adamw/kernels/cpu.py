"""The CPU back end: ctypes over the library that ``setup.py`` compiles from ``csrc/`` (plain C, no torch, no Python headers).

One C body serves every instruction set (``ISAS``), chosen at run time; the environment variable ``SHARDED_BF16_ADAMW_ISA`` forces one.
All of them, and any number of threads, give the bits of :mod:`sharded_bf16_adamw.kernels.reference`. The library's own thread
pool has ``torch.get_num_threads()`` threads, the caller among them. ctypes releases the GIL while it runs.
"""

from __future__ import annotations

import ctypes
import math
import os
import struct
import weakref
from array import array
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .device_memory import NormScratch
from .reference import Hyperparams

ISAS = (
    "baseline",
    "avx2",
    "avx512",
)  # in the order of csrc/native.h; baseline is what every processor of the machine's kind has
ISA_VARIABLE = "SHARDED_BF16_ADAMW_ISA"
LIBRARY = Path(__file__).with_name("_native.so")
ABI_VERSION = 3

_HYPER = struct.Struct(
    "6d"
)  # sba_hyper of csrc/native.h: lr, beta1, beta2, eps, weight_decay, grad_scale
_dtype_of = attrgetter("dtype")
_library: ctypes.CDLL | None = None
_unavailable_reason: str | None = None
_isa: int | None = None


def available(device: torch.device | None = None) -> bool:
    """Whether the library was built and loads here.

    Raises:
        ValueError: ``SHARDED_BF16_ADAMW_ISA`` names an instruction set that is unknown or that this processor lacks.
    """
    if _load() is None:
        return False
    _selected_isa()
    return True


def unavailable_reason(device: torch.device | None = None) -> str | None:
    """Why :func:`available` is False, as one clause; None where it is True."""
    _load()
    return _unavailable_reason


def supported_isas() -> list[str]:
    """The instruction sets that the library can use on this processor, slowest first. Empty without the library."""
    library = _load()
    return (
        []
        if library is None
        else [name for i, name in enumerate(ISAS) if library.sba_isa_supported(i)]
    )


def select_isa(name: str | None) -> None:
    """Use one instruction set from now on, or with None what ``SHARDED_BF16_ADAMW_ISA`` says, or else the fastest.

    Raises:
        ValueError: ``name`` is unknown, or this processor lacks it.
    """
    global _isa
    _isa = None if name is None else _isa_number(name, "the instruction set")


def selected_isa() -> str:
    """The instruction set in use. Raises ValueError as :func:`available` does."""
    return ISAS[_selected_isa()]


class Table:
    """Pointers of one device's parameters and their states, kept between steps.

    It holds its tensors, so their memory cannot be handed to others; that they still *are* the parameters' and states' tensors,
    with the same storage, is for the caller to check before each step.

    Args:
        params: n tensors, bfloat16 or float32, on the CPU; each dense.
        exp_avgs, exp_avg_sqs: n tensors of the parameters' dtypes, sizes and strides.
        corrections: for each parameter a bfloat16 tensor of its size and strides, or None where it is float32.
        steps: n 0-dim float32 tensors, the steps taken so far.
        groups: n indices into the hyper-parameters of a step; None: 0 for all.

    Raises:
        RuntimeError: the library is not there, see :func:`unavailable_reason`.
    """

    def __init__(
        self,
        params: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        corrections: Sequence[Tensor | None],
        steps: list[Tensor],
        groups: Sequence[int] | None = None,
    ) -> None:
        self._tensors = (
            list(params),
            list(exp_avgs),
            list(exp_avg_sqs),
            list(corrections),
            list(steps),
        )
        self._library = _required_library()
        self._grad_dtypes: list[torch.dtype] = []  # of the last step, as flags in _grad_is_f32
        # What a step writes for the library to read. ctypes and struct fill a few numbers with less code to fetch than numpy does, which
        # counts where the step before has left no cache warm.
        self._grad_is_f32 = (ctypes.c_uint8 * len(params))()
        self._grad_address = (ctypes.c_int64 * len(params))()
        columns = [[0 if x is None else x.data_ptr() for x in column] for column in self._tensors]
        address = np.array(columns, np.int64)
        numel = np.array([p.numel() for p in params], np.int64)
        is_f32 = np.array([p.dtype == torch.float32 for p in params], np.uint8)
        group = np.array(groups or [0] * len(params), np.int64)
        self._groups = int(group.max(initial=0)) + 1
        self._hypers = ctypes.create_string_buffer(self._groups * _HYPER.size)
        columns_of_numbers = (
            address.ctypes.data,
            numel.ctypes.data,
            is_f32.ctypes.data,
            group.ctypes.data,
        )
        self._handle = self._library.sba_table_new(len(params), *columns_of_numbers)
        if not self._handle:
            raise MemoryError("no memory for the pointer table of the optimizer step")
        weakref.finalize(self, self._library.sba_table_free, self._handle)

    def update_(
        self,
        grads: list[Tensor],
        hypers: Sequence[Hyperparams],
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        zero_grads: bool = False,
    ) -> None:
        """Take one step, in place; arguments as :meth:`sharded_bf16_adamw.kernels.Table.update_`.

        Tables may step in several threads at once, but each in one.

        Args:
            grads: n tensors, bfloat16 or float32, of the parameters' sizes and strides; 2-byte (4-byte) alignment is enough.

        Raises:
            ValueError: there are not as many gradients as parameters, or too few hyper-parameters.
            TypeError: a gradient is neither bfloat16 nor float32. Nothing was changed.
        """
        if len(grads) != len(self._tensors[0]):
            raise ValueError(
                f"update_ needs one gradient for each of the {len(self._tensors[0])} parameters, but got {len(grads)}"
            )
        if len(hypers) < self._groups:
            raise ValueError(
                f"update_ needs hyper-parameters for {self._groups} groups, but got {len(hypers)}"
            )
        if found_inf is not None and found_inf.item() != 0:
            return
        dtypes = list(map(_dtype_of, grads))
        if dtypes != self._grad_dtypes:
            self._grad_is_f32[:] = list(_float32_flags(dtypes))
            self._grad_dtypes = dtypes
        self._grad_address[:] = list(map(Tensor.data_ptr, grads))
        scale = 1.0 if grad_scale is None else float(grad_scale)
        for i in range(self._groups):
            lr, beta1, beta2, eps, weight_decay, maximize = hypers[i]
            _HYPER.pack_into(
                self._hypers,
                i * _HYPER.size,
                float(lr),
                beta1,
                beta2,
                eps,
                weight_decay,
                -scale if maximize else scale,
            )
        self._library.sba_table_update(
            self._handle,
            self._grad_address,
            self._grad_is_f32,
            self._hypers,
            zero_grads,
            torch.get_num_threads(),
            _selected_isa(),
        )


def grad_sum_sq(grads: list[Tensor], scratch: NormScratch | None = None) -> Tensor:
    """Sum the squares of all elements: fp64 throughout, in an order that depends neither on threads nor on the instruction set.

    Args:
        grads: bfloat16 or float32, on the CPU, any shapes and strides.

    Returns:
        0-dim float64.

    Raises:
        TypeError: a gradient has another dtype.
    """
    return torch.tensor(_sum_sq(grads), dtype=torch.float64, device="cpu")


def grad_norm_clip(
    grads: list[Tensor], max_norm: float, scratch: NormScratch | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`grad_sum_sq` and :func:`clip_coefficient` together."""
    return _clip(_sum_sq(grads), max_norm)


def clip_coefficient(sum_sq: Tensor, max_norm: float) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`sharded_bf16_adamw.kernels.clip_coefficient`."""
    return _clip(sum_sq.item(), max_norm)


def _clip(sum_sq: float, max_norm: float) -> tuple[Tensor, Tensor, Tensor]:
    """In Python, as the value is at hand: a dozen tensor operations would cost more than a small step."""
    norm = math.sqrt(sum_sq)
    values = array(
        "f", (norm, min(max_norm / (norm + 1e-6), 1.0), 0.0 if math.isfinite(sum_sq) else 1.0)
    )
    return torch.frombuffer(values, dtype=torch.float32).unbind()  # type: ignore[return-value]


def _sum_sq(grads: list[Tensor]) -> float:
    library = _required_library()
    is_f32 = array("B", _float32_flags(list(map(_dtype_of, grads))))
    if not all(map(Tensor.is_contiguous, grads)):
        grads = [
            g.contiguous() for g in grads
        ]  # also dense ones: the order of the sum is that of the elements, not of memory
    address, numel = (
        array("q", list(map(Tensor.data_ptr, grads))),
        array("q", list(map(Tensor.numel, grads))),
    )
    pointers = (column.buffer_info()[0] for column in (address, numel, is_f32))
    total = float(
        library.sba_sum_sq(len(grads), *pointers, torch.get_num_threads(), _selected_isa())
    )
    if total < 0:
        raise MemoryError("no memory for the partial sums of the gradient norm")
    return total


def stream_ceiling(arrays: Sequence[Tensor]) -> None:
    """Read five arrays and write all but the first in place, as they were, with next to no arithmetic: the memory traffic of a step.

    For benchmarks: what a plain loop makes of this machine's memory.

    Args:
        arrays: five contiguous bfloat16 tensors of one size, in the roles g, p, m, v, c.
    """
    assert len(arrays) == 5 and all(a.is_contiguous() and a.dtype == torch.bfloat16 for a in arrays)
    assert len({a.numel() for a in arrays}) == 1
    address = np.array([a.data_ptr() for a in arrays], np.int64)
    _required_library().sba_stream_ceiling(
        address.ctypes.data, arrays[0].numel(), torch.get_num_threads(), _selected_isa()
    )


def read_ceiling(tensors: Sequence[Tensor]) -> int:
    """Read contiguous bfloat16 tensors, with next to no arithmetic. For benchmarks: what a plain loop makes of it.

    Returns:
        The exclusive or of all whole 64-byte blocks, folded to 32 bits.
    """
    assert all(x.is_contiguous() and x.dtype == torch.bfloat16 for x in tensors)
    address = np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))
    numel = np.fromiter(map(Tensor.numel, tensors), np.int64, len(tensors))
    pointers = (address.ctypes.data, numel.ctypes.data)
    return int(
        _required_library().sba_read_ceiling(
            len(tensors), *pointers, torch.get_num_threads(), _selected_isa()
        )
    )


def _load() -> ctypes.CDLL | None:
    """The library, or None with ``_unavailable_reason`` set. Looked for once in a process."""
    global _library, _unavailable_reason
    if _library is None and _unavailable_reason is None:
        if not LIBRARY.exists():
            _unavailable_reason = (
                "the native library was not built (no C compiler when the package was installed?)"
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
    """Declare the signatures of csrc/native.c; without them ctypes would truncate pointers to 32 bits."""
    pointer, int64, int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    signatures: dict[str, tuple[list[type], type | None]] = {
        "sba_table_new": ([int64, pointer, pointer, pointer, pointer], pointer),
        "sba_table_free": ([pointer], None),
        "sba_table_update": ([pointer, pointer, pointer, pointer, int32, int32, int32], None),
        "sba_sum_sq": ([int64, pointer, pointer, pointer, int32, int32], ctypes.c_double),
        "sba_stream_ceiling": ([pointer, int64, int32, int32], None),
        "sba_read_ceiling": ([int64, pointer, pointer, int32, int32], ctypes.c_uint32),
        "sba_isa_supported": ([int32], int32),
        "sba_abi_version": ([], int32),
    }
    for name, (arguments, result) in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    return library


def _required_library() -> ctypes.CDLL:
    library = _load()
    if library is None:
        raise RuntimeError(f"the CPU back end is not available: {_unavailable_reason}")
    return library


def _selected_isa() -> int:
    """The number of the instruction set in use; the environment is read once."""
    global _isa
    if _isa is None:
        forced = os.environ.get(ISA_VARIABLE)
        _isa = _isa_number(
            forced or supported_isas()[-1], f"the environment variable {ISA_VARIABLE}"
        )
    return _isa


def _isa_number(name: str, origin: str) -> int:
    if name not in ISAS:
        raise ValueError(f"{origin} is {name!r}, which is not one of {', '.join(ISAS)}")
    if name not in supported_isas():
        raise ValueError(
            f"{origin} is {name!r}, which this processor lacks; it has {', '.join(supported_isas())}"
        )
    return ISAS.index(name)


def _float32_flags(dtypes: list[torch.dtype]) -> bytes:
    """For each gradient 1 where it is float32, else 0."""
    found = set(dtypes)
    for dtype in found:
        if dtype not in (torch.bfloat16, torch.float32):
            raise TypeError(
                f"a gradient has dtype {dtype}, but only bfloat16 and float32 gradients are supported"
            )
    if torch.float32 not in found:
        return bytes(len(dtypes))
    return bytes(dtype is torch.float32 for dtype in dtypes)
