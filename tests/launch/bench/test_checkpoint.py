"""launch/benchmark.py checkpoint: a small run to the end, with the figures in a file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_ratios_of_each_round_are_written(repo: Path, tmp_path: Path) -> None:
    file, script = tmp_path / "figures.json", repo / "launch" / "benchmark.py"
    options = f"--gb 0.001 --rounds 2 --folder {tmp_path / 'disk'} --json {file}"
    subprocess.run([sys.executable, str(script), "checkpoint", *options.split()], check=True)
    figures = json.loads(file.read_text())
    assert len(figures["rounds"]) == 2
    for number, figure in enumerate(figures["rounds"]):
        ratio = figures["ratios"]["throughput of load / plain read"][number]
        assert ratio == figure["plain read"] / figure["load"] > 0
