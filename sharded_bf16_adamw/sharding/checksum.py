"""A 64-bit checksum of a tensor's bits at memory speed, to compare replicas without sending them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COLUMNS = 64  # 8-byte words that share a weight in a large tensor: one pass of torch.sum reads memory at full speed
SMALL = 1 << 15  # words up to which each has a weight of its own
_MULTIPLIER = 0x2851F42D4C957F2E  # even, so that multiples of it plus one are odd weights


def checksums(tensors: Sequence[Tensor]) -> list[int]:
    """Return a signed 64-bit number for each tensor, which depends on every bit and on its position; 0 for zeros.

    The number is the sum of the tensor's 8-byte words, each mixed and times an odd weight, modulo 2^64. So one flipped bit always
    changes it, and other differences pass unseen with a probability near 2^-64, except that in a large tensor the words of a row of
    ``COLUMNS`` are added up first: changes that leave that sum as it is are not seen. Waits once for each device.

    Args:
        tensors: of any dtype, shape and strides, on any device. Only read.
    """
    sums = [_checksum(tensor.detach()) for tensor in tensors]
    by_device: dict[torch.device, list[int]] = {}
    for index, value in enumerate(sums):
        by_device.setdefault(value.device, []).append(index)
    result = [0] * len(sums)
    for indices in by_device.values():
        for index, number in zip(indices, torch.stack([sums[i] for i in indices]).tolist(), strict=True):
            result[index] = number
    return result


def _checksum(tensor: Tensor) -> Tensor:
    """Return a 0-dim int64 tensor on the tensor's device."""
    raw = tensor.contiguous().view(-1).view(torch.uint8)
    if raw.data_ptr() % 8 or raw.storage_offset() % 8:
        raw = raw.clone()
    count = raw.numel() // 8
    in_rows = count // COLUMNS * COLUMNS if count > SMALL else 0
    words = raw[: count * 8].view(torch.int64)
    last = raw.new_zeros(8)
    last[: raw.numel() - count * 8] = raw[count * 8 :]
    summands = torch.cat([words[:in_rows].view(-1, COLUMNS).sum(1), words[in_rows:], last.view(torch.int64)])
    mixed = summands ^ (summands >> 29 & (1 << 35) - 1)  # one-to-one; else an even number of changed top bits would cancel
    return (mixed * (torch.arange(summands.numel(), device=raw.device) * _MULTIPLIER + 1)).sum()
