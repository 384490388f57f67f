"""Hugging Face folders of a run: ``train.py --export-hf``."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from sharded_bf16_adamw import export_fp32

LATEST_EXPORT = Path("hf", "latest")  # in --out


def export_hf(args: argparse.Namespace, checkpoint: Path) -> None:
    """Export a checkpoint to ``<out>/hf``, update the link ``latest``, keep ``--keep``. Collective.

    All ranks write.
    """
    latest = Path(args.out) / LATEST_EXPORT
    root = latest.parent
    out = root / checkpoint.name
    is_first = dist.get_rank() == 0
    if is_first:  # of a run that has gone back to an earlier step
        shutil.rmtree(out, ignore_errors=True)
    dtype = getattr(torch, args.export_hf)
    export_fp32(checkpoint, out, dtype, config_from=args.model, parallel=True)
    if is_first:
        link = root / ".latest"
        link.unlink(missing_ok=True)
        link.symlink_to(out.name)
        link.replace(latest)
        oldest_first = sorted(root.glob("step-*"), key=lambda path: path.stat().st_mtime)
        for path in oldest_first[: -args.keep]:
            shutil.rmtree(path, ignore_errors=True)
