"""ZeRO stage 2 with ``step_in_backward=True``: the bits of ``step()``, memory and order."""

from __future__ import annotations

import gc
import math
import weakref
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from bits import same_bits
from distributed import run_ranks
from torch import nn

from sharded_bf16_adamw import ClipInBackward
from sharded_bf16_adamw.kernels import clip_coefficient
from sharded_bf16_adamw.sharding.zero import in_backward
from sharded_bf16_adamw.step_in_backward.clip import previous_sum_sq

from ..test_step_in_backward import Shared
from . import loop_cases as loops
from . import test_bits as bits
from .cases import (
    Linears,
    Parameters,
    assert_same_bits,
    backpressure_timeout,
    collect,
    mesh_of,
    new_optimizer,
    rank_gradients,
    traffic,
    zero,
)
from .in_backward_cases import (
    LAYER_BYTES,
    LAYERS,
    WIDTH,
    backward,
    in_backward_optimizer,
    layers,
    make_input,
)
from .loop_cases import FP32_SUMS, assert_loops_match, run_loops


@contextmanager
def updates_of(optimizer):
    """Yield a list that gets the parameters of each update inside the backward pass."""
    found, update = [], optimizer._in_backward.update

    def recorded(params, grads):
        if torch._C._current_graph_task_id() >= 0:
            found.append(params)
        update(params, grads)

    optimizer._in_backward.update = recorded
    try:
        yield found
    finally:
        del optimizer._in_backward.update


# ----------------------------------------------------------------------------------------- the bits


def bits_worker(rank, world, shape, options):
    model = Parameters()
    optimizer = in_backward_optimizer(model, shape, **options)
    with updates_of(optimizer) as updates:
        for step in range(5):
            with backpressure_timeout(60.0):
                model(rank_gradients(step, rank, world)).backward()
            optimizer.step()  # zero_grad() is not needed: nothing is kept
    return collect(model, optimizer), len(updates)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1,), {"static_graph": True}),
        ((2,), {}),
        ((3,), {"static_graph": True, "bucket_size_mb": 1e-6, "max_in_flight": 1}),
        ((2, 2), {"reduce_dtype": torch.float32}),
        ((2, 1), {}),
    ],
    ids=str,
)
def test_bits_match_single_process(shape, options):
    for weights, updates in run_ranks(math.prod(shape), bits_worker, shape, options):
        assert_same_bits(weights, bits.single_process(5)[0])
        assert updates > 5, "or nothing happened inside the backward pass"


class Loop(loops.Loop):
    def __init__(self, ranks, options=None):
        super().__init__(ranks)
        if options is not None:
            self.alone = False
            self.optimizer = in_backward_optimizer(self.model, **options)


def used_only_before_the_last_pass(loop):
    for step in range(4):
        with loop.optimizer.accumulate():
            loop.backward(7 * step)
        loop.backward(7 * step + 1, lambda rank: {"even", "bias", "fp32", "scalar"})
        loop.step()


STATIC_LOOPS = [
    loops.unused_on_some_ranks,
    loops.several_backwards,
    loops.several_backwards_with_other_uses,
    used_only_before_the_last_pass,
    loops.no_sync,
]
ANY_LOOP = [
    used_only_before_the_last_pass,
    loops.unused_on_some_ranks,
    loops.unused_on_changing_ranks,
    loops.unused_everywhere_for_a_while,
    loops.a_rank_without_any_gradient,
    loops.several_backwards,
    loops.several_backwards_with_other_uses,
    loops.no_sync,
    loops.frozen_and_unfrozen,
    loops.gradients_set_by_hand,
    loops.gradients_that_are_views,
    loops.memory_of_parameters_replaced,
    loops.state_reloaded,
    loops.closure,
]


def scenarios_of(options):
    return STATIC_LOOPS if "static_graph" in options else ANY_LOOP


def scenarios_worker(rank, world, options):
    with backpressure_timeout(0.05):  # in some scenarios another rank cannot keep up
        return run_loops(scenarios_of(options), partial(Loop, world, options))


