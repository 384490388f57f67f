"""precision_stats over ranks equals that of a single process."""

import functools
import math

import pytest
import torch
from distributed import run_ranks

from sharded_bf16_adamw import LR, AdamW_BF16

from .strategy_cases import BY_NAME, CLIP, Layers, Wrapped, backward, make_batch


def make_optimizer(wrapped):
    """Build an optimizer with a group for each dtype: FSDP1's flat parameters have one each."""
    params = list(wrapped.module.parameters())
    groups = [
        {"params": [p for p in params if p.dtype == dtype]}
        for dtype in (torch.bfloat16, torch.float32)
    ]
    schedule = LR(lr=1e-3, preheat_steps=5)
    return AdamW_BF16(groups, lr_function=schedule, sharding=wrapped.sharding)


def statistics(wrapped, uses_clip=True):
    """Train; return the statistics of the third step, for all groups and for each."""
    optimizer = make_optimizer(wrapped)
    for step in range(3):
        backward(wrapped, make_batch(step))
        if uses_clip:
            optimizer.clip_grad_norm_(CLIP)
        stats = optimizer.precision_stats() if step == 2 else None
        optimizer.step(zero_grad=True)
    return [each.as_dict() for each in (stats, *stats.groups)]


def worker(rank, world, name, uses_clip):
    return statistics(BY_NAME[name].wrap(Layers(), world), uses_clip)


@functools.cache
def expected(uses_clip):
    return statistics(Wrapped(Layers()), uses_clip)


@pytest.mark.parametrize("uses_clip", [True, False])
@pytest.mark.parametrize(
    ("world", "name"),
    [
        (2, "DDP"),
        (2, "FSDP2"),
        (2, "tensor parallel"),
        (2, "ZeRO-1 beside DDP"),
        (2, "ZeRO-2"),
        (4, "HSDP (FSDP2, 2 x 2)"),
    ],
)
def test_every_element_counts_once(world, name, uses_clip):
    for result in run_ranks(world, worker, name, uses_clip):
        for own, alone in zip(result, expected(uses_clip), strict=True):
            assert own == pytest.approx(alone, rel=1e-9, nan_ok=True)


def unequal_worker(rank, world):
    wrapped = BY_NAME["FSDP2"].wrap(Layers(), world)
    plain = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = AdamW_BF16([*wrapped.module.parameters(), plain], lr=1e-3)
    backward(wrapped, make_batch(0))
    plain.grad = torch.full_like(plain, 1.0 + rank)
    return optimizer.precision_stats().as_dict()


def test_unequal_gradients_of_replicas_give_nan():
    for result in run_ranks(2, unequal_worker):
        assert all(map(math.isnan, result.values()))
