"""A step like the previous one needs almost no host collectives; a changed one is detected."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from distributed import run_ranks
from torch import nn

from sharded_bf16_adamw import AdamW_BF16
from sharded_bf16_adamw.sharding.zero.closing_bucket import ClosingBucket
from sharded_bf16_adamw.sharding.zero.grad_consensus import GradConsensus

from .cases import (
    SHAPES,
    Parameters,
    assert_same_bits,
    backpressure_timeout,
    collect,
    consensus_calls,
    mean_gradients,
    mesh_of,
    new_optimizer,
    traffic,
    train_with_late_group,
    zero,
)
from .loop_cases import ALL, FP32_SUMS, Loop, assert_loops_match, named, run_loops

FULL = "all_reduce_max_and_problems"


def everything(rank):
    return ALL


def some_behind(rank):
    """``even`` is unused on rank 1, whose first bucket is then never complete; ``conv`` on all."""
    return ALL - {"conv"} if rank != 1 else ALL - {"conv", "even"}


def steps(loop, used, first, count):
    """Take steps that repeat each other, and return the exchanges of the last one."""
    for step in range(first, first + count):
        with consensus_calls() as calls:
            loop.backward(step, used)
            loop.step()
    return calls


# ----------------------------------------------------- changes that all ranks agree on and survive


def fewer_on_a_rank(loop, used):
    loop.backward(10, lambda rank: used(rank) - {"large"} if rank == 0 else used(rank))
    loop.step()


def fewer_everywhere(loop, used):
    loop.backward(10, lambda rank: used(rank) - {"large", "scalar"})
    loop.step()


def other_ones(loop, used):
    """Each rank lacks what the other one lacked: the maximum over ranks stays as it was."""
    loop.backward(10, lambda rank: used(1 - rank) if rank < 2 else used(rank))
    loop.step()


def none_on_a_rank(loop, used):
    loop.backward(10, lambda rank: frozenset() if rank == 1 else used(rank))
    loop.step()


def none_on_the_other_ranks(loop, used):
    loop.backward(10, lambda rank: used(rank) if rank == 1 else frozenset())
    loop.step()


def none_anywhere(loop, used):
    loop.step()


def one_more_backward_on_a_rank(loop, used):
    loop.backward(10, used)
    loop.backward(11, lambda rank: ALL if rank == 0 else frozenset())
    loop.step()


def three_backwards(loop, used):
    for micro in range(3):
        loop.backward(10 + micro, used)
    loop.step()


def conv_again_on_a_rank(loop, used):
    """A second backward pass on rank 0 alone; with ``some_behind`` in an inactive bucket."""
    loop.backward(10, used)
    loop.backward(11, lambda rank: {"conv"} if rank == 0 else frozenset())
    loop.step()


def clipped_in_between(loop, used):
    loop.backward(10, used)
    loop.optimizer.clip_grad_norm_(0.25)
    loop.backward(11, lambda rank: {"even", "scalar"})
    loop.step()


def step_twice_on_same_grads(loop, used):
    loop.backward(10, used)
    loop.optimizer.step()
    loop.step()


def discarded(loop, used):
    """All ranks discard; rank 0 has a partial backward pass, as if it had raised."""
    loop.backward(10, lambda rank: {"large"} if rank == 0 else used(rank))
    loop.optimizer.zero_grad()
    loop.backward(11, used)
    loop.step()


def frozen(loop, used):
    loop.model.uneven.requires_grad_(False)
    loop.backward(10, used)
    loop.step()
    loop.model.uneven.requires_grad_(True)


def alternating(loop, used):
    for step in range(10, 16):
        loop.backward(step, used if step % 2 else lambda rank: {"large", "even"})
        loop.step()


CHANGES = [
    fewer_on_a_rank,
    fewer_everywhere,
    other_ones,
    none_on_a_rank,
    none_on_the_other_ranks,
    none_anywhere,
    one_more_backward_on_a_rank,
    three_backwards,
    conv_again_on_a_rank,
    clipped_in_between,
    step_twice_on_same_grads,
    discarded,
    frozen,
    alternating,
]


BEHIND = {"max_in_flight": 1, **FP32_SUMS}


def run_change(loop, change, used):
    """Return the exchanges of a steady step, those of the change, and those of a steady step."""
    before = steps(loop, used, 0, 3)
    with consensus_calls() as calls:
        change(loop, used)
    return before, calls, steps(loop, used, 20, 4)


def changes_worker(rank, world, changes, used, shape, options):
    if shape:
        options |= {"mesh": mesh_of(shape)}

    def run(change, loop):
        before, calls, after = run_change(loop, change, used)
        assert before == after == (["any_rank"] if shape else [])
        # Nothing changes if both ranks use everything.
        assert FULL in calls or (change is other_ones and used is everything)

    with backpressure_timeout(0.05):
        return run_loops(changes, partial(Loop, world, options), run)


@pytest.mark.parametrize(
    ("world", "changes", "used", "shape", "options"),
    [
        (2, CHANGES[::2], everything, None, {}),
        (2, CHANGES[1::2], some_behind, None, BEHIND),
        # The other pairs, and four ranks in two dimensions.
        pytest.param(2, CHANGES[1::2], everything, None, {}, marks=pytest.mark.exhaustive),
        pytest.param(2, CHANGES[::2], some_behind, None, BEHIND, marks=pytest.mark.exhaustive),
        pytest.param(4, CHANGES, some_behind, (2, 2), {}, marks=pytest.mark.exhaustive),
    ],
    ids=["2", "2, behind", "2, others", "2, behind, others", "2x2, behind"],
)
def test_changes_after_steady_steps_match_single_process(world, changes, used, shape, options):
    expected = run_loops(
        changes, partial(Loop, world), lambda change, loop: run_change(loop, change, used)
    )
    assert_loops_match(run_ranks(world, changes_worker, changes, used, shape, options), expected)


def reversed_worker(rank, world):
    """Gradients become ready in another order on each rank."""
    loop = Loop(world, {})
    run = loop.run
    loop.run = lambda grads: run(dict(list(grads.items())[:: 1 if rank else -1]))
    assert steps(loop, everything, 0, 6) == []
    return collect(loop.model, loop.optimizer)


def test_ranks_with_other_orders_of_gradients():
    loop = Loop(2)
    steps(loop, everything, 0, 6)
    expected = collect(loop.model, loop.optimizer)
    for found in run_ranks(2, reversed_worker):
        assert_same_bits(found, expected)


def smallest_worker(rank, world):
    """Return the bytes of each reduction in a backward pass, and of those in its step."""
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8), nn.Linear(8, 16)).bfloat16()
    # One bucket per weight; those of the last two layers also hold the biases.
    sharding = zero(bucket_size_mb=600 / 2**20, broadcast_initial=True)
    optimizer = AdamW_BF16(model.parameters(), sharding=sharding)
    for _ in range(4):
        with traffic() as in_backward:
            model(torch.ones(1, 64, dtype=torch.bfloat16)).sum().backward()
        with traffic() as in_step:
            optimizer.step(zero_grad=True)
    return [
        [size for name, _, size in calls if name == "all_to_all_single"]
        for calls in (in_backward, in_step)
    ]


def test_smallest_bucket_is_sent_in_the_step():
    """The last gradient may be a large embedding, whose bucket must not wait or be copied."""
    for in_backward, in_step in run_ranks(2, smallest_worker):
        assert max(in_backward) == 2 * 64 * 32, "the large bucket is sent in place, without a flag"
        assert len(in_step) == 1 and in_step[0] < min(in_backward)


def late_group_worker(rank, world):
    """A group is added between two backward passes of a steady step."""
    with_zero, exchanges = train_with_late_group(zero(), added_at=5, steps=10)
    without, _ = train_with_late_group(None, added_at=5, steps=10)
    assert not exchanges
    assert all(map(torch.equal, with_zero, without))


def test_added_group():
    run_ranks(2, late_group_worker)


# ------------------------------------------------------------- the same bits as with an exchange


THREE_BUCKETS = frozenset({"even", "uneven", "large"})
CLOSES_EARLY = "others again on a rank"


def inexact_gradients(step, rank):
    """Gradients whose sums round."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return {
        name: torch.randn(shape, generator=generator).to(
            torch.float32 if name.startswith("fp32") else torch.bfloat16
        )
        for name, shape in SHAPES.items()
    }


