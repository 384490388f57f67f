"""A second implementation of the update rule, in numpy and from its specification alone.

It shares no code with the package. Bit patterns are numpy integers, the hash uses wrapping uint16
arithmetic, rounding works on integers, and the scalars of a step come from 60-digit decimals. Every
function works on arrays and on scalars.
"""

from __future__ import annotations

from decimal import Decimal, localcontext
from typing import Any, NamedTuple

import numpy as np

MASK = 0xFFFFFFFF
Array = Any  # an ndarray or a numpy scalar: ufuncs take both


class Hyperparams(NamedTuple):
    """Hyper-parameters of one step, named as in ``adamw_bf16_``."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.1


class Stepped(NamedTuple):
    """The results of a step.

    ``p, m, v, c`` are stored as uint16 bit patterns; ``mn, vn, cn`` are float32, before rounding.
    """

    p: Array
    m: Array
    v: Array
    c: Array
    mn: Array
    vn: Array
    cn: Array


def exact_scalars(t: int, h: Hyperparams) -> dict[str, Decimal]:
    """Return the scalars of step ``t`` to 60 digits, before any rounding."""
    with localcontext() as context:
        context.prec = 60
        lr, b1, b2, wd = (Decimal(x) for x in (h.lr, h.beta1, h.beta2, h.weight_decay))
        return {
            "beta1": b1,
            "one_minus_beta1": 1 - b1,
            "beta2": b2,
            "one_minus_beta2": 1 - b2,
            "step_size": lr / (1 - b1**t),
            "inv_sqrt_bias_correction2": 1 / (1 - b2**t).sqrt(),
            "eps": Decimal(h.eps),
            "lr_weight_decay": lr * wd,
        }


def lowbias32(x: Any) -> Any:
    """Hash integers, or uint64 arrays, below 2^32."""
    x = (x ^ x >> 16) * 0x7FEB352D & MASK
    x = (x ^ x >> 15) * 0x846CA68B & MASK
    return x ^ x >> 16


def random_bits(
    g: Array, p: Array, m: Array, v: Array, c: Array, t: int
) -> tuple[Array, Array, Array]:
    """Return the random bits for m, v and c, from uint16 patterns and the step."""
    u16, u32 = np.uint16, np.uint32
    low, high = u16(lowbias32(t) & 0xFFFF), u16(lowbias32(t) >> 16)
    with np.errstate(over="ignore"):
        x = g ^ m * u16(0x1643) ^ c * u16(0xC09D) ^ low
        w = p ^ v * u16(0x6771) ^ high
        product = x.astype(u32) * w.astype(u32)
        y = product.astype(u16) ^ (product >> u32(16)).astype(u16) ^ x
        y = (y ^ y >> u16(8) ^ high) * u16(0x365B)
        return y * u16(0x2851), y, y * u16(0xFAED)


def widen(pattern: Array) -> Array:
    """Return the float32 value of a bfloat16 bit pattern."""
    return (pattern.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_nearest_even(x: Array) -> Array:
    """Return the bfloat16 pattern nearest to a float32, ties to even. Every NaN becomes 0x7FC0."""
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def round_stochastically(x: Array, r: Array) -> Array:
    """Round float32 to a bfloat16 pattern, away from zero if the 16 discarded bits exceed ``r``."""
    bits = x.view(np.uint32).astype(np.uint64)
    return np.where(np.isnan(x), 0x7FC0, (bits + 0xFFFF - r) >> 16).astype(np.uint16)


def step_bf16(
    p: Array, g: Array, m: Array, v: Array, c: Array, t: int, h: Hyperparams, scale: float = 1.0
) -> Stepped:
    """Take one step on bfloat16 parameters.

    Args:
        p: uint16 bit patterns.
        g: uint16 patterns of bfloat16 gradients, or uint32 patterns of float32 ones, whose halves
            are folded for the hash.
        m: uint16 bit patterns.
        v: uint16 bit patterns.
        c: uint16 bit patterns.
        t: the 1-based step.
        h: hyper-parameters.
        scale: multiplies the gradient after hashing; negative to maximize.
    """
    s = {name: np.float32(float(value)) for name, value in exact_scalars(t, h).items()}
    if g.dtype == np.uint32:
        g_hash, g32 = (g >> np.uint32(16) ^ g).astype(np.uint16), g.view(np.float32)
    else:
        g_hash, g32 = g, widen(g)
    rm, rv, rc = random_bits(g_hash, p, m, v, c, t)
    with np.errstate(all="ignore"):
        p32, m32, v32, c32 = widen(p), widen(m), widen(v), widen(c)
        g32 = g32 * np.float32(scale)
        mn = s["beta1"] * m32 + s["one_minus_beta1"] * g32
        vn = s["beta2"] * v32 + s["one_minus_beta2"] * (g32 * g32)
        upd = s["step_size"] * mn / (np.sqrt(vn) * s["inv_sqrt_bias_correction2"] + s["eps"])
        d = c32 - (s["lr_weight_decay"] * (p32 + c32) + upd)
        pn = to_nearest_even(p32 + d)
        cn = (p32 - widen(pn)) + d
        return Stepped(
            pn,
            round_stochastically(mn, rm),
            round_stochastically(vn, rv),
            round_stochastically(cn, rc),
            mn,
            vn,
            cn,
        )
