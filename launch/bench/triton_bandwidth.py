"""A Triton kernel with the memory traffic of a step and next to no arithmetic. Imports Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = tl.constexpr(2048)  # words per program: four 16-byte vectors per thread and array


@triton.jit
def _copy_kernel(g, p, m, v, c, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    word = tl.load(g + at, mask=inside)
    new_p = tl.load(p + at, mask=inside) ^ word
    new_m = tl.load(m + at, mask=inside) ^ word
    new_v = tl.load(v + at, mask=inside) ^ word
    new_c = tl.load(c + at, mask=inside) ^ word
    tl.store(p + at, new_p, mask=inside)
    tl.store(m + at, new_m, mask=inside)
    tl.store(v + at, new_v, mask=inside)
    tl.store(c + at, new_c, mask=inside)


def copy_bandwidth_(arrays: Sequence[Tensor]) -> None:
    """Read five arrays and overwrite all but the first.

    Args:
        arrays: g, p, m, v and c: five contiguous int32 tensors of one size, a multiple of 16, on
            one GPU. Each element stands for two bf16.
    """
    assert len(arrays) == 5 and all(a.is_contiguous() and a.dtype == torch.int32 for a in arrays)
    n = arrays[0].numel()
    assert n % 16 == 0 and all(a.numel() == n for a in arrays), (
        "a multiple of 16 lets Triton use full vectors under the mask"
    )
    _copy_kernel[(triton.cdiv(n, BLOCK.value),)](*arrays, n, BLOCK=BLOCK.value, num_warps=4)
