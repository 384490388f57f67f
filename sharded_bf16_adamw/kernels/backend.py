"""The choice of a backend by device, and the arguments and checks that all backends share.

A backend is a module with ``make_table`` (returns a :class:`BackendTable`), ``grad_sum_sq`` and
``unavailable_reason``. It may also have ``clip_coefficient`` and ``norm_and_clip_coefficient``, if
these are faster than tensor operations.
"""

from __future__ import annotations

import functools
import importlib
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .device_memory import is_capturing

BACKENDS = ("reference", "native", "triton")
_MODULES = {"reference": "reference", "native": "cpu", "triton": "cuda"}
_BY_DEVICE = {"cpu": "native", "cuda": "triton"}  # other devices (MPS, XPU, ...): reference
_FALLBACK_DEVICES: set[torch.device] = set()  # on which a first update found no other backend

logger = logging.getLogger("sharded_bf16_adamw")


class Hyperparams(NamedTuple):
    """Hyper-parameters of a parameter group in one step. ``lr`` may be a one-element tensor."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool = False  # ascend instead of descend


class StepArgs(NamedTuple):
    """The arguments that change from step to step.

    Attributes:
        grads: bfloat16 or float32, one per parameter, of its shape and device. Only read.
        hypers: hyper-parameters, one entry per group.
        grad_scale: 0-dim float32 factor of the gradients, such as a clip coefficient. The kernels
            apply it in fp32 as they read the gradients.
        found_inf: 0-dim float32; if it is not zero, the step changes nothing.
    """

    grads: list[Tensor]
    hypers: Sequence[Hyperparams]
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


# The columns of ``precision_sums``; csrc/native.h and triton_precision.py repeat their order. They
# are sums of these float32 values of each element:
#
# * weight: ``p + c`` before the step.
# * update: the intended update, ``lr_weight_decay * weight + upd`` of :mod:`.reference`.
# * effective: the change of ``p`` plus the change of ``c``, as the step stores them.
# * plain: the change of ``p`` if there were no correction: ``round(p - update) - p``.
PRECISION_SUMS = (
    "elements",
    "corrected",  # elements with a correction
    "updates",  # elements whose update is not zero
    "lost",  # updates whose plain change is zero
    "carried",  # lost updates whose effective change is not zero
    "weight_sq",
    "update_sq",
    "descent",  # minus the dot product of update and effective change
    "plain_descent",  # minus the dot product of update and plain change
    "correction_sq",  # of the correction in ulps of ``p``
    "first_sq",  # of exp_avg after the step, before it is rounded
    "second_sq",  # of exp_avg_sq after the step, before it is rounded
)


class Runs(NamedTuple):
    """Runs of consecutive elements for ``precision_sums``. Each array has one int64 per run.

    Attributes:
        params: index of the run's parameter.
        begins: first element, in the order of the parameter's memory.
        counts: number of elements, at least 1.
        rows: row of the result to which the run is added. A row's parameters are of one group.
        n_rows: number of rows of the result.
    """

    params: np.ndarray
    begins: np.ndarray
    counts: np.ndarray
    rows: np.ndarray
    n_rows: int

    @classmethod
    def whole(cls, numels: Sequence[int], rows: Sequence[int], n_rows: int) -> Runs:
        """Return one run per parameter, of all its elements."""
        counts = np.array(numels, np.int64)
        begins = np.zeros_like(counts)
        return cls(np.arange(len(counts)), begins, counts, np.array(rows, np.int64), n_rows)

    def of_params(self, indices: Sequence[int]) -> Runs:
        """Return the runs of the parameters ``indices``, renumbered by position in that list."""
        last = max(int(self.params.max(initial=0)), max(indices, default=0))
        position = np.full(last + 1, -1, np.int64)
        position[indices] = np.arange(len(indices))
        params = position[self.params]
        return self._replace(params=params).select(params >= 0)

    def select(self, which: np.ndarray) -> Runs:
        """Return the runs that an index or a mask selects."""
        params, begins, counts, rows = (column[which] for column in self[:4])
        return Runs(params, begins, counts, rows, self.n_rows)


ParamTensors = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]


class TensorLists(NamedTuple):
    """Parameters of one device and their states, as :class:`FusedAdamW` describes them.

    Index ``i`` of every list belongs to one parameter. If ``groups`` is empty, all are in group 0.
    """

    params: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    corrections: Sequence[Tensor | None]
    steps: list[Tensor]
    groups: Sequence[int] = ()

    def rows(self) -> Iterator[ParamTensors]:
        """Iterate over the parameters, each with its states."""
        return zip(
            self.params, self.exp_avgs, self.exp_avg_sqs, self.corrections, self.steps, strict=True
        )

    def group_indices(self) -> Sequence[int]:
        """Return each parameter's index into :attr:`StepArgs.hypers`."""
        return self.groups or [0] * len(self.params)


