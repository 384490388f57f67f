"""Profiler traces name the collectives of ZeRO."""

from __future__ import annotations

import torch
from distributed import run_ranks

from .cases import Parameters, new_optimizer, train, zero


def profile_worker(rank, world):
    model = Parameters()
    optimizer = new_optimizer(model, zero())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(model, optimizer, 1, averaged=False)
    return {event.key for event in profile.key_averages() if event.key.startswith("ZeRO::")}


def test_profile_shows_ranges_of_collectives():
    expected = {"ZeRO::reduce_scatter", "ZeRO::all_gather_params", "ZeRO::consensus"}
    assert run_ranks(2, profile_worker) == [expected, expected]
