"""Checksums depend on every bit and its position."""

import pytest
import torch

from sharded_bf16_adamw.sharding.replica_checksum import COLUMNS, SMALL, checksums

LARGE = 8 * (SMALL + 5 * COLUMNS) + 3  # bytes: full rows, and words and bytes beyond them


@pytest.mark.parametrize("size", [1, 7, 8, 9, 1000, 8 * SMALL, LARGE])
def test_one_flipped_bit_changes_the_checksum(size):
    values = torch.randint(
        0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size)
    )
    flipped = [values]
    for place in {0, size // 3, size // 2, size - 1}:
        for bit in (0, 7):
            other = values.clone()
            other[place] ^= 1 << bit
            flipped.append(other)
    numbers = checksums(flipped)
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("size", [64, 8 * SMALL, LARGE])
def test_checksum_depends_on_positions(size):
    values = torch.zeros(size, dtype=torch.uint8)
    places = (
        [0, 1, 8, size // 2, size - 9]
        if size == 64
        else [0, 8 * COLUMNS, size // 2, size - 9, size - 1]
    )
    ones = []
    for place in places:
        ones.append(values.clone())
        ones[-1][place] = 1
    numbers = checksums(ones)
    assert len(set(numbers)) == len(places)
    assert checksums([values]) == [0]


def test_checksum_does_not_depend_on_strides_and_alignment():
    values = torch.randn(33, 65).bfloat16()
    shifted = torch.empty(values.numel() + 1, dtype=torch.bfloat16)[1:].view(33, 65).copy_(values)
    transposed = values.t().contiguous().t()
    assert len(set(checksums([values, shifted, transposed, values.clone()]))) == 1
    assert checksums([]) == [] and checksums([torch.empty(0), torch.zeros(3)]) == [0, 0]
