"""Choose the checkpoint that ``train.py`` resumes from, and compare its run with this one."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sharded_bf16_adamw import load, newest_good
from sharded_bf16_adamw.checkpoint import directory
from sharded_bf16_adamw.checkpoint.manifest import Manifest, read_manifest
from training.build import make_schedule
from training.config import changes
from training.errors import UsageError
from training.run_state import Run
from training.world import call_on_rank_0


def resume(run: Run) -> None:
    """Load the checkpoint to resume from, if any, and the loop's state. Collective."""
    path = find_checkpoint(run.args)
    if path is None:
        return
    try:
        extra = load(path, run.wrapped_model, run.optimizer).extra
    except (FileNotFoundError, ValueError, RuntimeError) as error:
        other = find_newest_good(run.args, path)
        if other is None:
            raise UsageError(f"{error}{suggest_newest_good(run.args, path)}") from error
        path, extra = other, load(other, run.wrapped_model, run.optimizer).extra
    run.step = run.last_checkpoint_step = extra["step"]
    run.evaluated_step = extra.get("evaluated_step", -1)
    run.held_out_loss = extra.get("held_out_loss", math.nan)
    run.nonfinite_steps = extra.get("nonfinite_steps", 0)
    run.consecutive_nonfinite = extra.get("consecutive_nonfinite", 0)
    if "spikes" in extra:
        run.spike_filter.load(extra["spikes"])
    run.last_checkpoint = path


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    """Return the checkpoint to continue from, or None to start from scratch. Collective.

    Rank 0 searches for all ranks: others may see an older state of a network file system.

    Raises:
        UsageError: on all ranks, if the checkpoint is missing, unreadable, not saved by train.py,
            past ``--steps``, or of another model, optimizer or (without ``--resume``)
            configuration.
    """
    return call_on_rank_0(_call_with_usage_errors, _find, args)


def find_newest_good(args: argparse.Namespace, damaged: Path) -> Path | None:
    """Return the newest undamaged checkpoint, or None if there is none. Collective.

    Also return None if ``--resume`` is given, or if ``damaged`` itself passes its checksums.

    Raises:
        UsageError: on all ranks, if that checkpoint is of another configuration.
    """
    if args.resume is not None:
        return None
    return call_on_rank_0(_call_with_usage_errors, _find_other, args, damaged)


def suggest_newest_good(args: argparse.Namespace, path: Path) -> str:
    """Return the part of an error about ``path`` that names an undamaged checkpoint. Collective."""
    return call_on_rank_0(_suggest_newest_good, args, path)


def _call_with_usage_errors(function: Any, *args: Any) -> Any:
    try:
        return function(*args)
    except OSError as error:
        raise UsageError(
            f"{error.filename or 'a file of the checkpoints'} cannot be read ({error.strerror}): "
            "give a directory that you may read."
        ) from error


def _find_other(args: argparse.Namespace, damaged: Path) -> Path | None:
    path = _newest_good(damaged.parent)
    if path is None or path == damaged:
        return None
    _check_same_config(path, args)
    return path


def _find(args: argparse.Namespace) -> Path | None:
    path = _select(args)
    if path is not None:
        _note_changes(args, _read_manifest(path, args))
    return path


def _select(args: argparse.Namespace) -> Path | None:
    root = Path(args.out) / "checkpoints"
    if args.resume is None:
        return _find_own(args, root)
    if args.resume == "auto":
        path = directory.latest(root)
    elif args.resume == "newest-good":
        path = _required_newest_good(root)
    else:
        path = _find_given(args, root)
    if path is not None:
        extra = _read_manifest(path, args).extra
        _check_model(path, args, extra["config"])
        if extra["step"] > args.steps:
            raise UsageError(
                f"the checkpoint {path} is at step {extra['step']}, past --steps {args.steps}: "
                "increase --steps to continue training."
            )
    return path


