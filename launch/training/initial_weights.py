"""Initial weights from a checkpoint or another model: ``--init-from`` and ``--model``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from sharded_bf16_adamw import AdamW_BF16, import_fp32, load
from sharded_bf16_adamw.checkpoint.directory import find_checkpoint
from sharded_bf16_adamw.sharding.dtensor import to_local
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
                f"--init-moments needs a checkpoint, but --init-from {source} is not one: leave "
                "out --init-moments, or give a checkpoint."
            )
        if not isinstance(optimizer, AdamW_BF16):
            # import_fp32 needs one. It copies weights to float32 parameters unchanged.
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
    """Load weights and states; keep the hyperparameters, schedule and seed of this run."""
    options = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    load(path, wrapped_model, optimizer)
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)
    if not args.init_moments:
        clear_moments(optimizer)
    set_seeds(args)


def clear_moments(optimizer: torch.optim.Optimizer) -> None:
    """Set moments and steps to zero; keep other states, such as corrections of the weights."""
    for state in optimizer.state.values():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if key in state:  # optimi keeps the step in the group
                local = to_local(state[key])
                # not zero_(), which torchao's quantized moments lack
                local.copy_(torch.zeros(local.shape, device=local.device))
