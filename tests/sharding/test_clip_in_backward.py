"""Clipping inside the backward pass by the previous step's norm, over all ranks."""

from __future__ import annotations

import math

import pytest
import torch
from bits import same_bits
from distributed import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sharded_bf16_adamw import AdamW_BF16, ClipInBackward
from sharded_bf16_adamw.kernels import clip_coefficient
from sharded_bf16_adamw.step_in_backward.clip import previous_sum_sq

from .strategy_cases import BY_NAME, Layers, backward, collect, make_batch
from .test_step_in_backward import RUNS

STEPS = 4
MAX_NORM = 0.5
BY_DEFAULT = (
    "FSDP2",
    "FSDP2 CPUOffloadPolicy",
    "HSDP (FSDP2, 2 x 2)",
    "tensor parallel",
    "FSDP2 + tensor parallel (2 x 2)",
)


def clipped_in_backward(wrapped):
    optimizer = AdamW_BF16(
        wrapped.module.parameters(),
        lr=1e-2,
        weight_decay=0.1,
        step_in_backward=True,
        clip_in_backward=ClipInBackward(MAX_NORM),
    )
    sums = []
    for step in range(STEPS):
        backward(wrapped, make_batch(step, exact=False))
        assert all(param.grad is None for param in wrapped.module.parameters())
        optimizer.step()
        sums.append(previous_sum_sq(optimizer.param_groups))
    return collect(wrapped.module, optimizer), sums


def scaled_steps(wrapped, sums):
    """Train by ``step()``, scaled by the previous step's norm, the square root of its sum."""
    optimizer = AdamW_BF16(wrapped.module.parameters(), lr=1e-2, weight_decay=0.1)
    norms = []
    for step in range(STEPS):
        backward(wrapped, make_batch(step, exact=False))
        norms.append(optimizer.clip_grad_norm_(math.inf))
        scale = clip_coefficient(sums[step - 1], MAX_NORM)[1] if step else torch.ones(())
        optimizer._clip.set(scale, torch.zeros(()))
        optimizer.step(zero_grad=True)
    return collect(wrapped.module, optimizer), norms


def worker(rank, world, name):
    wrap = BY_NAME[name].wrap
    ours, sums = clipped_in_backward(wrap(Layers(), world))
    return ours, sums, *scaled_steps(wrap(Layers(), world), sums)


@pytest.mark.parametrize(
    ("name", "world"),
    [
        pytest.param(name, world, marks=[] if name in BY_DEFAULT else pytest.mark.exhaustive)
        for name, world in RUNS
    ],
)
def test_bits_are_those_of_step_with_the_same_scale(name, world):
    for ours, sums, plain, norms in run_ranks(world, worker, name):
        assert torch.allclose(torch.stack(sums).sqrt().float(), torch.stack(norms), rtol=1e-6)
        assert max(norms) > MAX_NORM
        assert same_bits(ours, plain)


def refused_worker(rank, world):
    layers = Layers()
    fully_shard(layers, mesh=init_device_mesh("cpu", (world,)))
    with pytest.raises(ValueError, match="is sharded, so its own norm would take a collective"):
        AdamW_BF16(
            layers.parameters(),
            step_in_backward=True,
            clip_in_backward=ClipInBackward(1.0, by="param"),
        )


def test_the_norm_of_a_sharded_parameter_is_refused():
    run_ranks(2, refused_worker)
