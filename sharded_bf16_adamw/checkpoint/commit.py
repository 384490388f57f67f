"""One save's way to the disk: begun under a temporary name, published by one rename, or abandoned.

Two jobs may save to one root by mistake, on one machine or two. Where locks work, the second gets
an error (:mod:`.root_lock`). Where they do not, neither harms the other: temporary names are
unique, a leftover is removed only once its save must be dead, and a save removes only checkpoints
with a smaller serial number than its own.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .directory import (
    LATEST,
    REMOVED,
    discard,
    machine,
    readable_checkpoints,
    remove_all,
    sync_folder,
    unique_suffix,
    write_durably,
)
from .manifest import MANIFEST, FileRecord, Manifest
from .root_lock import RootLock, lock_if_possible

PARTIAL, NEW_LATEST = ".partial-", f".{LATEST}"
# Of leftovers that no lock tells of. A save whose ranks stand still fails sooner: collectives time out.
DEAD_AFTER_S = 3600
# Network file systems cache attributes, but ask the server for names that they have not looked up.
SEEN_WITHIN_S = 10.0
UNPUBLISHED = 0  # serial number of a manifest until :func:`publish` gives it the next one
_locks: dict[Path, RootLock | None] = {}  # by partial folder, of the saves of this process
_published: dict[Path, int] = {}  # by root, the serial number of what this process published last


def begin(root: Path, step: int) -> tuple[Path, Path]:
    """Remove what dead saves left, and make an empty folder to write to.

    :func:`release` or :func:`abandon` ends it.

    Returns:
        That folder, and the name that the checkpoint will have: a free one, as a resumed run may
        come by the same step again.

    Raises:
        RuntimeError: another save to ``root`` is under way, or another job has saved there since this one's last save.
    """
    _make_folders(root)
    serial, newest = max(readable_checkpoints(root), default=(0, root))
    if serial > _published.get(root, serial):
        raise RuntimeError(
            f"another job has saved {newest} since this job's last save there; end one of them, or give each a root of its own, or each "
            "would remove the other's checkpoints and resume from them"
        )
    partial = root / f"{PARTIAL}step-{step:08d}{unique_suffix()}"
    _locks[partial] = None
    with abandoned_on_error([partial]):
        _locks[partial] = lock_if_possible(root)
        final, copy = root / f"step-{step:08d}", 1
        while os.path.lexists(final):
            copy += 1
            final = root / f"step-{step:08d}-{copy}"
        partial.mkdir()
        _discard_leftovers(partial)
    return partial, final


def publish(partial: Path, final: Path, manifest: Manifest) -> None:
    """Make a folder, whose other files are on the disk, the latest checkpoint.

    Raises:
        FileExistsError: another job, which no lock kept out, has published a checkpoint of this
            name.
    """
    root = final.parent
    manifest.serial = 1 + max((serial for serial, _ in readable_checkpoints(root)), default=0)
    write_durably(partial / MANIFEST, manifest.to_bytes())
    sync_folder(partial)
    try:
        os.rename(partial, final)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise FileExistsError(
            f"another job has saved {final} in the meantime; give each job a root of its own"
        ) from error
    _published[root] = manifest.serial
    sync_folder(root)  # LATEST must not be on the disk before what it names
    temporary = root / f"{NEW_LATEST}{unique_suffix()}"
    try:
        write_durably(temporary, f"{final.name}\n".encode())
        os.replace(temporary, root / LATEST)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(root)


def remove_older(newest: Path, manifest: Manifest, keep: int | None) -> None:
    """Remove what ``newest``, just published, replaces.

    That is earlier saves of its step, and all but the ``keep`` newest. Checkpoints that another job
    has published since are left alone. Failing to remove one is a warning.
    """
    older = [
        path for serial, path in readable_checkpoints(newest.parent) if serial < manifest.serial
    ]
    replaced = [path for path in older if _step(path) == manifest.step]
    rest = [path for path in older if path not in replaced]
    remove_all(replaced + (rest[: max(0, len(rest) - keep + 1)] if keep is not None else []))


def release(partial: Path) -> None:
    """End the save that :func:`begin` began, and let others save.

    Does nothing if this process did not begin it, or has ended it.
    """
    lock = _locks.pop(partial, None)
    if lock is not None:
        lock.release()


def abandon(partial: Path) -> None:
    """End the save, and free the space of what was written: a full disk is the likeliest error."""
    try:
        if partial in _locks:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        release(partial)


@contextmanager
def abandoned_on_error(begun: list[Path]) -> Iterator[None]:
    """Abandon the saves that are in ``begun`` by then if the body raises, or is interrupted."""
    try:
        yield
    except BaseException:
        for partial in begun:
            abandon(partial)
        raise


def check_shared(root: Path, folder: Path, rank: int, does: str = "has made") -> None:
    """Check that this rank sees a folder in ``root`` that rank 0 has just made, or reads.

    A new one's name is unique: it cannot be another one.

    Raises:
        ValueError: it does not see it.
    """
    if not _within_patience(folder.is_dir, root):
        raise ValueError(
            f"rank {rank} does not see {folder}, which rank 0 {does}: {root} is not the same folder for all ranks; "
            "give a root on a file system that they share"
        )


def check_arrived(partial: Path, files_of_ranks: list[dict[str, FileRecord]]) -> None:
    """Check that this rank sees every file that the ranks have written, with its size.

    Raises:
        OSError: it does not see one so.
    """
    for rank, files in enumerate(files_of_ranks):
        for name, record in files.items():

            def seen(name: str = name, record: FileRecord = record) -> bool:
                return _size(partial / name) == record.bytes

            if not _within_patience(seen, partial):
                size = _size(partial / name)
                raise OSError(
                    f"{partial / name}, which rank {rank} wrote with {record.bytes} bytes, "
                    f"{'is missing' if size is None else f'has {size} bytes'} here; "
                    "give save() a root on a file system that all ranks share"
                )


def _within_patience(seen: Callable[[], bool], folder: Path) -> bool:
    """Return whether ``seen`` becomes true soon.

    What another host wrote may appear late: list the folder anew before each try.
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

    Opening it makes a network file system ask for its attributes anew.
    """
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return None


def _discard_leftovers(partial: Path) -> None:
    """Remove what other saves to the root of ``partial`` left, if they must be dead.

    They are if this process has the lock that they would hold on this machine, or if nothing in
    them has changed for so long.
    """
    root, locked = partial.parent, _locks[partial] is not None
    now = partial.stat().st_mtime  # of the file system's own clock
    for name in os.listdir(root):
        path = root / name
        if name.startswith(REMOVED):
            discard(path)
        elif name.startswith((PARTIAL, NEW_LATEST)) and path != partial:
            dead = locked and f"-{machine()}-" in name
            try:
                if dead or now - _last_change(path) > DEAD_AFTER_S:
                    hidden = root / f"{REMOVED}{name}"
                    os.rename(path, hidden)  # if it lives after all, it fails as a whole
                    discard(hidden)
            except FileNotFoundError:
                pass  # another process has removed or published it
            except OSError as error:
                warnings.warn(
                    f"{path} is left over and could not be removed ({error}); remove it yourself",
                    stacklevel=2,
                )


def _last_change(path: Path) -> float:
    inside = [path / name for name in os.listdir(path)] if path.is_dir() else []
    return max(os.lstat(each).st_mtime for each in [path, *inside])


def _step(path: Path) -> int:
    """``step-00000200-2`` -> 200."""
    return int(path.name.split("-")[1])


def _make_folders(path: Path) -> None:
    """Make a folder and those above it that are missing, and flush them to the disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)
