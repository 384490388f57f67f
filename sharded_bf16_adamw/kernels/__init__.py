"""The update on local tensors, dispatched by device. Nothing here knows of ranks, meshes or modules.

=========== ============================================ ==============================
back end    serves                                       where
=========== ============================================ ==============================
reference   every device (the specification)             ``reference.py``
=========== ============================================ ==============================
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

BACKENDS = ("reference",)


def adamw_bf16_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    corrections: list[Tensor | None],
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

    Index ``i`` of every list belongs to one parameter; its tensors have one shape and one device. Any strides serve.

    Args:
        params: bfloat16 or float32. Updated.
        grads: bfloat16 or float32. Read (and zeroed where ``zero_grads``).
        exp_avgs, exp_avg_sqs: the parameter's dtype. Updated.
        corrections: bfloat16, or None for a float32 parameter. Updated.
        steps: 0-dim float32, the steps taken before this one. Counted up by one.
        lr, beta1, beta2, eps, weight_decay: hyper-parameters of this step; ``lr`` may be a one-element tensor.
        maximize: ascend instead of descend.
        grad_scale: 0-dim float32 that multiplies the gradients in fp32 as they are read (a clip coefficient).
        found_inf: 0-dim float32; where it is not zero, nothing at all changes.
        zero_grads: zero the gradients in the same pass.
        backend: one of ``BACKENDS``, or None to choose by device.
    """
    if not params:
        return
    written_back: list[tuple[Tensor, Tensor]] = []
    rows = []
    for row in zip(params, grads, exp_avgs, exp_avg_sqs, corrections, strict=True):
        rows.append(row if _dense_alike(row) else _contiguous_copies(row, zero_grads, written_back))
    columns = [list(column) for column in zip(*rows, strict=True)]
    _implementation(params[0].device, backend).adamw_bf16_(
        *columns,
        steps,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        maximize=maximize,
        grad_scale=grad_scale,
        found_inf=found_inf,
        zero_grads=zero_grads,
    )
    for original, copy in written_back:
        original.copy_(copy)


def grad_sum_sq(grads: list[Tensor], backend: str | None = None) -> Tensor:
    """Sum the squares of all elements of ``grads`` (bfloat16 or float32, one device).

    Returns:
        0-dim float64 on the gradients' device, so that sums over ranks can be added before the square root.
    """
    return _implementation(grads[0].device if grads else torch.device("cpu"), backend).grad_sum_sq(grads)


def _implementation(device: torch.device, backend: str | None) -> ModuleType:
    from . import reference

    return reference


def _dense_alike(row: tuple[Tensor | None, ...]) -> bool:
    """Whether the tensors can be walked as one flat range: no gaps, no overlaps, and the same strides."""
    p = row[0]
    assert p is not None
    if all(x is None or x.is_contiguous() for x in row):
        return True
    same_strides = all(x is None or x.stride() == p.stride() for x in row)
    return same_strides and torch._prims_common.is_non_overlapping_and_dense(p)


def _contiguous_copies(
    row: tuple[Tensor | None, ...], zero_grads: bool, written_back: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor | None, ...]:
    """Contiguous stand-ins for tensors of unlike strides; those that the kernel changes are noted in ``written_back``."""
    copies = tuple(None if x is None else x.contiguous() for x in row)
    for i, (original, copy) in enumerate(zip(row, copies, strict=True)):
        if original is not None and copy is not original and (i != 1 or zero_grads):
            assert copy is not None
            written_back.append((original, copy))
    return copies