class BackendTable(Protocol):
    """The state that a backend keeps between steps for a list of parameters, such as addresses.

    ``make_table(tensors)`` of the backend's module creates one. A parameter and its states have
    the same strides and are dense (no gaps, no overlaps). The table keeps them alive. The caller
    ensures that their memory does not move.
    """

    def update_(self, args: StepArgs) -> None:
        """Take one step in place. Every gradient has the strides of its parameter."""

    def precision_sums(self, args: StepArgs, runs: Runs | None = None) -> Tensor:
        """Return :data:`PRECISION_SUMS` of the step; see :meth:`FusedAdamW.precision_sums`."""


class FusedAdamW:
    """The AdamW update of one device's parameters: built once, called at every step.

    It keeps the memory of parameters and states alive, so no other tensor can get their addresses.
    Before each step the caller must check that parameters and states still use that memory.

    Args:
        params: bfloat16 or float32, all on one device; any strides.
        exp_avgs: running averages of the gradients, of the parameters' shapes and dtypes.
        exp_avg_sqs: running averages of the squared gradients, of the same shapes and dtypes.
        corrections: bfloat16 of the parameter's shape, or None for a float32 parameter.
        steps: 0-dim float32, the number of steps taken so far.
        groups: index of each parameter's hyper-parameters in :attr:`StepArgs.hypers`; None: 0 for
            all.
        backend: one of ``BACKENDS``, or None to choose by device.

    Raises:
        ValueError: ``backend`` is unknown, unavailable or for other devices, or a state differs
            from its parameter in its number of elements or its device.
        TypeError: a tensor has a dtype that is not listed above.
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
        self._backend = backend_module(params[0].device, backend)
        tensors = TensorLists(params, exp_avgs, exp_avg_sqs, corrections, steps, groups or ())
        self._params = params
        self._rows = list(tensors.rows())
        self._groups = tensors.group_indices()
        self._group_count = max(self._groups) + 1
        for index, row in enumerate(self._rows):
            _check_row(index, *row)
        self._all_contiguous = all(x is None or x.is_contiguous() for x in chain(*tensors[:4]))
        self._storages = [x.untyped_storage() for row in self._rows for x in row if x is not None]
        # A parameter with gaps, or with other strides than its states, cannot be read as one range
        # of memory, so each step works on contiguous copies.
        self._dense = [i for i, row in enumerate(self._rows) if _same_dense_layout(row[:4])]
        self._strided = sorted(set(range(len(self._rows))) - set(self._dense))
        dense_rows = [self._rows[i] for i in self._dense]
        self._table = self._make_table(dense_rows, self._dense) if self._dense else None

    def update_(self, args: StepArgs) -> None:
        """Take one step in place, on all parameters together.

        Args:
            args: see :class:`StepArgs`. Shapes and devices of the gradients are not checked.

        Raises:
            ValueError: there is not one gradient per parameter, or a group has no hyper-parameters.
            TypeError: a gradient is neither bfloat16 nor float32. Nothing was changed.
            RuntimeError: a CUDA graph captures the step of a parameter that needs copies.
        """
        self._check_lengths(args)
        if self._strided and is_capturing(self._params[0].device):
            shape = tuple(self._params[self._strided[0]].shape)
            raise RuntimeError(
                f"cannot capture the step of a parameter of shape {shape} into a CUDA graph: its "
                "memory has gaps, or other strides than its state; make both contiguous"
            )
        if self._all_contiguous and all(map(Tensor.is_contiguous, args.grads)):
            assert self._table is not None
            self._table.update_(args)
        else:
            self._update_any_strides(args)
        # As after any in-place operation, autograd must detect a backward pass through the
        # overwritten weights.
        torch.autograd.graph.increment_version(self._params)

    def precision_sums(self, args: StepArgs, runs: Runs | None = None) -> Tensor:
        """Return :data:`PRECISION_SUMS` of the step with these arguments, without taking it.

        Products and sums are float64, and their order depends only on the tensors' layout. So equal
        tensors give equal bits on one machine.

        Args:
            args: see :meth:`update_`; ``found_inf`` is ignored.
            runs: elements to add up; None: all, with one row of the result per group. If a step
                needs contiguous copies of a parameter, its runs index the copy.

        Returns:
            float64 ``[rows, len(PRECISION_SUMS)]`` on the parameters' device, or on the CPU if that
            has no float64.
        """
        self._check_lengths(args)
        parts = [
            table.precision_sums(
                table_args,
                runs
                if runs is None or len(indices) == len(self._params)
                else runs.of_params(indices),
            )
            for table, table_args, indices, _ in self._parts(args)
        ]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

    @property
    def captured(self) -> bool:
        """True if a CUDA graph has captured a step; its replays read this object's memory."""
        return getattr(self._table, "captured", False)

    def _check_lengths(self, args: StepArgs) -> None:
        if len(args.grads) != len(self._params):
            raise ValueError(
                f"StepArgs.grads has {len(args.grads)} gradients for {len(self._params)} "
                "parameters; pass one per parameter"
            )
        if len(args.hypers) < self._group_count:
            raise ValueError(
                f"StepArgs.hypers has {len(args.hypers)} entries for {self._group_count} groups; "
                "pass one per group"
            )

    def _make_table(self, rows: Sequence[ParamTensors], indices: list[int]) -> BackendTable:
        groups = [self._groups[i] for i in indices]
        columns: list[Any] = list(map(list, zip(*rows, strict=True)))
        return self._backend.make_table(TensorLists(*columns)._replace(groups=groups))

    def _update_any_strides(self, args: StepArgs) -> None:
        """Take one step if some tensor is not contiguous."""
        for table, table_args, _, copied in self._parts(args):
            table.update_(table_args)
            for original, copy in copied:
                original.copy_(copy)

    def _parts(
        self, args: StepArgs
    ) -> Iterator[tuple[BackendTable, StepArgs, list[int], list[tuple[Tensor, Tensor]]]]:
        """Yield tables that together cover all parameters: the kept one, then temporary ones.

        Each comes with its arguments, whose gradients have the parameters' strides; the indices of
        its parameters; and pairs of an original tensor and its contiguous copy in the table.
        """
        check_grad_dtypes(g.dtype for g in args.grads)
        if self._table is not None:
            grads = args.grads
            if not (self._all_contiguous and all(map(Tensor.is_contiguous, grads))):
                grads = [_with_strides_of(self._params[i], args.grads[i]) for i in self._dense]
            yield self._table, args._replace(grads=grads), self._dense, []
        for i in self._strided:
            *tensors, step = self._rows[i]
            copies = [None if x is None else x.contiguous() for x in tensors]
            table = self._make_table([(*copies, step)], [i])  # type: ignore[list-item]
            table_args = args._replace(grads=[args.grads[i].contiguous()])
            copied = [
                (original, copy)
                for original, copy in zip(tensors, copies, strict=True)
                if original is not None and copy is not None and copy is not original
            ]
            yield table, table_args, [i], copied


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
    backend: str | None = None,
) -> None:
    """Take one AdamW step on local tensors, in place.

    :mod:`sharded_bf16_adamw.kernels.reference` defines the update rule. Index ``i`` of every list
    belongs to one parameter; its tensors have the same shape and device, and any strides. For
    repeated steps on the same tensors create a :class:`FusedAdamW`.

    Args:
        params: bfloat16 or float32. Updated.
        grads: bfloat16 or float32. Only read.
        exp_avgs: the parameter's dtype. Updated.
        exp_avg_sqs: the parameter's dtype. Updated.
        corrections: bfloat16, or None for a float32 parameter. Updated.
        steps: 0-dim float32, the number of steps taken before this one. Incremented.
        lr: learning rate of this step, a float or a one-element tensor.
        beta1: decay rate of ``exp_avgs``.
        beta2: decay rate of ``exp_avg_sqs``.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        maximize: ascend instead of descend.
        grad_scale: see :class:`StepArgs`.
        found_inf: see :class:`StepArgs`.
        backend: one of ``BACKENDS``, or None to choose by device.

    Raises:
        ValueError: ``backend`` is unknown, unavailable or for other devices, or a tensor differs
            from its parameter in its number of elements or its device.
        TypeError: a tensor has a dtype that is not listed above.
    """
    if not params:
        return
    for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
        if (grad.numel(), grad.device) != (param.numel(), param.device):
            raise ValueError(
                f"gradient {index} has {grad.numel()} elements on {grad.device} but its parameter "
                f"{param.numel()} on {param.device}"
            )
    hyper = Hyperparams(lr, beta1, beta2, eps, weight_decay, maximize)
    table = FusedAdamW(params, exp_avgs, exp_avg_sqs, corrections, steps, backend=backend)
    table.update_(StepArgs(grads, [hyper], grad_scale, found_inf))


