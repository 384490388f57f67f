"""The comparison of bits that other tests use finds every difference."""

from __future__ import annotations

import pytest
import torch
from bits import assert_same_bits, differences, random_bits, same_bits

DTYPES = [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.int64, torch.bool])
def test_changed_element_is_found(dtype):
    a = torch.ones(3, 4).to(dtype)
    b = a.clone()
    assert same_bits(a, b) and same_bits(a[0, 0], b[0, 0]) and same_bits(a[:0], b[:0])
    b[1, 2] = 0
    assert not same_bits(a, b)
    assert differences(a, b, "w")[0].startswith("w: 1 of 12 elements differ, first [1, 2]: ")
    assert same_bits(a.t(), a.t().contiguous()) and not same_bits(a.t(), b.t())


def test_zeros_and_nans_have_bits():
    zero, nan = torch.zeros(2), torch.tensor([0x7FC00000, 0x7F800001], dtype=torch.int32)
    nan = nan.view(torch.float32)
    assert not same_bits(zero, -zero) and not same_bits(zero, -zero, any_nan=True)
    assert same_bits(nan, nan) and not same_bits(nan, nan.flip(0))
    assert same_bits(nan, nan.flip(0), any_nan=True) and not same_bits(nan, zero, any_nan=True)


def test_dtypes_shapes_and_structures_are_compared():
    x = torch.zeros(4)
    for other in (x.bfloat16(), x.view(2, 2), x[:3], None, 0.0):
        assert not same_bits(other, x) and not same_bits(x, other)
    good = {"a": [x, {"b": 1}], "c": (x, None)}
    assert same_bits({"c": (x.clone(), None), "a": [x.clone(), {"b": 1}]}, good)
    for bad in (
        {"a": [x, {"b": 1}]},
        {**good, "d": 1},
        {**good, "a": [x]},
        {**good, "a": [x, {"b": 2}]},
        {**good, "c": (x + 1, None)},
        {**good, "c": (x, x)},
    ):
        assert not same_bits(bad, good)
    with pytest.raises(AssertionError, match=r"^run\['c'\]\[0\]: 4 of 4 elements differ"):
        assert_same_bits({**good, "c": (x + 1, None)}, good, "run")


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_bits_contain_special_values(dtype):
    x = random_bits(20_000, dtype, torch.Generator().manual_seed(0), offset=3)
    info = torch.finfo(dtype)
    assert x.dtype == dtype and x.shape == (20_000,) and x.storage_offset() == 3
    for value in (torch.inf, -torch.inf, 0.0, info.max, -info.max, info.smallest_normal):
        assert (x == value).any(), value
    assert x.isnan().any() and ((x != 0) & (x.abs() < info.smallest_normal)).any()
    assert (x.isfinite().float().mean() > 0.7) and x.unique().numel() > 10_000
    assert random_bits(0, dtype, torch.Generator()).shape == (0,)
