"""The square root on AMD GPUs, for Triton tests that run it in separate processes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton

from sharded_bf16_adamw.kernels.triton_adamw import _square_root


@triton.jit
def root_kernel(x, root):
    i = triton.language.program_id(0) * 1024 + triton.language.arange(0, 1024)
    triton.language.store(root + i, _square_root(triton.language.load(x + i), False))


@triton.jit
def scaled_root_kernel(x, root):
    i = triton.language.program_id(0) * 1024 + triton.language.arange(0, 1024)
    triton.language.store(root + i, _square_root(triton.language.load(x + i), True))


def flushing_root(x: Any) -> Any:
    """Emulate ``sqrt_rn`` of Triton 3.6 for AMD.

    It takes a reciprocal root that flushes subnormal numbers, and refines it in two iterations.
    Each float32 operation has one rounding, because numpy's long double holds the products. The
    hardware's reciprocal root is within one ulp; this one is off by one ulp if the last bit of
    ``x`` is set.
    """
    wide, narrow = np.longdouble, np.float32

    def fma(a: Any, b: Any, c: Any) -> Any:
        return narrow(wide(a) * wide(b) + wide(c))

    with np.errstate(all="ignore"):
        flushed = np.where(np.abs(x) < np.finfo(narrow).tiny, np.copysign(narrow(0), x), x)
        y = narrow(1 / np.sqrt(wide(flushed)))
        y = np.where(x.view(np.uint32) & 1, np.nextafter(y, narrow(np.inf)), y)
        s, h = x * y, narrow(0.5) * y
        d = fma(-h, s, narrow(0.5))
        h, s = fma(h, d, h), fma(s, d, s)
        return np.where((x == 0) | (x == np.inf), x, fma(fma(-s, s, x), h, s))


def square_roots(scaled: bool) -> dict[str, int]:
    """Count wrong roots by magnitude, with :func:`flushing_root` as the interpreter's root."""
    from triton.runtime import interpreter

    generator = np.random.default_rng(11)
    bits = generator.integers(0, 0x7F800000, 1 << 18, dtype=np.uint32)
    edges = [0, 1, 2, 3, 0x7FFFFF, 0x800000, 0x800001, 0x7F7FFFFF, 0x7F800000]
    edges += [(127 - 96) << 23 | x for x in (0, 1, 2)] + [((127 - 96) << 23) - x for x in (1, 2, 3)]
    bits[: len(edges)] = edges
    bits[1000:30000] >>= 8  # subnormal or zero
    x = bits.view(np.float32)
    wanted = np.sqrt(x)
    root = torch.empty(len(x))
    builder = interpreter.InterpreterBuilder
    exact, builder.create_precise_sqrt = (
        builder.create_precise_sqrt,
        lambda self, arg: self.unary_op(arg, flushing_root),
    )
    try:
        (scaled_root_kernel if scaled else root_kernel)[(len(x) // 1024,)](
            torch.from_numpy(x), root
        )
    finally:
        builder.create_precise_sqrt = exact
    wrong = root.numpy().view(np.uint32) != wanted.view(np.uint32)
    subnormal, tiny = x < np.finfo(np.float32).tiny, x < 2.0**-96
    classes = {"subnormal": subnormal, "below 2^-96": tiny & ~subnormal, "others": ~tiny}
    return {name: int((wrong & in_class).sum()) for name, in_class in classes.items()}
