"""CUDA and ROCm back end: the host side of the Triton kernels. Triton is imported only when the first kernel is needed.

Nothing here waits for the device, and steps may be captured into a CUDA graph (see ``device_memory.py``).

ROCm presents itself to torch as ``cuda``, so the name serves both.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from .device_memory import (
    ALIGNMENT,
    WARM_UP,
    DeviceArray,
    GradientAddresses,
    NormScratch,
    chunk_map,
    double_bits,
    interpreted,
    is_capturing,
    on_device_of,
    upload,
    warps,
)
from .reference import Hyperparams

MAX_CHUNK_MAPS = 4  # mixtures of kinds of gradients whose chunk maps are kept
MAX_LAYOUTS = 16  # sets of gradients whose norm tables are kept, in each scratch


def available(device: torch.device | None = None) -> bool:
    """Whether this back end can serve tensors of ``device``, or of the current one."""
    return unavailable_reason(device) is None


def unavailable_reason(device: torch.device | None = None) -> str | None:
    """Why not, in a clause; None if it can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA or ROCm device"
    return _reason_on(
        torch.cuda.current_device() if device is None or device.index is None else device.index
    )


@functools.cache
def _reason_on(index: int) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if torch.version.hip is None and torch.cuda.get_device_capability(index)[0] < 8:
        return f"{torch.cuda.get_device_name(index)} has no bfloat16 arithmetic (compute capability 8.0 or newer is needed)"
    return _launch_problem(torch.device("cuda", index))


def _launch_problem(device: torch.device) -> str | None:
    """Launch a small kernel; return why that failed, in a clause. Triton compiles a launcher in C when it first needs one."""
    if is_capturing(device):
        raise RuntimeError(f"a CUDA graph captures the first use of {device}; {WARM_UP}")
    sum_sq = torch.ones((), dtype=torch.float64, device=device)
    try:
        clip_coefficient(sum_sq, 1.0)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # of the device, which the reference back end would meet as well
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        return (
            f"Triton cannot launch a kernel on {device} ({type(error).__name__}: {first_line}); it needs a C compiler (gcc or clang "
            "in PATH, or one named by CC) and a cache folder that it may write to"
        )
    return None


class Table:
    """Addresses of one device's parameters and their states, kept on the device between steps.

    The tensors are referenced; that their memory stays where it was is for the caller to see.

    Args:
        params: bfloat16 or float32, all on one device. Tensors of one index are dense and share their strides.
        exp_avgs, exp_avg_sqs: the parameter's dtype.
        corrections: bfloat16, or None for a float32 parameter.
        steps: 0-dim float32 on the device, one for each parameter.
        groups: for each parameter the index of its hyper-parameters; None: 0 for all.
    """

    def __init__(
        self,
        params: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        corrections: list[Tensor | None],
        steps: list[Tensor],
        groups: Sequence[int] | None = None,
    ) -> None:
        from .triton_adamw import HYPER_WIDTH

        rows: list[_Row] = list(zip(params, exp_avgs, exp_avg_sqs, corrections, steps, strict=True))
        group_of = groups or [0] * len(rows)
        self.device = params[0].device
        self._graphs_read: list[Sequence[Hyperparams]] = []
        self._tensors = [x for row in rows for x in row if x is not None]
        assert all(x.device == self.device for x in self._tensors), (
            "all tensors of a table are on one device"
        )
        if is_capturing(self.device):
            raise RuntimeError(
                f"a CUDA graph captures a step of these {len(params)} parameters for the first time; {WARM_UP}"
            )
        self._group_count = max(group_of) + 1
        self._hypers = DeviceArray((self._group_count, HYPER_WIDTH.value), self.device)
        self._by_dtype = []
        for dtype in (torch.bfloat16, torch.float32):
            indices = [i for i, p in enumerate(params) if p.dtype == dtype]
            if indices:
                self._by_dtype.append(
                    _Rows(indices, [rows[i] for i in indices], [group_of[i] for i in indices])
                )

    def update_(
        self,
        grads: list[Tensor],
        hypers: Sequence[Hyperparams],
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        zero_grads: bool = False,
    ) -> None:
        """Take one step; see :meth:`sharded_bf16_adamw.kernels.Table.update_` for the arguments.

        One launch, whatever the number of groups, and one more for each further kind of row: float32 parameters, float32 gradients of
        bfloat16 parameters, tensors off a 16-byte boundary. In a captured graph a Python ``lr`` is a constant; a tensor on the device
        is read anew.

        Raises:
            RuntimeError: while a graph is captured, if the addresses of the gradients or the hyper-parameters changed and no step outside
                of the capture has set aside the pinned memory for them.
        """
        with on_device_of(self.device):
            values = [_hyper_values(hyper, self.device) for hyper in hypers[: self._group_count]]
            if is_capturing(self.device):
                self._graphs_read.append(hypers)  # whose tensors they read
            table = self._hypers.holding(values)
            for rows in self._by_dtype:
                rows.launch(grads, table, grad_scale, found_inf, zero_grads)

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph has captured a step. Its replays read this table, which must live as long."""
        return bool(self._graphs_read)


def grad_sum_sq(grads: list[Tensor], scratch: NormScratch | None = None) -> Tensor:
    """Sum the squares of all gradients (bfloat16 or float32, any strides, one device) in one launch.

    Args:
        scratch: the caller's own, used again in the next call; a CUDA graph needs one. None: a new one.

    Returns:
        0-dim float64 on the device. Equal gradients of equal shapes give equal bits.
    """
    return _norm(grads, None, scratch)[0]


def grad_norm_clip(
    grads: list[Tensor], max_norm: float, scratch: NormScratch | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``grad_sum_sq`` and ``clip_coefficient`` in one launch, for gradients that are whole on this device."""
    sum_sq, clip = _norm(grads, max_norm, scratch)
    assert clip is not None
    return sum_sq, clip[0], clip[1], clip[2]


