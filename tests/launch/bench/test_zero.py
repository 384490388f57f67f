"""launch/benchmark.py zero: its parts."""

from __future__ import annotations

import pytest
from bench import zero


@pytest.mark.parametrize("delays", [[], [2.0]])
def test_no_delays_leave_the_delayed_part_out(
    delays: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = []
    monkeypatch.setattr(zero, "measure", lambda args: {})
    monkeypatch.setattr(zero, "measure_delayed", lambda args: measured.append(args.delays_ms))
    monkeypatch.setattr(zero.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(zero.dist, "destroy_process_group", lambda: None)
    assert zero.main(["--delays-ms", *map(str, delays)]) == 0
    assert measured == ([delays] if delays else [])
    assert ("delayed" in capsys.readouterr().out) == bool(delays)
