"""The update rule in plain PyTorch: the specification that every other back end matches bit for bit.

Vocabulary, for one element at step ``t`` (1-based):

* ``g, p, m, v, c``: gradient, parameter, exp_avg, exp_avg_sq and correction as they are *stored*; the true weight is ``p + c``.
* ``mn, vn, pn, cn``: their fp32 successors, before rounding to the stored dtype.
* RTNE: round to nearest, ties to even, which is what a cast to bfloat16 does.
* SR: stochastic rounding, up with a probability equal to the discarded fraction, so that the mean error is zero.

The random bits of SR are a hash of the element's own stored bits and the step. They need no generator, no seed and no index, so
they cannot depend on how the parameter is sharded, and replicas agree without being synchronised. The hash is 16-bit arithmetic
throughout: a CPU then hashes two elements in the space of one float32, and the hash is what a step there costs.

Sources: the correction term is Kahan-style compensation as in "Revisiting BFloat16 Training" (Zamirai et al., arXiv:2010.06192)
and the ``adamw_bfloat16`` library; the hash combines the folded product of wyhash (Wang Yi) and the xorshift and multiplication of Chris
Wellons' hash-prospector, whose "lowbias32" hashes the step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .device_memory import NormScratch

CHUNK = 1 << 16  # elements per pass: the temporaries of one pass stay in a CPU's second-level cache

# Odd multipliers of the hash. Of thousands of random sets none was measurably better than another.
SPREAD_M, SPREAD_V, SPREAD_C = 0x1643, 0x6771, 0xC09D
MIX = 0x365B
DRAW_M, DRAW_C = 0x2851, 0xFAED


class Hyperparams(NamedTuple):
    """Hyper-parameters of a step, which the parameters of a group share. ``lr`` may be a one-element tensor."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool = False  # ascend instead of descend


class StepScalars(NamedTuple):
    """What one step needs besides tensors. All but ``step`` are Python floats that hold exact float32 values."""

    step: int
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    step_size: float
    inv_sqrt_bias_correction2: float
    eps: float
    lr_weight_decay: float


