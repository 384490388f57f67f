"""The elements that ``precision_stats(fraction=...)`` reads: a stratified random sample.

A parameter is cut into *blocks* of consecutive rows. Every ``one_in`` consecutive blocks form a
*stratum*, and one block of each stratum is drawn. The rows at the end that do not fill a stratum,
often all of a small parameter, are always read. So the estimated sum over the parameter is
``one_in`` times the sum over the drawn blocks, plus the sum over these rows. It is unbiased, since
each block is drawn with the same probability, and exact for the number of elements.

The draw is a hash of the step, the parameter's position in the optimizer, and the stratum's
position in the full parameter. So each step draws other blocks, and all ranks draw the same blocks
under every sharding. A rank reads the parts of the drawn blocks that its shard holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .kernels import Runs, lowbias32
from .sharding.dtensor import to_local
from .sharding.shard_rows import shard_rows

BLOCK = 4096  # elements; smaller reads would waste prefetched memory
MAX_STRATA = 4096  # per parameter, roughly; large ones get larger blocks, to save host time
GOLDEN = 0x9E3779B9  # odd, so that its products with 2^32 steps differ modulo 2^32


class _Strata(NamedTuple):
    """The strata that a rank holds a part of: int64 arrays, one entry per stratum and row range."""

    params: np.ndarray
    indices: np.ndarray  # the stratum's index in the full parameter
    origins: np.ndarray  # local index of the stratum's first element; may lie before the range
    block_numels: np.ndarray  # number of local elements in a block
    begins: np.ndarray  # local index of the range's first element
    ends: np.ndarray  # local index after the range's last element in a stratum


class StratifiedSample:
    """A sample of some parameters' elements, drawn anew at each step.

    Args:
        shards: the parameters' shards, as :meth:`.sharding.base.Sharding.shard` returns them.
        positions: the parameters' positions in the optimizer, equal on all ranks.
        rows: for each parameter the row of the result that it adds to.
        n_rows: number of rows of the result. The runs have twice as many: the drawn blocks add to
            the second half, which :meth:`total` scales.
        one_in: number of blocks in a stratum; 1 reads everything.
    """

    def __init__(
        self,
        shards: Sequence[Tensor],
        positions: Sequence[int],
        rows: Sequence[int],
        n_rows: int,
        one_in: int,
    ) -> None:
        self.one_in = one_in
        self._n_rows = n_rows
        self._rows = np.array(rows, np.int64)
        strata, whole = [], []
        for index, shard in enumerate(shards):
            own_strata, begins, ends = _strata_of(shard, one_in)
            strata.append((np.full(len(own_strata[0]), index), *own_strata))
            whole.append((np.full(len(begins), index), begins, ends))
        self._strata = _Strata(*map(np.concatenate, zip(*strata, strict=True)))
        params, indices = self._strata[:2]
        self._seeds = _hash(_hash(np.array(positions, np.int64))[params] ^ indices)
        params, begins, ends = map(np.concatenate, zip(*whole, strict=True))
        self._whole = Runs(params, begins, ends - begins, self._rows[params], 2 * n_rows)

    def draw(self, step: int) -> Runs:
        """Return the elements to read at a step."""
        params, _, origins, block_numels, first, last = self._strata
        if not len(params):
            return self._whole
        drawn = _hash(self._seeds + step * GOLDEN) * self.one_in >> 32
        begins = origins + drawn * block_numels
        ends = np.minimum(begins + block_numels, last)
        begins = np.maximum(begins, first)
        held = ends > begins
        params, begins, ends = params[held], begins[held], ends[held]
        drawn_runs = params, begins, ends - begins, self._rows[params] + self._n_rows
        pairs = zip(self._whole[:4], drawn_runs, strict=True)
        params, begins, counts, rows = map(np.concatenate, pairs)
        return Runs(params, begins, counts, rows, self._whole.n_rows)

    def total(self, sums: Tensor) -> Tensor:
        """Return the estimated sums over all elements, ``[n_rows, ...]``, from sums of a draw."""
        whole, drawn = sums.split(self._n_rows)
        return torch.add(whole, drawn, alpha=self.one_in)


def _strata_of(shard: Tensor, one_in: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Return the columns of :class:`_Strata` after the first; begins and ends of the other rows."""
    numel = to_local(shard).numel()
    rows = shard_rows(shard) if one_in > 1 and numel else None
    n_strata = 0
    if rows is not None:
        full_numel = rows.n_rows * rows.row_numel
        block_rows = rows.block_rows(max(BLOCK, full_numel // (one_in * MAX_STRATA)))
        n_strata = rows.n_rows // (one_in * block_rows)
    if rows is None or n_strata == 0:
        whole = np.array([numel] if numel else [], np.int64)
        return [np.zeros(0, np.int64)] * 5, np.zeros_like(whole), whole
    stratum_rows, width = one_in * block_rows, rows.local_row_numel
    starts = rows.starts
    local = np.arange(len(starts)) * (rows.range_rows * width)  # of each range
    sampled = np.clip(n_strata * stratum_rows - starts, 0, rows.range_rows)  # rows of each range
    first = starts // stratum_rows
    counts = np.where(sampled > 0, (starts + sampled - 1) // stratum_rows - first + 1, 0)
    ranges = np.repeat(np.arange(len(starts)), counts)
    indices = first[ranges] + np.arange(len(ranges)) - np.repeat(counts.cumsum() - counts, counts)
    columns = [
        indices,
        local[ranges] + (indices * stratum_rows - starts[ranges]) * width,
        np.full(len(ranges), block_rows * width),
        local[ranges],
        (local + sampled * width)[ranges],
    ]
    rest = sampled < rows.range_rows
    return columns, (local + sampled * width)[rest], (local + rows.range_rows * width)[rest]


def _hash(x: np.ndarray) -> np.ndarray:
    """Return 32 random bits of the low 32 bits of each int64."""
    hashed = lowbias32(torch.from_numpy(x.astype(np.int32)))  # astype() keeps the low bits
    return hashed.numpy().astype(np.int64) & 0xFFFFFFFF
