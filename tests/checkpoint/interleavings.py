"""Two jobs that save to one root, interleaved in a seeded order, and killed anywhere.

Each job is a thread that stops before every operation on files, and a scheduler chooses which
thread continues. A killed job performs no further operation, not even those of its error handlers,
and its locks are released, as by the kernel. Whenever all threads are stopped, ``latest`` must name
a complete checkpoint.

    python -m tests.checkpoint.interleavings --seeds 1000
"""

from __future__ import annotations

import argparse
import builtins
import errno
import fcntl
import io
import os
import random
import sys
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from sharded_bf16_adamw import AdamW_BF16, latest, load, prune, save, verify
from sharded_bf16_adamw.checkpoint import commit, directory, file_checksums, root_lock
from sharded_bf16_adamw.checkpoint.directory import complete_checkpoints
from sharded_bf16_adamw.checkpoint.manifest import Manifest, read_manifest

OPERATIONS = (  # functions of os before which a job stops
    "listdir",
    "lstat",
    "mkdir",
    "open",
    "rename",
    "replace",
    "rmdir",
    "scandir",
    "stat",
    "unlink",
)
LOCKS = ("one machine", "two machines", "no locks")
LIFE = 600  # about how many operations a job performs
TIDYING = 60  # about how many operations a save performs after publishing
SNAPSHOT = 0.05  # probability of a check between two operations
REFUSALS = ("is saving to", "another job has saved")  # errors of a second writer


class Killed(BaseException):
    """Raised to end a job's thread; nothing handles it."""


@dataclass
class Save:
    """A save with a unique number, which fills every tensor."""

    number: int
    step: int
    keep: int | None
    trained: tuple[nn.Module, AdamW_BF16]
    path: Path | None = None  # once it reported success


@dataclass
class Job:
    name: str
    actions: list[Save | int]  # an int is a prune that keeps so many
    kill_at: int | None
    kill_after_publishing: int | None
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    thread: threading.Thread | None = None
    done: int = 0  # number of operations
    killed: bool = False
    error: BaseException | None = None
    doing: Save | int | None = None
    published: Manifest | None = None  # by the current save


