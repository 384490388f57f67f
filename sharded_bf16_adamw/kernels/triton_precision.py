"""The Triton kernel of ``precision_stats``: sums over the changes of a step, without taking it.

One launch reads all tensors of one variant, with the access pattern of the update. The functions of
``triton_adamw.py`` compute the step. Each program adds up its chunk: the values of an element are
float32, their products and sums float64. ``cuda.py`` adds up the programs.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from .backend import PRECISION_SUMS
from .triton_adamw import (
    _SCALAR_POINTERS,
    BLOCK,
    DRAW_C,
    ROW_WIDTH,
    TAIL,
    UNALIGNED_ROW,
    _chunk_pointers,
    _new_bf16,
    _new_fp32,
    _round_nearest,
    _row_scalars,
    _stochastic_round,
    _widen,
)

SUMS = tl.constexpr(len(PRECISION_SUMS))
PER_THREAD = tl.constexpr(BLOCK.value // TAIL.value)  # elements of one 16-byte load of bfloat16


@triton.jit(do_not_specialize=["n_rows", "chunk"], do_not_specialize_on_alignment=_SCALAR_POINTERS)
def precision_kernel(
    param_table,  # *int64 [n_rows, ROW_WIDTH]
    grads,  # *int64 [2, n_rows]: addresses, then variants
    hypers,  # *int64 [groups, HYPER_WIDTH]
    chunks,  # *int32 [programs, 2]: row, chunk of the row; only of rows of this variant
    partials,  # *float64 [programs, len(PRECISION_SUMS)], written
    n_rows,
    chunk,  # elements of one program, a multiple of BLOCK
    grad_scale,  # *float of one element, or None
    variant: tl.constexpr,
    fp32_param: tl.constexpr,
    hardware_cast: tl.constexpr,  # see adamw_kernel
    flushing_sqrt: tl.constexpr,
):
    """Store the sums of each program's chunk."""
    _sum_chunk(
        param_table,
        grads,
        hypers,
        chunks,
        partials,
        chunk,
        grad_scale,
        variant,
        fp32_param,
        hardware_cast,
        flushing_sqrt,
    )


@triton.jit
def _sum_chunk(
    param_table,
    grads,
    hypers,
    chunks,
    partials,
    chunk,
    grad_scale,
    variant: tl.constexpr,
    fp32_param: tl.constexpr,
    hardware_cast: tl.constexpr,
    flushing_sqrt: tl.constexpr,
):
    """Add up one chunk.

    A separate function because it names global constants: see ``triton_adamw.py``.
    """
    row = tl.load(chunks + 2 * tl.program_id(0))
    scale, key, scalars = _row_scalars(param_table + row * ROW_WIDTH, hypers, grad_scale)
    g, p, m, v, c, n = _chunk_pointers(param_table, grads, chunks, row, chunk, variant, fp32_param)
    # Each line of offsets is the work of one thread, which adds up in registers. In an aligned row
    # a thread's elements are adjacent, for vector loads; in an unaligned one, adjacent threads read
    # adjacent elements.
    lanes = tl.arange(0, TAIL)[:, None]
    if (UNALIGNED_ROW & variant) == 0:
        offsets = lanes * PER_THREAD + tl.arange(0, PER_THREAD)[None, :]
    else:
        offsets = lanes + tl.arange(0, PER_THREAD)[None, :] * TAIL
    count = tl.zeros((TAIL,), tl.int32)
    dot = tl.zeros((TAIL,), tl.float64)
    sums = (count, count, count, dot, dot, dot, dot, dot, dot, dot)
    full = n - n % BLOCK
    for i in range(0, full, BLOCK):
        sums = _add(
            sums,
            g,
            p,
            m,
            v,
            c,
            i + offsets,
            None,
            scale,
            key,
            scalars,
            fp32_param,
            hardware_cast,
            flushing_sqrt,
        )
    for i in range(full, n, TAIL):
        tail = i + lanes
        sums = _add(
            sums,
            g,
            p,
            m,
            v,
            c,
            tail,
            tail < n,
            scale,
            key,
            scalars,
            fp32_param,
            hardware_cast,
            flushing_sqrt,
        )
    to = partials + tl.program_id(0) * SUMS
    tl.store(to, n.to(tl.float64))
    tl.store(to + 1, 0.0 if fp32_param else n.to(tl.float64))
    for j in tl.static_range(10):
        total = tl.sum(sums[j], axis=0).to(tl.float64)
        # descent, plain_descent: an update is subtracted, so its dot product with the change is
        # negative
        if j == 5 or j == 6:
            total = -total
        if j == 7:  # correction_sq, summed in units of 64 ulps
            total = total * (64.0 * 64.0)
        tl.store(to + 2 + j, total)


