"""Comparison of the sums that ``precision_sums`` of two backends return."""

from __future__ import annotations

import numpy as np
import pytest
from torch import Tensor

from sharded_bf16_adamw.kernels import PRECISION_SUMS, Runs


def some_runs(numels: list[int], groups: list[int]) -> Runs:
    """Return runs of each parameter: at its start, at odd offsets, and up to its end.

    The result has four rows. A run at the start adds to the row of its group (0 or 1), every other
    run to the row of its group plus 2.
    """
    columns: list[tuple[int, int, int, int]] = []
    for i, (numel, group) in enumerate(zip(numels, groups, strict=True)):
        for begin, count in ((0, 40), (48, 8), (64, 1500), (1601, 7), (1613, numel)):
            count = min(count, numel - begin)
            if count > 0:
                columns.append((i, begin, count, group + (2 if begin else 0)))
    return Runs(*np.array(columns, np.int64).reshape(-1, 4).T.copy(), 4)


def mismatches(found: Tensor, wanted: Tensor) -> list[str]:
    """Return a line for each sum that differs by more than the order of the summation explains.

    Counts must be equal.
    """
    if found.dtype != wanted.dtype or found.shape != wanted.shape:
        return [f"{found.dtype} {tuple(found.shape)}"]
    lines = []
    for group, (row, wanted_row) in enumerate(zip(found.tolist(), wanted.tolist(), strict=True)):
        for i, (name, x, y) in enumerate(zip(PRECISION_SUMS, row, wanted_row, strict=True)):
            is_count = i < PRECISION_SUMS.index("weight_sq")
            if x != (y if is_count else pytest.approx(y, rel=1e-12, abs=0, nan_ok=True)):
                lines.append(f"{name} of group {group}: {x!r} instead of {y!r}")
    return lines
