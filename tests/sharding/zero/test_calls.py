"""Ranks that call other methods than each other: an error on every rank, or a clear timeout."""

from __future__ import annotations

import re
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from sharded_bf16_adamw import AdamW_BF16
from sharded_bf16_adamw.sharding.zero.calls import (
    DISCARDED_ON_SOME_RANKS_ERROR,
    STEPPED_ON_SOME_RANKS_ERROR,
)

from .cases import (
    Parameters,
    assert_same_bits,
    collect,
    consensus_calls,
    mean_gradients,
    mesh_of,
    new_optimizer,
    zero,
)
from .loop_cases import named


def impatient_mesh():
    return DeviceMesh.from_group(dist.new_group(timeout=timedelta(seconds=3)), "cpu")


def backward(model, step=10):
    model(mean_gradients(step)).backward()


def add(optimizer):
    late = nn.Parameter(torch.ones(10, 3, dtype=torch.bfloat16))
    optimizer.add_param_group({"params": [("late", late)]})


def train(model, optimizer, first, count=4):
    """Take steps on the same gradients on every rank, which suit both stages."""
    for step in range(first, first + count):
        backward(model, step)
        optimizer.clip_grad_norm_(0.5)
        optimizer.step(zero_grad=True)


# -------------------------------------------------------- calls that the ranks see to be different


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


AT_ONCE = "some ranks called {} and others {} at the same point; make the same calls on every rank"
FOUND = [
    (added, AT_ONCE.format("clip_grad_norm_()", "add_param_group()")),
    (added_before_the_step, AT_ONCE.format("step()", "add_param_group()")),
    (added_where_another_clears, AT_ONCE.format(".*", ".*")),
    (clipped, AT_ONCE.format("step()", "clip_grad_norm_()")),
    (measured, AT_ONCE.format("clip_grad_norm_()", "precision_stats()")),
    (cleared_where_another_clips_again, DISCARDED_ON_SOME_RANKS_ERROR),
    (cleared_where_another_measures, DISCARDED_ON_SOME_RANKS_ERROR),
    (
        measured_where_another_clips_again,
        AT_ONCE.format("clip_grad_norm_()", "precision_stats()"),
    ),
    (added_where_another_clips_again, AT_ONCE.format("clip_grad_norm_()", "add_param_group()")),
    (cleared_after_an_error, DISCARDED_ON_SOME_RANKS_ERROR),
]


def found_worker(rank, world, stage, steps):
    """Every rank raises, its weights are as before, and it can go on."""
    results = []
    for misuse, message in FOUND:
        with named(misuse.__name__):
            model = Parameters()
            optimizer = new_optimizer(model, zero(stage, impatient_mesh()))
            train(model, optimizer, 0, steps)
            before = collect(model, optimizer)
            with pytest.raises(RuntimeError, match=re.escape(message).replace(r"\.\*", ".*")):
                misuse(model, optimizer, rank)
            assert_same_bits(collect(model, optimizer), before)
            optimizer.zero_grad()
            train(model, optimizer, 20)
            results.append(collect(model, optimizer))
    return results


@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize("stage", [1, 2])
def test_different_calls_are_an_error_on_every_rank(stage, steps):
    model = Parameters()
    optimizer = new_optimizer(model)
    train(model, optimizer, 0, steps)
    train(model, optimizer, 20)
    for results in run_ranks(2, found_worker, stage, steps):
        for found in results:
            assert_same_bits(found, collect(model, optimizer))


def one_more_group(params, mesh, rank, in_backward):
    """Build the optimizer of rank 1 with one group more."""
    groups = [{"params": [param]} for param in params]
    options = {"sharding": zero(2, mesh), "step_in_backward": in_backward}
    optimizer = AdamW_BF16(groups[: 1 + rank], **options)
    params[0].sum().backward()
    optimizer.step()


def other_groups_worker(rank, world, in_backward):
    params = [nn.Parameter(torch.ones(8, dtype=torch.bfloat16)) for _ in range(2)]
    with pytest.raises(RuntimeError, match=r"called step\(\) and others add_param_group\(\) at"):
        one_more_group(params, impatient_mesh(), rank, in_backward)


@pytest.mark.parametrize("in_backward", [False, True])
def test_other_number_of_groups(in_backward):
    run_ranks(2, other_groups_worker, in_backward)


# -------------------------------------------------------- a step on a rank after clip_grad_norm_()


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


INSTEAD = [
    (one_more_backward, "calling step() with other gradients"),
    (cleared_instead, "calling zero_grad()"),
    (added_instead, "calling add_param_group()"),
    (clipped_again, "calling clip_grad_norm_()"),
    (measured_instead, "calling precision_stats()"),
]
EVERY_RANK = (
    " after clip_grad_norm_(), precision_stats() or a failed step(), which every rank or none has "
    "to do, between ranks 0, 1 failed on rank 1; most likely"
)


def timeout_worker(rank, world, stage, steps):
    for instead, call in INSTEAD:
        if stage == 1 and instead is one_more_backward:
            continue  # DDP reduces its gradients
        with named(instead.__name__):
            model = Parameters()
            optimizer = new_optimizer(model, zero(stage, impatient_mesh()))
            train(model, optimizer, 0, steps)
            backward(model)
            optimizer.clip_grad_norm_(0.5)
            before = [param.detach().clone() for param in model.parameters()]
            with pytest.raises(RuntimeError) as caught:
                instead(model, optimizer, rank)
            if rank == 1:
                assert all(map(torch.equal, before, model.parameters()))
                message = call + EVERY_RANK
            else:
                message = "gathering the updated weights between ranks 0, 1 failed on rank 0; most"
            assert str(caught.value).startswith(message)


@pytest.mark.parametrize(("stage", "steps"), [(1, 4), (2, 0), (2, 4)])
def test_another_call_than_step_after_clipping_ends_in_a_timeout(stage, steps):
    """A step after ``clip_grad_norm_()`` exchanges nothing, so nobody can know in time."""
    run_ranks(2, timeout_worker, stage, steps)


def goes_on(instead, model, optimizer, rank):
    """Run the next step too, as nothing stops rank 0."""
    instead(model, optimizer, rank)
    assert rank == 0
    optimizer.zero_grad()
    backward(model, 12)
    optimizer.clip_grad_norm_(0.5)


def unnoticed_worker(rank, world):
    """Nothing is gathered, as each rank holds all weights: the next exchange tells."""
    for instead, _ in INSTEAD:
        with named(instead.__name__):
            model = Parameters()
            optimizer = new_optimizer(model, zero(2, mesh_of((2, 1))))
            train(model, optimizer, 0)
            backward(model)
            optimizer.clip_grad_norm_(0.5)
            with pytest.raises(RuntimeError, match=re.escape(STEPPED_ON_SOME_RANKS_ERROR)):
                goes_on(instead, model, optimizer, rank)


def test_another_call_than_step_where_no_rank_waits():
    run_ranks(2, unnoticed_worker)


# ------------------------------------------------------------------------- the same on every rank


def skipped_worker(rank, world, stage):
    """Steps are skipped and statistics measured; the steps after them are steady at once."""
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


def test_failed_exchange_is_not_what_static_graph_expects():
    one, other = run_ranks(2, retried_before_the_promise)
    assert_same_bits(one, other)
