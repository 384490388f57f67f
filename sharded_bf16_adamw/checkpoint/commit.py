"""Publish a save by one rename, or abandon it.

Two jobs may save to one root by mistake, on one machine or two. Where locks work, the second job
gets an error (:mod:`.root_lock`). Where they do not, neither job harms the other: temporary names
are unique, leftovers are removed only if their save cannot be running any more, and a save removes
only checkpoints with a smaller serial number than its own.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .directory import (
    LATEST,
    REMOVED,
    discard,
    machine,
    readable_checkpoints,
    sync_folder,
    unique_suffix,
    warn_not_removed,
)
from .file_checksums import FileRecord
from .manifest import Manifest, write_durably, write_manifest
from .root_lock import RootLock, lock_if_possible

PARTIAL, NEW_LATEST = ".partial-", f".{LATEST}"
# A leftover that no lock proves dead counts as dead if it has not changed for this long. A save
# whose ranks hang fails sooner, because collectives time out.
DEAD_AFTER_S = 3600
SEEN_WITHIN_S = 10.0  # network file systems cache folders, so files of other hosts appear late
UNPUBLISHED = 0  # serial number of a manifest before publish() assigns the next one
_locks: dict[Path, RootLock | None] = {}  # locks of this process's saves, by partial folder
_published: dict[Path, int] = {}  # serial number that this process published last, by resolved root


def begin(root: Path, step: int) -> tuple[Path, Path]:
    """Remove leftovers of dead saves, and create an empty folder to write to.

    End the save by :func:`release` or :func:`abandon`.

    Returns:
        The partial folder, and the path that the checkpoint will get: the first free name of this
        step, since a resumed run may save a step again.

    Raises:
        RuntimeError: another save to ``root`` is in progress, or another job has saved there since
            this job's last save.
    """
    _make_folders(root)
    serial, newest = max(readable_checkpoints(root), default=(0, root))
    if serial > _published.get(root.resolve(), serial):
        raise RuntimeError(
            f"another job has saved {newest} since this job's last save there; end one of the "
            "jobs, or give each a root of its own. Otherwise each would remove the other's "
            "checkpoints and resume from them"
        )
    partial = root / f"{PARTIAL}step-{step:08d}{unique_suffix()}"
    _locks[partial] = None
    with abandon_on_error([partial]):
        _locks[partial] = lock_if_possible(root)
        final, copy = root / f"step-{step:08d}", 1
        while os.path.lexists(final):
            copy += 1
            final = root / f"step-{step:08d}-{copy}"
        partial.mkdir()
        _discard_leftovers(partial)
    return partial, final


def publish(partial: Path, final: Path, manifest: Manifest) -> None:
    """Add the manifest to ``partial``, rename it to ``final``, and make it the latest checkpoint.

    Raises:
        FileExistsError: without a lock, another job has published a checkpoint of this name.
    """
    root, resolved = final.parent, final.parent.resolve()
    manifest.serial = 1 + max((serial for serial, _ in readable_checkpoints(root)), default=0)
    write_manifest(partial, manifest)
    sync_folder(partial)
    try:
        os.rename(partial, final)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise FileExistsError(
            f"another job has saved {final} in the meantime; give each job a root of its own"
        ) from error
    _published[resolved] = manifest.serial
    sync_folder(root)  # LATEST must not reach the disk before the folder that it names
    temporary = root / f"{NEW_LATEST}{unique_suffix()}"
    try:
        write_durably(temporary, f"{final.name}\n".encode())
        os.replace(temporary, root / LATEST)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(root)


def release(partial: Path) -> None:
    """End a save, and let others save.

    Does nothing if this process did not begin the save, or has ended it.
    """
    lock = _locks.pop(partial, None)
    if lock is not None:
        lock.release()


def abandon(partial: Path) -> None:
    """End a save, and remove its files to free space: a full disk is the likeliest error."""
    try:
        if partial in _locks:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        release(partial)


@contextmanager
def abandon_on_error(begun: list[Path]) -> Iterator[None]:
    """Abandon the saves in ``begun`` if the body raises or is interrupted."""
    try:
        yield
    except BaseException:
        for partial in begun:
            abandon(partial)
        raise


def check_folder_visible(root: Path, folder: Path, rank: int, action: str = "has created") -> None:
    """Check that this rank sees a folder in ``root`` that rank 0 has created or reads.

    A new folder's name is unique, so no other folder can be mistaken for it.

    Raises:
        ValueError: this rank does not see the folder.
    """
    if not _becomes_true(folder.is_dir, root):
        raise ValueError(
            f"rank {rank} does not see {folder}, which rank 0 {action}: {root} is not the same "
            "folder for all ranks; give a path on a file system that they share"
        )


def check_files_visible(partial: Path, files_of_ranks: list[dict[str, FileRecord]]) -> None:
    """Check on rank 0 that it sees every file that the ranks have written, in full size.

    Raises:
        OSError: a file is missing or has another size.
    """
    for rank, files in enumerate(files_of_ranks):
        for name, record in files.items():

            def seen(name: str = name, record: FileRecord = record) -> bool:
                return _size(partial / name) == record.bytes

            if not _becomes_true(seen, partial):
                size = _size(partial / name)
                raise OSError(
                    f"{partial / name}, which rank {rank} wrote with {record.bytes} bytes, "
                    f"{'is missing' if size is None else f'has {size} bytes'} on rank 0; "
                    "give save() a root on a file system that all ranks share"
                )


def _becomes_true(seen: Callable[[], bool], folder: Path) -> bool:
    """Return True if ``seen`` returns True within ``SEEN_WITHIN_S``.

    Lists the folder before each try, which refreshes the cache of a network file system.
    """
    deadline, pause = time.monotonic() + SEEN_WITHIN_S, 0.01
    while not seen():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
        with suppress(OSError):
            os.listdir(folder)
    return True


def _size(path: Path) -> int | None:
    """Return a file's size, None if it is missing.

    Opening the file makes a network file system refresh its attributes.
    """
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return None


def _discard_leftovers(partial: Path) -> None:
    """Remove the leftovers of dead saves in the root of ``partial``.

    While this process has the root's lock, every other save of this machine is dead. Any save is
    dead if nothing in its folder has changed for ``DEAD_AFTER_S``.
    """
    root, locked = partial.parent, _locks[partial] is not None
    now = partial.stat().st_mtime  # by the file system's clock
    for name in os.listdir(root):
        path = root / name
        if name.startswith(REMOVED):
            discard(path)
        elif name.startswith((PARTIAL, NEW_LATEST)) and path != partial:
            dead = locked and f"-{machine()}-" in name
            try:
                if dead or now - _last_change(path) > DEAD_AFTER_S:
                    hidden = root / f"{REMOVED}{name}"
                    os.rename(path, hidden)  # if the save is alive after all, it fails as a whole
                    discard(hidden)
            except FileNotFoundError:
                pass  # another process has removed or published it
            except OSError as error:
                warn_not_removed(f"the leftover {path}", error)


def _last_change(path: Path) -> float:
    inside = [path / name for name in os.listdir(path)] if path.is_dir() else []
    return max(os.lstat(each).st_mtime for each in [path, *inside])


def _make_folders(path: Path) -> None:
    """Create a folder and its missing parents, and flush them to the disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)
