"""FSDP1: norm and guard over shard groups, accumulation, mixed precision, true weights."""

from __future__ import annotations

import pytest
import torch
from bits import same_bits
from distributed import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecision, ShardingStrategy

from sharded_bf16_adamw import AdamW_BF16

from .fsdp1_cases import train, wrap, wrapped
from .strategy_cases import (
    CLIP,
    Layers,
    Wrapped,
    backward,
    collect,
    make_batch,
    make_optimizer,
    single_process,
)

BF16 = torch.bfloat16


def one_element_worker(rank, world, nonfinite):
    """One weight over all ranks: only rank 0 has it, and the others have no gradient."""
    model = wrap(nn.Linear(1, 1, bias=False).to(BF16))
    optimizer = AdamW_BF16(model.parameters(), lr=1e-2, skip_nonfinite=True)
    model(torch.full((1, 1), float("nan") if nonfinite else 3.0, dtype=BF16)).sum().backward()
    held = [p.numel() for p in model.parameters()]
    has_gradient = [p.grad is not None for p in model.parameters()]
    norm = optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    return held, has_gradient, norm.item(), optimizer.skipped_steps


def test_ranks_with_empty_shards_join_the_norm():
    results = run_ranks(3, one_element_worker, False)
    assert results == [([1], [True], 3.0, 0), ([0], [False], 3.0, 0), ([0], [False], 3.0, 0)]


def test_ranks_with_empty_shards_skip_on_nan():
    assert [skipped for _, _, _, skipped in run_ranks(3, one_element_worker, True)] == [1, 1, 1]


def guard_worker(rank, world, use_orig_params, strategy):
    """In the second step one row of one weight is NaN, so only one shard has it."""
    model = wrapped(use_orig_params, strategy)
    optimizer = AdamW_BF16(model.module.parameters(), lr=1e-2, skip_nonfinite=True)
    train(model, optimizer, [0])
    before = collect(model.module, optimizer)
    batch = make_batch(1)
    batch["wide"][1][:, 7] = float("nan")
    backward(model, batch)
    nan_here = any(
        p.grad is not None and bool(p.grad.isnan().any()) for p in model.module.parameters()
    )
    optimizer.step(zero_grad=True)
    unchanged = same_bits(collect(model.module, optimizer), before)
    train(model, optimizer, [2])
    return (
        nan_here,
        unchanged,
        optimizer.skipped_steps,
        same_bits(collect(model.module, optimizer), before),
    )


@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize(
    ("world", "strategy"), [(3, "FULL_SHARD"), (4, "HYBRID_SHARD"), (2, "NO_SHARD")]
)
def test_nan_on_one_rank_skips_the_step_on_all(world, strategy, use_orig_params):
    results = run_ranks(world, guard_worker, use_orig_params, strategy)
    if strategy != "NO_SHARD":
        assert not all(nan_here for nan_here, *_ in results)
    assert [rest for _, *rest in results] == [[True, 1, False]] * world


