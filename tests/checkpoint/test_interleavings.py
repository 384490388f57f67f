"""Two jobs that save to one root lose nothing, in whatever order their operations fall and wherever they are killed."""

from __future__ import annotations

from .interleavings import run_seeds


def test_interleaved_jobs_leave_whole_checkpoints():
    total = run_seeds(range(90))
    assert total["interleavings"] == 90
    assert min(total["kills"], total["refused"], total["removed"]) >= 30 and total["succeeded"] >= 90, "there was something to lose"
