"""Model, optimizer and learning-rate schedule for the arguments of ``train.py``."""

from __future__ import annotations

import argparse
import math
import os
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from sharded_bf16_adamw import LR, AdamW_BF16
from training.errors import UsageError
from training.model import GPT, PRESETS, RMSNorm
from training.optimizers import OPTIMIZERS
from training.strategies import STRATEGIES, Strategy, World

WEIGHT_DTYPES = {name: spec.weight_dtype for name, spec in OPTIMIZERS.items()}
Schedule = Callable[[int], float]


def set_seeds(args: argparse.Namespace) -> None:
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    if args.deterministic:
        # cuBLAS is deterministic only with this.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Filling uninitialized memory is for debugging, and slow.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def build_model(
    args: argparse.Namespace, world: World, strategy: Strategy
) -> tuple[GPT, nn.Module]:
    """Return the model and the module to call.

    Memory is allocated after sharding, so that each rank allocates only its own shards.
    """
    with torch.device("meta"):
        model = GPT(PRESETS[args.preset]).to(WEIGHT_DTYPES[args.optimizer])
    mesh = world.mesh(strategy.mesh_shape(world.size))
    strategy.shard(model, mesh)
    model.to_empty(device=world.device)
    model.init_weights(args.seed)
    return model, strategy.wrap(model, mesh)


def make_optimizer(
    args: argparse.Namespace, model: GPT, schedule: Schedule
) -> torch.optim.Optimizer:
    """Build an AdamW that applies weight decay to matrices, but not to the gains of norms.

    Raises:
        UsageError: the strategy shards AdamW_BF16 only, or a hyperparameter is invalid.
    """
    # By module and not by ndim, since FSDP1 flattens matrices.
    norms = [module for module in model.modules() if isinstance(module, RMSNorm)]
    gains = {id(p) for norm in norms for p in norm.parameters()}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if id(p) not in gains]},
        {"params": [p for p in model.parameters() if id(p) in gains], "weight_decay": 0.0},
    ]
    common = {"betas": tuple(args.betas), "weight_decay": args.weight_decay}
    device = next(model.parameters()).device
    world = World(dist.get_rank(), dist.get_world_size(), device)
    sharding = STRATEGIES[args.strategy].sharding(world.mesh())
    if sharding is not None and args.optimizer != "bf16":
        raise UsageError(
            f"--strategy {args.strategy} shards --optimizer bf16 only, not {args.optimizer}: "
            "use --strategy ddp or fsdp2."
        )
    spec = OPTIMIZERS[args.optimizer]
    reason = spec.unavailable_reason(device.type == "cuda")
    if reason is not None:
        raise UsageError(f"--optimizer {args.optimizer} {reason}.")
    try:
        if spec.make is None:
            backend = args.optimizer_backend
            return AdamW_BF16(
                groups, lr_function=schedule, backend=backend, sharding=sharding, **common
            )
        return spec.make(groups, lr=schedule(0), **common)
    except ValueError as error:
        raise UsageError(f"{error}; see --help") from error


def make_schedule(args: argparse.Namespace) -> Schedule:
    """Return the lr as a function of the 0-based step: linear warm-up, then ``--schedule``."""
    lr, warmup, last = args.lr, args.warmup, args.steps - 1
    if args.schedule == "power":
        return LR(lr, preheat_steps=warmup, decay_power=-0.5)

    def lr_at(step: int) -> float:
        if step < warmup:
            return lr * (step + 1) / warmup
        if args.schedule == "constant":
            return lr
        progress = min(1.0, (step - warmup + 1) / max(1, last - warmup + 1))
        return args.final_lr + (lr - args.final_lr) * (1 + math.cos(math.pi * progress)) / 2

    return lr_at
