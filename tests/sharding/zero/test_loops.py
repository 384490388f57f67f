"""Training loops of all kinds give the same bits with ZeRO and on a single process."""

from __future__ import annotations

from functools import partial

import pytest
from distributed import run_ranks

from . import loop_cases as loops
from .cases import assert_same_bits, backpressure_timeout, collect, mesh_of
from .loop_cases import Loop, assert_loops_match, run_loops, unused_on_some_ranks

# Those that read, replace or skip weights, which overlap_gather leaves in flight.
FOR_OVERLAP_GATHER = [
    loops.a_rank_without_any_gradient,
    loops.frozen_and_unfrozen,
    loops.kept_gradients,
    loops.discarded_gradients,
    loops.gradients_set_by_hand,
    loops.memory_of_parameters_replaced,
    loops.state_reloaded,
    loops.closure,
]
OTHERS = [scenario for scenario in loops.SCENARIOS if scenario not in FOR_OVERLAP_GATHER]
OVERLAP_GATHER = {"overlap_gather": True, "max_in_flight": 1}


def scenarios_worker(rank, world, scenarios, options):
    with backpressure_timeout(0.05):  # in some scenarios another rank cannot keep up
        return run_loops(scenarios, partial(Loop, world, options))


@pytest.mark.parametrize(
    ("world", "scenarios", "options"),
    [
        (2, loops.SCENARIOS, {}),
        (2, FOR_OVERLAP_GATHER, OVERLAP_GATHER),
        pytest.param(2, OTHERS, OVERLAP_GATHER, marks=pytest.mark.exhaustive),
        # The longest: four ranks, gradients sent and accumulated in float32.
        pytest.param(4, loops.SCENARIOS, loops.FP32_SUMS, marks=pytest.mark.exhaustive),
    ],
    ids=["2", "2, overlap_gather", "2, overlap_gather, others", "4, float32 sums"],
)
def test_training_loops_match_single_process(world, scenarios, options):
    expected = run_loops(scenarios, partial(Loop, world))
    assert_loops_match(run_ranks(world, scenarios_worker, scenarios, options), expected)


def late_rank_worker(rank, world):
    """On a replicate-shard mesh, ranks that fall behind still all-reduce in the order of others."""
    loop = Loop(world, {"mesh": mesh_of((2, 2))})
    with backpressure_timeout(0.05):
        unused_on_some_ranks(loop)
    return collect(loop.model, loop.optimizer)


def test_unused_parameters_on_replicate_shard_mesh():
    loop = Loop(4)
    unused_on_some_ranks(loop)
    for found in run_ranks(4, late_rank_worker):
        assert_same_bits(found, collect(loop.model, loop.optimizer))