def check_backend(backend: str | None) -> None:
    """Check that a backend is known and available on this machine.

    Raises:
        ValueError: the backend is unknown, or unavailable; the message gives the reason.
    """
    if backend is None:
        return
    if backend not in BACKENDS:
        raise ValueError(
            f"Invalid backend: {backend!r}; choose one of {', '.join(BACKENDS)} or None"
        )
    reason = _module(backend).unavailable_reason()
    if reason is not None:
        raise ValueError(
            f"backend {backend!r} is not available: {reason}; use None to choose by device"
        )


def backend_for(device: torch.device, backend: str | None) -> str:
    """Return the name of the backend for tensors of ``device``, without touching the device.

    A fallback to the reference is known only after the first update on the device.
    """
    preferred = _BY_DEVICE.get(device.type, "reference")
    return backend or ("reference" if device in _FALLBACK_DEVICES else preferred)


def _module(backend: str) -> ModuleType:
    return importlib.import_module(f".{_MODULES[backend]}", __package__)  # imported on first use


@functools.cache
def backend_module(device: torch.device, backend: str | None) -> ModuleType:
    """Return a backend's module, by default that of the device; warn about a fallback.

    Raises:
        ValueError: see :func:`check_backend`; or the backend is for tensors of other devices.
    """
    if backend is None:
        backend = _BY_DEVICE.get(device.type, "reference")
        reason = _module(backend).unavailable_reason(device)
        if reason is not None:
            warnings.warn(
                f"AdamW_BF16 uses the slower reference backend on {device.type}: {reason}; "
                "see python -m sharded_bf16_adamw.env",
                stacklevel=2,
            )
            _FALLBACK_DEVICES.add(device)
            backend = "reference"
    else:
        check_backend(backend)
        if backend not in ("reference", _BY_DEVICE.get(device.type)):
            raise ValueError(
                f"backend {backend!r} cannot read tensors on {device.type}; use None to choose by "
                "device"
            )
    logger.info("AdamW_BF16 uses the %s backend on %s", backend, device)
    return _module(backend)


