"""The gradient norm and the clip coefficient of the CUDA and ROCm backend: the host side.

The kernels are in ``triton_norm.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .device_memory import (
    WARM_UP,
    NormScratch,
    chunk_map,
    device_context,
    double_bits,
    is_capturing,
    upload,
    warps,
)
from .grad_addresses import GradientAddresses

MAX_LAYOUTS = 16  # kept by each NormScratch


def grad_sum_sq(grads: list[Tensor], scratch: NormScratch | None = None) -> Tensor:
    """Sum the squares of all elements in one launch; see :func:`.clip.grad_sum_sq`.

    Equal gradients of equal shapes give equal bits.
    """
    return _norm(grads, None, scratch)[0]


def norm_and_clip_coefficient(
    grads: list[Tensor], max_norm: float, scratch: NormScratch | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return :func:`clip_coefficient` of :func:`grad_sum_sq`, from one launch."""
    clip = _norm(grads, max_norm, scratch)[1]
    assert clip is not None
    return clip[0], clip[1], clip[2]


def clip_coefficient(sum_sq: Tensor, max_norm: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the clip coefficient in one launch; see :func:`.clip.clip_coefficient`."""
    from .triton_norm import clip_kernel

    clip = torch.empty(3, dtype=torch.float32, device=sum_sq.device)
    with device_context(sum_sq.device):
        clip_kernel[(1,)](sum_sq, clip, double_bits(max_norm), num_warps=1, enable_fp_fusion=False)
    return clip[0], clip[1], clip[2]


class _NormLayout:
    """Device arrays for the norm of gradients of given lengths, for one stream or for captures.

    Args:
        numels: the number of elements of each gradient.
        device: the gradients' device.
        share_with: a layout of the same lengths, whose constant arrays this one uses too.
    """

    def __init__(
        self, numels: tuple[int, ...], device: torch.device, share_with: _NormLayout | None = None
    ) -> None:
        from . import triton_norm as kernels

        self.chunk = kernels.MIN_CHUNK
        while sum(numels) > self.chunk * kernels.MAX_PROGRAMS:
            self.chunk *= 2
        if share_with is None:
            self.numels = upload(torch.tensor(numels, dtype=torch.int64, device="cpu"), device)
            self.chunks = upload(chunk_map(list(numels), self.chunk), device)
        else:
            self.numels, self.chunks = share_with.numels, share_with.chunks
        self.partials = torch.empty(self.chunks.shape[0], dtype=torch.float64, device=device)
        self.done_counter = torch.zeros(1, dtype=torch.int32, device=device)
        self.grads = GradientAddresses([0] * len(numels), device)


def _norm_layout(
    numels: tuple[int, ...], device: torch.device, scratch: NormScratch
) -> _NormLayout:
    """Return the current stream's layout. A capture gets the one that an earlier call created."""
    layouts = scratch.layouts
    capture_key = (device, "capture", numels)
    if is_capturing(device):
        if capture_key not in layouts:
            raise RuntimeError(
                f"a CUDA graph captures the norm of these {len(numels)} gradients for the first "
                f"time; {WARM_UP}"
            )
        return layouts[capture_key]
    key = (device, torch.cuda.current_stream().cuda_stream if device.type == "cuda" else 0, numels)
    layout = layouts[key] = layouts.pop(key) if key in layouts else _NormLayout(numels, device)
    if device.type == "cuda":
        capture_layout = layouts.pop(capture_key, None) or _NormLayout(numels, device, layout)
        layouts[capture_key] = capture_layout
        capture_layout.grads.array.reserve_pinned()
    for old in [k for k, x in layouts.items() if not x.grads.array.captured][:-MAX_LAYOUTS]:
        del layouts[old]
    return layout


def _norm(
    grads: list[Tensor], max_norm: float | None, scratch: NormScratch | None
) -> tuple[Tensor, Tensor | None]:
    """Launch the norm kernel.

    Returns:
        The sum of squares and, unless ``max_norm`` is None, float32
        ``[norm, coefficient, found_inf]``.
    """
    from . import triton_norm as kernels

    device = grads[0].device
    if not all(map(Tensor.is_contiguous, grads)):
        grads = [g.contiguous() for g in grads]  # the kernel reads one range of memory
    with device_context(device):
        layout = _norm_layout(tuple(map(Tensor.numel, grads)), device, scratch or NormScratch())
        grad_addresses, _ = layout.grads.upload(grads)
        sum_sq = torch.empty((), dtype=torch.float64, device=device)
        clip = None if max_norm is None else torch.empty(3, dtype=torch.float32, device=device)
        kernels.norm_kernel[(layout.chunks.shape[0],)](
            layout.numels,
            grad_addresses,
            layout.chunks,
            layout.partials,
            layout.done_counter,
            sum_sq,
            clip,
            len(grads),
            layout.chunk,
            double_bits(0.0 if max_norm is None else max_norm),
            num_warps=warps(kernels.THREADS, device),
            enable_fp_fusion=False,
        )
    return sum_sq, clip
