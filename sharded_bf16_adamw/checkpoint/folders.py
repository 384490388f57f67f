"""The folders under a root: which are complete, which is the latest, and changes that a crash at any point cannot spoil.

A name that starts with a dot is work in progress or rubbish, so nobody reads it, and the next save removes it. Everything appears by
one rename and disappears by one. Before a rename the content is flushed to the disk, and the folder after it.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from .manifest import MANIFEST, find_damage, read_manifest

LATEST = "LATEST"
_PARTIAL, _REMOVED = ".partial-", ".removed-"
_NAME = re.compile(r"step-(\d{8,})(-\d+)?")  # a copy that somebody keeps as step-00000200-best is not one of ours to count or remove


def latest(root: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint under ``root``, or None. Reads names and manifests; :func:`verify` reads it all."""
    root = Path(root)
    try:
        path = root / (root / LATEST).read_text().strip()
    except (OSError, UnicodeDecodeError):
        path = root
    if path.parent == root and path != root and (path / MANIFEST).is_file():
        return path
    complete = complete_checkpoints(root)
    return complete[-1] if complete else None


def find_checkpoint(path: str | os.PathLike[str]) -> Path | None:
    """The checkpoint that ``path`` means: its folder, or the root of a run, which stands for its latest; None where there is none."""
    path = Path(path)
    return path if (path / MANIFEST).is_file() else latest(path)


def no_checkpoint(path: str | os.PathLike[str]) -> FileNotFoundError:
    """What to raise where :func:`find_checkpoint` found none."""
    return FileNotFoundError(f"there is no checkpoint at {path}; give the folder of a checkpoint or of a run that has saved one")


def newest_good(root: str | os.PathLike[str]) -> tuple[Path | None, list[str]]:
    """Find the newest checkpoint under ``root`` that is undamaged, by comparing every file with its checksum.

    Starts with :func:`latest` and goes back in the order of saving, so an undamaged latest checkpoint is the only one that is read.
    For one process: in a distributed run call it on rank 0, broadcast the path, and pass that to :func:`load` on every rank.

    Args:
        root: folder of all checkpoints of a run.

    Returns:
        The checkpoint's folder, or None if there is no undamaged one; and a sentence for each folder that was skipped, because it is
        damaged or has no manifest. A folder without a readable manifest may be newer or older than the checkpoint returned.
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
    """Remove all checkpoints under ``root`` but the ``keep`` newest; never the latest. For one process.

    A kill at any point leaves each checkpoint whole or gone.

    Returns:
        The folders removed, oldest first.

    Raises:
        ValueError: ``keep`` is less than 1.
    """
    if keep < 1:
        raise ValueError(f"Invalid keep: {keep}; it must be at least 1")
    root = Path(root)
    newest = latest(root)
    old = [path for path in complete_checkpoints(root) if path != newest]
    removed = old[: max(0, len(old) + (newest is not None) - keep)]
    for path in removed:
        remove(path)
    return removed


def complete_checkpoints(root: Path) -> list[Path]:
    """In the order in which they were saved. One whose manifest is damaged counts as older than all others."""
    found = [path.parent for path in root.glob(f"step-*/{MANIFEST}") if _NAME.fullmatch(path.parent.name)]
    return sorted(found, key=lambda path: (_serial(path), path))


def incomplete_checkpoints(root: Path) -> list[Path]:
    """Return the folders that have a checkpoint's name but no manifest, by name. No save leaves one: a copy or a removal was cut short."""
    found = [path for path in root.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(path for path in found if not (path / MANIFEST).exists())


def begin(root: Path, step: int) -> tuple[Path, Path, int]:
    """Remove what failed saves left and make an empty folder to write to.

    Returns:
        That folder, the name that the checkpoint will have (one that is free: a resumed run may come by the same step again), and
        its serial number.
    """
    _make_folders(root)
    for leftover in [*root.glob(f"{_PARTIAL}*"), *root.glob(f"{_REMOVED}*"), *root.glob(f".{LATEST}*")]:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    complete = complete_checkpoints(root)
    final, copy = root / f"step-{step:08d}", 1
    while final.exists():
        copy += 1
        final = root / f"step-{step:08d}-{copy}"
    partial = root / f"{_PARTIAL}{final.name}"
    partial.mkdir()
    return partial, final, 1 + max((_serial(path) for path in complete), default=0)


def publish(partial: Path, final: Path, manifest: bytes) -> None:
    """Make a folder, whose other files are on the disk, the latest checkpoint."""
    write_durably(partial / MANIFEST, manifest)
    sync_folder(partial)
    os.rename(partial, final)
    sync_folder(final.parent)  # LATEST must not be on the disk before what it names
    temporary = final.with_name(f".{LATEST}")
    write_durably(temporary, f"{final.name}\n".encode())
    os.replace(temporary, final.with_name(LATEST))
    sync_folder(final.parent)


def remove_older(newest: Path, step: int, keep: int | None) -> None:
    """After ``newest`` was published: remove earlier saves of the same step, and all but the ``keep`` newest."""
    for path in complete_checkpoints(newest.parent):
        if path != newest and _step(path) == step:
            remove(path)
    if keep is not None:
        prune(newest.parent, keep)


def remove(path: Path) -> None:
    """Remove a checkpoint, at once as far as others can see."""
    hidden = path.with_name(f"{_REMOVED}{path.name}")
    if hidden.exists():
        shutil.rmtree(hidden)
    os.rename(path, hidden)
    sync_folder(path.parent)  # what is missing from it must not be on the disk before its new name
    shutil.rmtree(hidden)


def _step(path: Path) -> int:
    """``step-00000200-2`` -> 200."""
    return int(path.name.split("-")[1])


def write_durably(path: Path, content: bytes) -> None:
    """Write a new file and flush it to the disk."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _make_folders(path: Path) -> None:
    """Make a folder and those above it that are missing, and flush them to the disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)


def sync_folder(path: Path) -> None:
    """Flush a folder's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _serial(path: Path) -> int:
    try:
        return read_manifest(path).serial
    except (OSError, ValueError):
        return 0
