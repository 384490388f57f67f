"""Selection of the checkpoint for ``train.py --resume``, and checks that it is of the same run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch.distributed as dist

from sharded_bf16_adamw import newest_good
from sharded_bf16_adamw.checkpoint import directory
from sharded_bf16_adamw.checkpoint.manifest import read_manifest
from training.errors import UsageError
from training.strategies import on_all_ranks


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    """Return the checkpoint that ``--resume`` selects, or None to start from scratch. Collective.

    Rank 0 searches for all ranks: others may see an older state of a network file system.

    Raises:
        UsageError: on all ranks, if there is no such checkpoint or it is of another run.
    """
    if args.resume is None:
        return None
    is_first = dist.get_rank() == 0
    found = [on_all_ranks(_find_readable, args) if is_first else on_all_ranks(lambda: None)]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def _find_readable(args: argparse.Namespace) -> Path | None:
    try:
        return _find(args)
    except OSError as error:
        raise UsageError(
            f"{error.filename} cannot be read ({error.strerror}): "
            "give a directory that you may read."
        ) from error


def _find(args: argparse.Namespace) -> Path | None:
    root = Path(args.out) / "checkpoints"
    if args.resume == "auto":
        path = directory.latest(root)
    elif args.resume == "newest-good":
        path, skipped = newest_good(root)
        for reason in skipped:
            print(f"note: {reason}", file=sys.stderr)
        if path is None and skipped:
            raise UsageError(
                f"no checkpoint in {root} is undamaged: give --resume the path of another one, "
                "or another --out to start from scratch."
            )
    else:
        given = Path(args.resume)
        path = directory.find_checkpoint(given) or directory.latest(given / "checkpoints")
        if path is None:
            raise UsageError(
                f"--resume {given} is neither a checkpoint nor a directory with one: "
                "check the path, or use --resume auto."
            )
    if path is not None:
        _check_same_run(path, args)
    return path


def _check_same_run(path: Path, args: argparse.Namespace) -> None:
    """Refuse a checkpoint of another model or optimizer; print a note if the data has changed."""
    try:
        extra = read_manifest(path).extra
    except (OSError, ValueError) as error:
        raise UsageError(f"{error}{_suggest_undamaged(args, path)}") from error
    if "step" not in extra or "config" not in extra:
        raise UsageError(
            f"the checkpoint {path} was not saved by train.py: give --resume one that was."
        )
    saved, given = extra["config"], vars(args)
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
    names = ("data", "seed", "batch_size", "seq_len")
    changed = [n for n in names if saved.get(n, given[n]) != given[n]]
    if changed:
        print(
            f"note: {', '.join(changed)} changed since the checkpoint: "
            "the batches are not those of an uninterrupted run",
            file=sys.stderr,
        )


def suggest_undamaged(args: argparse.Namespace, path: Path) -> str:
    """Return the part of an error about ``path`` that names an undamaged checkpoint. Collective."""
    found = [_suggest_undamaged(args, path) if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(found, src=0)
    return found[0]


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