def _find_own(args: argparse.Namespace, root: Path) -> Path | None:
    """Return the latest checkpoint in ``--out``, which must have the same configuration."""
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
        path = _required_newest_good(root)
        assert path is not None
    _check_same_config(path, args)
    return path


def _check_same_config(path: Path, args: argparse.Namespace) -> None:
    saved = _read_manifest(path, args).extra["config"]
    changed = changes(vars(args), saved, operational=False)
    if changed:
        raise UsageError(
            f"--out {args.out} holds a run of another configuration "
            f"({'; '.join(changed)}): give the same options to continue it, add --resume auto to "
            "continue it with these, or give another --out to start from scratch."
        )


def _find_given(args: argparse.Namespace, root: Path) -> Path:
    """Return the checkpoint at ``--resume PATH``, or the latest that this command has saved since.

    So a command that is started again does not start over from ``PATH``.
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
        skipped: list[str] = []
        try:
            config = read_manifest(own).extra.get("config", {})
        except ValueError:
            own, skipped = newest_good(root)
            config = {} if own is None else read_manifest(own).extra.get("config", {})
        is_same = not changes(vars(args), config, operational=False)
        if own is not None and config.get("resume") == args.resume and is_same:
            _print_skipped(skipped)
            print(
                f"note: continuing from {own}, which this command has saved after it resumed from "
                f"{path}; give --resume {own} or another --out to choose",
                file=sys.stderr,
            )
            return own
    return path


def _newest_good(root: Path) -> Path | None:
    """Return the newest undamaged checkpoint, and print why others were skipped."""
    path, skipped = newest_good(root)
    _print_skipped(skipped)
    return path


def _print_skipped(reasons: list[str]) -> None:
    for reason in reasons:
        print(f"note: {reason}", file=sys.stderr)


def _required_newest_good(root: Path) -> Path | None:
    """Return the newest undamaged checkpoint, or None if no save has been completed."""
    path = _newest_good(root)
    if path is None and directory.latest(root) is not None:
        raise UsageError(
            f"no checkpoint in {root} is undamaged: give --resume the path of another one, "
            "or another --out to start from scratch."
        )
    return path


def _read_manifest(path: Path, args: argparse.Namespace) -> Manifest:
    try:
        manifest = read_manifest(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{error}{_suggest_newest_good(args, path)}") from error
    if "step" not in manifest.extra or "config" not in manifest.extra:
        raise UsageError(
            f"the checkpoint {path} was not saved by train.py: give --resume a checkpoint that was."
        )
    return manifest


def _check_model(path: Path, args: argparse.Namespace, saved: dict[str, Any]) -> None:
    """Raise UsageError if the checkpoint has another model or optimizer."""
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


def _note_changes(args: argparse.Namespace, manifest: Manifest) -> None:
    """Print how options, processes and learning rate differ from those of the checkpoint."""
    step, saved = manifest.extra["step"], manifest.extra["config"]
    changed = changes(vars(args), saved, operational=True)
    if manifest.world_size != dist.get_world_size():
        changed.append(
            f"the number of processes was {manifest.world_size}, now {dist.get_world_size()}"
        )
    if changed:
        print(f"note: changed since the checkpoint: {'; '.join(changed)}", file=sys.stderr)
    before = argparse.Namespace(**{**vars(args), **saved})
    lrs = [make_schedule(namespace)(step) for namespace in (before, args)]
    if lrs[0] != lrs[1]:
        print(
            f"note: the schedule jumps: the learning rate of the next step is {lrs[1]:.4g}, "
            f"not {lrs[0]:.4g}",
            file=sys.stderr,
        )


def _suggest_newest_good(args: argparse.Namespace, path: Path) -> str:
    try:
        good, _ = newest_good(path.parent)
    except OSError as error:
        return f"; other checkpoints could not be checked ({error})"
    if good is None:
        return f"; no checkpoint in {path.parent} is undamaged"
    if good == path:
        return ""
    return f"; {good} is undamaged: use --resume {'newest-good' if args.resume == 'auto' else good}"
