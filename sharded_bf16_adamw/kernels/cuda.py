"""The CUDA and ROCm backend: the host side of the Triton kernels of a step.

``cuda_norm.py`` is the same for the gradient norm. No call waits for the device, except to read an
``lr`` tensor that is on another device or neither float32 nor float64. Steps may be captured into a
CUDA graph (see ``device_memory.py``). Triton is imported when the first kernel is needed. torch
calls ROCm devices ``cuda`` too.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .backend import PRECISION_SUMS, Hyperparams, ParamTensors, Runs, StepArgs, TensorLists
from .cuda_norm import clip_coefficient as clip_coefficient
from .cuda_norm import grad_sum_sq as grad_sum_sq
from .cuda_norm import norm_and_clip_coefficient as norm_and_clip_coefficient
from .device_memory import (
    ALIGNMENT,
    WARM_UP,
    DeviceArray,
    chunk_map,
    device_context,
    double_bits,
    interpreted,
    is_capturing,
    upload,
    warps,
)
from .grad_addresses import GradientAddresses

MAX_CHUNK_MAPS = 4  # kept by _SameDtypeParams, one per list of variants


def unavailable_reason(device: torch.device | None = None) -> str | None:
    """Return in one clause why ``device`` (None: the current one) is not supported, or None."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA or ROCm device"
    index = None if device is None else device.index
    return _reason_on(torch.cuda.current_device() if index is None else index)


@functools.cache
def _reason_on(index: int) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if torch.version.hip is None and torch.cuda.get_device_capability(index)[0] < 8:
        return (
            f"{torch.cuda.get_device_name(index)} has no bfloat16 arithmetic (compute capability "
            "8.0 or newer is needed)"
        )
    return _launch_problem(torch.device("cuda", index))


def _launch_problem(device: torch.device) -> str | None:
    """Launch a small kernel; return the error as a clause, or None.

    This also detects that Triton has no C compiler to build its launcher.
    """
    if is_capturing(device):
        raise RuntimeError(f"a CUDA graph captures the first use of {device}; {WARM_UP}")
    sum_sq = torch.ones((), dtype=torch.float64, device=device)
    try:
        clip_coefficient(sum_sq, 1.0)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # an error of the device: the reference backend would fail too
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        return (
            f"Triton cannot launch a kernel on {device} ({type(error).__name__}: {first_line}); it "
            "needs a C compiler (gcc or clang in PATH, or one named by CC) and a writable cache "
            "folder"
        )
    return None


