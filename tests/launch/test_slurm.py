"""launch/slurm.sh with stand-ins for Slurm's commands, which run a job of one node here."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import train

from sharded_bf16_adamw import latest

LAUNCH = Path(train.__file__).parent

# srun runs its command in a process group of its own, whose leader scancel signals; both and scontrol note how they were called.
COMMANDS = {
    "srun": 'shift\nprintf "%s\\n" "srun $*" >> "$CALLS"\nsetsid "$@" &\necho $! > "$CALLS.pid"\nwait $!\n',
    "scancel": 'printf "%s\\n" "scancel $*" >> "$CALLS"\nkill -TERM "$(cat "$CALLS.pid")"\n',
    "scontrol": 'if [ "$1" = show ]; then echo localhost; echo other; else printf "%s\\n" "scontrol $*" >> "$CALLS"; fi\n'
    'kill -0 "$(cat "$CALLS.pid")" 2> /dev/null && echo "training goes on" >> "$CALLS"\n',
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"\n',
}
SHORT = "--device cpu --no-progress --seq-len 16 --batch-size 4 --eval-batches 1 --preset nano --save-every 0"


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job's batch script."""
    for name, body in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}")
        (tmp_path / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(LAUNCH.parent),
        "CALLS": str(tmp_path / "calls"),
        "NPROC_PER_NODE": "2",
        "RDZV_PORT": str(port),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "1",
    }


def start(slurm: dict[str, str], out: Path, steps: int) -> subprocess.Popen[str]:
    command = ["bash", "launch/slurm.sh", *SHORT.split(), "--steps", str(steps), "--out", str(out)]
    return subprocess.Popen(
        command,
        cwd=LAUNCH.parent,
        env=slurm,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_job_trains_to_its_end(slurm, tmp_path):
    job = start(slurm, tmp_path / "run", 2)
    output, _ = job.communicate(timeout=200)
    assert job.returncode == 0, output
    assert latest(tmp_path / "run" / "checkpoints").name == "step-00000002"
    calls = Path(slurm["CALLS"]).read_text()
    assert (
        "--nnodes 1 --nproc-per-node 2 --rdzv-id 7 --rdzv-backend c10d --rdzv-endpoint localhost:"
        in calls
    )
    assert "requeue" not in calls and "scancel" not in calls


def test_job_saves_and_returns_to_the_queue_before_its_time_ends(slurm, tmp_path):
    run = tmp_path / "run"
    job = start(slurm, run, 100_000)
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=200)
    assert "stopped at step" in output
    saved = latest(run / "checkpoints")
    assert saved is not None
    assert Path(slurm["CALLS"]).read_text().splitlines()[1:] == [
        "scancel --signal=TERM 7",
        "scontrol requeue 7",
    ]
    steps = int(saved.name.split("-")[1])
    again = start(slurm, run, steps + 2)
    output, _ = again.communicate(timeout=200)
    assert again.returncode == 0, output
    assert latest(run / "checkpoints").name == f"step-{steps + 2:08}"