class Interleaving:
    """One run of two jobs, given by its seed."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.random = random.Random(seed)
        self.locks = LOCKS[seed % len(LOCKS)]
        self.saves: dict[int, Save] = {}
        self.published: dict[int, int] = {}  # serial numbers by save number
        self.removed: set[int] = set()
        self.refused = self.kills = self.operations = 0
        self._observing = False
        self._stopped = threading.Semaphore(0)
        self._jobs: dict[int, Job] = {}  # by thread

    def run(self) -> None:
        """Raise AssertionError if anything is lost."""
        with self._patched():
            waiting = {
                name: [self._life(name) for _ in range(self.random.choice((1, 2)))] for name in "AB"
            }
            running: list[Job] = []
            while running or any(waiting.values()):
                for name, lives in waiting.items():
                    if lives and all(job.name != name for job in running):
                        running.append(self._start(lives.pop(0)))
                job = self.random.choice(running)
                job.turn.release()
                self._stopped.acquire()
                assert job.thread is not None
                if job.error is not None or job.doing is None:  # has ended
                    job.thread.join()
                    running.remove(job)
                    if job.error is not None and not isinstance(job.error, Killed):
                        raise job.error
                if job.killed or self.random.random() < SNAPSHOT:
                    self.check()
            self.check()
            self.check_reports()
            self.check_recovery()

    # --------------------------------------------------------------------------------------- checks

    def check(self) -> None:
        """Assert that all checkpoints are complete, and that ``latest`` finds one if any exists."""
        assert (latest(self.root) is not None) == bool(self.published)
        for path in complete_checkpoints(self.root):
            assert verify(path) == []
        if self.locks == "one machine" and (self.root / "LATEST").exists():
            assert latest(self.root) == self.root / (self.root / "LATEST").read_text().strip()

    def check_reports(self) -> None:
        """Assert that each successful save exists, or was removed by a later save."""
        existing = {number_of(path): path for path in complete_checkpoints(self.root)}
        for number, path in existing.items():
            assert_holds(path, number)
        for save_ in self.saves.values():
            if save_.path is not None:
                found = existing.get(save_.number)
                assert found == save_.path or save_.number in self.removed, save_
        newest = latest(self.root)
        if newest is not None:
            assert number_of(newest) in self.published

    def check_recovery(self) -> None:
        """Assert that a save an hour later works, and leaves only its own checkpoint."""
        for path in [*self.root.glob(".*"), *self.root.glob(".partial-*/*")]:
            os.utime(path, (0, 0))
        path = save(self.root, 9, *make(255), extra={"number": 255}, keep=1)
        assert latest(self.root) == path and number_of(path) == 255
        assert sorted(os.listdir(self.root)) == ["LATEST", path.name]
        assert not commit._locks

    # ----------------------------------------------------------------------------------------- jobs

    def _life(self, name: str) -> Job:
        """Return a job that saves, and may be killed at some operation."""
        actions: list[Save | int] = []
        for _ in range(self.random.choice((1, 2))):
            number = len(self.saves) + 1
            self.saves[number] = Save(
                number,
                self.random.choice((1, 2, 3)),
                self.random.choice((None, 1, 1, 2)),
                make(number),
            )
            actions.append(self.saves[number])
        if self.random.random() < 0.2:
            actions.append(self.random.choice((1, 2)))
        kind = self.random.choice(("lives", "killed", "killed after publishing"))
        return Job(
            name,
            actions,
            self.random.randrange(LIFE) if kind == "killed" else None,
            self.random.randrange(TIDYING) if kind == "killed after publishing" else None,
        )

    def _start(self, job: Job) -> Job:
        job.doing = job.actions[0]
        job.thread = threading.Thread(target=self._run_job, args=(job,), daemon=True)
        job.thread.start()
        return job

    def _run_job(self, job: Job) -> None:
        self._jobs[threading.get_ident()] = job
        job.turn.acquire()
        try:
            for action in job.actions:
                job.doing, job.published = action, None
                self._do(action)
        except BaseException as error:
            job.error = error
        job.doing = None
        del self._jobs[threading.get_ident()]
        self._stopped.release()

    def _do(self, action: Save | int) -> None:
        if isinstance(action, int):
            prune(self.root, action)
            return
        try:
            action.path = save(
                self.root,
                action.step,
                *action.trained,
                extra={"number": action.number},
                keep=action.keep,
            )
        except RuntimeError as error:
            if not any(refusal in str(error) for refusal in REFUSALS):
                raise
            self.refused += 1

    def _stop(self) -> bool:
        """Let the scheduler choose the next thread; return False if this job was killed."""
        job = self._jobs.get(threading.get_ident())
        if job is None or self._observing:  # the scheduler's own checks
            return True
        if not job.killed:
            self._stopped.release()
            job.turn.acquire()
            job.killed = job.done == job.kill_at
            self.kills += job.killed
            job.done += 1
            self.operations += 1
        return not job.killed

    # -------------------------------------------------------------------------------------- patches

    @contextmanager
    def _patched(self) -> Iterator[None]:
        def stopping(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(path: Any, *args: Any, **kwargs: Any) -> Any:
                under_root = (
                    isinstance(path, int)
                    or kwargs.get("dir_fd") is not None
                    or str(path).startswith(str(self.root))
                )
                if under_root and not self._stop():  # not in imports, which hold a lock
                    raise Killed
                return function(path, *args, **kwargs)

            return call

        def write(stream: Any, data: memoryview) -> int:
            """Write; do nothing for a killed job: torch's C++ code must not see an exception."""
            return real_write(stream, data) if self._stop() else data.nbytes

        def rename(source: Any, target: Any, **kwargs: Any) -> None:
            if not self._stop():
                raise Killed
            self._observing = True
            try:
                self._rename(
                    Path(source), Path(target), lambda: real_rename(source, target, **kwargs)
                )
            finally:
                self._observing = False

        real_write, real_rename, real_flock = (
            file_checksums._ChecksummedStream._write,
            os.rename,
            fcntl.flock,
        )

        def flock(descriptor: int, operation: int) -> None:
            if self.locks == "one machine":
                real_flock(descriptor, operation)
            elif self.locks == "no locks":
                raise OSError(errno.ENOSYS, "Function not implemented")

        def machine() -> str:
            job = self._jobs.get(threading.get_ident())
            return "0" * 8 if job is None or self.locks == "one machine" else job.name * 8

        patches = [
            mock.patch.object(os, name, stopping(getattr(os, name)))
            for name in OPERATIONS
            if name != "rename"
        ]
        patches += [
            mock.patch.object(os, "rename", rename),
            mock.patch.object(os, "fsync", stopping(lambda descriptor: None)),
        ]
        patches += [mock.patch.object(module, "open", stopping(open)) for module in (builtins, io)]
        patches += [mock.patch.object(module, "machine", machine) for module in (directory, commit)]
        patches += [
            mock.patch.object(file_checksums._ChecksummedStream, "_write", write),
            mock.patch.object(root_lock.fcntl, "flock", flock),
        ]
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*could not be removed")
            for patch in patches:
                patch.start()
            try:
                yield
            finally:
                for patch in reversed(patches):
                    patch.stop()

    def _rename(self, source: Path, target: Path, rename: Callable[[], None]) -> None:
        """Record which job publishes or removes a checkpoint, and assert that it may."""
        job = self._jobs.get(threading.get_ident())
        before = (
            read_manifest(source) if source.name.startswith("step-") and source.exists() else None
        )
        rename()
        if job is None:
            return
        if target.name.startswith("step-"):
            job.published = read_manifest(target)
            self.published[job.published.extra["number"]] = job.published.serial
            if job.kill_after_publishing is not None:
                job.kill_at = job.done + job.kill_after_publishing
        elif before is not None:
            self.removed.add(before.extra["number"])
            newest = complete_checkpoints(self.root)[-1]
            assert (read_manifest(newest).serial, newest) > (before.serial, source), (
                "a newer checkpoint must remain"
            )
            # Jobs without a lock may use one serial number twice.
            newer = sum(serial >= before.serial for serial in self.published.values()) - 1
            if isinstance(job.doing, Save):
                assert job.published is not None and before.serial < job.published.serial, (
                    "a save may remove only what is older than itself"
                )
                replaced = before.step == job.published.step
                assert replaced or (job.doing.keep is not None and newer >= job.doing.keep)


