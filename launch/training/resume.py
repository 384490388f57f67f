"""Choice of the checkpoint that ``train.py`` resumes from, and checks against its run."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from sharded_bf16_adamw import newest_good
from sharded_bf16_adamw.checkpoint import directory
from sharded_bf16_adamw.checkpoint.manifest import read_manifest
from sharded_bf16_adamw.checkpoint.root_lock import RootLock, lock_if_possible
from training.build import make_schedule
from training.errors import UsageError
from training.strategies import from_rank_0

# Linux kills the workers of a dead torchrun, but freeing their memory takes a while.
LOCK_WAIT_S = 10.0
# Options that do not change what is trained. All others are the run's configuration.
OPERATIONAL = {
    *("strategy", "device", "deterministic", "optimizer_backend", "grad_accum"),
    *("eval_every", "eval_batches", "out", "save_every", "async_save", "keep", "resume"),
    *("check_replicas", "precision_stats", "max_nonfinite", "progress", "print_every"),
    *("grace", "step_timeout", "export_hf"),
}


def lock_out_dir(args: argparse.Namespace) -> RootLock | None:
    """Create ``--out`` and lock it; None if its file system has no locks.

    Raises:
        UsageError: another run uses it, or it cannot be written to.
    """
    out_dir = Path(args.out)
    deadline = time.monotonic() + LOCK_WAIT_S
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                return lock_if_possible(out_dir)
            except RuntimeError as error:
                if time.monotonic() > deadline:
                    raise UsageError(f"--out {out_dir} is in use: {error}.") from None
            time.sleep(0.1)
    except OSError as error:
        raise UsageError(
            f"--out {out_dir} cannot be used ({error.strerror}): "
            "give a directory that you may read and write."
        ) from None


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    """Return the checkpoint to continue from, or None to start from scratch. Collective.

    Rank 0 searches for all ranks: others may see an older state of a network file system.

    Raises:
        UsageError: on all ranks, if ``--resume`` names no checkpoint, or it is of another run.
    """
    return from_rank_0(_readable, _find, args)


def find_undamaged(args: argparse.Namespace, damaged: Path) -> Path | None:
    """Return the newest undamaged checkpoint in place of a damaged one. Collective.

    None if ``--resume`` is given, or if no checkpoint is undamaged.
    """
    if args.resume is not None:
        return None
    found = from_rank_0(_readable, _newest_good, args, damaged.parent)
    return None if found == damaged else found


def suggest_undamaged(args: argparse.Namespace, path: Path) -> str:
    """Return the part of an error about ``path`` that names an undamaged checkpoint. Collective."""
    return from_rank_0(_suggest_undamaged, args, path)


def _readable(function: Any, *args: Any) -> Any:
    try:
        return function(*args)
    except OSError as error:
        raise UsageError(
            f"{error.filename} cannot be read ({error.strerror}): "
            "give a directory that you may read."
        ) from error


def _find(args: argparse.Namespace) -> Path | None:
    root = Path(args.out) / "checkpoints"
    if args.resume is None:
        return _find_own(args, root)
    if args.resume == "auto":
        path = directory.latest(root)
    elif args.resume == "newest-good":
        path = _newest_good(args, root)
    else:
        path = _find_given(args, root)
    if path is not None:
        extra = _read_extra(path, args)
        _check_model(path, args, extra["config"])
        if extra["step"] > args.steps:
            raise UsageError(
                f"the checkpoint {path} is at step {extra['step']}, past --steps {args.steps}: "
                "increase --steps to continue training."
            )
        _note_changes(args, extra)
    return path


def _find_own(args: argparse.Namespace, root: Path) -> Path | None:
    """Return the latest checkpoint of a run of the same configuration in ``--out``."""
    path = directory.latest(root)
    if path is None:
        if directory.incomplete_checkpoints(root) or (root.parent / "metrics.jsonl").exists():
            print(
                f"note: {root} has no checkpoint yet: the run starts from scratch", file=sys.stderr
            )
        return None
    try:
        read_manifest(path)
    except ValueError:
        path = _newest_good(args, root)
        assert path is not None
    changed = _changes(args, _read_extra(path, args)["config"])
    if changed:
        raise UsageError(
            f"--out {args.out} holds a run of another configuration "
            f"({'; '.join(changed)}): give the same options to continue it, add --resume auto to "
            "continue it with these, or give another --out to start from scratch."
        )
    return path


def _find_given(args: argparse.Namespace, root: Path) -> Path:
    """Return the checkpoint at ``--resume PATH``, or a newer one that this command has saved.

    A command that is restarted must not lose what it has trained since.
    """
    given = Path(args.resume)
    path = directory.find_checkpoint(given) or directory.latest(given / "checkpoints")
    if path is None:
        raise UsageError(
            f"--resume {given} is neither a checkpoint nor a directory with one: "
            "check the path, or use --resume auto."
        )
    own = directory.latest(root)
    if own is not None and own != path:
        try:
            config = read_manifest(own).extra.get("config", {})
        except ValueError:
            return path
        if config.get("resume") == args.resume and not _changes(args, config):
            print(
                f"note: continuing from {own}, which this command has saved after it resumed from "
                f"{path}; give --resume {own} or another --out to choose",
                file=sys.stderr,
            )
            return own
    return path


def _newest_good(args: argparse.Namespace, root: Path) -> Path | None:
    path, skipped = newest_good(root)
    for reason in skipped:
        print(f"note: {reason}", file=sys.stderr)
    if path is None and skipped:
        raise UsageError(
            f"no checkpoint in {root} is undamaged: give --resume the path of another one, "
            "or another --out to start from scratch."
        )
    return path


def _read_extra(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    try:
        extra = read_manifest(path).extra
    except (OSError, ValueError) as error:
        raise UsageError(f"{error}{_suggest_undamaged(args, path)}") from error
    if "step" not in extra or "config" not in extra:
        raise UsageError(
            f"the checkpoint {path} was not saved by train.py: give --resume a checkpoint that was."
        )
    return extra


def _changes(args: argparse.Namespace, saved: dict[str, Any]) -> list[str]:
    """Return the options of the configuration that changed, for a message."""
    given = json.loads(json.dumps(vars(args)))  # tuples as lists, as in the manifest
    return [
        f"{option(name)} was {saved[name]}, now {given[name]}"
        for name in sorted(given.keys() & saved.keys() - OPERATIONAL)
        if saved[name] != given[name]
    ]


def option(name: str) -> str:
    """Return the command-line option of an attribute of ``args``."""
    return f"--{name.replace('_', '-')}"


def _check_model(path: Path, args: argparse.Namespace, saved: dict[str, Any]) -> None:
    """Raise UsageError if the checkpoint is of another model or optimizer."""
    given = vars(args)
    if (saved.get("model") is None) != (given["model"] is None):
        name = "preset" if saved.get("model") is None else "model"
        raise UsageError(
            f"the checkpoint {path} was trained with --{name} {saved[name]}: give that option, or "
            "another --out to start from scratch."
        )
    for name in ("preset", "optimizer"):
        if saved.get(name, given[name]) != given[name]:
            raise UsageError(
                f"the checkpoint {path} was trained with --{name} {saved[name]}, "
                f"not {given[name]}: give --{name} {saved[name]}, "
                "or another --out to start from scratch."
            )


def _note_changes(args: argparse.Namespace, extra: dict[str, Any]) -> None:
    """Print what changes in a run that is resumed with another configuration."""
    changed = _changes(args, extra["config"])
    if changed:
        print(f"note: changed since the checkpoint: {'; '.join(changed)}", file=sys.stderr)
    before = argparse.Namespace(**{**vars(args), **extra["config"]})
    lrs = [make_schedule(namespace)(extra["step"]) for namespace in (before, args)]
    if lrs[0] != lrs[1]:
        print(
            f"note: the schedule jumps: the learning rate of the next step is {lrs[1]:.4g}, "
            f"not {lrs[0]:.4g}",
            file=sys.stderr,
        )


def _suggest_undamaged(args: argparse.Namespace, path: Path) -> str:
    try:
        good, _ = newest_good(path.parent)
    except OSError as error:
        return f"; other checkpoints could not be checked ({error})"
    if good is None:
        return f"; no checkpoint in {path.parent} is undamaged"
    if good == path:
        return ""
    return f"; {good} is undamaged: use --resume {'newest-good' if args.resume == 'auto' else good}"
