"""Bitwise comparison of tensors, and tensors of random bit patterns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# infinities, NaNs, zeros, smallest and largest subnormals, smallest normal, largest, a tie
SPECIAL = {
    torch.bfloat16: [
        *(0x7F80, 0xFF80, 0x7F81, 0x7FC0, 0x7FFF, 0xFFFF, 0, 0x8000),
        *(1, 0x8001, 0x7F, 0x80, 0x7F7F, 0xFF7F),
    ],
    torch.float32: [
        *(0x7F800000, 0xFF800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0, 0x80000000),
        *(0x7FFF7FFF, 0x7FFF0000, 0xFFFF0000),
        *(1, 0x80000001, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x3F808000),
    ],
}


def same_bits(actual: Any, expected: Any, *, any_nan: bool = False) -> bool:
    """Return True if :func:`differences` finds none."""
    return not differences(actual, expected, any_nan=any_nan)


def assert_same_bits(actual: Any, expected: Any, where: str = "", *, any_nan: bool = False) -> None:
    """Assert that :func:`differences` finds none."""
    found = differences(actual, expected, where, any_nan=any_nan)
    assert not found, "\n".join(found)


def differences(actual: Any, expected: Any, where: str = "", *, any_nan: bool = False) -> list[str]:
    """Compare nested dicts and sequences of local tensors and other values.

    Tensors must have the same dtype, shape and bits, so 0 is not -0. Other values are compared
    with ``==``.

    Args:
        actual: what was found.
        expected: what it is compared with.
        where: a name, with which each line begins.
        any_nan: whether a NaN equals every NaN, not only one of the same bits.

    Returns:
        A line for each difference.
    """
    if isinstance(expected, Tensor):
        line = _tensor_difference(actual, expected, any_nan)
        return [f"{where}: {line}"] if line else []
    if isinstance(expected, Mapping):
        if not isinstance(actual, Mapping) or actual.keys() != expected.keys():
            return [f"{where}: {actual} instead of a dict of {list(expected)}"]
        pairs = [(key, actual[key], expected[key]) for key in expected]
    elif isinstance(expected, (list, tuple)):
        if not isinstance(actual, (list, tuple)) or len(actual) != len(expected):
            return [f"{where}: {actual} instead of {len(expected)} items"]
        pairs = [(i, *pair) for i, pair in enumerate(zip(actual, expected, strict=True))]
    else:
        same = not isinstance(actual, Tensor) and actual == expected
        return [] if same else [f"{where}: {actual} instead of {expected}"]
    return [
        line
        for key, a, e in pairs
        for line in differences(a, e, f"{where}[{key!r}]", any_nan=any_nan)
    ]


def _tensor_difference(actual: Any, expected: Tensor, any_nan: bool) -> str:
    if not isinstance(actual, Tensor):
        return f"{actual} instead of a tensor"
    of_actual, of_expected = ((x.dtype, tuple(x.shape)) for x in (actual, expected))
    if of_actual != of_expected:
        return f"{of_actual} instead of {of_expected}"
    a, e = actual.detach().cpu(), expected.detach().cpu()
    wrong = integers(a) != integers(e)
    if any_nan and a.is_floating_point():
        wrong &= ~(a.isnan() & e.isnan())
    if not wrong.any():
        return ""
    first = tuple(wrong.nonzero()[0].tolist())
    return (
        f"{int(wrong.sum())} of {a.numel()} elements differ, "
        f"first {list(first)}: {a[first]} instead of {e[first]}"
    )


def integers(x: Tensor) -> Tensor:
    """Return the bits of each element as an integer."""
    return x.contiguous().view(INTEGERS[x.element_size()])


def random_bits(n: int, dtype: torch.dtype, generator: torch.Generator, offset: int = 0) -> Tensor:
    """Return ``n`` random bit patterns of bfloat16 or float32; a fifth is special.

    NaNs of any payload, infinities, zeros, subnormals and exact ties of float32 are among them. The
    tensor starts ``offset`` elements after an aligned address.
    """
    n += offset
    integer = torch.int16 if dtype == torch.bfloat16 else torch.int32
    special = torch.tensor(SPECIAL[dtype]).to(integer)
    chosen = special[torch.randint(len(special), (n,), generator=generator)]
    halves = torch.randint(-(2**15), 2**15, (n, 2), generator=generator).to(torch.int16)
    if dtype == torch.float32:  # 0x7FFF7FFF and ties
        kind = torch.randint(10, (n,), generator=generator)
        halves[:, 0] = torch.where(kind == 0, halves[:, 1], halves[:, 0])
        halves[:, 0] = torch.where(kind == 1, -(2**15), halves[:, 0])
        patterns = halves.view(torch.int32).flatten()
    else:
        patterns = halves[:, 1].contiguous()
    is_special = torch.rand(n, generator=generator) < 0.2
    return torch.where(is_special, chosen, patterns).view(dtype)[offset:]
