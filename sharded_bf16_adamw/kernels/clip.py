"""The gradient norm and the clip coefficient of local tensors, by the backend of their device."""

from __future__ import annotations

from torch import Tensor

from .backend import backend_module
from .device_memory import NormScratch


def grad_sum_sq(
    grads: list[Tensor], backend: str | None = None, scratch: NormScratch | None = None
) -> Tensor:
    """Sum the squares of all elements of ``grads``.

    Args:
        grads: at least one tensor, bfloat16 or float32, all on one device; any shapes and strides.
        backend: one of ``BACKENDS``, or None to choose by device.
        scratch: memory that is reused from step to step for gradients of these sizes; None
            allocates. A CUDA graph capture requires it.

    Returns:
        0-dim float64, so that the sums of all ranks can be added before the square root. It is on
        the gradients' device, or on the CPU if that has no float64 (:func:`double_device`).

    Raises:
        TypeError: a gradient is neither bfloat16 nor float32.
    """
    return backend_module(grads[0].device, backend).grad_sum_sq(grads, scratch)


def clip_coefficient(
    sum_sq: Tensor, max_norm: float, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the norm and a step's ``grad_scale`` and ``found_inf``, without a device sync.

    Args:
        sum_sq: 0-dim float64, the sum of squares of the gradients of all ranks.
        max_norm: the norm to clip to; infinity does not clip.
        backend: one of ``BACKENDS``, or None to choose by device.

    Returns:
        0-dim float32 ``(norm, coefficient, found_inf)``, computed in double and rounded once. The
        coefficient is ``min(1, max_norm / (norm + 1e-6))`` as in
        :func:`torch.nn.utils.clip_grad_norm_`; ``found_inf`` is 1 if the sum is inf or NaN, else 0.
    """
    module = backend_module(sum_sq.device, backend)
    if hasattr(module, "clip_coefficient"):
        return module.clip_coefficient(sum_sq, max_norm)
    norm = sum_sq.sqrt()
    coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return norm.float(), coefficient.float(), (~sum_sq.isfinite()).float()


def norm_and_clip_coefficient(
    grads: list[Tensor],
    max_norm: float,
    backend: str | None = None,
    scratch: NormScratch | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return :func:`clip_coefficient` of :func:`grad_sum_sq`, in one launch if possible.

    For a norm over this rank's gradients alone: it skips the all-reduce between the two.
    """
    module = backend_module(grads[0].device, backend)
    if hasattr(module, "norm_and_clip_coefficient"):
        return module.norm_and_clip_coefficient(grads, max_norm, scratch)
    return clip_coefficient(module.grad_sum_sq(grads, scratch), max_norm, backend)