@triton.jit
def _add(
    sums,
    g,
    p,
    m,
    v,
    c,
    i,
    mask,
    scale,
    key,
    scalars,
    fp32_param: tl.constexpr,
    hardware_cast: tl.constexpr,
    flushing_sqrt: tl.constexpr,
):
    """Add the elements ``i`` to ``sums``, which have one entry per line of ``i``; return them."""
    if fp32_param:
        weight, m32, v32, update = _new_fp32(
            g + i, p + i, m + i, v + i, mask, scale, scalars, flushing_sqrt
        )
        effective = (weight - update) - weight
        plain = effective
        in_64_ulps = tl.zeros_like(weight)
    else:
        p16, c16, pn, cn, m32, v32, update, random = _new_bf16(
            g + i,
            p + i,
            m + i,
            v + i,
            c + i,
            mask,
            scale,
            key,
            scalars,
            hardware_cast,
            flushing_sqrt,
        )
        p32 = _widen(p16)
        c32 = _widen(c16)
        weight = p32 + c32
        new_c = _widen(_stochastic_round(cn, random * DRAW_C).to(tl.uint32))
        effective = (_widen(pn.to(tl.uint32)) - p32) + (new_c - c32)
        plain = _widen(_round_nearest(p32 - update, hardware_cast).to(tl.uint32)) - p32
        in_64_ulps = c32 * _per_64_ulps(p16)
    if mask is not None:
        weight = tl.where(mask, weight, 0.0)
        update = tl.where(mask, update, 0.0)
        effective = tl.where(mask, effective, 0.0)
        plain = tl.where(mask, plain, 0.0)
        in_64_ulps = tl.where(mask, in_64_ulps, 0.0)
        m32 = tl.where(mask, m32, 0.0)
        v32 = tl.where(mask, v32, 0.0)
    is_update = update != 0.0
    is_lost = is_update & (plain == 0.0)
    update64 = update.to(tl.float64)
    return (
        sums[0] + tl.sum(is_update.to(tl.int32), axis=1),
        sums[1] + tl.sum(is_lost.to(tl.int32), axis=1),
        sums[2] + tl.sum((is_lost & (effective != 0.0)).to(tl.int32), axis=1),
        sums[3] + _squares(weight),
        sums[4] + tl.sum(update64 * update64, axis=1),
        sums[5] + tl.sum(update64 * effective.to(tl.float64), axis=1),
        sums[6] + tl.sum(update64 * plain.to(tl.float64), axis=1),
        sums[7] + _squares(in_64_ulps),
        sums[8] + _squares(m32),
        sums[9] + _squares(v32),
    )


@triton.jit
def _squares(x):
    wide = x.to(tl.float64)
    return tl.sum(wide * wide, axis=1)


@triton.jit
def _per_64_ulps(p16):
    """Return the inverse of 64 ulps of the bfloat16 with the bits ``p16``.

    The inverse of one ulp may be infinite. See ``reference_precision._correction_sq`` for the ulp.
    """
    exponent = tl.maximum(p16 & 0x7F80, 0x80)
    return _widen(0x7F80 - exponent)
