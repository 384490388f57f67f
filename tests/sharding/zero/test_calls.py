"""Ranks that call different methods: an error on every rank, or a timeout that names the call."""

from __future__ import annotations

import re

import pytest
import torch
from distributed import run_ranks
from torch import nn

from sharded_bf16_adamw import AdamW_BF16
from sharded_bf16_adamw.sharding.zero.calls import (
    DISCARDED_ON_SOME_RANKS_ERROR,
    STEPPED_ON_SOME_RANKS_ERROR,
)

from .cases import (
    Parameters,
    assert_same_bits,
    backpressure_timeout,
    collect,
    consensus_calls,
    mean_gradients,
    mesh_of,
    mesh_with_timeout,
    new_optimizer,
    shorten_timeout,
    zero,
)
from .loop_cases import named


def backward(model, step=10):
    model(mean_gradients(step)).backward()


def add(optimizer):
    late = nn.Parameter(torch.ones(10, 3, dtype=torch.bfloat16))
    optimizer.add_param_group({"params": [("late", late)]})


def train(model, optimizer, first, count=4):
    """Take steps on gradients that are the same on every rank, as stage 1 gets them from DDP."""
    for step in range(first, first + count):
        backward(model, step)
        optimizer.clip_grad_norm_(0.5)
        optimizer.step(zero_grad=True)


# -------------------------------------------------------- different calls that the ranks detect


def added(model, optimizer, rank):
    if rank == 1:
        add(optimizer)
    backward(model)
    optimizer.clip_grad_norm_(0.5)


def added_before_the_step(model, optimizer, rank):
    backward(model)
    if rank == 1:
        add(optimizer)
    optimizer.step()


def added_where_another_clears(model, optimizer, rank):
    backward(model)
    if rank == 1:
        add(optimizer)
    optimizer.zero_grad()
    backward(model)
    optimizer.step()


def clipped(model, optimizer, rank):
    backward(model)
    if rank == 1:
        optimizer.clip_grad_norm_(0.5)
    optimizer.step()


def measured(model, optimizer, rank):
    backward(model)
    if rank == 1:
        optimizer.precision_stats()
    optimizer.clip_grad_norm_(0.5)


def cleared_where_another_clips_again(model, optimizer, rank):
    backward(model)
    optimizer.clip_grad_norm_(0.5)
    if rank == 1:
        optimizer.zero_grad()
    optimizer.clip_grad_norm_(0.5)


def cleared_where_another_measures(model, optimizer, rank):
    backward(model)
    optimizer.clip_grad_norm_(0.5)
    if rank == 1:
        optimizer.zero_grad()
        backward(model)
    optimizer.precision_stats()


def measured_where_another_clips_again(model, optimizer, rank):
    backward(model)
    optimizer.clip_grad_norm_(0.5)
    if rank == 1:
        optimizer.precision_stats()
    optimizer.clip_grad_norm_(0.5)


def added_where_another_clips_again(model, optimizer, rank):
    backward(model)
    optimizer.clip_grad_norm_(0.5)
    if rank == 1:
        add(optimizer)
    optimizer.clip_grad_norm_(0.5)


def cleared_after_an_error(model, optimizer, rank):
    backward(model)
    model.large, kept = nn.Parameter(model.large.detach().clone()), model.large
    with pytest.raises(RuntimeError, match="has been replaced"):
        optimizer.step()
    model.large = kept
    if rank == 1:
        optimizer.zero_grad()
    optimizer.step()


DIFFERENT_CALLS = (
    "some ranks called {} and others {} at the same point; make the same calls on every rank"
)
DETECTED = [
    (added, DIFFERENT_CALLS.format("clip_grad_norm_()", "add_param_group()")),
    (added_before_the_step, DIFFERENT_CALLS.format("step()", "add_param_group()")),
    (added_where_another_clears, DIFFERENT_CALLS.format(".*", ".*")),
    (clipped, DIFFERENT_CALLS.format("step()", "clip_grad_norm_()")),
    (measured, DIFFERENT_CALLS.format("clip_grad_norm_()", "precision_stats()")),
    (cleared_where_another_clips_again, DISCARDED_ON_SOME_RANKS_ERROR),
    (cleared_where_another_measures, DISCARDED_ON_SOME_RANKS_ERROR),
    (
        measured_where_another_clips_again,
        DIFFERENT_CALLS.format("clip_grad_norm_()", "precision_stats()"),
    ),
    (
        added_where_another_clips_again,
        DIFFERENT_CALLS.format("clip_grad_norm_()", "add_param_group()"),
    ),
    (cleared_after_an_error, DISCARDED_ON_SOME_RANKS_ERROR),
]


