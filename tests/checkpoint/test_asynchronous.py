"""Asynchronous saves: staged copies, waiting, errors and threads."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks

from sharded_bf16_adamw import latest, load, save, verify, wait_for_save
from sharded_bf16_adamw.checkpoint import async_save, saving, staging
from sharded_bf16_adamw.sharding.collectives import timeout_of

from .victims import assert_holds, make, run, save_step


@pytest.fixture
def gate(monkeypatch):
    """Yield an event; files are written once it is set."""
    opened = threading.Event()
    write_data = saving.ChecksummedWriter.write_data

    def write_later(self, plan, planner):
        assert opened.wait(60)
        return write_data(self, plan, planner)

    monkeypatch.setattr(saving.ChecksummedWriter, "write_data", write_later)
    yield opened
    opened.set()
    wait_for_save()


def test_async_save_holds_the_state_of_the_call(tmp_path, gate):
    model, optimizer = make(1)
    extra = {"step": 1}
    path = save(tmp_path, 1, model, optimizer, extra=extra, async_=True)
    assert latest(tmp_path) is None, "nothing is written yet"
    extra["step"] = 5
    with torch.no_grad():
        for param in model.parameters():
            for tensor in (param, *optimizer.state[param].values()):
                tensor.fill_(5)
    optimizer.param_groups[0]["lr"] = 5.0
    gate.set()
    wait_for_save()
    assert latest(tmp_path) == path
    assert_holds(path, 1)


def test_second_save_and_load_wait_for_the_first(tmp_path, gate):
    save_step(tmp_path, 1, sharded=False, async_=True)
    threading.Timer(0.2, gate.set).start()
    second = save_step(tmp_path, 2, sharded=False, async_=True)
    assert latest(tmp_path) == tmp_path / "step-00000001", (
        "the first save must be complete before the second call returns"
    )
    assert_holds(tmp_path, 2)  # load waits
    assert latest(tmp_path) == second


def test_relative_root_is_resolved_at_the_call(tmp_path, gate, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    path = save_step(Path("run"), 1, sharded=False, async_=True)
    assert path == Path("run/step-00000001")
    monkeypatch.chdir(tmp_path / "elsewhere")
    gate.set()
    wait_for_save()
    assert_holds(tmp_path / path, 1)
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("following", ["save", "load", "wait_for_save"])
def test_async_error_is_raised_once_by_the_next_call(following, tmp_path, monkeypatch):
    good = save_step(tmp_path, 1, sharded=False)
    model, optimizer = make(7)

    def fails(self, plan, planner):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(saving.ChecksummedWriter, "write_data", fails)
        save(tmp_path, 2, model, optimizer, async_=True)
        call = {
            "save": lambda: save(tmp_path, 3, model, optimizer),
            "load": lambda: load(tmp_path, model, optimizer),
            "wait_for_save": wait_for_save,
        }[following]
        with pytest.raises(
            RuntimeError,
            match=r"cannot save the checkpoint .*step-00000002: on rank 0, OSError: .*No "
            r"space left",
        ):
            call()
    assert latest(tmp_path) == good
    wait_for_save()
    assert bool((next(model.parameters()) == 7).all()), "the call that raised did nothing else"
    save_step(tmp_path, 3, sharded=False)
    assert_holds(tmp_path, 3)


def test_destroyed_process_group_raises_and_publishes_nothing(tmp_path):
    root = tmp_path / "run"
    good = save_step(root, 2, sharded=False)
    assert run("destroying", root, world=2, victim=0, at=None, everybody=False) == [1, 1]
    assert latest(root) == good and not list(root.glob("step-00000003*"))
    assert_holds(good, 2)


FORGETFUL = """
import sys, threading
from pathlib import Path
from sharded_bf16_adamw import AdamW_BF16, save
from sharded_bf16_adamw.checkpoint import dcp_storage
import torch

write_data = dcp_storage.ChecksummedWriter.write_data

def write_at_the_end(self, plan, planner):
    threading.main_thread().join()
    if "full" in str(self.path):
        raise OSError(28, "No space left on device")
    return write_data(self, plan, planner)

dcp_storage.ChecksummedWriter.write_data = write_at_the_end

def save_to(disk):
    model = torch.nn.Linear(1024, 1024, bias=False).bfloat16()
    optimizer = AdamW_BF16(model.parameters(), lr=1e-3)
    save(Path(sys.argv[1], disk), 1, model, optimizer, async_=True)

