"""Which checkpoint ``--resume`` means, and whether it belongs to this run."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch.distributed as dist
from data import UsageError

from sharded_bf16_adamw import latest


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    """The checkpoint that ``--resume`` means; None to start afresh."""
    if args.resume is None:
        return None
    if args.resume == "auto":
        return latest(Path(args.out) / "checkpoints")
    path = Path(args.resume)
    found = path if (path / "manifest.json").exists() else latest(path) or latest(path / "checkpoints")
    if found is None:
        raise UsageError(f"--resume {path} is neither a checkpoint nor a folder with one: check the path, or use --resume auto.")
    return found


def check_same_run(path: Path, args: argparse.Namespace) -> None:
    """Refuse a checkpoint of another model or optimizer; say so where the data will not continue where it stopped."""
    extra = json.loads((path / "manifest.json").read_text())["extra"]
    if "step" not in extra or "config" not in extra:
        raise UsageError(f"the checkpoint {path} was not saved by train.py: give --resume one that was.")
    saved, given = extra["config"], vars(args)
    for name in ("preset", "optimizer"):
        if saved.get(name, given[name]) != given[name]:
            raise UsageError(
                f"the checkpoint {path} was trained with --{name} {saved[name]}, not {given[name]}: give --{name} {saved[name]}, "
                "or another --out to start afresh."
            )
    changed = [n for n in ("data", "seed", "batch_size", "seq_len") if saved.get(n, given[n]) != given[n]]
    if changed and dist.get_rank() == 0:
        print(f"note: {', '.join(changed)} changed since the checkpoint: the batches are not those of one run", file=sys.stderr)
