"""Two jobs that save to one root lose nothing, in any order of operations and killed anywhere."""

from __future__ import annotations

import pytest

from .interleavings import run_seeds


@pytest.mark.parametrize(
    "seeds", [range(30), pytest.param(range(30, 300), marks=pytest.mark.exhaustive)], ids=str
)
def test_interleaved_jobs_leave_complete_checkpoints(seeds):
    total = run_seeds(seeds)
    assert total["interleavings"] == len(seeds)
    killed_after_publishing = total["published"] - total["succeeded"]
    assert min(total["kills"], total["refused"], total["removed"], killed_after_publishing) >= 2, (
        "the seeds must have kills, refusals and removals"
    )
    assert total["succeeded"] >= 1.5 * len(seeds)
