"""Which checkpoint ``train.py --resume`` means, and whether it belongs to this run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch.distributed as dist
from data import UsageError
from strategies import on_all_ranks

from sharded_bf16_adamw import newest_good
from sharded_bf16_adamw.checkpoint import directory
from sharded_bf16_adamw.checkpoint.manifest import read_manifest


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    """The checkpoint that ``--resume`` means, which is of this run; None to start afresh. Collective.

    Rank 0 looks for all: other ranks may see an older state of a network's file system.
    """
    if args.resume is None:
        return None
    found = [
        on_all_ranks(_find_readable, args) if dist.get_rank() == 0 else on_all_ranks(lambda: None)
    ]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def _find_readable(args: argparse.Namespace) -> Path | None:
    try:
        return _find(args)
    except OSError as error:
        raise UsageError(
            f"{error.filename} cannot be read ({error.strerror}): give a folder that you may read."
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
                f"no checkpoint in {root} is undamaged: give --resume the path of another one, or another --out to start afresh."
            )
    else:
        given = Path(args.resume)
        path = directory.find_checkpoint(given) or directory.latest(given / "checkpoints")
        if path is None:
            raise UsageError(
                f"--resume {given} is neither a checkpoint nor a folder with one: check the path, or use --resume auto."
            )
    if path is not None:
        _check_same_run(path, args)
    return path


def _check_same_run(path: Path, args: argparse.Namespace) -> None:
    """Refuse a checkpoint of another model or optimizer; say so where the data will not continue where it stopped."""
    try:
        extra = read_manifest(path).extra
    except (OSError, ValueError) as error:
        raise UsageError(f"{error}{_undamaged_instead(args, path)}") from error
    if "step" not in extra or "config" not in extra:
        raise UsageError(
            f"the checkpoint {path} was not saved by train.py: give --resume one that was."
        )
    saved, given = extra["config"], vars(args)
    for name in ("preset", "optimizer"):
        if saved.get(name, given[name]) != given[name]:
            raise UsageError(
                f"the checkpoint {path} was trained with --{name} {saved[name]}, not {given[name]}: give --{name} {saved[name]}, "
                "or another --out to start afresh."
            )
    changed = [
        n for n in ("data", "seed", "batch_size", "seq_len") if saved.get(n, given[n]) != given[n]
    ]
    if changed:
        print(
            f"note: {', '.join(changed)} changed since the checkpoint: the batches are not those of one run",
            file=sys.stderr,
        )


def undamaged_instead(args: argparse.Namespace, path: Path) -> str:
    """Return what the message about the checkpoint at ``path``, which does not load, is to say of another one. Collective."""
    found = [_undamaged_instead(args, path) if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def _undamaged_instead(args: argparse.Namespace, path: Path) -> str:
    try:
        good, _ = newest_good(path.parent)
    except OSError as error:
        return f"; whether another one is undamaged could not be seen ({error})"
    if good is None:
        return f"; no checkpoint in {path.parent} is undamaged"
    if good == path:
        return ""  # it is undamaged itself
    return f"; {good} is undamaged: use --resume {'newest-good' if args.resume == 'auto' else good}"