save_to("empty")
other = threading.Thread(target=save_to, args=("full",))
other.start()
other.join()
"""


def test_program_that_ends_without_waiting_saves_and_prints_errors(tmp_path):
    """Tensors are large enough to be hashed in a thread pool, which Python has closed by then."""
    environment = {**os.environ, "PYTHONPATH": str(Path(saving.__file__).parents[2])}
    root = tmp_path / "disks"
    command = [sys.executable, "-c", FORGETFUL, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert verify(root / "empty") == []
    assert latest(root / "full") is None
    assert re.fullmatch(
        r"an asynchronous save failed: cannot save the checkpoint [^\n]*/full/[^\n]*No space left "
        r"on device\n",
        done.stderr,
    )


def rank_0_alone_is_wrong_worker(rank: int, world: int, root: str) -> None:
    model, optimizer = make(1, sharded=True)
    for wrong, message in (
        ({"extra": {"f": print}}, "extra must be plain data"),
        ({"keep": 0}, "Invalid keep: 0"),
    ):
        with pytest.raises(ValueError, match=message):
            save(root, 1, model, optimizer, **(wrong if rank == 0 else {}))
    assert save(root, 1, model, optimizer, extra={"step": 1} if rank == 0 else None) == latest(root)


def test_arguments_of_rank_0_count_and_errors_are_raised_on_all_ranks(tmp_path):
    run_ranks(2, rank_0_alone_is_wrong_worker, str(tmp_path))
    assert_holds(tmp_path, 1)


def test_staging_memory_is_reused(tmp_path):
    """The memory belongs to the optimizer, and is freed with it."""
    model, optimizer = make(1)
    save(tmp_path, 1, model, optimizer, async_=True)
    wait_for_save()
    first = {index: tensor.data_ptr() for index, tensor in staging._spare[optimizer].items()}
    save(tmp_path, 2, model, optimizer, extra={"step": 1}, async_=True)
    wait_for_save()
    assert {
        index: tensor.data_ptr() for index, tensor in staging._spare[optimizer].items()
    } == first and first
    assert_holds(tmp_path, 1)
    before = len(staging._spare)
    del model, optimizer
    gc.collect()
    assert len(staging._spare) == before - 1


def training_worker(rank: int, world: int, root: str) -> None:
    """Run collectives of training while the save runs; each replica is staged on one rank only."""
    model, optimizer = make(4, sharded=True)
    halfway = threading.Event()
    write_data = saving.ChecksummedWriter.write_data

    def write_later(self: Any, plan: Any, planner: Any) -> Any:
        assert halfway.wait(60)
        return write_data(self, plan, planner)

    with mock.patch.object(saving.ChecksummedWriter, "write_data", write_later):
        path = save(root, 4, model, optimizer, extra={"step": 4}, async_=True)
        for step in range(20):
            model(torch.ones(2, 6, dtype=torch.bfloat16)).sum().backward()
            optimizer.step(zero_grad=True)
            if step == 9:
                assert latest(root) is None
                halfway.set()
        wait_for_save()
    assert latest(root) == path
    copied = sum(tensor.nbytes for tensor in staging._spare[optimizer].values())
    full = (
        sum(4 * param.numel() * 2 + 4 for param in model.parameters())
        + torch.get_rng_state().nbytes * world
    )
    total = torch.tensor(float(copied))
    torch.distributed.all_reduce(total)
    assert total == full


def test_training_continues_and_each_rank_stages_its_share_only(tmp_path):
    run_ranks(3, training_worker, str(tmp_path))
    assert_holds(tmp_path, 4)


@pytest.mark.parametrize(("what", "groups"), [("collective", 2), ("disk", 1)])
def test_group_is_used_again_unless_its_collective_failed(what, groups, tmp_path, monkeypatch):
    """gloo closes a group's connections if a collective fails. Other errors leave it intact."""
    all_reduce = dist.all_reduce

    def fails(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if threading.current_thread().name == "checkpoint save":
            raise RuntimeError("Timed out waiting 1800000ms for recv operation to complete")
        return all_reduce(tensor, *args, **kwargs)

    full_disk = mock.Mock(side_effect=OSError(28, "No space left on device"))
    two_hours = timedelta(hours=2)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=two_hours)
    try:
        with monkeypatch.context() as patched:
            if what == "collective":
                patched.setattr(dist, "all_reduce", fails)
            else:
                patched.setattr(saving.ChecksummedWriter, "write_data", full_disk)
            save_step(tmp_path, 1, sharded=False, async_=True)
            with pytest.raises(RuntimeError, match=r"collective|No space left"):
                wait_for_save()
        path = save_step(tmp_path, 2, sharded=False, async_=True)
        wait_for_save()
        used = async_save._groups[dist.group.WORLD]
        assert len(used) == groups
        assert {timeout_of(group, torch.device("cpu")) for group in used} == {two_hours}
    finally:
        dist.destroy_process_group()
    assert_holds(path, 2)


