"""Export of checkpoints in Hugging Face format: ``train.py --export-hf``."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from sharded_bf16_adamw import export_fp32
from sharded_bf16_adamw.checkpoint.rank_errors import raise_on_all_ranks
from training.world import call_on_rank_0

LATEST_EXPORT = Path("hf", "latest")  # in --out


def export_hf(args: argparse.Namespace, checkpoint: Path) -> None:
    """Export a checkpoint to ``<out>/hf``, and update the link ``latest``. Collective.

    All ranks write. Then rank 0 deletes all but the newest ``--keep`` exports.

    Raises:
        RuntimeError, ValueError: on all ranks, if a rank cannot write.
    """
    latest = Path(args.out) / LATEST_EXPORT
    out = latest.parent / checkpoint.name
    is_rank_0 = dist.get_rank() == 0
    if is_rank_0:
        # Exported before the run resumed from an earlier step.
        shutil.rmtree(out, ignore_errors=True)
    dtype = getattr(torch, args.export_hf)
    export_fp32(checkpoint, out, dtype, config_from=args.model, parallel=True)
    with raise_on_all_ranks(f"cannot update {latest}"):
        if is_rank_0:
            _publish(out, latest, args.keep)


def export_hf_if_missing(args: argparse.Namespace, checkpoint: Path) -> None:
    """Export a checkpoint unless the link ``latest`` leads to its export. Collective."""
    latest = Path(args.out) / LATEST_EXPORT
    if not call_on_rank_0(lambda: latest.exists() and latest.resolve().name == checkpoint.name):
        export_hf(args, checkpoint)


def _publish(out: Path, latest: Path, keep: int) -> None:
    link = out.with_name(".latest")
    link.unlink(missing_ok=True)
    link.symlink_to(out.name)
    link.replace(latest)
    oldest_first = sorted(out.parent.glob("step-*"), key=lambda path: path.stat().st_mtime)
    for path in oldest_first[:-keep]:
        shutil.rmtree(path, ignore_errors=True)
