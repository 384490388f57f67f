"""launch/slurm.sh with fakes of Slurm's commands, which run a job of one node."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import train
from training.errors import STOPPED

from sharded_bf16_adamw import latest

LAUNCH = Path(train.__file__).parent

# srun drops its two options and runs the command in a new process group, whose leader scancel
# signals. All record their calls; scontrol also records if training still runs.
COMMANDS = {
    "srun": r"""
shift 2
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
if [ "$1 $2" = "show hostnames" ]; then
    echo localhost; echo other
elif [ "$1" = show ]; then
    echo "   JobState=${JOB_STATE:-RUNNING} Reason=None"
else
    printf "%s\n" "scontrol $*" >> "$CALLS"
fi
kill -0 "$(cat "$CALLS.pid")" 2> /dev/null && echo "training still runs" >> "$CALLS"
""",
    "python": f'exec {sys.executable} "$@"\n',
}
# Stand-in for python: a run that takes some steps, and stops like elastic.py on SIGTERM. It
# also runs the script's "python -c".
STOPPABLE = f"""#!{sys.executable}
import pathlib, signal, sys
if sys.argv[1] == "-c":
    exec(sys.argv[2])
    sys.exit()
signal.signal(signal.SIGTERM, lambda *_: sys.exit({STOPPED}))
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir()
(out / "metrics.jsonl").write_text("{{}}\\n" * 3)
signal.pause()
"""
SHORT = "--device cpu --no-progress --seq-len 16 --batch-size 4 --eval-batches 1 --preset nano"


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a job's batch script."""
    for name, body in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}")
        (tmp_path / name).chmod(0o755)
    return os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(LAUNCH.parent),
        "CALLS": str(tmp_path / "calls"),
        "NPROC_PER_NODE": "2",
        "SLURM_CPUS_ON_NODE": "2",
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "1",
    }


def start(slurm: dict[str, str], out: Path, steps: int) -> subprocess.Popen[str]:
    command = f"bash launch/slurm.sh {SHORT} --save-every 0 --steps {steps} --out {out}".split()
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=LAUNCH.parent, env=slurm, **output)


@pytest.mark.exhaustive  # the tests below run the same commands without training
def test_job_trains_to_the_last_step(slurm, tmp_path):
    job = start(slurm, tmp_path / "run", 2)
    output, _ = job.communicate(timeout=200)
    assert job.returncode == 0, output
    assert latest(tmp_path / "run" / "checkpoints").name == "step-00000002"
    calls = Path(slurm["CALLS"]).read_text()
    assert "launch/elastic.py --nnodes 1 --nproc-per-node 2 --max-restarts 3 --rdzv-id 7" in calls
    assert "--rdzv-backend c10d --rdzv-endpoint localhost:" in calls
    assert "requeue" not in calls and "scancel" not in calls


def stop(job: subprocess.Popen[str], run: Path) -> str:
    """Send the signal that announces the time limit once the job trains; return its output."""
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=200)
    return output


@pytest.mark.exhaustive  # the test below stops a stand-in; test_train_resume stops torchrun
def test_job_saves_and_is_requeued_before_its_time_limit(slurm, tmp_path):
    run = tmp_path / "run"
    job = start(slurm, run, 1_000)
    output = stop(job, run)
    assert job.returncode == STOPPED
    assert "stopped at step" in output
    saved = latest(run / "checkpoints")
    assert saved is not None
    assert Path(slurm["CALLS"]).read_text().splitlines()[1:] == [
        "scancel --signal=TERM 7",
        "scontrol requeue 7",
    ]


@pytest.mark.parametrize(
    ("state", "requeued"), [("RUNNING", ["scontrol requeue 7"]), ("CANCELLED", [])]
)
def test_job_is_requeued_before_its_time_limit_unless_cancelled(slurm, tmp_path, state, requeued):
    """If a job is cancelled just before its time limit, its state decides."""
    (tmp_path / "python").write_text(STOPPABLE)
    run = tmp_path / "run"
    job = start(slurm | {"JOB_STATE": state}, run, 1_000)
    stop(job, run)
    assert job.returncode == STOPPED
    first, *calls = Path(slurm["CALLS"]).read_text().splitlines()
    options = "--nnodes 1 --nproc-per-node 2 --max-restarts 3 --rdzv-id 7 --rdzv-backend c10d"
    command = rf"launch/elastic.py {options} --rdzv-endpoint localhost:\d+ launch/train.py "
    assert re.search(command, first)
    assert calls == ["scancel --signal=TERM 7", *requeued]


def test_job_must_be_submitted_from_the_root_of_the_repository(slurm, tmp_path):
    job = subprocess.run(
        ["bash", LAUNCH / "slurm.sh"], cwd=tmp_path, env=slurm, capture_output=True, text=True
    )
    assert job.returncode == 2
    assert job.stderr == (
        f"error: {tmp_path} has no launch/train.py: submit the job from the root of the "
        "repository.\n"
    )