def clip_coefficient(sum_sq: Tensor, max_norm: float) -> tuple[Tensor, Tensor, Tensor]:
    """Derive what a clipped step needs from a sum of squares, on the device and in one launch.

    Args:
        sum_sq: 0-dim float64 (summed over ranks).
        max_norm: the norm to clip to.

    Returns:
        0-dim float32 ``(norm, coefficient, found_inf)``, computed in double and rounded once. ``coefficient`` is
        ``min(1, max_norm / (norm + 1e-6))`` as in :func:`torch.nn.utils.clip_grad_norm_`; ``found_inf`` is 1 where the sum is
        infinite or NaN, else 0.
    """
    from .triton_norm import clip_kernel

    clip = torch.empty(3, dtype=torch.float32, device=sum_sq.device)
    with on_device_of(sum_sq.device):
        clip_kernel[(1,)](sum_sq, clip, double_bits(max_norm), num_warps=1, enable_fp_fusion=False)
    return clip[0], clip[1], clip[2]


_Row = tuple[
    Tensor, Tensor, Tensor, Tensor | None, Tensor
]  # param, exp_avg, exp_avg_sq, correction, step


def _hyper_values(hyper: Hyperparams, device: torch.device) -> list[int]:
    """The ``HYPER_WIDTH`` values of triton_adamw.py."""
    lr = hyper.lr
    if (
        isinstance(lr, Tensor)
        and lr.device == device
        and lr.dtype in (torch.float32, torch.float64)
    ):  # it may change on the device
        return [
            *map(double_bits, (0.0, *hyper[1:5])),
            int(hyper.maximize),
            lr.data_ptr(),
            int(lr.dtype == torch.float64),
        ]
    if isinstance(lr, Tensor) and is_capturing(device):
        raise RuntimeError(
            f"a CUDA graph captures a step whose lr is {lr.dtype} on {lr.device}, and would keep its present value; make lr a float32 "
            f"or float64 tensor on {device}, or a number if it is never to change"
        )
    return [*map(double_bits, (float(lr), *hyper[1:5])), int(hyper.maximize), 0, 0]


def _chunk_of(numel: int) -> int:
    """Choose the elements of one program for a launch over ``numel`` in all.

    On an H200 small chunks keep all processors busy where there is little to do (a third faster at 2^20 elements), and large ones save the
    start of programs elsewhere (2 % faster from 2^28 on).
    """
    return 4096 if numel <= 1 << 21 else 8192 if numel < 1 << 27 else 16384


class _Rows:
    """The parameters of one dtype: what is constant between steps, on the device. ``indices`` tells which gradients are theirs."""

    def __init__(self, indices: list[int], rows: list[_Row], groups: list[int]) -> None:
        from . import triton_adamw as kernels

        self.indices = indices
        device = rows[0][0].device
        self.fp32 = rows[0][0].dtype == torch.float32
        table = [
            [*(0 if x is None else x.data_ptr() for x in row), row[0].numel(), group, 0]
            for row, group in zip(rows, groups, strict=True)
        ]
        unaligned = kernels.UNALIGNED_ROW.value | kernels.UNALIGNED_GRAD.value
        off = [
            any(address % ALIGNMENT for address in row[: kernels.ROW_STEP.value]) for row in table
        ]
        self.rows = upload(torch.tensor(table, dtype=torch.int64, device="cpu"), device)
        numels = [row[0].numel() for row in rows]
        self.chunk = _chunk_of(sum(numels))
        self._all_chunks = chunk_map(numels, self.chunk)
        self.chunks = upload(self._all_chunks, device)
        self._chunks_of: dict[
            tuple[int, ...], dict[int, Tensor]
        ] = {}  # by the kinds of all rows, then by kind; the newest last
        self._captured_chunks: list[dict[int, Tensor]] = []  # that CUDA graphs read
        self.finished = torch.zeros(1, dtype=torch.int32, device=device)
        self.grads = GradientAddresses([unaligned if x else 0 for x in off], device)

    def launch(
        self,
        grads: list[Tensor],
        hypers: Tensor,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        zero_grads: bool,
    ) -> None:
        from . import triton_adamw as kernels

        table, kinds = self.grads.on_device([grads[i] for i in self.indices])
        chunks_of = {kinds[0]: self.chunks} if len(kinds) == 1 else self._chunks_by_kind(kinds)
        for kind, chunks in chunks_of.items():
            kernels.adamw_kernel[(chunks.shape[0],)](
                self.rows,
                table,
                hypers,
                chunks,
                self.finished,
                len(self.indices),
                self.chunk,
                grad_scale,
                found_inf,
                kind=kind,
                fp32_param=self.fp32,
                zero_grads=zero_grads,
                hardware_cast=not interpreted(),
                flushing_sqrt=torch.version.hip is not None,
                num_warps=warps(kernels.THREADS, self.rows.device),
                enable_fp_fusion=False,
            )

    def _chunks_by_kind(self, kinds: list[int]) -> dict[int, Tensor]:
        """The chunks of each kind's rows: each launch has programs for its own alone."""
        of_rows = tuple(self.grads.kinds)
        found = self._chunks_of.pop(of_rows, None)
        if is_capturing(self.chunks.device):
            if (
                found is None
            ):  # nothing can be uploaded: each launch skips the chunks of the other kinds
                return dict.fromkeys(kinds, self.chunks)
            self._captured_chunks.append(found)
        elif found is None:
            kind_of = torch.tensor(of_rows, dtype=torch.int64, device="cpu")[self._all_chunks[:, 0]]
            found = {
                kind: upload(self._all_chunks[kind_of == kind], self.chunks.device)
                for kind in kinds
            }
        self._chunks_of[of_rows] = found
        for old in list(self._chunks_of)[:-MAX_CHUNK_MAPS]:
            for chunks in self._chunks_of.pop(old).values():
                if (
                    chunks.is_cuda
                ):  # a kernel of another stream than the one that it was made on may still read it
                    chunks.record_stream(torch.cuda.current_stream(chunks.device))
        return found


