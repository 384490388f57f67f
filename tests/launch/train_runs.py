"""Runs of launch/train.py, in this process and in others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import train
from training.metrics import read_metrics

SCRIPT = Path(train.__file__)
OPTIMIZERS = ("bf16", "torch-fp32", "torch-bf16")
STATE_BYTES = {"bf16": 6.0, "torch-fp32": 8.0, "torch-bf16": 4.0}
SHORT = [
    "--device",
    "cpu",
    "--no-progress",
    "--seq-len",
    "16",
    "--batch-size",
    "12",
    "--eval-batches",
    "1",
]
TIMEOUT = 200


def start(processes: int, *arguments: object) -> subprocess.Popen[str]:
    """The script with settings for a short run, under torchrun for more than one process."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        if processes > 1
        else []
    )
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(SCRIPT), *SHORT, *map(str, arguments)]
    return subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; a script that hangs is killed with its workers, and fails the test."""
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    return process.returncode, out, err


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to torchrun and its workers, which have process groups of their own."""
    pids = [process.pid, *workers(process)]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def workers(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of the ranks that torchrun started."""
    stats = [path.read_text() for path in Path("/proc").glob("[0-9]*/stat") if path.exists()]
    return sorted(
        int(s.split()[0]) for s in stats if int(s.rpartition(")")[2].split()[1]) == process.pid
    )


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not any(line["step"] >= step for line in read_metrics(folder / "metrics.jsonl")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.02)


def curve(folder: Path) -> list[dict[str, float]]:
    """All metrics but the times."""
    return [
        {k: v for k, v in line.items() if k != "tokens_per_s"}
        for line in read_metrics(folder / "metrics.jsonl")
    ]


def held_out(lines: list[dict[str, float]]) -> list[float]:
    return [line["held_out_loss"] for line in lines if "held_out_loss" in line]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in curve(folder) if "loss" in line]


def run(*arguments: object) -> int:
    return train.main([*SHORT, *map(str, arguments)])


def train_on_ranks(rank: int, world_size: int, folder: str, runs: dict[str, list[str]]) -> None:
    for name, arguments in runs.items():
        assert train.main([*SHORT, "--out", f"{folder}/{name}", *arguments]) == 0
