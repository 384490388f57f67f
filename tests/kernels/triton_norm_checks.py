"""The norm kernel, for Triton tests that run it in separate processes."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from sharded_bf16_adamw.kernels import cuda, reference

from .triton_checks import BF16, FP32, SIZES, differing


def integers(
    n: int, dtype: torch.dtype, offset: int, generator: torch.Generator, device: str
) -> Tensor:
    """Return small integers: their squares add up without rounding, in any order."""
    return torch.randint(-128, 129, (n + offset,), generator=generator).to(device, dtype)[offset:]


def norms(device: str = "cpu", many_programs: bool = True) -> dict[str, tuple[Any, Any]]:
    """Return pairs (found, wanted).

    ``many_programs`` includes a case of thousands of programs where Triton compiles.
    """
    from sharded_bf16_adamw.kernels import triton_norm

    generator = torch.Generator().manual_seed(6)
    sizes = (*SIZES, 2 * triton_norm.MIN_CHUNK + 3)
    pairs: dict[str, tuple[Any, Any]] = {}
    for name, dtype, offset in (
        ("bf16", BF16, 0),
        ("fp32", FP32, 0),
        ("unaligned bf16", BF16, 1),
        ("unaligned fp32", FP32, 1),
    ):
        grads = [integers(n, dtype, offset, generator, device) for n in sizes]
        pairs[name] = (
            float(cuda.grad_sum_sq(grads)),
            sum(int((g.long() ** 2).sum()) for g in grads),
        )
    pairs["the last of them, again"] = (float(cuda.grad_sum_sq(grads)), pairs[name][1])
    mixed = [
        integers(n, (BF16, FP32)[i % 2], i % 3, generator, device) for i, n in enumerate(sizes)
    ]
    table = integers(5000, BF16, 0, generator, device).view(50, 100)
    strided = [
        table.t(),
        table[:, ::3],
        table[0, :1].expand(2000),
    ]  # the last has one element of memory
    pairs["strided"] = (
        float(cuda.grad_sum_sq(strided)),
        sum(int((g.long() ** 2).sum()) for g in strided),
    )
    pairs["mixed"] = (float(cuda.grad_sum_sq(mixed)), float(reference.grad_sum_sq(mixed)))
    pairs["empty"] = (float(cuda.grad_sum_sq([torch.zeros(0, device=device)])), 0.0)
    triton_norm.MAX_PROGRAMS, programs = 2, triton_norm.MAX_PROGRAMS
    pairs["large chunks"] = (
        float(cuda.grad_sum_sq([*mixed, torch.ones(1, device=device)])),
        float(reference.grad_sum_sq(mixed)) + 1,
    )
    triton_norm.MAX_PROGRAMS = programs
    # Only the interpreter sees a changed block; a compiled kernel contains it as a constant.
    interpreted = triton.knobs.runtime.interpret
    programs = 9 if interpreted else 2053  # more than one block of partial sums
    block, triton_norm.BLOCK_PARTIALS = (
        triton_norm.BLOCK_PARTIALS,
        4 if interpreted else triton_norm.BLOCK_PARTIALS,
    )
    if interpreted or many_programs:
        many = [torch.full((1,), 2.0, device=device) for _ in range(programs)]
        pairs["more programs than one block adds"] = (
            float(cuda.grad_sum_sq(many)),
            4.0 * len(many),
        )
    triton_norm.BLOCK_PARTIALS = block
    largest = torch.full((3,), torch.finfo(BF16).max, dtype=BF16, device=device)
    pairs["largest"] = (float(cuda.grad_sum_sq([largest])), 3 * float(largest[0]) ** 2)
    for name, value in (
        ("inf", math.inf),
        ("nan", math.nan),
        ("large", 3e38),
        ("small", 1e-30),
        ("one", 1.0),
        ("zero", 0.0),
    ):
        g = [
            torch.tensor([value, 0.0, 2 * value if value < 1 else 0.0], device=device),
            torch.zeros(3000, device=device),
        ]
        total = sum(float(x) ** 2 for x in g[0])
        norm = math.sqrt(total) if total == total else math.nan
        wanted = [
            norm,
            min(1.0, 0.5 / (norm + 1e-6)) if norm == norm else math.nan,
            float(not math.isfinite(total)),
        ]
        wanted = torch.tensor(wanted, dtype=torch.float64).to(FP32)
        results = cuda.norm_and_clip_coefficient(g, 0.5)
        fused = torch.stack(results)
        separate = torch.stack(cuda.clip_coefficient(cuda.grad_sum_sq(g), 0.5))
        pairs[f"clip {name}"] = (
            differing("fused", [fused], [wanted]) + differing("separate", [separate], [wanted]),
            [],
        )
        pairs[f"dtypes {name}"] = (
            [x.dtype for x in results],
            [FP32, FP32, FP32],
        )
    return pairs
