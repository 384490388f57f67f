"""The folders under a root: find complete checkpoints, and remove old ones.

A folder whose name starts with a dot is temporary and is not read. One rename publishes a
checkpoint, and one removes it. Files are flushed before they are published, and the parent folder
after each of the two renames.
"""

from __future__ import annotations

import errno
import functools
import logging
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

from .file_checksums import crc32_text, find_damage
from .manifest import MANIFEST, Manifest, is_file_name, read_manifest

LATEST = "LATEST"
REMOVED = ".removed-"
# A user's copy such as step-00000200-best does not match: it is neither counted nor removed.
_NAME = re.compile(r"step-(\d{8,})(-\d+)?")

logger = logging.getLogger("sharded_bf16_adamw")


def latest(root: str | os.PathLike[str]) -> Path | None:
    """Return the newest complete checkpoint under ``root``, or None.

    Reads names and manifests only; :func:`verify` reads all files.

    Not collective: on a network file system ranks may get different results. To resume on all ranks
    or on none, call :func:`load` with ``missing_ok=True``.

    Args:
        root: folder of all checkpoints of a run.

    Raises:
        OSError: the root or a checkpoint in it cannot be read, for example because permission is
            denied.

    Examples:
        >>> import torch
        >>> from sharded_bf16_adamw import AdamW_BF16, latest, save
        >>> model = torch.nn.Linear(4, 2).bfloat16()
        >>> optimizer = AdamW_BF16(model.parameters(), lr=1e-3)
        >>> print(latest("checkpoints"))
        None
        >>> path = save("checkpoints", 200, model, optimizer)
        >>> print(latest("checkpoints"))
        checkpoints/step-00000200
    """
    root = Path(root)
    try:
        name = (root / LATEST).read_text().strip()
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
        name = ""
    if is_file_name(name) and _has_manifest(root / name):
        return root / name
    complete = complete_checkpoints(root)
    return complete[-1] if complete else None


def find_checkpoint(path: str | os.PathLike[str]) -> Path | None:
    """Return the checkpoint at ``path``, or the latest of the run at ``path``, or None."""
    path = Path(path)
    return path if _has_manifest(path) else latest(find_root(path))


def find_root(path: str | os.PathLike[str]) -> Path:
    """Return the folder of a run's checkpoints: ``path``, or its subfolder ``checkpoints``."""
    path = Path(path)
    nested = path / "checkpoints"
    is_nested = not _named_as_checkpoints(path) and _named_as_checkpoints(nested)
    return nested if is_nested else path


def existing_checkpoint(path: str | os.PathLike[str]) -> Path:
    """Return the result of :func:`find_checkpoint`, or raise FileNotFoundError if it is None."""
    found = find_checkpoint(path)
    if found is None:
        raise no_checkpoint(path)
    return found


def no_checkpoint(path: str | os.PathLike[str]) -> FileNotFoundError:
    """Return the error for a ``path`` at which :func:`find_checkpoint` found nothing."""
    if Path(path, "config.json").is_file():
        return FileNotFoundError(
            f"there is no checkpoint at {path}; it is the folder of a Hugging Face model, whose "
            "weights import_fp32 loads"
        )
    return FileNotFoundError(
        f"there is no checkpoint at {path}; "
        "give the folder of a checkpoint, or of a run that has saved one"
    )


def newest_good(root: str | os.PathLike[str]) -> tuple[Path | None, list[str]]:
    """Find the newest checkpoint under ``root`` whose files all match their checksums.

    Starts with :func:`latest` and goes back in the order of saving, so it reads only the latest
    checkpoint if that is undamaged. Not collective: in a distributed run call it on rank 0,
    broadcast the path, and pass that to :func:`load` on every rank.

    Args:
        root: folder of all checkpoints of a run.

    Returns:
        The checkpoint's folder, or None if there is no undamaged one; and a sentence for each
        folder that was skipped because it is damaged or has no manifest. A folder without a
        readable manifest may be newer or older than the checkpoint returned.

    Raises:
        OSError: permission to read the root or a folder in it is denied.

    Examples:
        >>> import torch
        >>> from sharded_bf16_adamw import AdamW_BF16, newest_good, save
        >>> model = torch.nn.Linear(4, 2).bfloat16()
        >>> optimizer = AdamW_BF16(model.parameters(), lr=1e-3)
        >>> old, new = (save("checkpoints", step, model, optimizer) for step in (100, 200))
        >>> (new / ".metadata").unlink()
        >>> path, skipped = newest_good("checkpoints")
        >>> print(path)
        checkpoints/step-00000100
        >>> skipped
        ['the checkpoint checkpoints/step-00000200 is damaged: .metadata is missing']
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
    """Remove all but the ``keep`` newest checkpoints under ``root``, and never :func:`latest`'s.

    Not collective: call it on one process.

    Even if the process is killed, each checkpoint is complete or gone. Folders without a manifest
    are left alone. A checkpoint that cannot be removed, for example because another user owns
    it, causes a warning; the others are removed.

    Args:
        root: folder of all checkpoints of a run.
        keep: number of checkpoints to keep, at least 1.

    Returns:
        The folders removed, oldest first.

    Raises:
        ValueError: ``keep`` is less than 1.

    Examples:
        >>> import torch
        >>> from sharded_bf16_adamw import AdamW_BF16, prune, save
        >>> model = torch.nn.Linear(4, 2).bfloat16()
        >>> optimizer = AdamW_BF16(model.parameters(), lr=1e-3)
        >>> for step in (100, 200, 300):
        ...     path = save("checkpoints", step, model, optimizer)
        >>> [path.name for path in prune("checkpoints", keep=1)]
        ['step-00000100', 'step-00000200']
    """
    if keep < 1:
        raise ValueError(f"Invalid keep: {keep}; it must be at least 1")
    root = Path(root)
    newest = latest(root)
    return remove_all([path for _, path in readable_checkpoints(root)[:-keep] if path != newest])


def complete_checkpoints(root: Path) -> list[Path]:
    """Return the complete checkpoints in the order of saving.

    A checkpoint with a damaged manifest counts as older than all others.
    """
    found = [path for path in _named_as_checkpoints(root) if _has_manifest(path)]
    return sorted(found, key=lambda path: (_serial(path), path))


def readable_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """Return serial number and folder of each checkpoint, in the order of saving.

    A damaged manifest counts as serial number 0. Checkpoints whose manifest cannot be read are
    skipped: a save must not fail because of them.
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
    """Return the folders that have a checkpoint's name but no manifest, sorted by name.

    An interrupted copy or removal leaves them; a save never does.
    """
    return sorted(path for path in _named_as_checkpoints(root) if not _has_manifest(path))


