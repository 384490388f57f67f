"""Roots shared by ranks or jobs, and files in them that cannot be removed or read."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import threading
import time
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from distributed import run_ranks

from sharded_bf16_adamw import latest, load, prune, save, verify
from sharded_bf16_adamw.checkpoint import commit, directory, loading, root_lock, saving
from sharded_bf16_adamw.checkpoint.file_checksums import FileRecord
from sharded_bf16_adamw.checkpoint.root_lock import LOCK, RootLock, RootLockedError

from .victims import assert_holds, make, patch_system_call, save_step


def names(root: Path) -> list[str]:
    return sorted(os.listdir(root))


# --------------------------------------------------------------------------------- ranks of one job


def node_local_worker(rank: int, world: int, folder: str, patience: float) -> str:
    os.makedirs(f"{folder}/node{rank}/run", exist_ok=True)
    os.chdir(f"{folder}/node{rank}")
    with mock.patch.object(commit, "SEEN_WITHIN_S", patience):
        for async_ in (False, True):
            with pytest.raises(ValueError, match="rank 1 does not see") as caught:
                save("run", 2, *make(2, sharded=True), keep=1, async_=async_)
    return str(caught.value)


def test_root_on_node_local_disks_is_refused(tmp_path):
    good = save_step(tmp_path / "node0" / "run", 1, sharded=False)
    first, second = run_ranks(2, node_local_worker, str(tmp_path), 0.1)
    assert first == second and "\n" not in first
    assert (
        "run is not the same folder for all ranks; give a path on a file system that they share"
        in first
    )
    assert (
        names(good.parent) == ["LATEST", "step-00000001"]
        and names(tmp_path / "node1" / "run") == []
    )
    assert_holds(good, 1)


def lost_file_worker(rank: int, world: int, root: str, size: int | None) -> str:
    good = save(root, 1, *make(1, sharded=True), extra={"step": 1})
    write_data = saving.ChecksummedWriter.write_data

    def write_and_lose(self: Any, plan: Any, planner: Any) -> Any:
        result = write_data(self, plan, planner)
        for name in self.files if rank == 1 else ():
            os.unlink(self.path / name) if size is None else os.truncate(self.path / name, size)
        return result

    with (
        mock.patch.object(saving.ChecksummedWriter, "write_data", write_and_lose),
        mock.patch.object(commit, "SEEN_WITHIN_S", 0.1),
        pytest.raises(
            RuntimeError,
            match=r"on rank 0, OSError: .*__1_0.distcp, which rank 1 wrote with \d+ bytes",
        ) as caught,
    ):
        save(root, 2, *make(2, sharded=True), keep=1)
    assert latest(root) == good and verify(good) == []
    return str(caught.value)


@pytest.mark.parametrize(("size", "state"), [(None, "is missing"), (10, "has 10 bytes")])
def test_file_that_rank_0_does_not_see_is_named_and_nothing_is_published(size, state, tmp_path):
    first, second = run_ranks(2, lost_file_worker, str(tmp_path), size)
    assert (
        first == second
        and f"{state} on rank 0; give save() a root on a file system that all ranks share" in first
    )
    assert names(tmp_path) == ["LATEST", "step-00000001"]


def test_late_file_is_waited_for(tmp_path):
    (tmp_path / "a").write_bytes(b"12")

    def complete() -> None:
        time.sleep(0.1)
        (tmp_path / "a").write_bytes(b"12345")

    thread = threading.Thread(target=complete)
    thread.start()
    commit.check_files_visible(tmp_path, [{"a": FileRecord(5, "")}])
    assert (tmp_path / "a").stat().st_size == 5
    thread.join()


def missing_ok_worker(rank: int, world: int, folder: str) -> None:
    """Show ranks different states of the root; all must act as rank 0 does."""
    model, optimizer = make(1, sharded=True)
    save(f"{folder}/full", 1, model, optimizer, extra={"step": 1})
    seen_by_others = mock.Mock(side_effect=AssertionError("rank 0 must look for all ranks"))
    for of_rank_0, expected in (("none", None), ("full", {"step": 1})):
        with mock.patch.object(loading, "_find", loading._find if rank == 0 else seen_by_others):
            loaded = load(f"{folder}/{of_rank_0}", model, optimizer, missing_ok=True)
            assert (loaded and loaded.extra) == expected
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        load(f"{folder}/none", model, optimizer)


def test_all_ranks_resume_or_none(tmp_path):
    run_ranks(2, missing_ok_worker, str(tmp_path))


# ----------------------------------------------------------------------------------------- two jobs


def test_concurrent_save_is_refused_with_the_holder_of_the_lock(tmp_path):
    save_step(tmp_path, 1, sharded=False)
    reached, opened = threading.Event(), threading.Event()
    write_data = saving.ChecksummedWriter.write_data

    def write_later(self: Any, plan: Any, planner: Any) -> Any:
        reached.set()
        assert opened.wait(60)
        return write_data(self, plan, planner)

    with mock.patch.object(saving.ChecksummedWriter, "write_data", write_later):
        thread = threading.Thread(target=lambda: save_step(tmp_path, 2, sharded=False, keep=1))
        thread.start()
        assert reached.wait(60)
        before = names(tmp_path)
        with pytest.raises(
            RuntimeError,
            match=rf"process {os.getpid()} on .* is saving to {tmp_path} now; give each job a root",
        ):
            save_step(tmp_path, 2, sharded=False, keep=1)
        assert names(tmp_path) == before
        opened.set()
        thread.join()
    assert names(tmp_path) == ["LATEST", "step-00000002"]
    assert_holds(tmp_path, 2)
    assert_holds(save_step(tmp_path, 2, sharded=False, keep=1), 2)
    assert names(tmp_path) == ["LATEST", "step-00000002-2"]


def test_failed_or_interrupted_save_releases_the_lock(tmp_path, monkeypatch):
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
        for module, name in (
            (os.path, "lexists"),
            (commit, "_discard_leftovers"),
            (saving, "get_state"),
            (saving, "publish"),
        ):
            with monkeypatch.context() as patched:
                patched.setattr(module, name, mock.Mock(side_effect=error))
                with pytest.raises((RuntimeError, KeyboardInterrupt)):
                    save_step(tmp_path, 1, sharded=False)
            assert names(tmp_path) == [] and not commit._locks
    assert_holds(save_step(tmp_path, 1, sharded=False), 1)


def test_save_succeeds_if_the_lock_cannot_be_released(tmp_path, monkeypatch):
    """The server of a network file system was lost after the checkpoint was published."""
    flock = root_lock.fcntl.flock

    def lost(descriptor: int, operation: int) -> None:
        if operation == root_lock.fcntl.LOCK_UN:
            raise OSError(errno.EIO, "Input/output error")
        flock(descriptor, operation)

    monkeypatch.setattr(root_lock.fcntl, "flock", lost)
    for step in (1, 2):
        assert_holds(save_step(tmp_path, step, sharded=False), step)


def test_one_root_under_two_paths_is_one_root(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for step, root in enumerate(("run", "link", "run/../run", "run")):
        save_step(tmp_path / root, step, sharded=False, keep=1)
    assert names(tmp_path / "run") == ["LATEST", "step-00000003"]


def test_forked_process_does_not_keep_the_lock(tmp_path, monkeypatch):
    """The file cannot be removed, as if another user owned it in a sticky folder."""
    monkeypatch.setattr(
        os, "unlink", mock.Mock(side_effect=PermissionError(errno.EPERM, "Operation not permitted"))
    )
    lock = RootLock(tmp_path)
    copy = os.dup(lock._descriptor)  # like a fork's, it refers to the same open file
    lock.release()
    RootLock(tmp_path).release()
    os.close(copy)


def test_lock_file_of_dead_process_or_other_user_blocks_nobody(tmp_path, monkeypatch):
    (tmp_path / LOCK).write_text("process 1 on nowhere")
    save_step(tmp_path, 1, sharded=False)
    assert names(tmp_path) == ["LATEST", "step-00000001"]
    (tmp_path / LOCK).write_text("process 1 on nowhere")
    real = os.open

    def refuses(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if str(path).endswith(LOCK) and flags & os.O_RDWR and os.path.exists(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuses)
    held = RootLock(tmp_path)
    with pytest.raises(RuntimeError, match="process 1 on nowhere is saving"):
        save_step(tmp_path, 2, sharded=False)
    held.release()
    assert_holds(save_step(tmp_path, 2, sharded=False), 2)


def leave(root: Path, name: str, hours: float, file_hours: float | None = None) -> Path:
    """Create the leftover of a save that was killed so many hours ago."""
    path = root / name
    path.mkdir()
    (path / "__0_0.distcp").write_bytes(b"x")
    for each, age in (
        (path / "__0_0.distcp", hours if file_hours is None else file_hours),
        (path, hours),
    ):
        os.utime(each, (time.time() - 3600 * age,) * 2)
    return path


@pytest.mark.parametrize("no_locks", [None, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_leftover_is_removed_once_its_save_must_be_dead(no_locks, tmp_path, monkeypatch):
    if no_locks is not None:
        monkeypatch.setattr(
            root_lock.fcntl,
            "flock",
            mock.Mock(side_effect=OSError(no_locks, os.strerror(no_locks))),
        )
    mine = leave(tmp_path, f".partial-step-00000002-{directory.machine()}-00000000", 0)
    fresh = leave(tmp_path, ".partial-step-00000002-another1-00000000", 0.5)
    active = leave(tmp_path, ".partial-step-00000003-another1-00000000", 5, file_hours=0.5)
    leave(tmp_path, ".partial-step-00000002-another1-11111111", 2)
    leave(tmp_path, ".partial-step-00000002", 2)
    leave(tmp_path, ".removed-step-00000002-another1-00000000", 0)
    for name, hours in (("00000000", 2.0), ("11111111", 0.0)):
        (tmp_path / f".LATEST-another1-{name}").write_text("step")
        os.utime(tmp_path / f".LATEST-another1-{name}", (time.time() - 3600 * hours,) * 2)
    save_step(tmp_path, 1, sharded=False, keep=1)
    left = [
        fresh.name,
        active.name,
        ".LATEST-another1-11111111",
        *([] if no_locks is None else [mine.name]),
    ]
    assert names(tmp_path) == sorted(["LATEST", "step-00000001", *left])
    assert all((tmp_path / name / "__0_0.distcp").exists() for name in left if "partial" in name)


def test_name_taken_by_another_job_raises_and_both_checkpoints_are_complete(tmp_path, monkeypatch):
    """The file system has no locks."""
    monkeypatch.setattr(
        root_lock.fcntl,
        "flock",
        mock.Mock(side_effect=OSError(errno.ENOSYS, "Function not implemented")),
    )
    publish = saving.publish

    def publish_second(*args: Any) -> None:
        monkeypatch.setattr(saving, "publish", publish)
        save_step(tmp_path, 1, sharded=False)
        publish(*args)

    monkeypatch.setattr(saving, "publish", publish_second)
    with pytest.raises(
        RuntimeError,
        match=r"another job has saved .*step-00000001 in the meantime; give each job a root "
        r"of its own",
    ):
        save_step(tmp_path, 1, sharded=False)
    assert names(tmp_path) == ["LATEST", "step-00000001"]
    assert_holds(tmp_path, 1)


def test_prune_keeps_the_latest_and_the_last_saved(tmp_path):
    paths = [save_step(tmp_path, step, sharded=False) for step in (1, 2, 3)]
    # as if the disk had been full once the third was published
    (tmp_path / "LATEST").write_text(f"{paths[1].name}\n")
    assert prune(tmp_path, 1) == [paths[0]]
    assert latest(tmp_path) == paths[1]


# ------------------------------------------------------------- files that cannot be removed or read


def test_link_to_archive_is_unlinked_and_its_target_kept(tmp_path):
    root, archive = tmp_path / "run", tmp_path / "archive"
    for step in (1, 2, 3):
        save_step(root, step, sharded=False)
    for step in (1, 2):
        shutil.move(root / f"step-0000000{step}", archive / str(step))
        (root / f"step-0000000{step}").symlink_to(archive / str(step))
    (root / ".removed-step-00000000").symlink_to(archive)
    (root / ".partial-step-00000000").symlink_to(archive / "gone")
    os.utime(root / ".partial-step-00000000", (0, 0), follow_symlinks=False)
    (root / "step-00000005").symlink_to(archive / "gone")
    for step in (4, 5):
        save_step(root, step, sharded=False, keep=1)
    assert names(root) == ["LATEST", "step-00000005", "step-00000005-2"]
    for step in (1, 2):
        assert_holds(archive / str(step), step)


@pytest.mark.parametrize("stuck", ["rename", "rmtree"])
def test_checkpoint_that_cannot_be_removed_causes_a_warning(stuck, tmp_path, monkeypatch):
    for step in (1, 2, 3):
        save_step(tmp_path, step, sharded=False)
    real: Any = getattr(os if stuck == "rename" else shutil, stuck)

    def refuses(path: Any, *args: Any, **kwargs: Any) -> None:
        if "step-00000001" not in str(path):
            real(path, *args, **kwargs)
        elif not kwargs.get("ignore_errors"):
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    monkeypatch.setattr(os if stuck == "rename" else shutil, stuck, refuses)
    for step in (4, 5):
        with pytest.warns(UserWarning, match=r"step-00000001.* could not be removed .*busy"):
            save_step(tmp_path, step, sharded=False, keep=1)
        assert [name for name in names(tmp_path) if "00000001" not in name] == [
            "LATEST",
            f"step-0000000{step}",
        ]
        assert_holds(tmp_path, step)
    with warnings.catch_warnings(record=True):
        assert prune(tmp_path, 1) == []


def test_folder_without_fsync_is_accepted_but_a_failing_disk_is_not(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuses(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuses)
    for number in (errno.EINVAL, errno.ENOTSUP):
        assert_holds(save_step(tmp_path / str(number), 1, sharded=False), 1)
    number = errno.EIO
    with pytest.raises(RuntimeError, match="Input/output error"):
        save_step(tmp_path / str(number), 1, sharded=False)


def forbid(monkeypatch: pytest.MonkeyPatch, *forbidden: Path) -> None:
    """Deny access as permissions would, which do not bind root."""
    for module, name in (
        (os, "stat"),
        (os, "scandir"),
        (os, "listdir"),
        (os, "open"),
        (__import__("io"), "open"),
    ):
        real = getattr(module, name)

        def refuses(path: Any, *args: Any, real: Any = real, **kwargs: Any) -> Any:
            if not isinstance(path, int) and any(
                Path(path) == each or each in Path(path).parents for each in forbidden
            ):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(path, *args, **kwargs)

        patch_system_call(monkeypatch, module, name, refuses)


@pytest.mark.parametrize("what", ["", "LATEST", "step-00000002"])
def test_unreadable_checkpoint_is_not_taken_for_missing(what, tmp_path, monkeypatch):
    root = tmp_path / "run"
    for step in (1, 2):
        save_step(root, step, sharded=False)
    forbid(monkeypatch, root / what)
    with pytest.raises(PermissionError):
        latest(root)
    with pytest.raises(
        RuntimeError, match=f"cannot read the checkpoint {root}: on rank 0, PermissionError"
    ):
        load(root, *make(0), missing_ok=True)


def test_unreadable_old_checkpoint_is_kept_and_saves_work(tmp_path, monkeypatch):
    for step in (1, 2):
        save_step(tmp_path, step, sharded=False)
    leave(tmp_path, ".partial-step-00000003-another1-00000000", 2)
    with monkeypatch.context() as patched:
        forbid(
            patched,
            tmp_path / "step-00000001",
            tmp_path / ".partial-step-00000003-another1-00000000",
        )
        with pytest.warns(
            UserWarning,
            match=r"the leftover .*\.partial-step-00000003.* could not be removed "
            r".*Permission denied",
        ):
            save_step(tmp_path, 3, sharded=False, keep=1)
        assert prune(tmp_path, 1) == []
    assert names(tmp_path) == [
        ".partial-step-00000003-another1-00000000",
        "LATEST",
        "step-00000001",
        "step-00000003",
    ]
    assert_holds(tmp_path / "step-00000001", 1)


def test_error_of_a_locked_root_can_be_pickled():
    """A pool of processes sends it to its parent."""
    error = pickle.loads(pickle.dumps(RootLockedError("in use", "process 7 on node3")))
    assert (str(error), error.holder) == ("in use", "process 7 on node3")
