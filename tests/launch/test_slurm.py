"""launch/slurm.sh with fakes of Slurm's commands, which run a job of one node."""

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

# srun runs its command in its own process group, whose leader scancel signals. Both, and scontrol,
# record their calls; scontrol also records that training still runs.
COMMANDS = {
    "srun": r"""
shift
printf "%s\n" "srun $*" >> "$CALLS"
setsid "$@" &
echo $! > "$CALLS.pid"
wait $!
""",
    "scancel": r"""
printf "%s\n" "scancel $*" >> "$CALLS"
kill -TERM "$(cat "$CALLS.pid")"
""",
    "scontrol": r"""
if [ "$1" = show ]; then
    echo localhost; echo other
else
    printf "%s\n" "scontrol $*" >> "$CALLS"
fi
kill -0 "$(cat "$CALLS.pid")" 2> /dev/null && echo "training still runs" >> "$CALLS"
""",
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"\n',
}
SHORT = "--device cpu --no-progress --seq-len 16 --batch-size 4 --eval-batches 1 --preset nano"


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a job's batch script."""
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
    command = f"bash launch/slurm.sh {SHORT} --save-every 0 --steps {steps} --out {out}".split()
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=LAUNCH.parent, env=slurm, **output)


def test_job_trains_to_the_last_step(slurm, tmp_path):
    job = start(slurm, tmp_path / "run", 2)
    output, _ = job.communicate(timeout=200)
    assert job.returncode == 0, output
    assert latest(tmp_path / "run" / "checkpoints").name == "step-00000002"
    calls = Path(slurm["CALLS"]).read_text()
    assert "--nnodes 1 --nproc-per-node 2 --rdzv-id 7" in calls
    assert "--rdzv-backend c10d --rdzv-endpoint localhost:" in calls
    assert "requeue" not in calls and "scancel" not in calls


def test_job_saves_and_is_requeued_before_its_time_limit(slurm, tmp_path):
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
