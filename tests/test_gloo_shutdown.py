"""Exit of a process whose gloo threads are still releasing tensors."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest

from sharded_bf16_adamw.sharding import gloo_shutdown

# The group stays referenced, as by DDP and FSDP, so destroy_process_group() joins no thread. The
# main thread never yields the GIL: without the exit handler gloo still holds tensors at the end.
SCRIPT = """
import atexit, sys, weakref
import torch
import torch.distributed as dist

refs = []
# Handlers run last in, first out, so this one runs after the package's.
atexit.register(lambda: print("held at the end:", sum(ref() is not None for ref in refs)))
import sharded_bf16_adamw

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
group = dist.group.WORLD
dist.barrier()
sys.setswitchinterval(100)
for _ in range(300):
    tensor = torch.ones(4)
    refs.append(weakref.ref(tensor))
    group.allreduce([tensor])
del tensor
dist.destroy_process_group()
"""


def test_gloo_threads_release_tensors_before_interpreter_exit(repo):
    environment = {**os.environ, "PYTHONPATH": str(repo)}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=100
    )
    assert result.stdout == "held at the end: 0\n", result.stderr
    assert result.returncode == 0, result.stderr


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """Return a function that writes a thread's state as ``/proc`` shows it."""

    def write(thread: int, name: str, state: str) -> None:
        (tmp_path / str(thread)).mkdir(exist_ok=True)
        (tmp_path / str(thread) / "stat.new").write_text(f"{thread} ({name}) {state} 1 2 3\n")
        (tmp_path / str(thread) / "stat.new").rename(tmp_path / str(thread) / "stat")

    monkeypatch.setattr(gloo_shutdown, "TASKS", tmp_path)
    return write


def test_exit_waits_until_the_gloo_thread_sleeps(tasks):
    tasks(1, "python", "R")
    tasks(2, "pt_gloo_runloop", "R")
    waiting = threading.Thread(target=gloo_shutdown.wait_for_gloo_threads)
    waiting.start()
    time.sleep(0.1)
    assert waiting.is_alive()
    tasks(2, "pt_gloo_runloop", "S")
    waiting.join(gloo_shutdown.MAX_WAIT / 2)
    assert not waiting.is_alive()


def test_busy_gloo_thread_delays_exit_only_for_max_wait(tasks, monkeypatch):
    monkeypatch.setattr(gloo_shutdown, "MAX_WAIT", 0.05)
    tasks(1, "name (with) brackets", "S")
    tasks(2, "pt_gloo_runloop", "R")
    started = time.monotonic()
    gloo_shutdown.wait_for_gloo_threads()
    assert time.monotonic() - started >= 0.05


def test_exit_does_not_wait_without_gloo(tasks, monkeypatch):
    tasks(1, "python", "R")
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("slept"))
    gloo_shutdown.wait_for_gloo_threads()


def test_exit_waits_grace_period_if_threads_are_invisible(tmp_path, monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr(gloo_shutdown, "TASKS", tmp_path / "none")
    monkeypatch.setattr(time, "sleep", slept.append)
    gloo_shutdown.wait_for_gloo_threads()
    assert slept == [gloo_shutdown.GRACE]
