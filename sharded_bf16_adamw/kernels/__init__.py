"""The update on local tensors, dispatched by device. Nothing here knows of ranks, meshes or modules.

========= ============================================= ===========================================
back end  serves                                        where
========= ============================================= ===========================================
native    CPU                                           ``cpu.py`` over the C library of ``csrc/``
triton    CUDA and ROCm                                 ``cuda.py``, ``triton_adamw.py``, ``triton_norm.py``
reference every device; the specification of the others ``reference.py``
========= ============================================= ===========================================

Every back end module has ``Table`` (one device's parameters and states, with ``update_``), ``grad_sum_sq``, ``available`` and
``unavailable_reason``; those that do better than tensor operations also ``clip_coefficient`` and ``grad_norm_clip``.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Sequence
from itertools import chain
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .device_memory import NormScratch, is_capturing
from .reference import Hyperparams
from .reference import double_device as double_device

BACKENDS = ("reference", "native", "triton")
_MODULES = {"reference": "reference", "native": "cpu", "triton": "cuda"}
_BY_DEVICE = {"cpu": "native", "cuda": "triton"}  # other devices (MPS, XPU, ...): reference
_FALLBACK_DEVICES: set[torch.device] = set()  # their first choice is not available


class Table:
    """Parameters of one device with their states, and the back end's table of where they lie: made once, used at every step.

    It keeps the memory of its tensors alive, so that no other tensor can come to lie there. Whether the parameters and states still
    do is for the caller to check before each step.

    Args:
        params: bfloat16 or float32, all on one device; any strides.
        exp_avgs: running averages of the gradients, of the parameters' shapes and dtypes.
        exp_avg_sqs: of the squared gradients, likewise.
        corrections: bfloat16 of the parameter's shape, or None for a float32 parameter.
        steps: 0-dim float32, the steps taken so far.
        groups: for each parameter which of the hyper-parameters given to :meth:`update_` are its own; None: the first, for all.
        backend: one of ``BACKENDS``, or None to choose by device.

    Raises:
        ValueError: a state has another number of elements than its parameter.
        TypeError: a tensor has a dtype that is none of the above.
    """

    def __init__(
        self,
        params: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        corrections: Sequence[Tensor | None],
        steps: list[Tensor],
        groups: Sequence[int] | None = None,
        backend: str | None = None,
    ) -> None:
        self._backend = _backend_module(params[0].device, backend)
        self._params = params
        self._all_contiguous = all(
            x is None or x.is_contiguous()
            for x in chain(params, exp_avgs, exp_avg_sqs, corrections)
        )
        rows = list(zip(params, exp_avgs, exp_avg_sqs, corrections, steps, strict=True))
        for index, row in enumerate(rows):
            _check_row(index, *row)
        self._rows = rows
        self._groups = groups or [0] * len(rows)
        self._storages = [x.untyped_storage() for row in rows for x in row if x is not None]
        # A row of unlike strides, or with gaps, cannot be walked as one range: each step works on contiguous copies of it.
        self._flat = [i for i, row in enumerate(rows) if _walkable(row[:4])]
        self._strided = [i for i in range(len(rows)) if i not in set(self._flat)]
        self._table: Any = (
            self._make([rows[i] for i in self._flat], self._flat) if self._flat else None
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
        """Take one step in place, on all parameters together; the arguments by name are those of :func:`adamw_bf16_`.

        Args:
            grads: one for each parameter, of its shape and device, which is for the caller to see.
            hypers: hyper-parameters, one for each group.
        """
        if self._strided and is_capturing(self._params[0].device):
            shape = tuple(self._params[self._strided[0]].shape)
            raise RuntimeError(
                f"a CUDA graph captures a step of a parameter of shape {shape} whose memory has gaps, or another order than its state's; "
                "make both contiguous"
            )
        if self._all_contiguous and all(map(Tensor.is_contiguous, grads)):
            self._table.update_(
                grads, hypers, grad_scale=grad_scale, found_inf=found_inf, zero_grads=zero_grads
            )
        else:
            self._update_any_strides(
                grads, hypers, grad_scale=grad_scale, found_inf=found_inf, zero_grads=zero_grads
            )
        # so that autograd notices a backward pass through overwritten weights, as after any in-place operation of torch
        torch.autograd.graph.increment_version(self._params)

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph has captured a step, and so reads what this table holds whenever it is replayed."""
        return getattr(self._table, "captured", False)

    def _make(self, rows: Sequence[tuple[Tensor | None, ...]], indices: list[int]) -> Any:
        return self._backend.Table(
            *[list(column) for column in zip(*rows, strict=True)],
            [self._groups[i] for i in indices],
        )

    def _update_any_strides(
        self, grads: list[Tensor], hypers: Sequence[Hyperparams], **flags: Any
    ) -> None:
        """As :meth:`update_`, where some tensor is not contiguous."""
        if self._flat:
            laid_out = [_laid_out_as(self._params[i], grads[i]) for i in self._flat]
            self._update_rows(
                self._table, [grads[i] for i in self._flat], laid_out, hypers, **flags
            )
        for i in self._strided:
            row = self._rows[i]
            copies = [x if x is None else x.contiguous() for x in row[:4]]
            self._update_rows(
                self._make([(*copies, row[4])], [i]),
                [grads[i]],
                [grads[i].contiguous()],
                hypers,
                **flags,
            )
            for original, copy in zip(row[:4], copies, strict=True):
                if original is not None and copy is not None and copy is not original:
                    original.copy_(copy)

    @staticmethod
    def _update_rows(
        table: Any,
        grads: list[Tensor],
        laid_out: list[Tensor],
        hypers: Sequence[Hyperparams],
        **flags: Any,
    ) -> None:
        """One call of the back end; ``laid_out`` are the gradients, copied where they have not their parameter's strides."""
        table.update_(laid_out, hypers, **flags)
        if flags["zero_grads"]:
            for grad, copy in zip(grads, laid_out, strict=True):
                if copy is not grad:
                    grad.copy_(copy)  # zero where the step was taken