@pytest.mark.parametrize(
    "options",
    [
        {"shape": (2,), "max_in_flight": 1},
        {"shape": (2,), "max_in_flight": 1, "static_graph": True},
        # As long as both: four ranks, two dimensions, float32 sums.
        pytest.param({"shape": (2, 2), **FP32_SUMS}, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_training_loops_match_single_process(options):
    world = math.prod(options["shape"])
    expected = run_loops(scenarios_of(options), partial(Loop, world))
    assert_loops_match(run_ranks(world, scenarios_worker, options), expected)


def micro_batches_worker(rank, world, how, static_graph):
    """Return the number of updates inside the last backward pass, after comparing the bits."""
    results = []
    for in_backward_too in (False, True):
        model, optimizer = layers(world, static_graph=static_graph)
        if not in_backward_too:
            model = Linears(LAYERS, WIDTH)
            optimizer = new_optimizer(model, zero(2))
        for step in range(5):
            with optimizer.no_sync() if how == "no_sync" else optimizer.accumulate():
                before = model[0].weight.detach().clone()
                for micro in range(2):
                    backward(model, rank, 3 * step + micro)
                assert torch.equal(model[0].weight, before)
            with backpressure_timeout(60.0):
                if in_backward_too:
                    with updates_of(optimizer) as updates:
                        backward(model, rank, 3 * step + 2)
                else:
                    backward(model, rank, 3 * step + 2)
            optimizer.step(zero_grad=True)
        results.append(collect(model, optimizer))
    assert same_bits(*results)
    return len(updates)


@pytest.mark.parametrize(
    ("how", "static_graph", "expected"),
    [("no_sync", False, True), ("accumulate", False, False), ("accumulate", True, True)],
)
def test_micro_batches(how, static_graph, expected):
    for updates in run_ranks(2, micro_batches_worker, how, static_graph):
        # without static_graph, step() reduces and updates the closing bucket
        least = LAYERS - 1 if static_graph else LAYERS - 2
        assert (updates >= least) if expected else (updates == 0)


def shared_worker(rank, world):
    results = []
    for options in ({}, {"step_in_backward": True}):
        model = Shared().bfloat16()
        optimizer = new_optimizer(model, zero(2, bucket_size_mb=1e-6), **options)
        for step in range(4):
            model(torch.arange(7) + step + rank).square().mean().backward()
            assert all(param.grad is None for param in model.parameters())
            optimizer.step(zero_grad=True)
        results.append(collect(model, optimizer))
    assert same_bits(*results)


def test_weights_that_are_tied_used_twice_and_checkpointed():
    run_ranks(2, shared_worker)


def added_group_worker(rank, world):
    results = []
    for options in ({}, {"step_in_backward": True}):
        model, late = Linears(LAYERS, WIDTH), Linears(2, WIDTH)
        optimizer = new_optimizer(model, zero(2, bucket_size_mb=1e-6), **options)
        for step in range(4):
            if step == 2:
                optimizer.add_param_group({"params": list(late.named_parameters())})
            late(model(make_input(step, rank))).square().mean().backward()
            optimizer.step(zero_grad=True)
            late.zero_grad()
        results.append([*collect(model, optimizer).values(), *collect(late, optimizer).values()])
    assert all(map(torch.equal, *results))


def test_added_group():
    run_ranks(2, added_group_worker)


def clip_worker(rank, world, shape):
    """Return the sums of squares, after comparing with steps that are scaled by them."""
    model = Parameters()
    optimizer = in_backward_optimizer(model, shape, clip=ClipInBackward(0.5))
    sums = []
    for step in range(5):
        model(rank_gradients(step, rank, world)).backward()
        optimizer.step()
        sums.append(previous_sum_sq(optimizer.param_groups))
    weights = collect(model, optimizer)
    model = Parameters()
    optimizer = new_optimizer(model, zero(2, mesh_of(shape)))
    for step in range(5):
        model(rank_gradients(step, rank, world)).backward()
        norm = optimizer.clip_grad_norm_(math.inf)
        assert torch.allclose(sums[step].sqrt().float(), norm, rtol=1e-6)
        scale = clip_coefficient(sums[step - 1], 0.5)[1] if step else torch.ones(())
        optimizer._clip.set(scale, torch.zeros(()))
        optimizer.step(zero_grad=True)
    assert_same_bits(weights, collect(model, optimizer))
    return sums


@pytest.mark.parametrize("shape", [(2,), (2, 2)])
def test_clipping_by_the_norm_of_the_step_before(shape):
    first, *others = run_ranks(math.prod(shape), clip_worker, shape)
    assert all(sums == first for sums in others)
    assert all(total.sqrt() > 0.5 for total in first)


# --------------------------------------------------------------------------- memory, order, traffic


def memory_worker(rank, world):
    """Return the most bytes of gradients outside buckets in flight, and of those in flight."""
    per_bucket = 2
    model = Linears(LAYERS, WIDTH)
    most = [0, 0]

    def look(param):
        stage = optimizer._sharding
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        grads += [b._reduce_scatter_input for b in stage._order.buckets if b.is_pending]
        grads += stage._sharded_grads.values()
        storages = {g.untyped_storage()._cdata: g.untyped_storage().nbytes() for g in grads}
        in_flight = sum(p._input.nbytes for _, p in stage._in_flight)
        most[:] = [max(most[0], sum(storages.values())), max(most[1], in_flight)]

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(look)  # before the optimizer's own
    optimizer = in_backward_optimizer(
        model, (world,), bucket_size_mb=per_bucket * LAYER_BYTES / 2**20, max_in_flight=1
    )
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(look)
    for step in range(3):
        with backpressure_timeout(60.0):
            backward(model, rank, step)
        optimizer.step()
    return most


@pytest.mark.parametrize("world", [2, 3])
def test_live_gradients_are_those_of_a_bucket_and_a_parameter(world):
    for outside, in_flight in run_ranks(world, memory_worker):
        padded = -(-WIDTH // world) * world / WIDTH
        assert LAYER_BYTES < outside < 1.05 * (2 * LAYER_BYTES * padded + LAYER_BYTES)
        flags = 2 * world  # a bf16 element for each rank in the closing bucket
        assert in_flight <= 2 * LAYER_BYTES * padded + flags


def order_worker(rank, world):
    """Compare the collectives with and without the option; return the events of the last step."""
    sent = []
    for options in ({}, {"step_in_backward": True}):
        model = Linears(LAYERS, WIDTH)
        size = LAYER_BYTES / 2**20
        optimizer = new_optimizer(model, zero(2, bucket_size_mb=size, max_in_flight=1), **options)
        events = []
        for step in range(3):
            events.clear()
            with traffic() as calls, backpressure_timeout(60.0):
                calls.on_call = events.append
                backward(model, rank, step)
                events.append("end")
                optimizer.step(zero_grad=True)
        sent.append(sorted(calls))
    assert sent[0] == sent[1], "the same bytes"
    return events


def test_weights_are_gathered_while_the_backward_pass_goes_on():
    for events in run_ranks(2, order_worker):
        first, end = events.index("all_gather_single"), events.index("end")
        assert events[:first] == ["all_to_all_single"], "the first bucket, before the second"
        assert events[:end].count("all_to_all_single") >= LAYERS - 1
        assert events.count("all_gather_single") == LAYERS


def early_reader_worker(rank, world):
    """Delay what arrives: no parameter may change before its gradient is final."""

    class Late(in_backward.PendingAllGather):
        is_completed = False

    model, optimizer = layers(world)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(in_backward, "PendingAllGather", Late)
        changed = []

        def look(param):
            changed.append(
                [bool((p != before).any()) for p, before in zip(params, old, strict=True)]
            )

        params = list(model.parameters())
        for param in params:
            param.register_post_accumulate_grad_hook(look)
        for step in range(2):
            old = [param.detach().clone() for param in params]
            changed.clear()
            with backpressure_timeout(60.0):
                backward(model, rank, step)
            for done, flags in enumerate(changed):
                assert not any(flags[: LAYERS - 1 - done]), "their gradients are yet to come"
            rows = [(p != before).any(1) for p, before in zip(params, old, strict=True)]
            share = WIDTH // world
            for row in rows[1:]:  # all but the bucket that was launched last
                assert row[rank * share : (rank + 1) * share].all()
                assert not row[: rank * share].any() and not row[(rank + 1) * share :].any()
            optimizer.step()
            assert all((p != before).any(1).all() for p, before in zip(params, old, strict=True))
    return [param.detach() for param in params]


def test_late_weights_are_copied_in_by_step():
    one, two = run_ranks(2, early_reader_worker)
    assert all(map(torch.equal, one, two))


def late_rank_worker(rank, world):
    """Rank 1 does not use the last layer, so that it sends everything in ``step()``."""
    model, optimizer = layers(world)
    with updates_of(optimizer) as updates, backpressure_timeout(0.05):
        for step in range(3):
            nn.Sequential(*list(model)[: LAYERS - rank])(make_input(step, rank)).sum().backward()
            optimizer.step()
    return [param.detach() for param in model.parameters()], len(updates)


def test_a_rank_that_falls_behind_does_not_block_the_others():
    (one, first), (two, second) = run_ranks(2, late_rank_worker)
    assert all(map(torch.equal, one, two))
    assert (first, second) == (0, 0)


def dropped_worker(rank, world):
    model, optimizer = layers(world)
    backward(model, rank, 0)
    optimizer.step()
    dropped = weakref.ref(optimizer._sharding)
    gc.disable()
    del optimizer
    assert dropped() is None, "without the garbage collector"
    gc.enable()
    backward(model, rank, 1)
    assert all(param.grad is not None for param in model.parameters())


def test_hooks_go_with_the_optimizer():
    run_ranks(2, dropped_worker)