def power(base: float, exponent: int) -> float:
    """``base ** exponent`` by repeated squaring in double: the same bits on every machine, unlike ``pow`` of a C library."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def step_scalars(step: int, hyper: Hyperparams) -> StepScalars:
    """Compute the scalars of one step in double and round each once to float32."""
    lr, beta1, beta2, eps, weight_decay, _ = hyper
    lr = float(lr)

    def f32(x: float) -> float:
        with np.errstate(
            over="ignore"
        ):  # an infinite step size is the user's choice of lr, as in torch
            return float(np.float32(x))

    return StepScalars(
        step=step,
        beta1=f32(beta1),
        one_minus_beta1=f32(1.0 - beta1),
        beta2=f32(beta2),
        one_minus_beta2=f32(1.0 - beta2),
        step_size=f32(lr / (1.0 - power(beta1, step))),
        inv_sqrt_bias_correction2=f32(1.0 / math.sqrt(1.0 - power(beta2, step))),
        eps=f32(eps),
        lr_weight_decay=f32(lr * weight_decay),
    )


class Table:
    """The parameters of one device and their states; see :class:`sharded_bf16_adamw.kernels.Table`, which hands over rows of tensors
    that are dense and share their strides."""

    def __init__(
        self,
        params: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        corrections: list[Tensor | None],
        steps: list[Tensor],
        groups: Sequence[int] | None = None,
    ) -> None:
        self._rows = list(
            zip(
                params,
                exp_avgs,
                exp_avg_sqs,
                corrections,
                steps,
                groups or [0] * len(params),
                strict=True,
            )
        )

    @torch.no_grad()
    def update_(
        self,
        grads: list[Tensor],
        hypers: Sequence[Hyperparams],
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        zero_grads: bool = False,
    ) -> None:
        """Take one step in place; see :meth:`sharded_bf16_adamw.kernels.Table.update_`."""
        if found_inf is not None and found_inf.item() != 0:
            return
        scale = 1.0 if grad_scale is None else float(grad_scale)
        scalars: dict[
            tuple[int, int], StepScalars
        ] = {}  # most parameters of a group share their step
        for (p, m, v, c, step, group), g in zip(self._rows, grads, strict=True):
            step += 1
            t = int(step.item())
            if (t, group) not in scalars:
                scalars[t, group] = step_scalars(t, hypers[group])
            if p.numel() == 0:
                continue
            flat = [x.as_strided((x.numel(),), (1,)) for x in (p, g, m, v, c) if x is not None]
            update = _update_fp32 if c is None else _update_bf16
            for chunk in zip(*[x.split(CHUNK) for x in flat], strict=True):
                update(
                    *chunk, scale=-scale if hypers[group].maximize else scale, s=scalars[t, group]
                )  # type: ignore[misc]
            if zero_grads:
                g.zero_()


def available(device: torch.device | None = None) -> bool:
    """Always: it is plain torch."""
    return True


def unavailable_reason(device: torch.device | None = None) -> str | None:
    """None: it is available."""
    return None


def grad_sum_sq(grads: list[Tensor], scratch: NormScratch | None = None) -> Tensor:
    """See :func:`sharded_bf16_adamw.kernels.grad_sum_sq`."""
    device = double_device(grads[0].device) if grads else torch.device("cpu")
    total = torch.zeros((), dtype=torch.float64, device=device)
    for g in grads:
        for chunk in g.reshape(-1).split(CHUNK):
            total += chunk.to(device).double().square().sum()
    return total


@functools.cache
def double_device(device: torch.device) -> torch.device:
    """Return the device on which to compute in float64 with tensors of ``device``: the CPU for MPS and for XPUs without it."""
    has_double = device.type != "mps" and (
        device.type != "xpu" or torch.xpu.get_device_properties(device).has_fp64
    )
    return device if has_double else torch.device("cpu")


def _update_bf16(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, c: Tensor, scale: float, s: StepScalars
) -> None:
    """One step on a chunk of a bfloat16 parameter, in place. Each fp32 operation is rounded by itself: no fused multiply-add."""
    rm, rv, rc = _random_bits(g, p, m, v, c, step_key(s.step))
    p32, c32 = p.float(), c.float()
    mn, vn, upd = _moments(g.float() * scale, m.float(), v.float(), s)
    d = c32 - (
        s.lr_weight_decay * (p32 + c32) + upd
    )  # p + c only scales the decay: storing it would lose the low bits
    pn = (p32 + d).bfloat16()
    cn = (p32 - pn.float()) + d
    p.copy_(pn)
    v.copy_(stochastic_round(vn, rv))
    m.copy_(stochastic_round(mn, rm))
    c.copy_(stochastic_round(cn, rc))


def _update_fp32(p: Tensor, g: Tensor, m: Tensor, v: Tensor, scale: float, s: StepScalars) -> None:
    """One step on a chunk of a float32 parameter: the same rule with no correction and nothing to round."""
    mn, vn, upd = _moments(g.float() * scale, m, v, s)
    p.sub_(s.lr_weight_decay * p + upd)
    v.copy_(vn)
    m.copy_(mn)


def _moments(g: Tensor, m: Tensor, v: Tensor, s: StepScalars) -> tuple[Tensor, Tensor, Tensor]:
    """Return the new moments and the update ``step_size * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)``, all float32."""
    mn = s.beta1 * m + s.one_minus_beta1 * g
    vn = s.beta2 * v + s.one_minus_beta2 * (g * g)
    upd = s.step_size * mn / (_sqrt(vn) * s.inv_sqrt_bias_correction2 + s.eps)
    return mn, vn, upd


def stochastic_round(x: Tensor, r: Tensor) -> Tensor:
    """Round float32 to bfloat16, away from zero where the 16 discarded bits, as a number, exceed ``r``.

    Args:
        x: float32, any shape.
        r: int32 of the same shape, uniform on [0, 65535].

    Returns:
        bfloat16. Infinities stay; NaN stays NaN (some carry all-ones payloads, which rounding up would wrap to zero).
    """
    bits = x.view(torch.int32)
    rounded = ((bits >> 16) + ((bits & 0xFFFF) > r)).to(torch.int16).view(torch.bfloat16)
    return torch.where(x.isnan(), torch.nan, rounded)


def lowbias32(x: Tensor) -> Tensor:
    """A 32-bit hash of each element of an int32 tensor: multiplication wraps, and masks turn the arithmetic shifts into logical ones."""
    x = x ^ (x >> 16 & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15 & 0x1FFFF)
    x = x * (0x846CA68B - (1 << 32))
    return x ^ (x >> 16 & 0xFFFF)


def step_key(step: int) -> int:
    """32 random bits of a step, from :func:`lowbias32`."""
    return int(lowbias32(torch.tensor(step, device="cpu").to(torch.int32))) & 0xFFFFFFFF


def _random_bits(
    g: Tensor, p: Tensor, m: Tensor, v: Tensor, c: Tensor, key: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The random bits for m, v and c, int32 on [0, 65535], from the stored bits of each element and the :func:`step_key`.

    All arithmetic is modulo 2^16, but for the product of two halves of the inputs, whose high and low half are folded (as in the
    "mum" of wyhash): one multiplication that mixes 32 bits. It alone would favour some results (a factor of 0 gives 0 for all of
    the other); the key, different at each step, is part of both factors and of the fold, so that no value is favoured over time.
    The three draws need not be independent of each other: each alone is unbiased.
    """
    low, high = key & 0xFFFF, key >> 16
    x = (_pattern(g) ^ _pattern(m) * SPREAD_M ^ _pattern(c) * SPREAD_C ^ low) & 0xFFFF
    w = (_pattern(p) ^ _pattern(v) * SPREAD_V ^ high) & 0xFFFF
    product = x * w
    y = (product ^ product >> 16 ^ x) & 0xFFFF
    y = (y ^ y >> 8 ^ high) * MIX
    return y * DRAW_M & 0xFFFF, y & 0xFFFF, y * DRAW_C & 0xFFFF


def _pattern(x: Tensor) -> Tensor:
    """The 16 stored bits of a bfloat16 tensor as int32. A float32 gradient folds to the same bits where bfloat16 holds it exactly."""
    if x.dtype == torch.float32:
        bits = x.view(torch.int32)
        return (bits >> 16 ^ bits) & 0xFFFF
    return x.view(torch.int16).to(torch.int32) & 0xFFFF


def _sqrt(x: Tensor) -> Tensor:
    """Correctly rounded float32 square root. torch's own on CPU is not (17 % of values are one bit off); through double it is."""
    if double_device(x.device) != x.device:
        return x.sqrt()
    return x.double().sqrt().float()