class _NormLayout:
    """What the norm of gradients of given lengths needs on the device. Its scratch memory serves one stream, or the captures."""

    def __init__(
        self, numels: tuple[int, ...], device: torch.device, twin: _NormLayout | None = None
    ) -> None:
        from . import triton_norm as kernels

        self.numels: Tensor = (
            twin.numels
            if twin
            else upload(torch.tensor(numels, dtype=torch.int64, device="cpu"), device)
        )
        self.chunk = kernels.MIN_CHUNK
        while sum(numels) > self.chunk * kernels.MAX_PROGRAMS:
            self.chunk *= 2
        self.chunks: Tensor = (
            twin.chunks if twin else upload(chunk_map(list(numels), self.chunk), device)
        )
        self.partials = torch.empty(self.chunks.shape[0], dtype=torch.float64, device=device)
        self.finished = torch.zeros(1, dtype=torch.int32, device=device)
        self.grads = GradientAddresses([0] * len(numels), device)


def _norm_layout(
    numels: tuple[int, ...], device: torch.device, scratch: NormScratch
) -> _NormLayout:
    """The layout of the current stream or, while it captures, the one that an earlier call has made for captures."""
    layouts = scratch.layouts
    for_capture = (device, "capture", numels)
    if is_capturing(device):
        if for_capture not in layouts:
            raise RuntimeError(
                f"a CUDA graph captures the norm of these {len(numels)} gradients for the first time; {WARM_UP}"
            )
        return layouts[for_capture]
    key = (device, torch.cuda.current_stream().cuda_stream if device.type == "cuda" else 0, numels)
    layout = layouts[key] = layouts.pop(key) if key in layouts else _NormLayout(numels, device)
    if device.type == "cuda":
        twin = (
            layouts.pop(for_capture)
            if for_capture in layouts
            else _NormLayout(numels, device, layout)
        )
        layouts[for_capture] = twin
        twin.grads.array.keep_spare()
    for old in [k for k, x in layouts.items() if not x.grads.array.captured][:-MAX_LAYOUTS]:
        del layouts[old]
    return layout


def _norm(
    grads: list[Tensor], max_norm: float | None, scratch: NormScratch | None
) -> tuple[Tensor, Tensor | None]:
    """Launch the norm kernel: the sum of squares and, with a ``max_norm``, float32 ``[norm, coefficient, found_inf]``."""
    from . import triton_norm as kernels

    device = grads[0].device
    if not all(map(Tensor.is_contiguous, grads)):
        grads = [g.contiguous() for g in grads]  # the kernel walks memory from the first element on
    with on_device_of(device):
        layout = _norm_layout(tuple(map(Tensor.numel, grads)), device, scratch or NormScratch())
        table, _ = layout.grads.on_device(grads)
        sum_sq = torch.empty((), dtype=torch.float64, device=device)
        clip = None if max_norm is None else torch.empty(3, dtype=torch.float32, device=device)
        kernels.norm_kernel[(layout.chunks.shape[0],)](
            layout.numels,
            table,
            layout.chunks,
            layout.partials,
            layout.finished,
            sum_sq,
            clip,
            len(grads),
            layout.chunk,
            double_bits(0.0 if max_norm is None else max_norm),
            num_warps=warps(kernels.THREADS, device),
            enable_fp_fusion=False,
        )
    return sum_sq, clip
