"""Export of checkpoints in Hugging Face format: ``train.py --export-hf``."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from sharded_bf16_adamw import export_fp32

LATEST_EXPORT = Path("hf", "latest")  # in --out


def export_hf(args: argparse.Namespace, checkpoint: Path) -> None:
    """Export a checkpoint to ``<out>/hf``, and update the link ``latest``. Collective.

    All ranks write. Then rank 0 deletes all but the newest ``--keep`` exports.
    """
    latest = Path(args.out) / LATEST_EXPORT
    root = latest.parent
    out = root / checkpoint.name
    is_rank_0 = dist.get_rank() == 0
    if is_rank_0:
        # Left by a run that later resumed from an earlier step.
        shutil.rmtree(out, ignore_errors=True)
    dtype = getattr(torch, args.export_hf)
    export_fp32(checkpoint, out, dtype, config_from=args.model, parallel=True)
    if is_rank_0:
        link = root / ".latest"
        link.unlink(missing_ok=True)
        link.symlink_to(out.name)
        link.replace(latest)
        oldest_first = sorted(root.glob("step-*"), key=lambda path: path.stat().st_mtime)
        for path in oldest_first[: -args.keep]:
            shutil.rmtree(path, ignore_errors=True)
