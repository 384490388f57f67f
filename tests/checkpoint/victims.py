"""Processes that save checkpoints and kill themselves at a chosen operation on files."""

from __future__ import annotations

import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import forkserver
from torch import nn
from torch.distributed.checkpoint import DefaultSavePlanner

from sharded_bf16_adamw import AdamW_BF16, load, prune, save, wait_for_save
from sharded_bf16_adamw.checkpoint import dcp_storage, file_checksums
from sharded_bf16_adamw.sharding.dtensor import to_local

# functions of os that count as operations; each write to a tensor file counts too
OPERATIONS = ("fsync", "mkdir", "rename", "replace", "rmdir", "unlink")
# Process.start() polls all processes; concurrent polls of one process lose its exit code
_poll_lock = threading.Lock()
SURVIVOR_TIMEOUT_S = 60  # for the surviving ranks to notice that a rank has died


def make(step: int, sharded: bool = False) -> tuple[nn.Module, AdamW_BF16]:
    """Return a model and optimizer with all elements equal to the step."""
    model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 2)).to(torch.bfloat16)
    if sharded:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    optimizer = AdamW_BF16(model.parameters(), lr=1e-2)
    optimizer.init_state()
    with torch.no_grad():
        for param in model.parameters():
            for tensor in (param, *optimizer.state[param].values()):
                to_local(tensor).fill_(step)
    return model, optimizer


def assert_holds(path: Path, step: int) -> None:
    """Load a checkpoint, and assert that all elements are ``step``."""
    model, optimizer = make(0)
    assert load(path, model, optimizer).extra == {"step": step}
    for param in model.parameters():
        assert all(
            bool((tensor == step).all()) for tensor in (param, *optimizer.state[param].values())
        )


def save_step(root: Path, step: int, sharded: bool, **options: Any) -> Path:
    return save(root, step, *make(step, sharded), extra={"step": step}, **options)


def synchronous(root: Path, sharded: bool) -> None:
    save_step(root, 3, sharded, keep=1)


def asynchronous(root: Path, sharded: bool) -> None:
    save_step(root, 3, sharded, keep=1, async_=True)
    wait_for_save()


def repeated(root: Path, sharded: bool) -> None:
    """Save with the cached plan of an earlier save; :func:`_rank` disables building another."""
    save(root, 3, *_repeated_state[0], extra={"step": 3}, keep=1)


def repeated_asynchronous(root: Path, sharded: bool) -> None:
    save(root, 3, *_repeated_state[0], extra={"step": 3}, keep=1, async_=True)
    wait_for_save()


def same_step_again(root: Path, sharded: bool) -> None:
    save_step(root, 2, sharded)


def destroying(root: Path, sharded: bool) -> None:
    """Destroy the process group while the save is in flight on every rank."""
    write_data = dcp_storage.ChecksummedWriter.write_data

    def write_later(self: Any, plan: Any, planner: Any) -> Any:
        time.sleep(0.3 + dist.get_rank() if dist.is_initialized() else 0)
        return write_data(self, plan, planner)

    dcp_storage.ChecksummedWriter.write_data = write_later  # type: ignore[method-assign]
    save_step(root, 3, sharded, keep=1, async_=True)
    dist.destroy_process_group()
    wait_for_save()


def pruning(root: Path, sharded: bool) -> None:
    prune(root, 1)


def next_saves(parent: Path, sharded: bool) -> None:
    """Save again to each root in ``parent``."""
    for root in parent.iterdir():
        if root.is_dir():
            save_step(root, 9, sharded, keep=1)


ACTIONS: dict[str, Callable[[Path, bool], None]] = {
    action.__name__: action
    for action in (
        *(synchronous, asynchronous, repeated, repeated_asynchronous, same_step_again),
        *(destroying, pruning, next_saves),
    )
}
_repeated_state: list[tuple[nn.Module, AdamW_BF16]] = []  # what the repeated saves save


def run(
    action: str, root: Path, world: int, victim: int, at: int | None, everybody: bool
) -> list[int]:
    """Run ``action`` on ``world`` ranks. Rank ``victim`` kills itself before operation ``at``.

    With ``at=None`` no rank kills itself. With ``everybody``, the other ranks are killed once the
    victim has ended.

    Returns:
        Exit codes by rank.
    """
    ranks = [
        forkserver.Process(
            target=_rank, args=(action, root, rank, world, at if rank == victim else None)
        )
        for rank in range(world)
    ]
    with _poll_lock:
        for process in ranks:
            process.start()
    deadline = time.monotonic() + SURVIVOR_TIMEOUT_S
    wait([ranks[victim].sentinel], SURVIVOR_TIMEOUT_S)
    for process in ranks:
        if everybody and process is not ranks[victim]:
            process.kill()
        wait([process.sentinel], max(0.0, deadline - time.monotonic()))
        with _poll_lock:
            process.kill()
            process.join()
    return [process.exitcode or 0 for process in ranks]


def operations(root: Path, rank: int) -> list[str]:
    """Return the operations that a rank recorded in a run that was not killed."""
    return Path(f"{root}.operations.{rank}").read_text().split()


def _rank(action: str, root: Path, rank: int, world: int, at: int | None) -> None:
    torch.set_num_threads(1)
    if world > 1:
        store = dist.FileStore(f"{root}.store", world)
        dist.init_process_group(
            "gloo",
            store=store,
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=SURVIVOR_TIMEOUT_S),
        )
    if action.startswith("repeated"):
        dcp_storage.CHUNKS_FILE_THRESHOLD = 0  # write the files of a checkpoint with many chunks
        _repeated_state.append(make(3, world > 1))
        save(f"{root}.first", 1, *_repeated_state[0], extra={"step": 1})
        # Fails if the save builds a plan instead of reusing the cached one.
        DefaultSavePlanner.create_local_plan = None  # type: ignore[assignment,method-assign]
    done = _watch_operations(at)
    try:
        ACTIONS[action](root, world > 1)
    except RuntimeError:
        os._exit(1)  # another rank is gone
    Path(f"{root}.operations.{rank}").write_text(" ".join(done))
    os._exit(0)


def _watch_operations(at: int | None) -> list[str]:
    """Record operations; kill this process by SIGKILL before number ``at``."""
    done: list[str] = []

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if len(done) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(name)
            return function(*args, **kwargs)

        return call

    accessor = getattr(pathlib, "_normal_accessor", None)  # Python 3.10's pathlib has copies
    for name in OPERATIONS:
        function = watched(name, getattr(os, name))
        setattr(os, name, function)
        if hasattr(accessor, name):
            setattr(accessor, name, function)
    stream: Any = file_checksums._ChecksummedStream
    stream._write = watched("write", stream._write)
    return done


def patch_system_call(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, new: Any) -> None:
    """Replace a function of ``os`` or ``io``, also for Python 3.10's pathlib, which copies them."""
    monkeypatch.setattr(module, name, new)
    accessor = getattr(pathlib, "_normal_accessor", None)
    if hasattr(accessor, name):
        monkeypatch.setattr(accessor, name, new)