def make(number: int) -> tuple[nn.Module, AdamW_BF16]:
    model = nn.Linear(2, 2, bias=False).bfloat16()
    optimizer = AdamW_BF16(model.parameters(), lr=1e-2)
    optimizer.init_state()
    with torch.no_grad():
        for tensor in (model.weight, *optimizer.state[model.weight].values()):
            tensor.fill_(number)
    return model, optimizer


def number_of(path: Path) -> int:
    number: int = read_manifest(path).extra["number"]
    return number


def assert_holds(path: Path, number: int) -> None:
    model, optimizer = make(0)
    load(path, model, optimizer)
    assert all(
        bool((tensor == number).all())
        for tensor in (model.weight, *optimizer.state[model.weight].values())
    )


def run_seeds(seeds: range) -> Counter[str]:
    """Run one interleaving a seed; AssertionError names the first that loses something."""
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as root:
        assert_holds(save(root, 1, *make(1)), 1)  # late imports happen before the patches
    for seed in seeds:
        with tempfile.TemporaryDirectory() as root:
            interleaving = Interleaving(Path(root), seed)
            try:
                interleaving.run()
            except Exception as error:
                raise AssertionError(f"seed {seed} ({interleaving.locks}): {error!r}") from error
            succeeded = sum(save_.path is not None for save_ in interleaving.saves.values())
            total.update(
                interleavings=1,
                operations=interleaving.operations,
                kills=interleaving.kills,
                refused=interleaving.refused,
                published=len(interleaving.published),
                succeeded=succeeded,
                removed=len(interleaving.removed),
            )
    return total


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(dict(run_seeds(range(args.first, args.first + args.seeds))))
    sys.exit(0)
