"""Train a tiny model while random events end its processes, and check what is left.

    python -m tests.launch.chaos --events 40
    python -m tests.launch.chaos --events 40 --nodes 2

An event is SIGKILL to a worker or to torchrun, SIGTERM or SIGUSR1 to torchrun, or SIGSTOP to a
worker for longer than ``--step-timeout``. After it torchrun restarts the workers, or the same
command is started again. ``--nodes`` starts that many torchruns, which rendezvous like those of
several machines. If one of them alone is killed or evicted, it is replaced while the others run, as
in Kubernetes. The number of processes is fixed in every second run; in the others each start of the
command draws it anew.

After each event the latest checkpoint must not be older than before. At the end of a run
``metrics.jsonl`` must have each step once, all checkpoints must be complete and undamaged, no
partial one may be left, and the curve must be that of an undisturbed run: bit for bit if the number
of processes is fixed, else within 5 % of the last held-out loss.
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

from torch.distributed.elastic.utils.distributed import get_free_port

from sharded_bf16_adamw import verify

REPO = Path(__file__).resolve().parents[2]
STOPPED = 75
EVENTS = ("kill worker", "kill torchrun", "SIGTERM", "SIGUSR1", "SIGSTOP worker")
NODE_EVENTS = (*EVENTS, "SIGTERM to one node")
OPTIONS = (
    "--device cpu --preset nano --no-progress --seq-len 16 --batch-size 12 --eval-batches 1 "
    "--eval-every 10 --save-every 3 --keep 3"
)


@dataclass
class Job:
    """A command that is started again until it is done.

    Attributes:
        world_sizes: numbers of processes, multiples of ``nodes``; each new start draws one.
        patience: seconds in which a run must make progress.
        nodes: number of torchruns.
    """

    out: Path
    steps: int
    world_sizes: tuple[int, ...]
    step_timeout: float
    patience: float
    random: random.Random
    nodes: int = 1
    torchruns: list[subprocess.Popen[bytes]] = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)

    def start(self) -> None:
        """Start torchrun on each node as its user would."""
        size = self.random.choice(self.world_sizes) // self.nodes
        self.launcher = f"launch/elastic.py --nproc-per-node {size} --max-restarts 1000"
        if self.nodes > 1:
            self.launcher += (
                f" --nnodes {self.nodes} --rdzv-id job --rdzv-backend c10d"
                f" --rdzv-endpoint localhost:{get_free_port()}"
            )
        self.torchruns = [self.start_node() for _ in range(self.nodes)]

    def start_node(self) -> subprocess.Popen[bytes]:
        script = f"launch/train.py {OPTIONS} --steps {self.steps} --out {self.out}"
        options = f"--step-timeout {self.step_timeout}"
        env = {
            **os.environ,
            "PYTHONPATH": str(REPO),
            "OMP_NUM_THREADS": "1",
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(int(max(5, self.step_timeout))),
        }
        with self.log.open("ab") as log:
            command = [sys.executable, *f"{self.launcher} {script} {options}".split()]
            return subprocess.Popen(command, cwd=REPO, env=env, stdout=log, stderr=log)

    def replace_ended_nodes(self) -> None:
        """With several nodes, start a new torchrun for each that has failed or was stopped."""
        for index, torchrun in enumerate(self.torchruns):
            if self.nodes > 1 and torchrun.poll() not in (None, 0):
                self.torchruns[index] = self.start_node()

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

    def workers(self, torchruns: list[subprocess.Popen[bytes]]) -> list[int]:
        parents = {pid: stat[1] for pid, stat in stats().items()}
        own = {str(torchrun.pid) for torchrun in torchruns}
        return sorted(pid for pid, parent in parents.items() if parent in own)

    def wait_until(self, condition: Any, what: str) -> None:
        deadline = time.monotonic() + self.patience
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"{what} within {self.patience:g} s: see {self.log}")
            time.sleep(0.1)

    def have_ended(self) -> bool:
        return all(torchrun.poll() is not None for torchrun in self.torchruns)

    def disturb(self, event: str) -> bool:
        """Cause an event after some steps; start the command again if that has ended it.

        Return False if the run is done.
        """
        before = self.saved_step()
        inode_before = self.metrics_inode()
        # Steps to see of the current attempt, which replaces metrics.jsonl when it starts.
        wanted = self.random.randint(0, 6)
        seen: set[int] = set()

        def has_trained() -> bool:
            if self.metrics_inode() != inode_before:
                seen.add(self.last_step())
            self.replace_ended_nodes()
            return len(seen) > wanted or self.have_ended()

        self.wait_until(has_trained, "no progress")
        time.sleep(self.random.random() / 5)
        pids = self.workers(self.torchruns)
        if not pids:
            return self.end({0}, before)
        self.events[event] += 1
        victim = self.random.choice(pids)
        node = self.random.choice(self.torchruns)
        if event in ("kill worker", "SIGSTOP worker"):
            os.kill(victim, signal.SIGKILL if event == "kill worker" else signal.SIGSTOP)
            self.wait_until(lambda: not living(pids), "the other workers did not end")
        elif event == "kill torchrun":
            orphans = self.workers([node])
            node.kill()
            node.wait()
            self.wait_until(lambda: not living(orphans), "orphans are left")
            if self.nodes == 1:
                return self.end({-signal.SIGKILL}, before)
        elif event == "SIGTERM to one node":
            node.send_signal(signal.SIGTERM)
            self.wait_until(lambda: not living(pids), "the workers did not end")
            assert node.wait(self.patience) in (STOPPED, 0), f"{node.returncode}: see {self.log}"
        else:
            for torchrun in self.torchruns:
                torchrun.send_signal(signal.Signals[event])
            self.wait_until(self.have_ended, "the run did not end")
            assert not living(pids), "orphans are left"
            return self.end({STOPPED, 0}, before)
        assert self.saved_step() >= before, "a checkpoint is lost"
        return True

    def metrics_inode(self) -> int:
        """Return the inode of ``metrics.jsonl``, which each attempt replaces."""
        try:
            return (self.out / "metrics.jsonl").stat().st_ino
        except FileNotFoundError:
            return -1

    def end(self, expected: set[int], before: int) -> bool:
        """Check the exit codes; return False if the run is done, else start it again."""
        self.wait_until(self.have_ended, "the run did not end")
        codes = {torchrun.returncode for torchrun in self.torchruns}
        assert codes <= expected, f"exit codes {codes}: see {self.log}"
        assert self.saved_step() >= before, "a checkpoint is lost"
        if codes == {0}:
            return False
        self.start()
        return True

    def finish(self) -> None:
        """Wait for the end of the run, and check what it has left."""

        def has_ended() -> bool:
            self.replace_ended_nodes()
            return self.have_ended()

        self.wait_until(has_ended, "the run did not end")
        codes = {torchrun.returncode for torchrun in self.torchruns}
        assert codes <= {0}, f"exit codes {codes}: see {self.log}"
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
    """Return the processes that are neither dead nor zombies."""
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
    nodes: int = 1,
    undisturbed: Callable[[Job], None] = Job.start,
) -> Counter[str]:
    """Disturb runs of ``steps`` steps by all ``events``; return how often each happened.

    ``undisturbed`` starts the run without events with which they are compared.
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
        job.nodes = nodes
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
        help="after them the run is left to finish (default: %(default)s)",
    )
    add("--steps", type=int, default=200, help="of each run (default: %(default)s)")
    add("--sizes", type=int, nargs="+", help="processes (default: 4 3 2; 4 2 with --nodes 2)")
    add("--nodes", type=int, default=1, help="torchruns (default: %(default)s)")
    add("--step-timeout", type=float, default=10.0, help="default: %(default)g")
    add("--patience", type=float, default=300.0, help="seconds (default: %(default)g)")
    add("--seed", type=int, default=0, help="of the events (default: %(default)s)")
    args = parser.parse_args()
    source = random.Random(args.seed)
    kinds = EVENTS if args.nodes == 1 else NODE_EVENTS
    events = [source.choice(kinds) for _ in range(args.events)]
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    sizes = tuple(args.sizes or [size for size in (4, 3, 2) if size % args.nodes == 0])
    limits = args.step_timeout, args.patience
    happened = soak(
        folder, events, sizes, args.steps, *limits, args.seed, args.events_per_run, args.nodes
    )
    shutil.rmtree(folder)  # a failure leaves it for inspection
    print(f"{happened.total()} events, no checkpoint lost: {dict(happened)}")


if __name__ == "__main__":
    main()
