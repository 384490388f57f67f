"""``benchmark.py exchange`` runs on several ranks and reports each exchange."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_figures(repo: Path, tmp_path: Path) -> None:
    script = repo / "launch" / "benchmark.py"
    options = f"--ranks 1 3 --repeats 2 --json {tmp_path}/figures"
    subprocess.run([sys.executable, str(script), "exchange", *options.split()], check=True)
    figures = json.loads((tmp_path / "figures").read_text())
    assert list(figures) == ["1", "3"]
    for of_ranks in figures.values():
        assert list(of_ranks) == ["agree", "any_rank", "bucket", "bucket_with_flag"]
        assert all(0 < each["lowest_ms"] <= each["median_ms"] for each in of_ranks.values())