def rank_1_lacks_large(rank):
    return ALL - {"large"} if rank == 1 else ALL


def rank_1_lacks_all(rank):
    return frozenset() if rank == 1 else ALL


def others_again(rank):
    return ALL - {"uneven"} if rank == 0 else frozenset()


# The parameters used in each backward pass of a step.
PATTERNS = {
    "three": [everything] * 3,
    "three, one rank behind": [rank_1_lacks_large] * 3,
    "behind in the second": [everything, rank_1_lacks_large, everything],
    "only once on a rank": [everything, rank_1_lacks_all, rank_1_lacks_all],
    "at last on a rank": [rank_1_lacks_all, rank_1_lacks_all, everything],
    # Other buckets launch again after the closing bucket, which holds "uneven".
    CLOSES_EARLY: [everything, others_again],
}
MORE_BACKWARDS = {5: [rank_1_lacks_all], 6: [everything] * 2}  # additional backward passes, by step


@contextmanager
def closed_steps(allowed):
    """Count calls of ``reduce_unless`` by success; if not ``allowed``, no step becomes steady."""
    counts = Counter()
    reduce_unless = ClosingBucket.reduce_unless

    def counted(self, flag, group):
        reduced = reduce_unless(self, flag, group)
        counts[reduced is not None] += 1
        return reduced

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ClosingBucket, "reduce_unless", counted)
        if not allowed:
            patched.setattr(GradConsensus, "expect_repetition", lambda self: None)
        yield counts


