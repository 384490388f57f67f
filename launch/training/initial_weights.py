"""Initial weights from a checkpoint or another model: ``train.py --init-from`` and --model."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from sharded_bf16_adamw import AdamW_BF16, import_fp32, load
from sharded_bf16_adamw.checkpoint.directory import find_checkpoint
from training.build import set_seeds
from training.errors import UsageError
from training.world import call_on_rank_0


def init_from(
    args: argparse.Namespace, wrapped_model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Replace the weights by those of ``--init-from``, else of ``--model``, if any. Collective.

    AdamW_BF16 splits weights with more bits than bfloat16 into ``p`` and ``correction``.

    Raises:
        UsageError: on all ranks, if the weights are missing, damaged or of another model.
    """
    source = args.init_from or args.model
    if source is None:
        return
    checkpoint = call_on_rank_0(_find, source)
    try:
        if checkpoint is not None:
            _load(args, checkpoint, wrapped_model, optimizer)
            return
        if args.init_moments:
            raise UsageError(
                f"--init-moments needs a checkpoint, but --init-from {source} is none: leave it "
                "out, or give a checkpoint."
            )
        if not isinstance(optimizer, AdamW_BF16):
            # Needed for import_fp32 only. It copies weights to float32 parameters unchanged.
            optimizer = AdamW_BF16(wrapped_model.parameters(), lr=0.0)
        import_fp32(source, wrapped_model, optimizer)
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(str(error)) from error


def _find(source: str) -> Path | None:
    try:
        if not Path(source).exists():
            raise UsageError(
                f"--init-from {source} does not exist: give a checkpoint, a run, or a folder or "
                "file of safetensors."
            )
        return find_checkpoint(source)
    except OSError as error:
        raise UsageError(
            f"{error.filename} cannot be read ({error.strerror}): give --init-from a path that you "
            "may read."
        ) from error


def _load(
    args: argparse.Namespace, path: Path, wrapped_model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Load weights and states; hyperparameters, schedule and seed stay those of this run."""
    options = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    load(path, wrapped_model, optimizer)
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)
    if not args.init_moments:
        for state in optimizer.state.values():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                state[key].zero_()
    set_seeds(args)
