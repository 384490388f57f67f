"""The Triton kernels of the gradient norm.

One launch sums the squares of all gradients of a device and computes the clip coefficient. Squares
of float32 and bfloat16 are exact in double, so their sum is more precise than a float32 norm. The
gradients' lengths determine the order of the sum, so equal gradients give equal bits.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from .triton_adamw import FP32_GRAD, TAIL, UNALIGNED_GRAD, _double, _gradient, _pointer

BLOCK = tl.constexpr(2048)
MIN_CHUNK = 16384  # elements of one program; doubled until MAX_PROGRAMS suffice
MAX_PROGRAMS = 16384  # about; the last program adds up all partial sums
BLOCK_PARTIALS = tl.constexpr(2048)
THREADS = 128


@triton.jit(do_not_specialize=["n_rows", "chunk", "max_norm_bits"])
def norm_kernel(
    numels,  # *int64 [n_rows]
    grads,  # *int64 [2, n_rows]: addresses, then variants (see triton_adamw)
    chunks,  # *int32 [programs, 2]: row, chunk of the row
    partials,  # *float64 [programs], scratch
    done_counter,  # *int32 [1]: programs whose partial sum is stored; zero between launches
    sum_sq,  # *float64 [1], written
    clip,  # *float32 [3], written: norm, coefficient, found_inf; or None
    n_rows,
    chunk,  # elements of one program, a multiple of BLOCK
    max_norm_bits: tl.int64,
):
    """Sum the squares of all gradients. The program that finishes last stores the results."""
    tl.store(partials + tl.program_id(0), _sum_of_program(numels, grads, chunks, n_rows, chunk))
    tl.debug_barrier()  # the partial sum is stored before this program is counted
    if tl.atomic_add(done_counter, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(done_counter, 0)
        total = _sum_of_partials(partials)
        tl.store(sum_sq, total)
        if clip is not None:
            _store_clip(clip, total, _double(max_norm_bits))


@triton.jit
def _sum_of_program(numels, grads, chunks, n_rows, chunk):
    """Return the sum of squares of this program's chunk.

    A separate function because it names global constants: see ``triton_adamw.py``.
    """
    program = tl.program_id(0)
    row = tl.load(chunks + 2 * program)
    start = tl.load(chunks + 2 * program + 1).to(tl.int64) * chunk
    n = tl.minimum(tl.load(numels + row) - start, chunk).to(tl.int32)
    address = tl.load(grads + row)
    variant = tl.load(grads + n_rows + row)
    total = tl.full((), 0.0, tl.float64)
    if variant == 0:
        total = _sum_chunk(address, start, n, False, True)
    elif variant == FP32_GRAD:
        total = _sum_chunk(address, start, n, True, True)
    elif variant == UNALIGNED_GRAD:
        total = _sum_chunk(address, start, n, False, False)
    else:
        total = _sum_chunk(address, start, n, True, False)
    return total


@triton.jit
def _sum_of_partials(partials):
    programs = tl.num_programs(0)
    acc = tl.zeros((BLOCK_PARTIALS,), tl.float64)
    for first in range(0, programs, BLOCK_PARTIALS):
        index = first + tl.arange(0, BLOCK_PARTIALS)
        # .cg bypasses L1, which may hold older values
        acc += tl.load(partials + index, mask=index < programs, other=0.0, cache_modifier=".cg")
    return tl.sum(acc, axis=0)


@triton.jit(do_not_specialize=["max_norm_bits"], do_not_specialize_on_alignment=["sum_sq"])
def clip_kernel(sum_sq, clip, max_norm_bits: tl.int64):
    """Compute ``clip`` (see ``norm_kernel``) from a sum over ranks, in one program."""
    _store_clip(clip, tl.load(sum_sq), _double(max_norm_bits))


@triton.jit
def _store_clip(clip, sum_sq, max_norm):
    norm = tl.sqrt(sum_sq)
    coefficient = max_norm / (norm + 1e-6)
    coefficient = tl.where(coefficient > 1.0, 1.0, coefficient)  # NaN stays
    tl.store(clip, norm.to(tl.float32))
    tl.store(clip + 1, coefficient.to(tl.float32))
    # inf or NaN comes from a gradient: the squares of finite ones cannot overflow a double
    tl.store(clip + 2, tl.where(sum_sq - sum_sq == 0.0, 0.0, 1.0))


@triton.jit
def _sum_chunk(address, start, n, fp32: tl.constexpr, aligned: tl.constexpr):
    g = _pointer(address, start, fp32, aligned)
    offsets = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float64)
    full = n - n % BLOCK
    for i in range(0, full, BLOCK):
        x = _gradient(tl.load(g + i + offsets)).to(tl.float64)
        acc = tl.fma(x, x, acc)  # the product is exact, so the fma has the bits of two operations
    total = tl.sum(acc, axis=0)
    rest = tl.zeros((TAIL,), tl.float64)
    for i in range(full, n, TAIL):
        tail = i + tl.arange(0, TAIL)
        y = _gradient(tl.load(g + tail, mask=tail < n, other=0)).to(tl.float64)
        rest = tl.fma(y, y, rest)
    return total + tl.sum(rest, axis=0)
