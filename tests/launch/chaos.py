"""Train a tiny model while random events end its processes, and check what is left.

    python -m tests.launch.chaos --events 40

An event is the SIGKILL of a worker or of torchrun, SIGTERM or SIGUSR1 to torchrun, or the SIGSTOP
of a worker for longer than ``--step-timeout``. Then torchrun restarts the workers, or the same
command starts anew. Runs of a fixed number of processes alternate with runs in which each new
torchrun has another one. After each event, the latest checkpoint is not older than before it. At
the end of a run its ``metrics.jsonl`` has each step once, all checkpoints are complete and
undamaged, no partial one is left, and the curve is that of an undisturbed run: bit for bit if the
number of processes is fixed, else within 5 % of the last held-out loss.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sharded_bf16_adamw import verify

REPO = Path(__file__).resolve().parents[2]
STOPPED = 75
EVENTS = ("kill worker", "kill torchrun", "SIGTERM", "SIGUSR1", "SIGSTOP worker")
OPTIONS = (
    "--device cpu --preset nano --no-progress --seq-len 16 --batch-size 12 --eval-batches 1 "
    "--eval-every 10 --save-every 3 --keep 3"
)


@dataclass
class Job:
    """A command that is started again until it is done.

    Attributes:
        world_sizes: numbers of processes; each new torchrun draws one.
        patience: seconds in which a run must make progress.
    """

    out: Path
    steps: int
    world_sizes: tuple[int, ...]
    step_timeout: float
    patience: float
    random: random.Random
    process: subprocess.Popen[bytes] | None = None
    events: Counter[str] = field(default_factory=Counter)

    def start(self) -> None:
        """Start torchrun as its user would."""
        size = self.random.choice(self.world_sizes)
        launcher = f"launch/elastic.py --nproc-per-node {size} --max-restarts 1000"
        script = f"launch/train.py {OPTIONS} --steps {self.steps} --out {self.out}"
        options = f"--step-timeout {self.step_timeout}"
        env = {
            **os.environ,
            "PYTHONPATH": str(REPO),
            "OMP_NUM_THREADS": "1",
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(int(max(5, self.step_timeout))),
        }
        with self.log.open("ab") as log:
            command = [sys.executable, *f"{launcher} {script} {options}".split()]
            self.process = subprocess.Popen(command, cwd=REPO, env=env, stdout=log, stderr=log)

    @property
    def log(self) -> Path:
        return self.out.with_suffix(".log")

    def lines(self) -> list[dict[str, Any]]:
        """Return the complete lines of ``metrics.jsonl``, without the times."""
        path = self.out / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in lines]

    def last_step(self) -> int:
        return max((line["step"] for line in self.lines() if "loss" in line), default=0)

    def saved_step(self) -> int:
        """Return the step of the latest checkpoint, -1 without one."""
        try:
            name = (self.out / "checkpoints" / "LATEST").read_text().strip()
        except FileNotFoundError:
            return -1
        assert (self.out / "checkpoints" / name / "manifest.json").exists(), name
        return int(name.split("-")[1])

    def workers(self) -> list[int]:
        assert self.process is not None
        parents = {pid: stat[1] for pid, stat in stats().items()}
        return sorted(pid for pid, parent in parents.items() if parent == str(self.process.pid))

    def wait_until(self, condition: Any, what: str) -> None:
        deadline = time.monotonic() + self.patience
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"{what} within {self.patience:g} s: see {self.log}")
            time.sleep(0.1)

    def disturb(self, event: str) -> bool:
        """Cause an event, and start the command anew if it has ended.

        Return False if the run is done.
        """
        assert self.process is not None
        process, before = self.process, self.saved_step()
        modified = self.modified()
        # Some steps of this attempt, which rewrites the file when it starts.
        wanted = self.random.randint(0, 6)
        seen: set[int] = set()

        def has_trained() -> bool:
            if self.modified() != modified:
                seen.add(self.last_step())
            return len(seen) > wanted or process.poll() is not None

        self.wait_until(has_trained, "no progress")
        time.sleep(self.random.random() / 5)
        pids = self.workers() if process.poll() is None else []
        if not pids:
            return self.end(process.wait(), {0}, before)
        self.events[event] += 1
        victim = self.random.choice(pids)
        if event == "kill worker":
            os.kill(victim, signal.SIGKILL)
            self.wait_until(lambda: not living(pids), "torchrun did not end the other workers")
        elif event == "SIGSTOP worker":
            os.kill(victim, signal.SIGSTOP)
            self.wait_until(lambda: not living(pids), "the watchdog did not end the workers")
        elif event == "kill torchrun":
            process.kill()
            process.wait()
            self.wait_until(lambda: not living(pids), "orphans are left")
            return self.end(-signal.SIGKILL, {-signal.SIGKILL}, before)
        else:
            process.send_signal(signal.Signals[event])
            self.wait_until(lambda: process.poll() is not None, "the run did not end")
            assert not living(pids), "orphans are left"
            return self.end(process.returncode, {STOPPED, 0}, before)
        assert self.saved_step() >= before, "a checkpoint is lost"
        return True

    def modified(self) -> int:
        """Return the inode of ``metrics.jsonl``, which each attempt replaces."""
        try:
            return (self.out / "metrics.jsonl").stat().st_ino
        except FileNotFoundError:
            return -1

    def end(self, code: int, expected: set[int], before: int) -> bool:
        assert code in expected, f"exit code {code}: see {self.log}"
        assert self.saved_step() >= before, "a checkpoint is lost"
        if code == 0:
            return False
        self.start()
        return True

    def finish(self) -> None:
        """Wait for the end, and check what is left."""
        if (process := self.process) is not None:
            self.wait_until(lambda: process.poll() is not None, "the run did not end")
            assert process.returncode == 0, f"exit code {process.returncode}: see {self.log}"
        steps = [line["step"] for line in self.lines() if "loss" in line]
        assert steps == list(range(1, self.steps + 1)), steps
        assert self.saved_step() == self.steps
        root = self.out / "checkpoints"
        left = sorted(path.name for path in root.iterdir())
        # A removal of an old checkpoint may have been the last thing that was interrupted.
        assert all(name.startswith(("LATEST", "step-", ".removed-")) for name in left), left
        for path in root.glob("step-*"):
            assert verify(path) == [], path


def stats() -> dict[int, list[str]]:
    """Return the fields after the name in /proc/PID/stat of all processes: state, parent, ..."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            found[int(path.parent.name)] = path.read_text().rpartition(")")[2].split()
    return found


