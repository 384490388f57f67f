"""FSDP2, HSDP and others: unused and frozen parameters, state sizes and placements."""

from __future__ import annotations

import pytest
import torch
from bits import same_bits
from distributed import run_ranks
from torch.distributed.tensor import DTensor, Replicate, Shard

from sharded_bf16_adamw import AdamW_BF16

from .strategy_cases import (
    BY_NAME,
    CASES,
    Layers,
    Wrapped,
    backward,
    collect,
    make_batch,
    make_optimizer,
)

STATES = ("exp_avg", "exp_avg_sq", "correction")
# DDP needs find_unused_parameters.
WRAPPED = [case.name for case in CASES if "DDP" not in case.name]
HSDP = "HSDP (FSDP2, 2 x 2)"


def wrap(name, world, model):
    return BY_NAME[name].wrap(model, world) if name else Wrapped(model)


def world_of(name):
    return 2 if 2 in BY_NAME[name].worlds else 4


def unused_worker(rank, world, name, steps):
    """``wide`` has no gradient in every second step, so no decay either."""
    wrapped = wrap(name, world, Layers())
    optimizer = make_optimizer(wrapped)
    for step in range(steps):
        batch = make_batch(step)
        if step % 2:
            del batch["wide"]
        backward(wrapped, batch)
        optimizer.clip_grad_norm_(0.5)
        optimizer.step(zero_grad=True)
    return collect(wrapped.module, optimizer)


@pytest.mark.parametrize("name", WRAPPED)
def test_unused_parameters_do_not_change(name):
    expected = unused_worker(0, 1, None, 5)
    assert expected["wide.weight"]["step"] == 3 and expected["tall.weight"]["step"] == 5
    for result in run_ranks(world_of(name), unused_worker, name, 5):
        assert same_bits(result, expected)


def frozen_worker(rank, world, name, steps):
    """``wide`` is frozen from the start, in one group with the others."""
    model = Layers()
    model.wide.requires_grad_(False)
    wrapped = wrap(name, world, model)
    optimizer = make_optimizer(wrapped)
    for step in range(steps):
        backward(wrapped, make_batch(step))
        optimizer.clip_grad_norm_(0.5)
        optimizer.step(zero_grad=True)
    frozen = [param for param in wrapped.module.parameters() if not param.requires_grad]
    assert frozen and not any(optimizer.state.get(param) for param in frozen)
    return collect(wrapped.module, optimizer)


@pytest.mark.parametrize("name", WRAPPED)
def test_frozen_parameters_have_no_state_and_no_decay(name):
    expected = frozen_worker(0, 1, None, 3)
    assert list(expected["wide.weight"]) == ["weights"] and torch.equal(
        expected["wide.weight"]["weights"], Layers().wide.weight
    )
    for result in run_ranks(world_of(name), frozen_worker, name, 3):
        assert same_bits(result, expected)


def thaw_worker(rank, world, name, steps):
    """``wide`` is frozen in the first two steps, ``tall`` in the last two."""
    wrapped = wrap(name, world, Layers())
    optimizer = make_optimizer(wrapped)
    for step in range(steps):
        wrapped.module.wide.requires_grad_(step >= 2)
        wrapped.module.tall.requires_grad_(step < steps - 2)
        backward(wrapped, make_batch(step))
        optimizer.step(zero_grad=True)
    wrapped.module.requires_grad_(True)
    return collect(wrapped.module, optimizer)


@pytest.mark.parametrize(
    "name", ["FSDP2", HSDP, "tensor parallel", "FSDP2 + tensor parallel (2 x 2)"]
)
def test_freezing_and_unfreezing_during_training(name):
    expected = thaw_worker(0, 1, None, 5)
    assert (
        expected["wide.weight"]["step"] == 3
        and expected["tall.weight"]["step"] == 3
        and expected["gain.weight"]["step"] == 5
    )
    for result in run_ranks(world_of(name), thaw_worker, name, 5):
        assert same_bits(result, expected)


def placements_worker(rank, world, name):
    wrapped = wrap(name, world, Layers())
    optimizer = make_optimizer(wrapped)
    backward(wrapped, make_batch(0))
    optimizer.step()
    sizes = {}
    for fqn, param in wrapped.module.named_parameters():
        states = [optimizer.state[param][key] for key in STATES if key in optimizer.state[param]]
        assert all(
            isinstance(state, DTensor) and state.placements == param.placements for state in states
        )
        sizes[fqn] = (param.placements, sum(state.to_local().nbytes for state in states))
    return sizes


def test_hsdp_states_are_replicated_and_sharded():
    results = run_ranks(4, placements_worker, HSDP)
    assert all(
        placements == (Replicate(), Shard(0))
        for sizes in results
        for placements, _ in sizes.values()
    )
    assert [sizes["wide.weight"][1] for sizes in results] == [12 * 8 * 6 // 2] * 4
    assert [sizes["tall.weight"][1] for sizes in results] == [7 * 6 * 6, 6 * 6 * 6] * 2, (
        "7 and 6 rows"
    )


def test_states_have_the_shard_dimension_of_the_parameter():
    results = run_ranks(4, placements_worker, "FSDP2 shard_placement_fn to columns")
    for sizes in results:
        assert sizes["wide.weight"] == ((Shard(1),), 12 * 8 * 6 // 4)
        assert sizes["tall.weight"][0] == (Shard(0),), "6 columns do not divide into 4"


def hybrid_norm_worker(rank, world):
    wrapped = wrap(HSDP, world, Layers())
    optimizer = AdamW_BF16(wrapped.module.parameters(), lr=1e-2, skip_nonfinite=True)
    for param in wrapped.module.parameters():
        param.grad = torch.ones_like(param)
    squared = optimizer.clip_grad_norm_(1.0).item() ** 2
    optimizer.step(zero_grad=True)
    if rank in (1, 3):  # both replicas of one shard, as after a reduction
        wrapped.module.wide.weight.grad = torch.full_like(wrapped.module.wide.weight, float("inf"))
    else:
        wrapped.module.wide.weight.grad = torch.ones_like(wrapped.module.wide.weight)
    before = wrapped.module.wide.weight.full_tensor()
    optimizer.step()
    return (
        squared,
        optimizer.skipped_steps,
        torch.equal(before, wrapped.module.wide.weight.full_tensor()),
    )


def test_hsdp_norm_counts_replicas_once_and_guard_skips_all():
    elements = sum(param.numel() for param in Layers().parameters())
    for squared, skipped, unchanged in run_ranks(4, hybrid_norm_worker):
        assert squared == pytest.approx(elements, rel=1e-6)
        assert skipped == 1 and unchanged