def ignored_worker(rank, world, use_orig_params):
    """A parameter that FSDP ignores is plain and replicated, and counts once."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).to(BF16)
    ignored = model[1].weight
    model = wrap(model, use_orig_params, ignored_states=[ignored])
    model(torch.ones(1, 4, dtype=BF16))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    whole = (
        32
        if use_orig_params
        else sum(p.numel() for p in model.parameters() if p is not ignored) * world + 16
    )
    return AdamW_BF16(model.parameters(), lr=1e-2).clip_grad_norm_(1.0).item() ** 2, whole


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_norm_counts_ignored_parameters_once(use_orig_params):
    for squared, whole in run_ranks(2, ignored_worker, use_orig_params):
        assert squared == pytest.approx(whole, rel=1e-6)


def unsharded_worker(rank, world, use_orig_params):
    """Every rank holds full gradients of ones."""
    model = wrap(
        nn.Linear(8, 8, bias=False).to(BF16),
        use_orig_params,
        sharding_strategy=ShardingStrategy.NO_SHARD,
    )
    model(torch.ones(1, 8, dtype=BF16)).sum().backward()
    return AdamW_BF16(model.parameters(), lr=1e-2).clip_grad_norm_(1.0).item()


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_norm_counts_no_shard_replicas_once(use_orig_params):
    assert run_ranks(3, unsharded_worker, use_orig_params) == [8.0] * 3


def accumulation_worker(rank, world, use_orig_params):
    """Two micro-batches, the first in ``no_sync``; gradients are reduced in float32."""
    precision = MixedPrecision(param_dtype=BF16, reduce_dtype=torch.float32)
    model = Layers()
    model = Wrapped(
        wrap(model, use_orig_params, auto_wrap_policy=lambda **_: True, mixed_precision=precision),
        rank,
        world,
    )
    optimizer = make_optimizer(model)
    for step in range(5):
        batch = make_batch(step)
        first, second = (
            {name: (x[half], c[half]) for name, (x, c) in batch.items()}
            for half in (slice(0, 6), slice(6, 12))
        )
        with model.module.no_sync():
            backward(model, first)
        backward(model, second)
        optimizer.clip_grad_norm_(CLIP)
        optimizer.step(zero_grad=True)
    return collect(model.module, optimizer)


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_accumulation_with_mixed_precision_matches_single_process(use_orig_params):
    expected, _ = single_process(5)
    for result in run_ranks(2, accumulation_worker, use_orig_params):
        assert same_bits(result, expected)


def hybrid_worker(rank, world):
    """One model is sharded over all ranks, one over pairs of them; gradients are ones."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    models = [
        wrap(nn.Linear(8, 8, bias=False).to(BF16)),
        wrap(
            nn.Linear(6, 6, bias=False).to(BF16),
            mesh=mesh,
            sharding_strategy=ShardingStrategy.HYBRID_SHARD,
        ),
    ]
    for model in models:
        model(
            torch.ones(
                1,
                model.weight.shape[0] if model.weight.ndim > 1 else model.module.in_features,
                dtype=BF16,
            )
        ).sum().backward()
    optimizer = AdamW_BF16([p for model in models for p in model.parameters()], lr=1e-2)
    return optimizer.clip_grad_norm_(1.0).item()


def test_norm_over_different_shard_groups():
    assert run_ranks(4, hybrid_worker) == [10.0] * 4  # sqrt(8 * 8 + 6 * 6)


def true_weights_worker(rank, world, use_orig_params, strategy):
    """A forward pass alone leaves parameters unsharded; the optimizer still sees shards."""
    model = wrapped(use_orig_params, strategy)
    optimizer = make_optimizer(model)
    train(model, optimizer, range(3))
    corrections = [
        optimizer.state[p].get("correction", torch.zeros(())) for p in model.module.parameters()
    ]
    expected = [
        p.detach().float() + c.float()
        for p, c in zip(model.module.parameters(), corrections, strict=True)
    ]
    assert any(bool(c.any()) for c in corrections)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            loss = model.module(make_batch(7))
        found = list(optimizer.true_weights())
        assert all(
            torch.equal(weight, own) for (_, weight), own in zip(found, expected, strict=True)
        ) and len(found) == len(expected)
        params = optimizer.param_groups[0]["params"]
        fresh = AdamW_BF16(params)
        fresh.init_state()
        for p, own in zip(params, expected, strict=True):
            assert fresh.state[p]["exp_avg"].shape == own.shape
    loss.backward()
    optimizer.step(zero_grad=True)
    train(model, optimizer, range(3, 5))
    return collect(model.module, optimizer)


@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize(
    ("world", "strategy"), [(2, "FULL_SHARD"), (2, "SHARD_GRAD_OP"), (4, "HYBRID_SHARD")]
)
def test_true_weights_are_sharded_after_an_evaluation(world, strategy, use_orig_params):
    alone = Wrapped(Layers())
    optimizer = make_optimizer(alone)
    train(alone, optimizer, [0, 1, 2, 7, 3, 4])
    expected = collect(alone.module, optimizer)
    for result in run_ranks(world, true_weights_worker, use_orig_params, strategy):
        assert same_bits(result, expected)