def adamw_bf16_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    corrections: Sequence[Tensor | None],
    steps: list[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    zero_grads: bool = False,
    backend: str | None = None,
) -> None:
    """Take one AdamW step on local tensors, in place, by the rule of :mod:`sharded_bf16_adamw.kernels.reference`.

    Index ``i`` of every list belongs to one parameter; its tensors have one shape and one device. Any strides serve. For repeated
    steps on the same tensors make a :class:`Table`.

    Args:
        params: bfloat16 or float32. Updated.
        grads: bfloat16 or float32. Read (and zeroed where ``zero_grads``).
        exp_avgs: the parameter's dtype. Updated.
        exp_avg_sqs: the parameter's dtype. Updated.
        corrections: bfloat16, or None for a float32 parameter. Updated.
        steps: 0-dim float32, the steps taken before this one. Counted up by one.
        lr: learning rate of this step, a float or a one-element tensor.
        beta1: decay rate of ``exp_avgs``.
        beta2: decay rate of ``exp_avg_sqs``.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        maximize: ascend instead of descend.
        grad_scale: 0-dim float32 that multiplies the gradients in fp32 as they are read (a clip coefficient).
        found_inf: 0-dim float32; where it is not zero, nothing at all changes.
        zero_grads: zero the gradients in the same pass.
        backend: one of ``BACKENDS``, or None to choose by device.

    Raises:
        ValueError: ``backend`` is unknown or cannot serve here, or a tensor has another number of elements, or device, than its parameter.
        TypeError: a tensor has a dtype that is none of the above.
    """
    if not params:
        return
    for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
        if (grad.numel(), grad.device) != (param.numel(), param.device):
            raise ValueError(
                f"gradient {index} has {grad.numel()} elements on {grad.device} but its parameter {param.numel()} on {param.device}"
            )
    hyper = Hyperparams(lr, beta1, beta2, eps, weight_decay, maximize)
    table = Table(params, exp_avgs, exp_avg_sqs, corrections, steps, backend=backend)
    table.update_(grads, [hyper], grad_scale=grad_scale, found_inf=found_inf, zero_grads=zero_grads)


def grad_sum_sq(
    grads: list[Tensor], backend: str | None = None, scratch: NormScratch | None = None
) -> Tensor:
    """Sum the squares of all elements of ``grads`` (bfloat16 or float32, one device; at least one tensor).

    Args:
        grads: the tensors.
        backend: one of ``BACKENDS``, or None to choose by device.
        scratch: the caller's own for these tensors' sizes, kept from step to step; a CUDA graph needs one. None: a new one.

    Returns:
        0-dim float64 on the gradients' device (:func:`double_device`: on the CPU where that has no float64), so that sums over
        ranks can be added before the square root.
    """
    return _backend_module(grads[0].device, backend).grad_sum_sq(grads, scratch)


