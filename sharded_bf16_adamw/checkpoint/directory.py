"""The folders under a root: which are complete, which is the latest, and how they are removed.

A name that starts with a dot is work in progress or rubbish: nobody reads it. Everything appears by
one rename and disappears by one. Before a rename the content is flushed to the disk, and the folder
after it.
"""

from __future__ import annotations

import errno
import functools
import os
import platform
import re
import secrets
import shutil
import stat
import warnings
import zlib
from contextlib import suppress
from pathlib import Path

from .manifest import MANIFEST, Manifest, crc32_text, find_damage, read_manifest

LATEST = "LATEST"
REMOVED = ".removed-"
_NAME = re.compile(
    r"step-(\d{8,})(-\d+)?"
)  # a copy that somebody keeps as step-00000200-best is not one of ours to count or remove


def latest(root: str | os.PathLike[str]) -> Path | None:
    """Return the newest complete checkpoint under ``root``, or None.

    Reads names and manifests; :func:`verify` reads it all.

    Each process looks for itself, and on a network file system ranks may see different states. To
    resume on all ranks or on none, call :func:`load` with ``missing_ok=True``.

    Raises:
        OSError: the root or a checkpoint in it cannot be read, for example because permission is
            denied.
    """
    root = Path(root)
    try:
        path = root / (root / LATEST).read_text().strip()
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
        path = root
    if path.parent == root and path != root and _has_manifest(path):
        return path
    complete = complete_checkpoints(root)
    return complete[-1] if complete else None


def find_checkpoint(path: str | os.PathLike[str]) -> Path | None:
    """Return the checkpoint at ``path``, or the latest if that is the root of a run.

    None if there is none.
    """
    path = Path(path)
    return path if _has_manifest(path) else latest(path)


def no_checkpoint(path: str | os.PathLike[str]) -> FileNotFoundError:
    """What to raise where :func:`find_checkpoint` found none."""
    return FileNotFoundError(
        f"there is no checkpoint at {path}; give the folder of a checkpoint or of a run that has saved one"
    )


def newest_good(root: str | os.PathLike[str]) -> tuple[Path | None, list[str]]:
    """Find the newest checkpoint under ``root`` whose files all match their checksums.

    Starts with :func:`latest` and goes back in the order of saving, so an undamaged latest
    checkpoint is the only one that is read. For one process: in a distributed run call it on rank
    0, broadcast the path, and pass that to :func:`load` on every rank.

    Args:
        root: folder of all checkpoints of a run.

    Returns:
        The checkpoint's folder, or None if there is no undamaged one; and a sentence for each
        folder that was skipped, because it is damaged or has no manifest. A folder without a
        readable manifest may be newer or older than the checkpoint returned.

    Raises:
        OSError: the root or a folder in it may not be read.
    """
    root = Path(root)
    first = latest(root)
    rest = [path for path in reversed(complete_checkpoints(root)) if path != first]
    unordered = [path for path in rest if _serial(path) == 0]
    ordered = [path for path in rest if path not in unordered]
    skipped = [f"{path} has no {MANIFEST}" for path in incomplete_checkpoints(root)]
    for path in [*([first] if first else []), *unordered, *ordered]:
        try:
            damage = find_damage(path, read_manifest(path).files)
        except (FileNotFoundError, ValueError) as error:
            skipped.append(str(error))
            continue
        if not damage:
            return path, skipped
        skipped.append(f"the checkpoint {path} is damaged: {'; '.join(damage)}")
    return None, skipped


def prune(root: str | os.PathLike[str], keep: int) -> list[Path]:
    """Remove all checkpoints under ``root`` but the ``keep`` newest; never the latest.

    For one process.

    A kill at any point leaves each checkpoint whole or gone. Folders without a manifest are left
    alone. A checkpoint that cannot be removed, for example because it is another user's, is a
    warning; the others are removed.

    Returns:
        The folders removed, oldest first.

    Raises:
        ValueError: ``keep`` is less than 1.
    """
    if keep < 1:
        raise ValueError(f"Invalid keep: {keep}; it must be at least 1")
    root = Path(root)
    newest = latest(root)
    return remove_all([path for _, path in readable_checkpoints(root)[:-keep] if path != newest])