def check_grad_dtypes(dtypes: Iterable[torch.dtype]) -> None:
    """Raise TypeError unless every dtype is bfloat16 or float32."""
    for dtype in set(dtypes) - {torch.bfloat16, torch.float32}:
        raise TypeError(
            f"a gradient has dtype {dtype}; only bfloat16 and float32 gradients are supported"
        )


def _check_row(index: int, p: Tensor, m: Tensor, v: Tensor, c: Tensor | None, step: Tensor) -> None:
    if p.dtype not in (torch.bfloat16, torch.float32):
        raise TypeError(
            f"parameter {index} has dtype {p.dtype}; only bfloat16 and float32 are supported"
        )
    if (c is None) == (p.dtype == torch.bfloat16):
        raise TypeError(
            f"parameter {index} has dtype {p.dtype} and {'no' if c is None else 'a'} correction; "
            "give one to each bfloat16 parameter and to no other"
        )
    for name, x in (("exp_avg", m), ("exp_avg_sq", v), ("correction", c)):
        if x is not None and x.dtype != p.dtype:
            raise TypeError(
                f"{name} {index} has dtype {x.dtype} but its parameter {p.dtype}; they must be the "
                "same"
            )
        if x is not None and (x.numel(), x.device) != (p.numel(), p.device):
            raise ValueError(
                f"{name} {index} has {x.numel()} elements on {x.device} but its parameter "
                f"{p.numel()} on {p.device}"
            )
    if step.dtype != torch.float32 or step.numel() != 1 or step.device != p.device:
        raise TypeError(
            f"step {index} must be a 0-dim float32 tensor on {p.device}, but is {step.dtype} of "
            f"shape {tuple(step.shape)} on {step.device}"
        )


def _same_dense_layout(tensors: tuple[Tensor | None, ...]) -> bool:
    """Return True if each tensor fills one range of memory, all in the same order of elements."""
    p = tensors[0]
    assert p is not None
    if all(x is None or x.is_contiguous() for x in tensors):
        return True
    return all(x is None or x.stride() == p.stride() for x in tensors) and _is_dense(p)


def _is_dense(tensor: Tensor) -> bool:
    """Return True if the elements fill one range of memory, each once, in any order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _with_strides_of(param: Tensor, grad: Tensor) -> Tensor:
    """Return ``grad`` with the strides of ``param``, as a copy if its own strides differ."""
    if grad.stride() == param.stride() or (grad.is_contiguous() and param.is_contiguous()):
        return grad
    laid_out = torch.empty_like(param, dtype=grad.dtype, memory_format=torch.preserve_format)
    return laid_out.copy_(grad)