# ---------------------------------------------------------------------------------- several threads


def in_threads(*functions: Callable[[], None]) -> None:
    """Run functions concurrently, and raise their errors."""
    with ThreadPoolExecutor(len(functions)) as pool:
        for future in [pool.submit(function) for function in functions]:
            future.result()


def test_two_threads_save_two_models_concurrently(tmp_path, monkeypatch):
    """Both copies are staged before either is written, repeatedly in the same memory."""
    both = threading.Barrier(2, timeout=60)
    write_data = saving.ChecksummedWriter.write_data

    def write_together(self, plan, planner):
        both.wait()
        return write_data(self, plan, planner)

    monkeypatch.setattr(saving.ChecksummedWriter, "write_data", write_together)

    def train(number: int) -> None:
        model, optimizer = make(number)
        for step in range(1, 4):
            save(
                tmp_path / str(number), step, model, optimizer, extra={"step": number}, async_=True
            )
        wait_for_save()

    in_threads(lambda: train(1), lambda: train(2))
    for number in (1, 2):
        for step in range(1, 4):
            assert_holds(tmp_path / str(number) / f"step-{step:08d}", number)


def test_each_thread_gets_the_error_of_its_own_save(tmp_path, monkeypatch):
    failed, asked = threading.Event(), threading.Event()
    write_data = saving.ChecksummedWriter.write_data

    def fails(self, plan, planner):
        if "bad" in str(self.path):
            raise OSError(28, "No space left on device")
        return write_data(self, plan, planner)

    monkeypatch.setattr(saving.ChecksummedWriter, "write_data", fails)

    def unlucky() -> None:
        save_step(tmp_path / "bad", 1, sharded=False, async_=True)
        async_save._pending[-1].join()
        failed.set()
        assert asked.wait(60)
        with pytest.raises(RuntimeError, match=r"cannot save the checkpoint .*bad.*No space left"):
            wait_for_save()
        wait_for_save()

    def lucky() -> None:
        assert failed.wait(60)
        save_step(tmp_path / "good", 1, sharded=False, async_=True)
        assert_holds(tmp_path / "good", 1)
        wait_for_save()
        asked.set()

    in_threads(unlucky, lucky)
    assert async_save._pending == []


def test_errors_of_ended_threads_are_raised_one_by_one(tmp_path, gate, monkeypatch):
    both = threading.Barrier(2, timeout=60)

    def save_only(name: str) -> None:
        save_step(tmp_path / name, 1, sharded=False, async_=True)
        both.wait()

    with monkeypatch.context() as patched:
        patched.setattr(
            saving, "publish", mock.Mock(side_effect=OSError(28, "No space left on device"))
        )
        in_threads(lambda: save_only("a"), lambda: save_only("b"))
        threading.Timer(0.2, gate.set).start()
        messages = []
        for _ in range(2):
            with pytest.raises(RuntimeError, match="cannot save the checkpoint") as caught:
                wait_for_save()
            messages.append(str(caught.value))
    wait_for_save()
    assert [sum(f"{tmp_path}/{name}/" in message for message in messages) for name in "ab"] == [
        1,
        1,
    ]


def test_wait_for_save_waits_for_all_threads(tmp_path, gate):
    """Save and load wait only for the saves of their own thread."""
    started, waited = threading.Event(), threading.Event()

    def other() -> None:
        save_step(tmp_path / "other", 1, sharded=False, async_=True)
        started.set()
        assert waited.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    assert started.wait(60)
    (tmp_path / "own").mkdir()
    assert (
        load(tmp_path / "own", *make(0), missing_ok=True) is None
        and latest(tmp_path / "other") is None
    )
    threading.Timer(0.2, gate.set).start()
    wait_for_save()
    assert_holds(tmp_path / "other", 1)
    waited.set()
    thread.join()