class TritonTable:
    """Addresses of the parameters and their states: a :class:`.backend.BackendTable`.

    They stay on the device between steps.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """

    def __init__(self, tensors: TensorLists) -> None:
        from .triton_adamw import HYPER_WIDTH

        params, groups = list(tensors.rows()), tensors.group_indices()
        self.device = tensors.params[0].device
        self._captured_hypers: list[Sequence[Hyperparams]] = []  # CUDA graphs read their lr tensors
        self._tensors = [x for param in params for x in param if x is not None]
        assert all(x.device == self.device for x in self._tensors), "tensors of several devices"
        if is_capturing(self.device):
            raise RuntimeError(
                f"a CUDA graph captures a step of these {len(params)} parameters for the first "
                f"time; {WARM_UP}"
            )
        self._group_count = max(groups) + 1
        self._hypers = DeviceArray((self._group_count, HYPER_WIDTH.value), self.device)
        self._by_dtype = []
        for dtype in (torch.bfloat16, torch.float32):
            # sorted by group, so that the programs of a group are consecutive
            indices = sorted(
                (i for i, p in enumerate(tensors.params) if p.dtype == dtype),
                key=groups.__getitem__,
            )
            if indices:
                selected = [params[i] for i in indices], [groups[i] for i in indices]
                self._by_dtype.append(_SameDtypeParams(indices, *selected))

    def update_(self, args: StepArgs) -> None:
        """Take one step in place; see :class:`.backend.BackendTable`.

        All groups share one launch. Each further variant takes one more: float32 parameters,
        float32 gradients of bfloat16 parameters, tensors off a 16-byte boundary. A captured graph
        keeps a Python ``lr`` as a constant, and reads a tensor on the device at each replay.

        Raises:
            RuntimeError: a CUDA graph captures new addresses of gradients, or new hyper-parameters,
                and no step since the last capture has reserved pinned memory for them. Or it
                captures an ``lr`` tensor of another device or dtype, whose value it would freeze.
        """
        with device_context(self.device):
            hypers = self._upload_hypers(args)
            if is_capturing(self.device):
                self._captured_hypers.append(args.hypers)
            # An upload may raise, so all come before the first launch.
            for params, grads in [(x, x.upload_grads(args)) for x in self._by_dtype]:
                params.launch(args, hypers, *grads)

    def precision_sums(self, args: StepArgs, runs: Runs | None = None) -> Tensor:
        """Add up the sums of one step; see :meth:`.backend.FusedAdamW.precision_sums`.

        One launch for each variant, as in :meth:`update_`, then a sum over programs for each row of
        the result. The addresses of runs are uploaded at each call.
        """
        shape = len(args.hypers) if runs is None else runs.n_rows, len(PRECISION_SUMS)
        total = torch.zeros(shape, dtype=torch.float64, device=self.device)
        with device_context(self.device):
            hypers = self._upload_hypers(args)
            for params in self._by_dtype:
                if runs is None:
                    params.add_precision_sums(total, args, hypers)
                else:
                    param_runs = runs.of_params(params.indices)
                    params.add_precision_sums_of_runs(param_runs, total, args, hypers)
        return total

    def _upload_hypers(self, args: StepArgs) -> Tensor:
        """Return the kernel's hyper-parameter array; see :func:`_hyper_values`."""
        hypers = args.hypers[: self._group_count]
        return self._hypers.upload_if_changed([_hyper_values(h, self.device) for h in hypers])

    @property
    def captured(self) -> bool:
        """True if a CUDA graph has captured a step; its replays read this table's memory."""
        return bool(self._captured_hypers)


make_table = TritonTable


def _hyper_values(hyper: Hyperparams, device: torch.device) -> list[int]:
    """Return one row of the kernel's hyper-parameter array (its layout is in triton_adamw.py)."""
    lr = hyper.lr
    if isinstance(lr, Tensor):
        is_double = lr.dtype == torch.float64
        if lr.device == device and (is_double or lr.dtype == torch.float32):
            # by address, since its value may change on the device
            doubles = map(double_bits, (0.0, *hyper[1:5]))
            return [*doubles, int(hyper.maximize), lr.data_ptr(), int(is_double)]
        if is_capturing(device):
            raise RuntimeError(
                f"a CUDA graph captures a step whose lr is {lr.dtype} on {lr.device}, and would "
                f"keep its present value; make lr a float32 or float64 tensor on {device}, or a "
                "number if it never changes"
            )
    return [*map(double_bits, (float(lr), *hyper[1:5])), int(hyper.maximize), 0, 0]


def _chunk_of(numel: int) -> int:
    """Return the number of elements per program for ``numel`` elements.

    On an H200, 6144 is faster than 8192: by 13 % at 2^24 elements, by 3 % at 2^30. With few
    elements, smaller chunks keep all multiprocessors busy.
    """
    return 1024 if numel <= 1 << 19 else 2048 if numel <= 1 << 21 else 6144