def rounding_worker(rank, world):
    """Train with each pattern: consensus in every step, steady steps, and static_graph."""
    for name, rounds in PATTERNS.items():
        results = []
        for allowed, static_graph in ((False, False), (True, False), (True, True)):
            model = Parameters()
            for key in ALL - THREE_BUCKETS:
                delattr(model, key)
            optimizer = new_optimizer(model, zero(static_graph=static_graph))
            with closed_steps(allowed) as counts, backpressure_timeout(0.05):
                for step in range(8):
                    if step == 4:
                        results.append(collect(model, optimizer))
                    more = [] if static_graph else MORE_BACKWARDS.get(step, [])
                    for micro, used in enumerate([*rounds, *more]):
                        grads = inexact_gradients(10 * step + micro, rank)
                        if names := used(rank) & THREE_BUCKETS:
                            model({key: grads[key] for key in grads if key in names}).backward()
                    optimizer.step(zero_grad=True)
            if allowed and not static_graph and name != CLOSES_EARLY:
                assert counts == {True: 3, False: 1}, name
            else:
                assert not counts
            results.append(collect(model, optimizer))
        (early, late, steady_early, steady_late, static_early, _) = results
        with named(name):
            assert_same_bits(steady_early, early)
            assert_same_bits(static_early, early)
            assert_same_bits(steady_late, late)


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_steady_steps_change_no_bit_when_sums_round(world):
    run_ranks(world, rounding_worker)


# ------------------------------------------------------------------- changes that are an error


def zero_grad_on_a_rank(model, optimizer, rank):
    model(mean_gradients(10)).backward()
    if rank == 1:
        optimizer.zero_grad()
    optimizer.step()


def stale_on_a_rank(model, optimizer, rank):
    model(mean_gradients(9)).backward()
    optimizer.step(zero_grad=rank == 0)
    yield
    model(mean_gradients(10)).backward()
    optimizer.step()


def stale_everywhere(model, optimizer, rank):
    model(mean_gradients(9)).backward()
    optimizer.step()
    yield
    model(mean_gradients(10)).backward()
    optimizer.clip_grad_norm_(1.0)


def kept_on_a_rank(model, optimizer, rank):
    model(mean_gradients(9)).backward()
    optimizer.step(zero_grad=rank == 0)
    yield
    optimizer.step()


