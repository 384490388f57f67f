"""The update rule in plain PyTorch. Every other backend matches it bit for bit.

Notation for one element at step ``t`` (1-based):

* ``g, p, m, v, c``: gradient, parameter, exp_avg, exp_avg_sq and correction as they are *stored*.
  The true weight is ``p + c``.
* ``mn, vn, pn, cn``: the new values of ``m, v, p, c``. All but ``pn`` are fp32, not yet rounded to
  the stored dtype.
* RTNE: round to nearest, ties to even, as a cast to bfloat16 does.
* SR: stochastic rounding. It rounds up with a probability equal to the discarded fraction, so that
  the mean error is zero.

The random bits of SR are a hash of the element's own stored bits and the step. They need no
generator, seed or index, so they do not depend on how the parameter is sharded, and replicas agree
without communication. The hash uses 16-bit words: a CPU then hashes two elements in one 32-bit
lane, and the hash is the largest cost of a step on a CPU.

Sources: the correction term is Kahan-style compensation as in "Revisiting BFloat16 Training"
(Zamirai et al., arXiv:2010.06192) and the ``adamw_bfloat16`` library. The hash combines the folded
product of wyhash (Wang Yi) with the xorshift and multiplication of Chris Wellons' hash-prospector,
whose "lowbias32" hashes the step.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .backend import (
    PRECISION_SUMS,
    Hyperparams,
    Runs,
    StepArgs,
    TensorLists,
    check_grad_dtypes,
)
from .device_memory import NormScratch

CHUNK = 1 << 16  # elements per pass, so that the temporaries stay in a CPU's second-level cache

# Odd multipliers of the hash. Of thousands of random sets, none was measurably better.
SPREAD_M, SPREAD_V, SPREAD_C = 0x1643, 0x6771, 0xC09D
MIX = 0x365B
DRAW_M, DRAW_C = 0x2851, 0xFAED
LOWBIAS_FIRST, LOWBIAS_SECOND = 0x7FEB352D, 0x846CA68B  # multipliers of lowbias32


class StepScalars(NamedTuple):
    """Scalars of one step. All but ``step`` are Python floats that hold exact float32 values."""

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
    """Return ``base ** exponent`` by repeated squaring in double.

    It has the same bits on every machine, unlike ``pow`` of a C library.
    """
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
        # a huge lr gives an infinite step size without a warning, as in torch
        with np.errstate(over="ignore"):
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


class ReferenceTable:
    """The parameters of one device and their states: a :class:`.backend.BackendTable`."""

    def __init__(self, tensors: TensorLists) -> None:
        self._rows = list(zip(tensors.rows(), tensors.group_indices(), strict=True))

    @torch.no_grad()
    def update_(self, args: StepArgs) -> None:
        """Take one step in place; see :class:`.backend.BackendTable`."""
        grads, hypers, grad_scale, found_inf = args
        if found_inf is not None and found_inf.item() != 0:
            return
        check_grad_dtypes(g.dtype for g in grads)
        scale = 1.0 if grad_scale is None else float(grad_scale)
        # most parameters of a group share their step
        scalars: dict[tuple[int, int], StepScalars] = {}
        for ((p, m, v, c, step), group), g in zip(self._rows, grads, strict=True):
            step += 1
            t = int(step.item())
            if (t, group) not in scalars:
                scalars[t, group] = step_scalars(t, hypers[group])
            if p.numel() == 0:
                continue
            flat = [x.as_strided((x.numel(),), (1,)) for x in (p, g, m, v, c) if x is not None]
            update = _update_fp32 if c is None else _update_bf16
            signed_scale = -scale if hypers[group].maximize else scale
            for chunk in zip(*[x.split(CHUNK) for x in flat], strict=True):
                update(*chunk, scale=signed_scale, s=scalars[t, group])  # type: ignore[misc]

    @torch.no_grad()
    def precision_sums(self, args: StepArgs, runs: Runs | None = None) -> Tensor:
        """Add up the sums of one step; see :meth:`.backend.FusedAdamW.precision_sums`."""
        from .reference_precision import add_sums

        device = double_device(args.grads[0].device)
        shape = len(args.hypers) if runs is None else runs.n_rows, len(PRECISION_SUMS)
        total = torch.zeros(shape, dtype=torch.float64, device=device)
        if runs is None:
            numels, groups = [g.numel() for g in args.grads], [group for _, group in self._rows]
            runs = Runs.whole(numels, groups, shape[0])
        for i, begin, count, to in zip(*runs[:4], strict=True):
            (*tensors, step), group = self._rows[i]
            own: list[Any] = [
                None if x is None else x.as_strided((x.numel(),), (1,))[begin : begin + count]
                for x in (*tensors, args.grads[i])
            ]
            p, m, v, c, g = own
            add_sums(total[to], (p, m, v, c, step), g, args.hypers[group], args.grad_scale)
        return total


make_table = ReferenceTable


def unavailable_reason(device: torch.device | None = None) -> str | None:
    """Return None: the backend is plain torch, and always available."""
    return None


def grad_sum_sq(grads: list[Tensor], scratch: NormScratch | None = None) -> Tensor:
    """Sum the squares of all elements; see :func:`.clip.grad_sum_sq`."""
    check_grad_dtypes(g.dtype for g in grads)
    device = double_device(grads[0].device) if grads else torch.device("cpu")
    total = torch.zeros((), dtype=torch.float64, device=device)
    for g in grads:
        for chunk in g.reshape(-1).split(CHUNK):
            total += chunk.to(device).double().square().sum()
    return total


@functools.cache
def double_device(device: torch.device) -> torch.device:
    """Return ``device``, or the CPU if the device has no float64 (MPS and some XPUs)."""
    has_double = device.type != "mps" and (
        device.type != "xpu" or torch.xpu.get_device_properties(device).has_fp64
    )
    return device if has_double else torch.device("cpu")


def _update_bf16(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, c: Tensor, scale: float, s: StepScalars
) -> None:
    """Update a chunk of a bfloat16 parameter in place.

    Every fp32 operation rounds its result: no fused multiply-add.
    """
    rm, rv, rc = _random_bits(g, p, m, v, c, step_key(s.step))
    p32, c32 = p.float(), c.float()
    mn, vn, upd = _moments(g.float() * scale, m.float(), v.float(), s)
    # only the decay uses p + c: this fp32 sum loses low bits of c
    d = c32 - (s.lr_weight_decay * (p32 + c32) + upd)
    pn = (p32 + d).bfloat16()
    cn = (p32 - pn.float()) + d
    p.copy_(pn)
    v.copy_(stochastic_round(vn, rv))
    m.copy_(stochastic_round(mn, rm))
    c.copy_(stochastic_round(cn, rc))


def _update_fp32(p: Tensor, g: Tensor, m: Tensor, v: Tensor, scale: float, s: StepScalars) -> None:
    """Update a chunk of a float32 parameter in place, without correction and rounding."""
    mn, vn, upd = _moments(g.float() * scale, m, v, s)
    p.sub_(s.lr_weight_decay * p + upd)
    v.copy_(vn)
    m.copy_(mn)


def _moments(g: Tensor, m: Tensor, v: Tensor, s: StepScalars) -> tuple[Tensor, Tensor, Tensor]:
    """Return the new moments and the update, all float32.

    The update is ``step_size * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)``.
    """
    mn = s.beta1 * m + s.one_minus_beta1 * g
    vn = s.beta2 * v + s.one_minus_beta2 * (g * g)
    upd = s.step_size * mn / (_sqrt(vn) * s.inv_sqrt_bias_correction2 + s.eps)
    return mn, vn, upd


def stochastic_round(x: Tensor, r: Tensor) -> Tensor:
    """Round float32 to bfloat16: up in magnitude if the 16 discarded bits exceed ``r``, else down.

    Args:
        x: float32, any shape.
        r: int32 of the same shape, uniform on [0, 65535].

    Returns:
        bfloat16. Infinity stays infinity. NaN stays NaN, although rounding its bits up could
        overflow into zero.
    """
    bits = x.view(torch.int32)
    rounded = ((bits >> 16) + ((bits & 0xFFFF) > r)).to(torch.int16).view(torch.bfloat16)
    return torch.where(x.isnan(), torch.nan, rounded)


def lowbias32(x: Tensor) -> Tensor:
    """Hash each element of an int32 tensor to 32 bits.

    Multiplication wraps, and the masks turn arithmetic shifts into logical ones.
    """
    x = x ^ (x >> 16 & 0xFFFF)
    x = x * LOWBIAS_FIRST
    x = x ^ (x >> 15 & 0x1FFFF)
    x = x * (LOWBIAS_SECOND - (1 << 32))
    return x ^ (x >> 16 & 0xFFFF)


def step_key(step: int) -> int:
    """Return 32 random bits of a step, from :func:`lowbias32`."""
    return int(lowbias32(torch.tensor(step, device="cpu").to(torch.int32))) & 0xFFFFFFFF


def _random_bits(
    g: Tensor, p: Tensor, m: Tensor, v: Tensor, c: Tensor, key: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Hash the stored bits of each element and the :func:`step_key`.

    All arithmetic is modulo 2^16, except one product of two 16-bit words. Folding its high half
    into its low half (the "mum" of wyhash) mixes 32 bits with one multiplication. By itself the
    fold favours some results: a factor of 0 gives 0 for any other factor. So the key, which differs
    at each step, is part of both factors and of the result, and favours no value over time.

    Returns:
        The random bits for m, v and c, int32 on [0, 65535]. Each is unbiased; they may depend on
        each other.
    """
    low, high = key & 0xFFFF, key >> 16
    x = (_pattern(g) ^ _pattern(m) * SPREAD_M ^ _pattern(c) * SPREAD_C ^ low) & 0xFFFF
    w = (_pattern(p) ^ _pattern(v) * SPREAD_V ^ high) & 0xFFFF
    product = x * w
    y = (product ^ product >> 16 ^ x) & 0xFFFF
    y = (y ^ y >> 8 ^ high) * MIX
    return y * DRAW_M & 0xFFFF, y & 0xFFFF, y * DRAW_C & 0xFFFF


def _pattern(x: Tensor) -> Tensor:
    """Return the bits of each element that are hashed: 16 bits, as int32.

    A float32 gradient that bfloat16 holds exactly folds to the bits of that bfloat16.
    """
    if x.dtype == torch.float32:
        bits = x.view(torch.int32)
        return (bits >> 16 ^ bits) & 0xFFFF
    return x.view(torch.int16).to(torch.int32) & 0xFFFF


def _sqrt(x: Tensor) -> Tensor:
    """Return the correctly rounded float32 square root.

    On the CPU, torch's float32 square root is an ulp off for 17 % of values, so this computes it in
    double. A device without float64 keeps its own.
    """
    if double_device(x.device) != x.device:
        return x.sqrt()
    return x.double().sqrt().float()
