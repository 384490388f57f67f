"""The pair ``(p, correction)``, two bfloat16 tensors whose sum is a weight."""

from __future__ import annotations

import torch
from torch import Tensor


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split a float32 tensor into ``(p, correction)``, both bfloat16."""
    p = x.bfloat16()
    remainder = torch.where(p.isfinite(), x - p.float(), 0.0)
    return p, remainder.bfloat16()


def join(p: Tensor, correction: Tensor) -> Tensor:
    """Return ``p + correction`` in float32: the value given to :func:`split`, up to 2^-17 of it.

    :mod:`.checkpoint.export` states the exact bound.
    """
    return p.float() + correction.float()
