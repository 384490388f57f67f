"""Two jobs that save to one root lose nothing, in any order of operations and killed anywhere."""

from __future__ import annotations

from .interleavings import run_seeds


def test_interleaved_jobs_leave_complete_checkpoints():
    total = run_seeds(range(60))
    assert total["interleavings"] == 60
    killed_after_publishing = total["published"] - total["succeeded"]
    assert min(total["kills"], total["refused"], total["removed"], killed_after_publishing) >= 5, (
        "the seeds must have kills, refusals and removals"
    )
    assert total["succeeded"] >= 90