class _SameDtypeParams:
    """The parameters of one dtype. Their addresses and chunks stay on the device between steps.

    Args:
        indices: the index of each parameter's gradient in :attr:`StepArgs.grads`.
        params: each parameter with its states.
        groups: the index of each parameter's hyper-parameters.
    """

    def __init__(self, indices: list[int], params: list[ParamTensors], groups: list[int]) -> None:
        from . import triton_adamw as kernels

        self.indices = indices
        self.groups = groups
        device = params[0][0].device
        self.fp32 = params[0][0].dtype == torch.float32
        table = [
            [*(0 if x is None else x.data_ptr() for x in tensors), tensors[0].numel(), group, 0]
            for tensors, group in zip(params, groups, strict=True)
        ]
        unaligned = kernels.UNALIGNED_ROW.value | kernels.UNALIGNED_GRAD.value
        unaligned_rows = [
            any(address % ALIGNMENT for address in row[: kernels.ROW_STEP.value]) for row in table
        ]
        self._host_param_table = np.array(table, np.int64)
        self.param_table = upload(torch.from_numpy(self._host_param_table), device)
        numels = [tensors[0].numel() for tensors in params]
        self.chunk = _chunk_of(sum(numels))
        self._all_chunks = chunk_map(numels, self.chunk)
        self.chunks = upload(self._all_chunks, device)
        # variants of all parameters -> variant -> its chunks; most recently used last
        self._chunk_maps: dict[tuple[int, ...], dict[int, Tensor]] = {}
        self._captured_chunks: list[dict[int, Tensor]] = []  # CUDA graphs read them
        self.done_counter = torch.zeros(1, dtype=torch.int32, device=device)
        self.grads = GradientAddresses([unaligned if x else 0 for x in unaligned_rows], device)

    def upload_grads(self, args: StepArgs) -> tuple[Tensor, dict[int, Tensor]]:
        """Return the gradients' addresses on the device, and the chunks of each variant."""
        grad_addresses, variants = self.grads.upload([args.grads[i] for i in self.indices])
        if len(variants) == 1:
            return grad_addresses, {variants[0]: self.chunks}
        return grad_addresses, self._chunks_by_variant(variants)

    def launch(
        self,
        args: StepArgs,
        hypers: Tensor,
        grad_addresses: Tensor,
        chunks_by_variant: dict[int, Tensor],
    ) -> None:
        """Update the parameters.

        Args:
            args: those of the step.
            hypers: the kernel's hyper-parameter array.
            grad_addresses: of :meth:`upload_grads`.
            chunks_by_variant: of :meth:`upload_grads`.
        """
        from .triton_adamw import adamw_kernel

        for variant, chunks in chunks_by_variant.items():
            adamw_kernel[(chunks.shape[0],)](
                self.param_table,
                grad_addresses,
                hypers,
                chunks,
                self.done_counter,
                len(self.indices),
                self.chunk,
                args.grad_scale,
                args.found_inf,
                variant=variant,
                **self._options(),
            )

    def add_precision_sums(self, total: Tensor, args: StepArgs, hypers: Tensor) -> None:
        """Add each group's sums to its row of ``total``."""
        grad_addresses, chunks_by_variant = self.upload_grads(args)
        param_of_program = self._all_chunks[:, 0].numpy()
        group_of_program = np.array(self.groups)[param_of_program]
        variant_of_program = np.array(self.grads.variants)[param_of_program]
        for variant, chunks in chunks_by_variant.items():
            groups = group_of_program[variant_of_program == variant]
            inputs = self.param_table, grad_addresses, hypers, chunks
            self._launch_precision(total, inputs, groups, self.chunk, args.grad_scale, variant)

    def add_precision_sums_of_runs(
        self, runs: Runs, total: Tensor, args: StepArgs, hypers: Tensor
    ) -> None:
        """Add the sums of ``runs`` to ``total``; the kernel sees each run as one parameter."""
        from . import triton_adamw as kernels

        if not len(runs.params):
            return
        grads = [args.grads[i] for i in self.indices]
        runs = runs.select(np.argsort(runs.rows, kind="stable"))
        params, begins, counts, total_rows, _ = runs
        table = self._host_param_table[params]
        table[:, : kernels.ROW_STEP.value] += begins[:, None] * (4 if self.fp32 else 2)
        table[:, kernels.ROW_NUMEL.value] = counts
        if self.fp32:
            table[:, kernels.ROW_CORRECTION.value] = 0
        fp32_grad = np.array([g.dtype == torch.float32 for g in grads])[params]
        addresses = np.array(list(map(Tensor.data_ptr, grads)))[params] + begins * np.where(
            fp32_grad, 4, 2
        )
        unaligned_row = (table[:, : kernels.ROW_STEP.value] % ALIGNMENT).any(1)
        variants = (
            fp32_grad * kernels.FP32_GRAD.value
            | unaligned_row * kernels.UNALIGNED_ROW.value
            | (unaligned_row | (addresses % ALIGNMENT != 0)) * kernels.UNALIGNED_GRAD.value
        )
        chunk = _chunk_of(int(counts.sum()))
        chunks = chunk_map(counts, chunk).numpy()
        run_of_program = chunks[:, 0]
        for variant in np.unique(variants).tolist():
            selected = variants[run_of_program] == variant
            # one upload: each part starts at a multiple of 16 bytes
            parts = table, np.stack([addresses, variants]), chunks[selected].view(np.int64)
            packed = torch.from_numpy(np.concatenate([part.reshape(-1) for part in parts]))
            on_device = upload(packed, total.device)
            table_, grads_, chunks_ = on_device.split([part.size for part in parts])
            inputs = (
                table_.view(table.shape),
                grads_.view(2, -1),
                hypers,
                chunks_.view(torch.int32).view(-1, 2),
            )
            row_of_program = total_rows[run_of_program[selected]]
            self._launch_precision(total, inputs, row_of_program, chunk, args.grad_scale, variant)

    def _launch_precision(
        self,
        total: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor, Tensor],
        row_of_program: np.ndarray,
        chunk: int,
        grad_scale: Tensor | None,
        variant: int,
    ) -> None:
        """Launch the kernel, and add each program's sums to its row of ``total``.

        Args:
            total: changed in place.
            inputs: the first four arguments of the kernel.
            row_of_program: the row of ``total`` for each program; equal rows are consecutive.
            chunk: elements of one program.
            grad_scale: factor of the gradients.
            variant: variant of the programs' parameters.
        """
        from .triton_precision import precision_kernel

        param_table, grad_addresses, hypers, chunks = inputs
        shape = chunks.shape[0], total.shape[1]
        partials = torch.empty(shape, dtype=torch.float64, device=total.device)
        precision_kernel[(chunks.shape[0],)](
            param_table,
            grad_addresses,
            hypers,
            chunks,
            partials,
            param_table.shape[0],
            chunk,
            grad_scale,
            variant=variant,
            **self._options(),
        )
        starts = np.flatnonzero(np.diff(row_of_program, prepend=-1))
        rows, counts = row_of_program[starts].tolist(), np.diff(starts, append=len(row_of_program))
        for row, row_partials in zip(rows, partials.split(counts.tolist()), strict=True):
            total[row] += row_partials.sum(0)

    def _options(self) -> dict[str, Any]:
        from .triton_adamw import THREADS

        return {
            "fp32_param": self.fp32,
            "hardware_cast": not interpreted(),
            "flushing_sqrt": torch.version.hip is not None,
            "num_warps": warps(THREADS, self.param_table.device),
            "enable_fp_fusion": False,
        }

    def _chunks_by_variant(self, variants: list[int]) -> dict[int, Tensor]:
        """Return each variant's chunks to launch. A capture of new variants gets all chunks."""
        key = tuple(self.grads.variants)
        chunks_by_variant = self._chunk_maps.pop(key, None)
        if is_capturing(self.chunks.device):
            # A capture cannot upload. Each launch skips the other variants' chunks instead.
            if chunks_by_variant is None:
                return dict.fromkeys(variants, self.chunks)
            self._captured_chunks.append(chunks_by_variant)
        elif chunks_by_variant is None:
            variant_of_param = torch.tensor(key, dtype=torch.int64, device="cpu")
            variant_of_chunk = variant_of_param[self._all_chunks[:, 0]]
            chunks_by_variant = {
                variant: upload(self._all_chunks[variant_of_chunk == variant], self.chunks.device)
                for variant in variants
            }
        self._chunk_maps[key] = chunks_by_variant
        for old in list(self._chunk_maps)[:-MAX_CHUNK_MAPS]:
            for chunks in self._chunk_maps.pop(old).values():
                if chunks.is_cuda:  # a kernel on another stream may still read it
                    chunks.record_stream(torch.cuda.current_stream(chunks.device))
        return chunks_by_variant