def living(pids: list[int]) -> list[int]:
    """Return those processes that are neither dead nor zombies."""
    known = stats()
    return [pid for pid in pids if pid in known and known[pid][0] not in "ZX"]


def soak(
    folder: Path,
    events: list[str],
    sizes: tuple[int, ...],
    steps: int,
    step_timeout: float,
    patience: float,
    seed: int,
    events_per_run: int | None = None,
    undisturbed: Callable[[Job], None] = Job.start,
) -> Counter[str]:
    """Disturb runs of ``steps`` steps by all ``events``; return how often each happened.

    ``undisturbed`` starts the run that they are compared with.
    """
    source = random.Random(seed)
    common = (steps, (sizes[0],), step_timeout, patience, source)
    reference = Job(folder / "reference", *common)
    undisturbed(reference)
    reference.finish()
    expected, happened = reference.lines(), Counter[str]()
    queue = list(events)
    number = 0
    while queue:
        is_fixed = number % 2 == 0
        job = Job(folder / f"run-{number}", *common)
        job.world_sizes = sizes[:1] if is_fixed else sizes
        job.start()
        while queue and job.events.total() != events_per_run:
            count = job.events.total()
            if not job.disturb(queue[0]):
                break
            if job.events.total() > count:
                print(f"run {number}, step {job.last_step()}: {queue.pop(0)}", flush=True)
        job.finish()
        lines = job.lines()
        if is_fixed:
            assert lines == expected, f"{job.out} differs from {reference.out}"
        else:
            losses = [each[-1]["held_out_loss"] for each in (lines, expected)]
            assert abs(losses[0] / losses[1] - 1) < 0.05, losses
        happened += job.events
        number += 1
    return happened


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--events", type=int, default=40, help="default: %(default)s")
    add(
        "--events-per-run",
        type=int,
        default=10,
        help="then the run is left to end (default: %(default)s)",
    )
    add("--steps", type=int, default=200, help="of each run (default: %(default)s)")
    add("--sizes", type=int, nargs="+", default=[4, 3, 2], help="processes (default: 4 3 2)")
    add("--step-timeout", type=float, default=10.0, help="default: %(default)g")
    add("--patience", type=float, default=300.0, help="seconds (default: %(default)g)")
    add("--seed", type=int, default=0, help="of the events (default: %(default)s)")
    args = parser.parse_args()
    source = random.Random(args.seed)
    events = [source.choice(EVENTS) for _ in range(args.events)]
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    sizes = tuple(args.sizes)
    limits = args.step_timeout, args.patience
    happened = soak(folder, events, sizes, args.steps, *limits, args.seed, args.events_per_run)
    shutil.rmtree(folder)  # a failure leaves it for inspection
    print(f"{happened.total()} events, no checkpoint lost: {dict(happened)}")


if __name__ == "__main__":
    main()
