"""The sums of ``precision_stats`` in plain PyTorch. The fused kernels match them.

The *effective* change comes from the bits that a step stores, since the step is taken on copies of
each chunk. See ``PRECISION_SUMS`` in ``backend.py`` for the terms.
"""

from __future__ import annotations

from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from .backend import Hyperparams, ParamTensors, StepArgs, TensorLists
from .reference import CHUNK, ReferenceTable, _moments, double_device, step_scalars


def add_sums(
    total: Tensor, row: ParamTensors, g: Tensor, hyper: Hyperparams, grad_scale: Tensor | None
) -> None:
    """Add the sums of one parameter, or of a run of its elements, to ``total``.

    Args:
        total: float64, in the order of ``PRECISION_SUMS``.
        row: the parameter and its states, dense and of the same strides.
        g: its gradient, of the same strides.
        hyper: hyper-parameters of its group.
        grad_scale: see :class:`.backend.StepArgs`.
    """
    *tensors, step = row
    s = step_scalars(int((step + 1).item()), hyper)
    scale = (-1.0 if hyper.maximize else 1.0) * (1.0 if grad_scale is None else grad_scale.item())
    flat: list[Any] = [
        x.as_strided((x.numel(),), (1,)).split(CHUNK) for x in (g, *tensors) if x is not None
    ]
    for g_part, p, m, v, c in zip(*flat, *[repeat(None)] * (5 - len(flat)), strict=False):
        new: list[Any] = [None if x is None else x.clone() for x in (p, m, v, c, step)]
        table = ReferenceTable(TensorLists(*([x] for x in new)))
        table.update_(StepArgs([g_part], [hyper], grad_scale))
        mn, vn, upd = _moments(g_part.float() * scale, m.float(), v.float(), s)
        p32 = p.float()
        weight = p32 if c is None else p32 + c.float()
        update = s.lr_weight_decay * weight + upd
        plain = (p32 - update).to(p.dtype).float() - p32
        effective = new[0].float() - p32
        if c is not None:
            # the two changes separately: unless they are large they are exact, but p + c is rounded
            effective += new[3].float() - c.float()
        sums = _sums(
            p, c, weight=weight, update=update, effective=effective, plain=plain, m=mn, v=vn
        )
        total += sums.to(total.device)


def _sums(
    p: Tensor,
    c: Tensor | None,
    *,
    weight: Tensor,
    update: Tensor,
    effective: Tensor,
    plain: Tensor,
    m: Tensor,
    v: Tensor,
) -> Tensor:
    is_update = update != 0
    is_lost = is_update & (plain == 0)
    counts = [is_update.sum(), is_lost.sum(), (is_lost & (effective != 0)).sum()]
    sums = [
        p.new_tensor(p.numel(), dtype=torch.int64),
        p.new_tensor(0 if c is None else p.numel(), dtype=torch.int64),
        *counts,
        _dot(weight, weight),
        _dot(update, update),
        -_dot(update, effective),
        -_dot(update, plain),
        torch.zeros_like(counts[0]) if c is None else _correction_sq(p, c),
        _dot(m, m),
        _dot(v, v),
    ]
    device = double_device(p.device)
    return torch.stack([x.to(device, torch.float64) for x in sums])


def _correction_sq(p: Tensor, c: Tensor) -> Tensor:
    """Return the sum of squares of ``c`` in ulps of ``p``.

    An ulp is 2^-7 of the largest power of two up to ``|p|``; a subnormal ``p`` has the ulp of the
    smallest normal number. One ulp may be subnormal in float32, so ``c`` is divided by 64 ulps, and
    the sum multiplied by 64 squared.
    """
    power_of_two = (p.view(torch.int16) & 0x7F80).view(torch.bfloat16).float()
    in_64_ulps = c.float() / (power_of_two.clamp(min=torch.finfo(torch.bfloat16).tiny) * 0.5)
    return 4096.0 * _dot(in_64_ulps, in_64_ulps)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the 0-dim float64 dot product: squares of second moments underflow in float32."""
    device = double_device(a.device)
    wide = a.to(device, torch.float64)
    return torch.dot(wide, wide if a is b else b.to(device, torch.float64))
