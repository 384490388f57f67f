"""The Triton kernel of the update rule: one launch updates many tensors of a CUDA or ROCm device.

Terms:

* row: one parameter. Its row of ``param_table`` holds the addresses of its tensors, its number of
  elements and its group, as int64 (see the ``ROW_*`` offsets).
* group: rows that share hyper-parameters. ``hypers`` holds them as int64 (see the ``HYPER_*``
  offsets).
* chunk: ``chunk`` consecutive elements of one row, the work of one program. ``chunks`` maps
  programs to (row, chunk) pairs.
* variant: flags of a row that the compiler must know (``FP32_GRAD``, ``UNALIGNED_GRAD``,
  ``UNALIGNED_ROW``). A launch updates the rows of one variant.

The arithmetic follows ``reference.py`` operation by operation. Launch with
``enable_fp_fusion=False``: a fused multiply-add rounds once, but the rule rounds twice. Scalars
that the rule computes in double are passed as the bits of a double.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from . import reference

# elements per iteration: each of 128 threads loads 8 bfloat16, which are 16 bytes
BLOCK = tl.constexpr(1024)
# elements per iteration in the masked rest of a chunk: one per thread, since masks need registers
TAIL = tl.constexpr(128)

ROW_WIDTH = tl.constexpr(8)
ROW_PARAM = tl.constexpr(0)
ROW_EXP_AVG = tl.constexpr(1)
ROW_EXP_AVG_SQ = tl.constexpr(2)
ROW_CORRECTION = tl.constexpr(3)
ROW_STEP = tl.constexpr(4)
ROW_NUMEL = tl.constexpr(5)
ROW_GROUP = tl.constexpr(6)

HYPER_WIDTH = tl.constexpr(8)
HYPER_LR = tl.constexpr(0)  # bits of a double, like the next four
HYPER_BETA1 = tl.constexpr(1)
HYPER_BETA2 = tl.constexpr(2)
HYPER_EPS = tl.constexpr(3)
HYPER_WEIGHT_DECAY = tl.constexpr(4)
HYPER_MAXIMIZE = tl.constexpr(5)  # 0 or 1
HYPER_LR_ADDRESS = tl.constexpr(6)  # of a tensor to read instead of HYPER_LR, or 0
HYPER_LR_DOUBLE = tl.constexpr(7)  # 1 if that tensor is float64, 0 if it is float32

FP32_GRAD = tl.constexpr(1)
UNALIGNED_GRAD = tl.constexpr(2)
# parameter or state off a 16-byte boundary; implies UNALIGNED_GRAD
UNALIGNED_ROW = tl.constexpr(4)

TINY = tl.constexpr(2.0**-96)
TWO_TO_32 = tl.constexpr(2.0**32)
TWO_TO_MINUS_16 = tl.constexpr(2.0**-16)

SPREAD_M = tl.constexpr(reference.SPREAD_M)
SPREAD_V = tl.constexpr(reference.SPREAD_V)
SPREAD_C = tl.constexpr(reference.SPREAD_C)
MIX = tl.constexpr(reference.MIX)
DRAW_M = tl.constexpr(reference.DRAW_M)
DRAW_C = tl.constexpr(reference.DRAW_C)
LOWBIAS_FIRST = tl.constexpr(reference.LOWBIAS_FIRST)
LOWBIAS_SECOND = tl.constexpr(reference.LOWBIAS_SECOND)

THREADS = BLOCK.value // 8

BLOCK_ROWS = tl.constexpr(128)  # rows per iteration when steps are incremented

_SCALAR_POINTERS = ["grad_scale", "found_inf"]  # 0-dim tensors may be views at any address


@triton.jit(do_not_specialize=["n_rows", "chunk"], do_not_specialize_on_alignment=_SCALAR_POINTERS)
def adamw_kernel(
    param_table,  # *int64 [n_rows, ROW_WIDTH]
    grads,  # *int64 [2, n_rows]: addresses, then variants
    hypers,  # *int64 [groups, HYPER_WIDTH]
    chunks,  # *int32 [programs, 2]: row, chunk of the row
    done_counter,  # *int32 [1]: programs that have read their step; zero between launches
    n_rows,
    chunk,  # elements of one program, a multiple of BLOCK
    grad_scale,  # *float of one element, or None
    found_inf,  # *float of one element, or None
    variant: tl.constexpr,  # only rows of this variant are updated
    fp32_param: tl.constexpr,
    hardware_cast: tl.constexpr,  # False in the interpreter, whose casts to bfloat16 truncate
    flushing_sqrt: tl.constexpr,  # True on AMD: see _square_root
):
    """Take one step of all rows of one variant."""
    active = True
    if found_inf is not None:
        active = tl.load(found_inf) == 0.0  # NaN skips the step, too
    if active:
        _update_chunk(
            param_table,
            grads,
            hypers,
            chunks,
            n_rows,
            chunk,
            grad_scale,
            variant,
            fp32_param,
            hardware_cast,
            flushing_sqrt,
        )
        _increment_steps(param_table, grads, done_counter, n_rows, variant)


# The kernel itself names no global constants: at every launch Triton would compare each with its
# value at compile time, which takes longer than the rest of the launch. The constants of the
# functions below are only part of the compiled kernel's cache key.


@triton.jit
def _update_chunk(
    param_table,
    grads,
    hypers,
    chunks,
    n_rows,
    chunk,
    grad_scale,
    variant: tl.constexpr,
    fp32_param: tl.constexpr,
    hardware_cast: tl.constexpr,
    flushing_sqrt: tl.constexpr,
):
    """Update this program's chunk, if its row is of this variant."""
    program = tl.program_id(0)
    row = tl.load(chunks + 2 * program)
    if tl.load(grads + n_rows + row) == variant:
        scale, key, scalars = _row_scalars(param_table + row * ROW_WIDTH, hypers, grad_scale)
        g, p, m, v, c, n = _chunk_pointers(
            param_table, grads, chunks, row, chunk, variant, fp32_param
        )
        offsets = tl.arange(0, BLOCK)
        full = n - n % BLOCK
        for i in range(0, full, BLOCK):
            index = i + offsets
            _update(
                g,
                p,
                m,
                v,
                c,
                index,
                None,
                scale,
                key,
                scalars,
                fp32_param,
                hardware_cast,
                flushing_sqrt,
            )
        for i in range(full, n, TAIL):
            tail = i + tl.arange(0, TAIL)
            _update(
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


@triton.jit
def _row_scalars(this_row, hypers, grad_scale):
    """Return the factor of the gradients, the hash of the step, and the step's scalars."""
    scale = tl.full((), 1.0, tl.float32)
    if grad_scale is not None:
        scale = _without_payload(tl.load(grad_scale).to(tl.float32).to(tl.uint32, bitcast=True))
    hyper = hypers + tl.load(this_row + ROW_GROUP) * HYPER_WIDTH
    # not 0 - x, which loses the sign of zero
    scale = tl.where(tl.load(hyper + HYPER_MAXIMIZE) != 0, scale * -1.0, scale)
    step = tl.load(tl.load(this_row + ROW_STEP).to(tl.pointer_type(tl.float32)))
    t = (step + 1.0).to(tl.int32)
    return scale, _lowbias32(t.to(tl.uint32)), _step_scalars(t, hyper)


@triton.jit
def _chunk_pointers(
    param_table, grads, chunks, row, chunk, variant: tl.constexpr, fp32_param: tl.constexpr
):
    """Return pointers to the start of this program's chunk, and its number of elements."""
    this_row = param_table + row * ROW_WIDTH
    start = tl.load(chunks + 2 * tl.program_id(0) + 1).to(tl.int64) * chunk
    n = tl.minimum(tl.load(this_row + ROW_NUMEL) - start, chunk).to(tl.int32)
    g = _pointer(
        tl.load(grads + row), start, (FP32_GRAD & variant) != 0, (UNALIGNED_GRAD & variant) == 0
    )
    aligned: tl.constexpr = (UNALIGNED_ROW & variant) == 0
    p = _pointer(tl.load(this_row + ROW_PARAM), start, fp32_param, aligned)
    m = _pointer(tl.load(this_row + ROW_EXP_AVG), start, fp32_param, aligned)
    v = _pointer(tl.load(this_row + ROW_EXP_AVG_SQ), start, fp32_param, aligned)
    c = p  # a float32 parameter has no correction
    if not fp32_param:
        c = _pointer(tl.load(this_row + ROW_CORRECTION), start, fp32_param, aligned)
    return g, p, m, v, c, n


@triton.jit
def _increment_steps(param_table, grads, done_counter, n_rows, variant: tl.constexpr):
    """Increment the steps of all rows of this variant in the program that finishes last.

    By then every program has read its row's step: the barrier orders the reads of all threads
    before this program is counted.
    """
    tl.debug_barrier()
    if tl.atomic_add(done_counter, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(done_counter, 0)
        for first in range(0, n_rows, BLOCK_ROWS):
            index = first + tl.arange(0, BLOCK_ROWS)
            mask = index < n_rows
            mask = mask & (tl.load(grads + n_rows + index, mask=mask, other=-1) == variant)
            step = tl.load(param_table + index * ROW_WIDTH + ROW_STEP, mask=mask, other=0).to(
                tl.pointer_type(tl.float32)
            )
            tl.store(step, tl.load(step, mask=mask, other=0.0) + 1.0, mask=mask)


@triton.jit
def _update(
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
    fp32_param,
    hardware_cast,
    flushing_sqrt: tl.constexpr,
):
    """Update the elements ``i`` of one row. ``mask`` is None if all of them exist."""
    if fp32_param:
        _update_fp32(g + i, p + i, m + i, v + i, mask, scale, scalars, flushing_sqrt)
    else:
        _update_bf16(
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


@triton.jit
def _update_bf16(
    g,
    p,
    m,
    v,
    c,
    mask,
    scale,
    key,
    scalars,
    hardware_cast: tl.constexpr,
    flushing_sqrt: tl.constexpr,
):
    _, _, pn, cn, mn, vn, _, random = _new_bf16(
        g, p, m, v, c, mask, scale, key, scalars, hardware_cast, flushing_sqrt
    )
    tl.store(p, pn, mask=mask)
    tl.store(v, _stochastic_round(vn, random), mask=mask)
    tl.store(m, _stochastic_round(mn, random * DRAW_M), mask=mask)
    tl.store(c, _stochastic_round(cn, random * DRAW_C), mask=mask)


@triton.jit
def _new_bf16(
    g,
    p,
    m,
    v,
    c,
    mask,
    scale,
    key,
    scalars,
    hardware_cast: tl.constexpr,
    flushing_sqrt: tl.constexpr,
):
    """Compute the step of some elements without storing it.

    Returns:
        The bits of the old p and c, the bits of the new p, the new c, m and v before rounding, the
        update (minus the change of p + c), and the random bits for v.
    """
    g_bits = tl.load(g, mask=mask)
    p16 = tl.load(p, mask=mask).to(tl.uint32)
    m16 = tl.load(m, mask=mask).to(tl.uint32)
    v16 = tl.load(v, mask=mask).to(tl.uint32)
    c16 = tl.load(c, mask=mask).to(tl.uint32)
    random = _random_bits(_pattern(g_bits), p16, m16, v16, c16, key)
    p32 = _widen(p16)
    c32 = _widen(c16)
    mn, vn, upd = _moments(
        _gradient(g_bits) * scale, _widen(m16), _widen(v16), scalars, flushing_sqrt
    )
    change = scalars[6] * (p32 + c32) + upd
    d = c32 - change
    pn = _round_nearest(p32 + d, hardware_cast)
    cn = (p32 - _widen(pn.to(tl.uint32))) + d
    return p16, c16, pn, cn, mn, vn, change, random


@triton.jit
def _update_fp32(g, p, m, v, mask, scale, scalars, flushing_sqrt: tl.constexpr):
    p32, mn, vn, change = _new_fp32(g, p, m, v, mask, scale, scalars, flushing_sqrt)
    tl.store(p, (p32 - change).to(tl.uint32, bitcast=True), mask=mask)
    tl.store(v, vn.to(tl.uint32, bitcast=True), mask=mask)
    tl.store(m, mn.to(tl.uint32, bitcast=True), mask=mask)


@triton.jit
def _new_fp32(g, p, m, v, mask, scale, scalars, flushing_sqrt: tl.constexpr):
    """Return the old p, the new m and v, and the update (minus the change of p)."""
    p32 = tl.load(p, mask=mask).to(tl.float32, bitcast=True)
    m32 = tl.load(m, mask=mask).to(tl.float32, bitcast=True)
    v32 = tl.load(v, mask=mask).to(tl.float32, bitcast=True)
    mn, vn, upd = _moments(
        _gradient(tl.load(g, mask=mask)) * scale, m32, v32, scalars, flushing_sqrt
    )
    return p32, mn, vn, scalars[6] * p32 + upd


@triton.jit
def _moments(g, m, v, scalars, flushing_sqrt: tl.constexpr):
    beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, inv_sqrt_bias_correction2, _, eps = (
        scalars
    )
    mn = beta1 * m + one_minus_beta1 * g
    vn = beta2 * v + one_minus_beta2 * (g * g)
    upd = tl.div_rn(
        step_size * mn, _square_root(vn, flushing_sqrt) * inv_sqrt_bias_correction2 + eps
    )
    return mn, vn, upd


@triton.jit
def _square_root(x, flushing_sqrt: tl.constexpr):
    """Return the square root, rounded to nearest.

    On AMD, some versions of Triton (3.6) refine the hardware's reciprocal square root. It flushes
    subnormal numbers to zero, so their root becomes NaN. Below 2^-96 the refinement's remainder is
    subnormal, so the root is an ulp off. Scaling such numbers up by a power of two is exact.
    """
    if flushing_sqrt:
        tiny = x < TINY
        root = tl.sqrt_rn(tl.where(tiny, x * TWO_TO_32, x))
        return tl.where(tiny, root * TWO_TO_MINUS_16, root)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def _step_scalars(t, hyper):
    """Return ``reference.step_scalars``, computed in double and each rounded once to float32."""
    lr = _double_at(hyper + HYPER_LR)
    lr_address = tl.load(hyper + HYPER_LR_ADDRESS)
    if lr_address != 0:
        if tl.load(hyper + HYPER_LR_DOUBLE) != 0:
            lr = tl.load(lr_address.to(tl.pointer_type(tl.float64)))
        else:
            lr = tl.load(lr_address.to(tl.pointer_type(tl.float32))).to(tl.float64)
    beta1 = _double_at(hyper + HYPER_BETA1)
    beta2 = _double_at(hyper + HYPER_BETA2)
    return (
        beta1.to(tl.float32),
        (1.0 - beta1).to(tl.float32),
        beta2.to(tl.float32),
        (1.0 - beta2).to(tl.float32),
        (lr / (1.0 - _power(beta1, t))).to(tl.float32),
        (1.0 / tl.sqrt(1.0 - _power(beta2, t))).to(tl.float32),
        (lr * _double_at(hyper + HYPER_WEIGHT_DECAY)).to(tl.float32),
        _double_at(hyper + HYPER_EPS).to(tl.float32),
    )


@triton.jit
def _power(base, exponent):
    """Return ``base ** exponent`` in double by repeated squaring, like ``reference.power``."""
    result = tl.full((), 1.0, tl.float64)
    while exponent > 0:
        result = tl.where((exponent & 1) != 0, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


@triton.jit
def _double(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _double_at(address):
    return _double(tl.load(address))


@triton.jit
def _pointer(address, start, fp32: tl.constexpr, aligned: tl.constexpr):
    """Return a pointer to element ``start`` of the tensor at ``address``, as unsigned integers."""
    pointer = address.to(tl.pointer_type(tl.uint32 if fp32 else tl.uint16)) + start
    if aligned:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _widen(bits):
    """Return as float32 the bfloat16 whose 16 bits are in a uint32."""
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def _gradient(bits):
    """Return as float32 a gradient that was loaded as uint16 (bfloat16) or uint32 (float32)."""
    if bits.dtype == tl.uint32:
        return _without_payload(bits)
    else:
        return _widen(bits.to(tl.uint32))


@triton.jit
def _pattern(bits):
    """Return the 16 hashed bits of a gradient; see ``reference._pattern``."""
    if bits.dtype == tl.uint32:
        return (bits >> 16 ^ bits) & 0xFFFF
    else:
        return bits.to(tl.uint32)


@triton.jit
def _lowbias32(x):
    """Compute ``reference.lowbias32`` of a uint32."""
    x = x ^ (x >> 16)
    x = x * LOWBIAS_FIRST
    x = x ^ (x >> 15)
    x = x * LOWBIAS_SECOND
    return x ^ (x >> 16)


@triton.jit
def _random_bits(g, p, m, v, c, key):
    """Compute the random bits for v; times ``DRAW_M`` or ``DRAW_C`` they are those for m or c.

    See ``reference._random_bits``. Arguments and result are uint32; only the low halves matter.
    """
    x = (g ^ m * SPREAD_M ^ c * SPREAD_C ^ key) & 0xFFFF
    w = (p ^ v * SPREAD_V ^ key >> 16) & 0xFFFF
    product = x * w
    y = product ^ product >> 16 ^ x
    return (y ^ (y >> 8 & 0xFF) ^ key >> 16) * MIX


@triton.jit
def _round_nearest(x, hardware_cast: tl.constexpr):
    """Round float32 to the bits of a bfloat16, ties to even."""
    if hardware_cast:
        return x.to(tl.bfloat16).to(tl.uint16, bitcast=True)
    bits = x.to(tl.uint32, bitcast=True)
    # NaN stays NaN: see _stochastic_round
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).to(tl.uint16)


@triton.jit
def _stochastic_round(x, r):
    """Round float32 to the bits of a bfloat16: up if the discarded bits exceed the low 16 of ``r``.

    Rounding up NVIDIA's NaN 0x7fffffff would overflow into -0.0. The minimum prevents it, and costs
    less than a test for NaN. On other devices a computed NaN has the payload of an operand, whose
    last 16 bits are zero: see ``_without_payload``.
    """
    bits = tl.minimum(x.to(tl.int32, bitcast=True), 0x7FFF0000)
    # not ~r: Triton's interpreter makes -1 a uint32 for it, which numpy 2.5 refuses
    complement = r & 0xFFFF ^ 0xFFFF
    # the sum carries if the discarded bits exceed r
    return ((bits.to(tl.uint32, bitcast=True) + complement) >> 16).to(tl.uint16)


@triton.jit
def _without_payload(bits):
    """Return as float32 a uint32 bit pattern, with every NaN replaced by the canonical one."""
    return (
        tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, bits)
        .to(tl.uint32)
        .to(tl.float32, bitcast=True)
    )