def _named_as_checkpoints(root: Path) -> list[Path]:
    """Return the folders and links that have a checkpoint's name."""
    try:
        with os.scandir(root) as entries:
            named = [entry for entry in entries if _NAME.fullmatch(entry.name)]
            return [root / entry.name for entry in named if entry.is_symlink() or entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _has_manifest(path: Path) -> bool:
    """Return True if the folder has a manifest.

    Raises if permission is denied, unlike ``Path.is_file`` in some versions of Python.
    """
    try:
        return stat.S_ISREG(os.stat(path / MANIFEST).st_mode)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise
        return False


def remove(path: Path) -> None:
    """Remove a checkpoint by one rename; the target of a link is left alone.

    Raises:
        OSError: the checkpoint cannot be removed; nothing has changed.
    """
    if path.is_symlink():
        path.unlink()
        return
    hidden = path.with_name(f"{REMOVED}{path.name}{unique_suffix()}")
    os.rename(path, hidden)
    sync_folder(path.parent)  # the new name must reach the disk before the files go
    discard(hidden)


def remove_older(newest: Path, manifest: Manifest, keep: int | None) -> None:
    """Remove the checkpoints that ``newest``, just published, replaces.

    These are the earlier saves of its step, and all but the ``keep`` newest, itself included; None
    keeps all of those. Checkpoints that another job has published since are left alone. A
    checkpoint that cannot be removed causes a warning.
    """
    older = [
        path for serial, path in readable_checkpoints(newest.parent) if serial < manifest.serial
    ]
    replaced = [path for path in older if _step(path) == manifest.step]
    rest = [path for path in older if path not in replaced]
    remove_all(replaced + (rest[: max(0, len(rest) - keep + 1)] if keep is not None else []))


def remove_all(paths: list[Path]) -> list[Path]:
    """Remove checkpoints, warn about those that cannot be removed, and return the removed ones."""
    removed = []
    for path in paths:
        try:
            remove(path)
        except FileNotFoundError:
            continue  # another process has removed it
        except OSError as error:
            warn_not_removed(f"the older checkpoint {path}", error)
            continue
        logger.debug("removed older checkpoint %s", path)
        removed.append(path)
    return removed


def discard(path: Path) -> None:
    """Remove a temporary folder, file or link, and warn if something is left."""
    try:
        if path.is_symlink() or not path.is_dir():
            path.unlink()
            return
        shutil.rmtree(path, ignore_errors=True)  # frees what it can
        if os.path.lexists(path):
            shutil.rmtree(path)  # raises the reason
    except FileNotFoundError:
        pass  # another process removes it too
    except OSError as error:
        warn_not_removed(f"the leftover {path}", error)


def warn_not_removed(what: str, error: OSError) -> None:
    """Warn that a folder is left on the disk."""
    warnings.warn(f"{what} could not be removed ({error}); remove it yourself", stacklevel=3)


def unique_suffix() -> str:
    """Return the suffix of a temporary name: the machine, and a random token."""
    return f"-{machine()}-{secrets.token_hex(4)}"


@functools.cache
def machine() -> str:
    """Return 8 hexadecimal digits that identify this boot of this machine, also in containers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        boot = platform.node()
    return crc32_text(zlib.crc32(boot.encode()))


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to the disk, if its file system can do that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def _serial(path: Path) -> int:
    """Return the serial number of a checkpoint, 0 if its manifest is damaged or missing."""
    try:
        return read_manifest(path).serial
    except (OSError, ValueError):
        return 0


def _step(path: Path) -> int:
    """Return the step in a checkpoint's name: ``step-00000200-2`` -> 200."""
    return int(path.name.split("-")[1])