def cast_on_a_rank(model, optimizer, rank):
    model(mean_gradients(10)).backward()
    if rank == 1:
        model.large.data = model.large.data.float()
    optimizer.step()


def replaced_on_a_rank(model, optimizer, rank):
    model(mean_gradients(10)).backward()
    if rank == 1:
        model.large = nn.Parameter(model.large.detach().clone())
    optimizer.step()


def a_later_optimizer(model, optimizer, rank):
    later = AdamW_BF16(model.named_parameters(), sharding=zero())
    model(mean_gradients(10)).backward()
    optimizer.step()
    del later


ERRORS = [
    (zero_grad_on_a_rank, r"some ranks called zero_grad\(\) between a backward pass and its step"),
    (stale_on_a_rank, "new gradients were accumulated onto gradients that the previous step"),
    (stale_everywhere, "new gradients were accumulated onto gradients that the previous step"),
    (kept_on_a_rank, r"some ranks have called optimizer.zero_grad\(\) since the last step"),
    (cast_on_a_rank, "on rank 1, parameter 'large' was .*bfloat16.* and is now .*float32"),
    (replaced_on_a_rank, "on rank 1, parameter 'large' has been replaced in its module"),
    (a_later_optimizer, "go to a ZeRO stage 2 optimizer that was built later"),
]


def errors_worker(rank, world, shape):
    for misuse, message in ERRORS:
        with named(misuse.__name__):
            raise_and_go_on(rank, shape, misuse, message)


def raise_and_go_on(rank, shape, misuse, message):
    model = Parameters()
    optimizer = new_optimizer(model, zero(mesh=mesh_of(shape)))

    def train(first):
        for step in range(first, first + 4):
            with consensus_calls() as calls:
                model(mean_gradients(step)).backward()
                optimizer.step(zero_grad=True)
        assert calls == ([] if len(shape) == 1 else ["any_rank"])

    train(0)
    attempt = misuse(model, optimizer, rank) if misuse.__name__.startswith(GENERATORS) else None
    if attempt is not None:
        next(attempt)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=message):
        misuse(model, optimizer, rank) if attempt is None else next(attempt)
    if misuse is replaced_on_a_rank or misuse is cast_on_a_rank:
        return
    assert all(map(torch.equal, before, model.parameters()))
    if misuse is not a_later_optimizer:
        optimizer.zero_grad()
        train(20)


GENERATORS = ("stale", "kept")  # misuses of two parts


@pytest.mark.parametrize("shape", [(2,), (2, 1)], ids=str)
def test_errors_after_steady_steps_are_raised_on_every_rank(shape):
    run_ranks(2, errors_worker, shape)


def stage_1_worker(rank, world):
    """A gradient missing on all ranks is accepted; missing on one rank, it raises on both."""
    model = Parameters()
    optimizer = new_optimizer(model, zero(1))
    exchanges = []
    for step in range(11):
        grads = mean_gradients(step)
        if step in (5, 8):
            del grads["large"]
        if step == 10 and rank == 1:
            del grads["even"]
        before = [p.detach().clone() for p in model.parameters()]
        with consensus_calls() as calls:
            model(grads).backward()
            if step == 10:
                with pytest.raises(RuntimeError, match="'even' has a gradient on some ranks and"):
                    optimizer.step()
                assert all(map(torch.equal, before, model.parameters()))
                break
            optimizer.step(zero_grad=True)
        exchanges.append([name for name in calls if name in (FULL, "any_rank")])
    steady, full, both = ["any_rank"], [FULL], ["any_rank", FULL]
    assert exchanges[0] == full * 2, "the first step also checks that gradients are averaged"
    assert exchanges[1:] == [full, steady, steady, steady, both, full, full, both, full]
    return collect(model, optimizer)


def test_stage_1():
    model = Parameters()
    optimizer = new_optimizer(model)
    for step in range(10):
        grads = mean_gradients(step)
        if step in (5, 8):
            del grads["large"]
        model(grads).backward()
        optimizer.step(zero_grad=True)
    for found in run_ranks(2, stage_1_worker):
        assert_same_bits(found, collect(model, optimizer))
