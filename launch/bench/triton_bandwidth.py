"""A kernel for ``benchmark.py``: the memory traffic of a step on a GPU, with next to no arithmetic. Imports Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = tl.constexpr(2048)  # words a program: four 16-byte vectors a thread and array


@triton.jit
def _stream_kernel(g, p, m, v, c, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    word = tl.load(g + at, mask=inside)
    for_p = tl.load(p + at, mask=inside) ^ word
    for_m = tl.load(m + at, mask=inside) ^ word
    for_v = tl.load(v + at, mask=inside) ^ word
    for_c = tl.load(c + at, mask=inside) ^ word
    tl.store(p + at, for_p, mask=inside)
    tl.store(m + at, for_m, mask=inside)
    tl.store(v + at, for_v, mask=inside)
    tl.store(c + at, for_c, mask=inside)


def stream_ceiling_(arrays: Sequence[Tensor]) -> None:
    """Read five arrays and write all but the first in place.

    Args:
        arrays: five contiguous int32 tensors of one size, a multiple of 16, on one GPU, in the roles g, p, m, v, c; each element
            stands for two bf16.
    """
    assert len(arrays) == 5 and all(a.is_contiguous() and a.dtype == torch.int32 for a in arrays)
    n = arrays[0].numel()
    assert n % 16 == 0 and all(a.numel() == n for a in arrays), (
        "a multiple of 16 lets Triton use whole vectors under the mask"
    )
    _stream_kernel[(triton.cdiv(n, BLOCK.value),)](*arrays, n, BLOCK=BLOCK.value, num_warps=4)
