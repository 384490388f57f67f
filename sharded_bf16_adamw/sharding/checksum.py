"""A 64-bit checksum of a tensor's bits at memory speed, to compare replicas without sending them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

COLUMNS = 64  # 8-byte words that share a weight in a large tensor: one pass of torch.sum reads memory at full speed
SMALL = 1 << 12  # words up to which each has a weight of its own
MAX_TOGETHER = (
    1 << 18
)  # words of small tensors that are copied together, since a GPU takes longer to launch than to read them
_MULTIPLIER = 0x2851F42D4C957F2E  # even, so that multiples of it plus one are odd weights


def checksums(tensors: Sequence[Tensor]) -> list[int]:
    """Return a signed 64-bit number for each tensor, which depends on every bit and on its position; 0 for zeros.

    The number is the sum of the tensor's 8-byte words, each mixed and times an odd weight, modulo 2^64. So one flipped bit always
    changes it, and other differences pass unseen with a probability near 2^-64, except that in a large tensor the words of a row of
    ``COLUMNS`` are added up first: changes that leave that sum as it is are not seen. Waits once for each device.

    Args:
        tensors: of any dtype, shape and strides, on any device. Only read.
    """
    raws = [tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    by_device: dict[torch.device, list[int]] = {}
    for index, raw in enumerate(raws):
        by_device.setdefault(raw.device, []).append(index)
    result = [0] * len(raws)
    for indices in by_device.values():
        large = [i for i in indices if _word_count(raws[i]) > SMALL]
        batches = list(_batches([i for i in indices if _word_count(raws[i]) <= SMALL], raws))
        sums = [_checksums_of_small([raws[i] for i in batch]) for batch in batches] + [
            _checksum_of_large(raws[i]).view(1) for i in large
        ]
        for index, number in zip(
            [i for batch in [*batches, large] for i in batch], torch.cat(sums).tolist(), strict=True
        ):
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
        if words > MAX_TOGETHER:
            yield batch
            batch, words = [], 0
    if batch:
        yield batch


def _checksums_of_small(raws: list[Tensor]) -> Tensor:
    """Return int64 ``[len(raws)]``, by as many kernels as for one."""
    device = raws[0].device
    zeros = torch.zeros(7, dtype=torch.uint8, device=device)
    words = torch.cat([part for raw in raws for part in (raw, zeros[: -raw.numel() % 8])]).view(
        torch.int64
    )
    counts = torch.tensor([_word_count(raw) for raw in raws], dtype=torch.int64, device="cpu")
    owner = torch.arange(len(raws), device="cpu").repeat_interleave(counts)
    place = torch.arange(len(words), device="cpu") - (counts.cumsum(0) - counts)[owner]
    summands = _mixed(words) * (place.to(device) * _MULTIPLIER + 1)
    return torch.zeros(len(raws), dtype=torch.int64, device=device).index_add_(
        0, owner.to(device), summands
    )


def _checksum_of_large(raw: Tensor) -> Tensor:
    """Return a 0-dim int64 tensor on the tensor's device."""
    if raw.data_ptr() % 8 or raw.storage_offset() % 8:
        raw = raw.clone()
    count = raw.numel() // 8
    in_rows = count // COLUMNS * COLUMNS
    words = raw[: count * 8].view(torch.int64)
    last = raw.new_zeros(8)
    last[: raw.numel() - count * 8] = raw[count * 8 :]
    summands = torch.cat(
        [words[:in_rows].view(-1, COLUMNS).sum(1), words[in_rows:], last.view(torch.int64)]
    )
    return (
        _mixed(summands) * (torch.arange(summands.numel(), device=raw.device) * _MULTIPLIER + 1)
    ).sum()


def _mixed(words: Tensor) -> Tensor:
    """Map words one-to-one: else an even number of changed top bits would cancel."""
    return words ^ (words >> 29 & (1 << 35) - 1)