def clip_coefficient(
    sum_sq: Tensor, max_norm: float, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Derive what a clipped and guarded step needs from the sum of squares of all gradients, without waiting for the device.

    Args:
        sum_sq: 0-dim float64, summed over ranks.
        max_norm: the largest norm; infinity does not clip.

    Returns:
        0-dim float32 ``(norm, coefficient, found_inf)``, computed in double and rounded once: the coefficient is
        ``min(1, max_norm / (norm + 1e-6))`` as in :func:`torch.nn.utils.clip_grad_norm_`; ``found_inf`` is 1 where the sum is inf or NaN.
    """
    module = _backend_module(sum_sq.device, backend)
    if hasattr(module, "clip_coefficient"):
        return module.clip_coefficient(sum_sq, max_norm)
    norms = sum_sq.sqrt()
    coefficient = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    return norms.float(), coefficient.float(), (~sum_sq.isfinite()).float()


def grad_norm_clip(
    grads: list[Tensor],
    max_norm: float,
    backend: str | None = None,
    scratch: NormScratch | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`grad_sum_sq` and :func:`clip_coefficient`, in one launch where the back end can, for gradients that are whole here."""
    module = _backend_module(grads[0].device, backend)
    if hasattr(module, "grad_norm_clip"):
        return module.grad_norm_clip(grads, max_norm, scratch)[-3:]
    return clip_coefficient(module.grad_sum_sq(grads, scratch), max_norm, backend)


def check_backend(backend: str | None) -> None:
    """Raise ValueError, with the reason, where ``backend`` is unknown or cannot serve on this machine."""
    if backend is None:
        return
    if backend not in BACKENDS:
        raise ValueError(
            f"Invalid backend: {backend!r}; choose one of {', '.join(BACKENDS)} or None"
        )
    module = _module(backend)
    if not module.available():
        raise ValueError(
            f"backend {backend!r} cannot serve here: {module.unavailable_reason()}; use None to choose by device"
        )


def backend_for(device: torch.device, backend: str | None) -> str:
    """Return the name of the back end for tensors of ``device``, without touching the device.

    It is the first choice until an update has fallen back to the reference.
    """
    first_choice = _BY_DEVICE.get(device.type, "reference")
    return backend or ("reference" if device in _FALLBACK_DEVICES else first_choice)


def _module(backend: str) -> ModuleType:
    return importlib.import_module(f".{_MODULES[backend]}", __name__)  # imported only when used


@functools.cache
def _backend_module(device: torch.device, backend: str | None) -> ModuleType:
    if backend is not None:
        check_backend(backend)
        return _module(backend)
    chosen = _module(_BY_DEVICE.get(device.type, "reference"))
    if not chosen.available(device):
        reason = chosen.unavailable_reason(device)
        warnings.warn(
            f"AdamW_BF16 takes slower steps on {device.type}, by the reference back end: {reason}",
            stacklevel=2,
        )
        _FALLBACK_DEVICES.add(device)
        chosen = _module("reference")
    return chosen


def _check_row(index: int, p: Tensor, m: Tensor, v: Tensor, c: Tensor | None, step: Tensor) -> None:
    if p.dtype not in (torch.bfloat16, torch.float32):
        raise TypeError(
            f"parameter {index} has dtype {p.dtype}; only bfloat16 and float32 are supported"
        )
    if (c is None) == (p.dtype == torch.bfloat16):
        raise TypeError(
            f"parameter {index} has dtype {p.dtype} and {'no' if c is None else 'a'} correction; bfloat16 ones alone have one"
        )
    for name, x in (("exp_avg", m), ("exp_avg_sq", v), ("correction", c)):
        if x is not None and x.dtype != p.dtype:
            raise TypeError(
                f"{name} {index} has dtype {x.dtype} but its parameter {p.dtype}; they must be the same"
            )
        if x is not None and (x.numel(), x.device) != (p.numel(), p.device):
            raise ValueError(
                f"{name} {index} has {x.numel()} elements on {x.device} but its parameter {p.numel()} on {p.device}"
            )
    if step.dtype != torch.float32 or step.numel() != 1 or step.device != p.device:
        raise TypeError(
            f"step {index} must be a 0-dim float32 tensor on {p.device}, but is {step.dtype} of shape {tuple(step.shape)} on {step.device}"
        )


def _walkable(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether the tensors can be walked together as one flat range: no gaps, no overlaps, and the same strides."""
    p = tensors[0]
    assert p is not None
    if all(x is None or x.is_contiguous() for x in tensors):
        return True
    return all(x is None or x.stride() == p.stride() for x in tensors) and _is_dense(p)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one range of memory, each once, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _laid_out_as(param: Tensor, grad: Tensor) -> Tensor:
    """``grad`` with the strides of ``param``, copied only if it has others."""
    if grad.stride() == param.stride() or (grad.is_contiguous() and param.is_contiguous()):
        return grad
    return torch.empty_like(param, dtype=grad.dtype, memory_format=torch.preserve_format).copy_(
        grad
    )