def complete_checkpoints(root: Path) -> list[Path]:
    """Return the complete checkpoints in the order of saving.

    One whose manifest is damaged counts as older than all others.
    """
    found = [path for path in _named_as_checkpoints(root) if _has_manifest(path)]
    return sorted(found, key=lambda path: (_serial(path), path))


def readable_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """Return serial number and folder of each checkpoint that may be read, in the order of saving.

    Nobody can say how old the others are, and they are no reason for a save to fail.
    """
    found = []
    for path in _named_as_checkpoints(root):
        with suppress(OSError):
            content = (path / MANIFEST).read_bytes()
            try:
                found.append((Manifest.from_bytes(content).serial, path))
            except ValueError:
                found.append((0, path))
    return sorted(found)


def incomplete_checkpoints(root: Path) -> list[Path]:
    """Return the folders that have a checkpoint's name but no manifest, by name.

    No save leaves one: a copy or a removal was cut short.
    """
    return sorted(path for path in _named_as_checkpoints(root) if not _has_manifest(path))


def _named_as_checkpoints(root: Path) -> list[Path]:
    """Return the folders, and links, that have a checkpoint's name."""
    try:
        with os.scandir(root) as entries:
            named = [entry for entry in entries if _NAME.fullmatch(entry.name)]
            return [root / entry.name for entry in named if entry.is_symlink() or entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _has_manifest(path: Path) -> bool:
    """Return whether the folder has a manifest.

    Unlike ``Path.is_file`` in some versions of Python, raise if that cannot be seen.
    """
    try:
        return stat.S_ISREG(os.stat(path / MANIFEST).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def remove(path: Path) -> None:
    """Remove a checkpoint. It disappears by one rename; of a link, the target is left alone.

    Raises:
        OSError: it cannot be removed; nothing has changed.
    """
    if path.is_symlink():
        path.unlink()
        return
    hidden = path.with_name(f"{REMOVED}{path.name}{unique_suffix()}")
    os.rename(path, hidden)
    sync_folder(path.parent)  # what is missing from it must not be on the disk before its new name
    discard(hidden)


def remove_all(paths: list[Path]) -> list[Path]:
    """Remove checkpoints, and warn of those that cannot be removed. Return those that were."""
    removed = []
    for path in paths:
        try:
            remove(path)
        except FileNotFoundError:
            continue  # another process has removed it
        except OSError as error:
            warnings.warn(
                f"the older checkpoint {path} could not be removed ({error}); remove it yourself",
                stacklevel=2,
            )
            continue
        removed.append(path)
    return removed


def discard(path: Path) -> None:
    """Remove a folder, file or link that nobody reads, as far as possible.

    Warn if something is left.
    """
    try:
        if path.is_symlink() or not path.is_dir():
            path.unlink()
            return
        shutil.rmtree(path, ignore_errors=True)  # frees what it can
        if os.path.lexists(path):
            shutil.rmtree(path)  # says why it cannot
    except FileNotFoundError:
        pass  # another process removes it too
    except OSError as error:
        warnings.warn(
            f"{path} is left over and could not be removed ({error}); remove it yourself",
            stacklevel=2,
        )


def unique_suffix() -> str:
    """Return the end of a temporary name: which machine made it, and a random token."""
    return f"-{machine()}-{secrets.token_hex(4)}"


@functools.cache
def machine() -> str:
    """Return 8 hexadecimal digits for this boot of this machine.

    Processes in its containers share them.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        boot = platform.node()
    return crc32_text(zlib.crc32(boot.encode()))


def write_durably(path: Path, content: bytes) -> None:
    """Write a new file and flush it to the disk."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flush a folder's list of names to the disk, if its file system can do that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def _serial(path: Path) -> int:
    """Return the serial number of a checkpoint, 0 if its manifest is damaged or gone."""
    try:
        return read_manifest(path).serial
    except (OSError, ValueError):
        return 0
