"""``--skip-spikes``: which steps are outliers."""

from __future__ import annotations

import json

import pytest
from training.spikes import WINDOW, SpikeFilter


def fill(spikes: SpikeFilter, steps: int) -> list[bool]:
    """Record losses and norms that alternate between 1 and 3: mean 2, deviation about 1."""
    return [spikes.is_spike(1 + 2 * (i % 2), 3 - 2 * (i % 2)) for i in range(steps)]


@pytest.mark.parametrize("kind", ["loss", "norm"])
def test_values_far_above_the_mean_are_spikes(kind):
    def is_spike(value: float) -> bool:
        spikes = SpikeFilter(4.0)
        assert not any(fill(spikes, WINDOW))
        return spikes.is_spike(*((value, 2.0) if kind == "loss" else (2.0, value)))

    # The standard deviation is sqrt(128 / 127) = 1.0039.
    assert [is_spike(value) for value in (2.0, 6.0, 6.02, 100.0, -100.0)] == [
        False,
        False,
        True,
        True,
        False,
    ]


def test_nothing_is_a_spike_before_the_window_is_half_full():
    spikes = SpikeFilter(4.0)
    fill(spikes, WINDOW // 2 - 1)
    assert not spikes.is_spike(100.0, 2.0)
    assert spikes.is_spike(1000.0, 2.0)


def test_a_lasting_change_of_level_is_accepted():
    spikes = SpikeFilter(4.0)
    fill(spikes, WINDOW)
    found = [spikes.is_spike(50.0, 2.0) for _ in range(WINDOW)]
    assert found[0] and not any(found[20:])


def test_state_survives_json():
    spikes, other = SpikeFilter(4.0), SpikeFilter(4.0)
    fill(spikes, WINDOW + 7)
    spikes.skipped = 3
    other.load(json.loads(json.dumps(spikes.state())))
    assert other.state() == spikes.state() and other.skipped == 3
    assert other.is_spike(7.0, 2.0) and not SpikeFilter(4.0).is_spike(7.0, 2.0)
