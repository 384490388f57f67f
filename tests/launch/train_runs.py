"""Runs of launch/train.py, in this process and in others."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
import train
from training.metrics import read_metrics

from . import chaos

SCRIPT = Path(train.__file__)
ELASTIC = SCRIPT.with_name("elastic.py")
OPTIMIZERS = ("bf16", "torch-fp32", "torch-bf16")
STATE_BYTES = {"bf16": 6.0, "torch-fp32": 8.0, "torch-bf16": 4.0}
SHORT = "--device cpu --no-progress --seq-len 16 --batch-size 12 --eval-batches 1"
TIMEOUT = 200


def command_line(*arguments: object) -> list[str]:
    """Return the arguments of a short run; each of ``arguments`` may hold several words."""
    return " ".join([SHORT, *map(str, arguments)]).split()


def start(processes: int, *arguments: object) -> subprocess.Popen[str]:
    """Start a short run of the script, under elastic.py for more than one process."""
    launcher = f"{ELASTIC} --standalone --nproc-per-node {processes}".split()
    command = [sys.executable, *(launcher if processes > 1 else []), str(SCRIPT)]
    env = {**os.environ, "PYTHONPATH": str(SCRIPT.parent.parent), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*command, *command_line(*arguments)], text=True, stdout=pipe, stderr=pipe, env=env
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr; kill a script that hangs, and its workers, and raise."""
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    return process.returncode, out, err


def kill(process: subprocess.Popen[str]) -> None:
    """Kill torchrun and its workers, which have process groups of their own."""
    pids = [process.pid, *workers(process)]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def workers(process: subprocess.Popen[str]) -> list[int]:
    """Return the process ids of the ranks that torchrun started."""
    return sorted(pid for pid, stat in chaos.stats().items() if stat[1] == str(process.pid))


def wait_for_step(process: subprocess.Popen[str], out_dir: Path, step: int) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not any(line["step"] >= step for line in read_metrics(out_dir / "metrics.jsonl")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.02)


def curve(out_dir: Path) -> list[dict[str, float]]:
    """Return all metrics but the times."""
    return [
        {k: v for k, v in line.items() if k != "tokens_per_s"}
        for line in read_metrics(out_dir / "metrics.jsonl")
    ]


def held_out(lines: list[dict[str, float]]) -> list[float]:
    return [line["held_out_loss"] for line in lines if "held_out_loss" in line]


def losses(out_dir: Path) -> list[float]:
    return [line["loss"] for line in curve(out_dir) if "loss" in line]


def undrawn() -> AbstractContextManager[Any]:
    """Draw no picture: matplotlib takes longer than a short training."""
    return mock.patch("training.picture.draw", return_value=True)


def run(*arguments: object, is_drawn: bool = False) -> int:
    with nullcontext() if is_drawn else undrawn():
        return train.main(command_line(*arguments))


def printed_on_ranks(
    rank: int, world_size: int, out_dir: str, arguments: str
) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of a run on this rank."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        code = run("--out", out_dir, arguments)
    return code, out.getvalue(), err.getvalue()


def train_on_ranks(rank: int, world_size: int, root: str, runs: dict[str, str]) -> None:
    """Train each of ``runs``, arguments by name, into the directory of its name."""
    for name, arguments in runs.items():
        assert run("--out", f"{root}/{name}", arguments) == 0


def train_until_killed(rank: int, world_size: int, out_dir: str, arguments: str, step: int) -> None:
    """Train; all ranks are killed at once some time after ``step``."""
    pids: list[Any] = [None] * world_size
    dist.all_gather_object(pids, os.getpid())

    def kill_ranks() -> None:
        path = Path(out_dir) / "metrics.jsonl"
        while not any(line["step"] >= step for line in read_metrics(path)):
            time.sleep(0.02)
        for pid in reversed(pids):  # this process last
            os.kill(pid, signal.SIGKILL)

    if rank == 0:
        threading.Thread(target=kill_ranks, daemon=True).start()
    run("--out", out_dir, arguments)
