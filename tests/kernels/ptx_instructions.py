"""The PTX instructions that need no other lane, in numpy: ``OPERATIONS``. See ``ptx_emulator.py``.

Only the instructions of this package's kernels are included, with all types that are computed in
the same way. Three sorts are missing on purpose: ``add.f32`` and ``mul.f32`` without ``.rn``, which
ptxas may fuse, and instructions that approximate or flush subnormals to zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray

# the types of stored registers
BITS = {"b16": np.uint16, "b32": np.uint32, "b64": np.uint64, "pred": np.bool_}
TYPES: dict[str, Any] = {
    **BITS,
    **{f"u{n}": np.dtype(f"uint{n}").type for n in (16, 32, 64)},
    **{f"s{n}": np.dtype(f"int{n}").type for n in (16, 32, 64)},
    "f32": np.float32,
    "f64": np.float64,
    "bf16": np.uint16,
    "bf16x2": np.uint32,
}
# The only NaN that single-precision instructions return. Double-precision ones keep payloads.
NAN32 = np.uint32(0x7FFFFFFF).view(np.float32)


def _f32(function: Callable[..., Array]) -> Callable[..., Array]:
    def canonical(*values: Array) -> Array:
        result = function(*values).astype(np.float32)
        result[np.isnan(result)] = NAN32
        return result

    return canonical


def _shift_left(x: Array, by: Array) -> Array:
    return np.where(
        by < 8 * x.itemsize, x << (by & (8 * x.itemsize - 1)).astype(x.dtype), 0
    ).astype(x.dtype)


def _shift_right(x: Array, by: Array) -> Array:
    # in two shifts, so that the sign extends without end
    shifted = x >> np.minimum(by, 8 * x.itemsize - 1).astype(x.dtype)
    return shifted >> (by >= 8 * x.itemsize).astype(x.dtype)


def _extract(x: Array, position: Array, length: Array) -> Array:
    wide = x.astype(np.uint64) >> (position & 0xFF).astype(np.uint64)
    return (
        wide & (np.uint64(1) << np.minimum(length & 0xFF, 32).astype(np.uint64)) - np.uint64(1)
    ).astype(np.uint32)


def _permute(a: Array, b: Array, selector: Array) -> Array:
    """Select bytes of ``b:a``: each nibble of the selector is the index of one."""
    if (selector & 0x8888).any():
        raise NotImplementedError("prmt.b32 that replicates signs")
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(both)
    for byte in range(4):
        from_byte = (selector >> np.uint32(4 * byte) & 7).astype(np.uint64)
        result |= (both >> np.uint64(8) * from_byte & np.uint64(0xFF)) << np.uint64(8 * byte)
    return result.astype(np.uint32)


def _to_bf16(x: Array) -> Array:
    bits = x.view(np.uint32)
    return np.where(np.isnan(x), 0x7FFF, bits + (0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def _to_int32(x: Array) -> Array:
    """Round toward zero, saturate, and convert NaN to 0."""
    return np.where(
        np.isnan(x), 0, np.clip(np.trunc(x.astype(np.float64)), -(2**31), 2**31 - 1)
    ).astype(np.int32)


def _fma64(a: Array, b: Array, c: Array) -> Array:
    """Compute ``a * b + c`` with one rounding, for exact products only."""
    if not all(((x.astype(np.float32) == x) | np.isnan(x)).all() for x in (a, b)):
        raise NotImplementedError("fma.rn.f64 of factors that are not single-precision numbers")
    return a * b + c


def _operations() -> dict[str, tuple[str, tuple[str, ...], Callable[..., Array]]]:
    """Return for each opcode the types of the result and of the sources, and the function."""
    table: dict[str, tuple[str, tuple[str, ...], Callable[..., Array]]] = {
        "bfe.u32": ("u32", ("u32", "u32", "u32"), _extract),
        "prmt.b32": ("b32", ("b32", "b32", "b32"), _permute),
        "neg.f32": ("f32", ("f32",), np.negative),
        "fma.rn.f64": ("f64", ("f64", "f64", "f64"), _fma64),
        "cvt.rn.bf16.f32": ("bf16", ("f32",), _to_bf16),
        "cvt.rn.bf16x2.f32": (
            "bf16x2",
            ("f32", "f32"),
            lambda a, b: _to_bf16(a).astype(np.uint32) << 16 | _to_bf16(b),
        ),
        "cvt.rzi.s32.f32": ("s32", ("f32",), _to_int32),
        "cvt.rn.f32.f64": ("f32", ("f64",), _f32(np.positive)),
        "cvt.f64.f32": ("f64", ("f32",), lambda x: x.astype(np.float64)),
    }
    # numpy rounds these correctly and keeps subnormals
    for t, x in (("f32", _f32), ("f64", lambda function: function)):
        for name, ufunc in (
            ("add", np.add),
            ("sub", np.subtract),
            ("mul", np.multiply),
            ("div", np.divide),
        ):
            table[f"{name}.rn.{t}"] = (t, (t, t), x(ufunc))
        table[f"sqrt.rn.{t}"] = (t, (t,), x(np.sqrt))
    for t in ("s32", "s64"):
        for name, ufunc in (("add", np.add), ("sub", np.subtract), ("min", np.minimum)):
            table[f"{name}.{t}"] = (t, (t, t), ufunc)
        table[f"neg.{t}"] = (t, (t,), np.negative)
    for t in ("s16", "s32"):
        table[f"mul.lo.{t}"] = (t, (t, t), np.multiply)
    for t, wide in (("u16", "u32"), ("s16", "s32"), ("u32", "u64"), ("s32", "s64")):
        table[f"mul.wide.{t}"] = (wide, (t, t), lambda a, b, wide=TYPES[wide]: a.astype(wide) * b)
        table[f"mad.wide.{t}"] = (
            wide,
            (t, t, wide),
            lambda a, b, c, wide=TYPES[wide]: a.astype(wide) * b + c,
        )
    for t in BITS:
        for name, ufunc in (
            ("and", np.bitwise_and),
            ("or", np.bitwise_or),
            ("xor", np.bitwise_xor),
        ):
            table[f"{name}.{t}"] = (t, (t, t), ufunc)
        table[f"not.{t}"] = (t, (t,), np.invert)
    for t in ("b32", "b64"):
        table[f"shl.{t}"] = (t, (t, "u32"), _shift_left)
    for t in ("u32", "s32", "u64", "s64"):
        table[f"shr.{t}"] = (t, (t, "u32"), _shift_right)
    for to, source in (
        ("s64", "s32"),
        ("u16", "u32"),
        ("u32", "u16"),
        ("u32", "u64"),
        ("u64", "u32"),
    ):
        table[f"cvt.{to}.{source}"] = (to, (source,), lambda x, to=TYPES[to]: x.astype(to))
    comparisons = {
        "eq": np.equal,
        "ne": np.not_equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
    }
    for t in ("b32", "b64", "s32", "s64", "u32", "u64", "f32", "f64"):
        table[f"selp.{t}"] = (t, (t, t, "pred"), lambda a, b, which: np.where(which, a, b))
        for name, ufunc in comparisons.items():
            # PTX's ne is false for NaN, unlike numpy's
            if (t, name) not in (("f32", "ne"), ("f64", "ne")):
                table[f"setp.{name}.{t}"] = ("pred", (t, t), ufunc)
    return table


OPERATIONS = _operations()