def detected_worker(rank, world, stage, steps):
    """Assert that every rank raises, keeps its weights and states, and can continue."""
    results = []
    for misuse, message in DETECTED:
        with named(misuse.__name__):
            model = Parameters()
            optimizer = new_optimizer(model, zero(stage, mesh_with_timeout(20)))
            train(model, optimizer, 0, steps)
            before = collect(model, optimizer)
            with pytest.raises(RuntimeError, match=re.escape(message).replace(r"\.\*", ".*")):
                misuse(model, optimizer, rank)
            assert_same_bits(collect(model, optimizer), before)
            optimizer.zero_grad()
            train(model, optimizer, 20, 2)
            results.append(collect(model, optimizer))
    return results


@pytest.mark.parametrize(("stage", "steps"), [(1, 4), (2, 0), (2, 4)])
def test_different_calls_are_an_error_on_every_rank(stage, steps):
    model = Parameters()
    optimizer = new_optimizer(model)
    train(model, optimizer, 0, steps)
    train(model, optimizer, 20, 2)
    for results in run_ranks(2, detected_worker, stage, steps):
        for found in results:
            assert_same_bits(found, collect(model, optimizer))


def one_more_group(params, mesh, rank, in_backward):
    """Step once, with one more parameter group on rank 1 than on rank 0."""
    groups = [{"params": [param]} for param in params]
    options = {"sharding": zero(2, mesh), "step_in_backward": in_backward}
    optimizer = AdamW_BF16(groups[: 1 + rank], **options)
    params[0].sum().backward()
    optimizer.step()


def other_groups_worker(rank, world, in_backward):
    params = [nn.Parameter(torch.ones(8, dtype=torch.bfloat16)) for _ in range(2)]
    with pytest.raises(RuntimeError, match=r"called step\(\) and others add_param_group\(\) at"):
        one_more_group(params, mesh_with_timeout(20), rank, in_backward)


@pytest.mark.parametrize("in_backward", [False, True])
def test_different_numbers_of_groups_are_an_error(in_backward):
    run_ranks(2, other_groups_worker, in_backward)


# --------------------------- another call than step() on one rank after clip_grad_norm_()


def one_more_backward(model, optimizer, rank):
    if rank == 1:
        backward(model, 11)
    optimizer.step()


def cleared_instead(model, optimizer, rank):
    if rank == 1:
        optimizer.zero_grad()
    optimizer.step()


def added_instead(model, optimizer, rank):
    if rank == 1:
        add(optimizer)
    optimizer.step()


def clipped_again(model, optimizer, rank):
    if rank == 1:
        optimizer.clip_grad_norm_(0.5)
    optimizer.step()


def measured_instead(model, optimizer, rank):
    if rank == 1:
        optimizer.precision_stats()
    optimizer.step()


INSTEAD_OF_STEP = [
    (one_more_backward, "calling step() with new gradients"),
    (cleared_instead, "calling zero_grad()"),
    (added_instead, "calling add_param_group()"),
    (clipped_again, "calling clip_grad_norm_()"),
    (measured_instead, "calling precision_stats()"),
]
AFTER_CONSENSUS = (
    " after clip_grad_norm_(), precision_stats() or a failed step(), which must happen on every "
    "rank or on none, between ranks 0, 1 failed on rank 1; most likely"
)


