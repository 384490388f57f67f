"""A 64-bit checksum of tensors, to compare replicas without sending them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .dtensor import group_by

# Number of consecutive 8-byte words of a large tensor that torch.sum adds up, at memory speed,
# before they are weighted.
COLUMNS = 64
SMALL = 1 << 12  # most words of a small tensor, in which each word has its own weight
# Words of small tensors in one batch: a GPU reads them faster than it launches a kernel.
BATCH_WORDS = 1 << 18
_MULTIPLIER = 0x2851F42D4C957F2E  # even, so the weights, its multiples plus one, are odd


def text_checksum(text: str) -> int:
    """Return a checksum of a text that fits into an int64."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def checksums(tensors: Sequence[Tensor]) -> list[int]:
    """Return a signed 64-bit checksum of each tensor's bits and their positions; 0 for zeros.

    The checksum is the sum modulo 2^64 of the tensor's 8-byte words, each mixed and multiplied by
    an odd weight, so one flipped bit always changes the checksum. A large tensor is first summed
    over rows of ``COLUMNS`` words; changes that keep the sum of a row are undetected. Any other
    difference is undetected with a probability near 2^-64. Synchronizes once with each device.

    Args:
        tensors: of any dtype, shape and strides, on any device. Only read.
    """
    raws = [tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    result = [0] * len(raws)
    for indices in group_by(range(len(raws)), lambda i: raws[i].device).values():
        large = [i for i in indices if _word_count(raws[i]) > SMALL]
        batches = list(_batches([i for i in indices if _word_count(raws[i]) <= SMALL], raws))
        sums = [_checksums_of_small([raws[i] for i in batch]) for batch in batches]
        sums += [_checksum_of_large(raws[i]).view(1) for i in large]
        order = [i for batch in [*batches, large] for i in batch]
        for index, number in zip(order, torch.cat(sums).tolist(), strict=True):
            result[index] = number
    return result


def _word_count(raw: Tensor) -> int:
    return (raw.numel() + 7) // 8


def _batches(indices: list[int], raws: list[Tensor]) -> Iterator[list[int]]:
    batch: list[int] = []
    words = 0
    for index in indices:
        batch.append(index)
        words += _word_count(raws[index])
        if words > BATCH_WORDS:
            yield batch
            batch, words = [], 0
    if batch:
        yield batch


def _checksums_of_small(raws: list[Tensor]) -> Tensor:
    """Return the checksums of tensors on one device, in a fixed number of kernel launches."""
    device = raws[0].device
    zeros = torch.zeros(7, dtype=torch.uint8, device=device)
    padded = torch.cat([part for raw in raws for part in (raw, zeros[: -raw.numel() % 8])])
    words = padded.view(torch.int64)
    counts = torch.tensor([_word_count(raw) for raw in raws], dtype=torch.int64, device="cpu")
    owner = torch.arange(len(raws), device="cpu").repeat_interleave(counts)
    position = torch.arange(len(words), device="cpu") - (counts.cumsum(0) - counts)[owner]
    summands = _mix(words) * (position.to(device) * _MULTIPLIER + 1)
    sums = torch.zeros(len(raws), dtype=torch.int64, device=device)
    return sums.index_add_(0, owner.to(device), summands)


def _checksum_of_large(raw: Tensor) -> Tensor:
    """Return the checksum as a 0-dim int64 tensor on the tensor's device."""
    if raw.data_ptr() % 8 or raw.storage_offset() % 8:
        raw = raw.clone()
    count = raw.numel() // 8
    in_rows = count // COLUMNS * COLUMNS
    words = raw[: count * 8].view(torch.int64)
    last = raw.new_zeros(8)
    last[: raw.numel() - count * 8] = raw[count * 8 :]
    row_sums = words[:in_rows].view(-1, COLUMNS).sum(1)
    summands = torch.cat([row_sums, words[in_rows:], last.view(torch.int64)])
    weights = torch.arange(summands.numel(), device=raw.device) * _MULTIPLIER + 1
    return (_mix(summands) * weights).sum()


def _mix(words: Tensor) -> Tensor:
    """Mix each word by a bijection. Else an even number of flipped top bits would cancel."""
    return words ^ (words >> 29 & (1 << 35) - 1)