def timeout_worker(rank, world, stage, steps):
    for instead, call in INSTEAD_OF_STEP:
        if stage == 1 and instead is one_more_backward:
            continue  # DDP reduces its gradients
        with named(instead.__name__):
            model = Parameters()
            mesh = mesh_with_timeout(60)
            optimizer = new_optimizer(model, zero(stage, mesh))
            train(model, optimizer, 0, steps)
            backward(model)
            optimizer.clip_grad_norm_(0.5)
            before = [param.detach().clone() for param in model.parameters()]
            shorten_timeout(optimizer, mesh)
            with backpressure_timeout(0.05), pytest.raises(RuntimeError) as caught:
                instead(model, optimizer, rank)
            if rank == 1:
                assert all(map(torch.equal, before, model.parameters()))
                message = call + AFTER_CONSENSUS
            else:
                message = "gathering the updated weights between ranks 0, 1 failed on rank 0; most"
            assert str(caught.value).startswith(message)


@pytest.mark.parametrize(("stage", "steps"), [(1, 4), (2, 0), (2, 4)])
def test_another_call_than_step_after_clipping_ends_in_a_timeout(stage, steps):
    """A step after ``clip_grad_norm_()`` exchanges nothing, so ranks cannot detect it."""
    run_ranks(2, timeout_worker, stage, steps)


def goes_on(instead, model, optimizer, rank):
    """Take the next step too. ``instead`` raises on rank 1 only, as rank 0 waits for nobody."""
    instead(model, optimizer, rank)
    assert rank == 0
    optimizer.zero_grad()
    backward(model, 12)
    optimizer.clip_grad_norm_(0.5)


def unnoticed_worker(rank, world):
    """No weights are gathered on this mesh, so only the next exchange detects the difference."""
    for instead, _ in INSTEAD_OF_STEP:
        with named(instead.__name__):
            model = Parameters()
            optimizer = new_optimizer(model, zero(2, mesh_of((2, 1))))
            train(model, optimizer, 0)
            backward(model)
            optimizer.clip_grad_norm_(0.5)
            with pytest.raises(RuntimeError, match=re.escape(STEPPED_ON_SOME_RANKS_ERROR)):
                goes_on(instead, model, optimizer, rank)


def test_another_call_than_step_is_detected_later_without_all_gather():
    run_ranks(2, unnoticed_worker)


# ------------------------------------------------------------------------- the same on every rank


def skipped_worker(rank, world, stage):
    """Skip a step after clip_grad_norm_() and precision_stats(); the next is steady at once."""
    model = Parameters()
    optimizer = new_optimizer(model, zero(stage))
    train(model, optimizer, 0)
    backward(model)
    optimizer.clip_grad_norm_(0.5)
    optimizer.precision_stats()
    optimizer.clip_grad_norm_(0.25)
    optimizer.zero_grad()
    with consensus_calls() as calls:
        train(model, optimizer, 20, 1)
    assert len(calls) == (0 if stage == 2 else 1)
    return collect(model, optimizer)


@pytest.mark.parametrize("stage", [1, 2])
def test_skipped_step(stage):
    model = Parameters()
    optimizer = new_optimizer(model)
    train(model, optimizer, 0)
    train(model, optimizer, 20, 1)
    for found in run_ranks(2, skipped_worker, stage):
        assert_same_bits(found, collect(model, optimizer))


def retried_before_the_promise(rank, ranks):
    """Different calls in the first steps of static_graph, then the same ones on every rank."""
    model = Parameters()
    optimizer = new_optimizer(model, zero(static_graph=True))
    backward(model, 0)
    optimizer.step(zero_grad=True)  # finds the order of gradients
    backward(model)
    with pytest.raises(RuntimeError, match="some ranks called"):
        (optimizer.clip_grad_norm_ if rank == 0 else lambda norm: optimizer.step())(0.5)
    optimizer.step(zero_grad=True)
    for step in range(1, 5):
        backward(model, step)
        optimizer.step(zero_grad=True)
    return collect(model, optimizer)


def test_static_graph_ignores_a_failed_exchange():
    model = Parameters()
    optimizer = new_optimizer(model)
    for step in (0, 10, 1, 2, 3, 4):
        backward(model, step)
        optimizer.step(zero_grad=True)
    for found in run_ranks(2, retried_before_the_promise):
        assert_same_bits(found, collect(model, optimizer))
