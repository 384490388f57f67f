"""Model, optimizer and learning-rate schedule for the arguments of ``train.py``."""

from __future__ import annotations

import argparse
import math
import os
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from sharded_bf16_adamw import LR, AdamW_BF16
from sharded_bf16_adamw.kernels.backend import backend_module
from training import hugging_face
from training.errors import UsageError
from training.model import GPT, PRESETS, Config
from training.optimizers import OPTIMIZERS
from training.options import model_name
from training.strategies import STRATEGIES, Strategy
from training.world import World, call_on_all_ranks

WEIGHT_DTYPES = {name: spec.weight_dtype for name, spec in OPTIMIZERS.items()}
ANNOUNCED = 500_000_000  # building a model with this many parameters or more is announced
Schedule = Callable[[int], float]


def set_seeds(args: argparse.Namespace) -> None:
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    if args.deterministic:
        # cuBLAS is deterministic only with this variable.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Filling uninitialized memory is for debugging, and slow.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def model_config(args: argparse.Namespace) -> Any:
    """Return the config of ``--preset`` or of ``--model``; each has a ``vocab_size``.

    Raises:
        UsageError: ``--model`` is not a folder that ``transformers`` can use.
    """
    if args.model is not None:
        return hugging_face.read_config(args.model, args.seq_len)
    return replace(PRESETS[args.preset], vocab_size=args.vocab_size or Config.vocab_size)


def build_model(
    args: argparse.Namespace, config: Any, world: World, strategy: Strategy
) -> tuple[nn.Module, nn.Module, int]:
    """Return the model, the wrapped model, and the number of elements of all parameters.

    Memory is allocated after sharding, so that each rank allocates only its own shards. The weights
    of ``--model`` are read later.

    Raises:
        UsageError: ``--strategy`` cannot shard the model, or transformers cannot build it.
    """
    dtype = WEIGHT_DTYPES[args.optimizer]
    mesh_shape = strategy.mesh_shape(world.size)
    if args.model is None:
        with torch.device("meta"):
            model: nn.Module = GPT(config).to(dtype)
    elif "tensor" in mesh_shape:
        raise UsageError(
            f"--strategy {args.strategy} shards the presets only, not --model: use --strategy "
            "fsdp2."
        )
    else:
        model = call_on_all_ranks(hugging_face.build, args.model, config, dtype)
    num_params = sum(p.numel() for p in model.parameters())
    is_announced = world.rank == 0 and num_params >= ANNOUNCED
    if is_announced:
        print(
            f"building {model_name(args)}: {num_params:,} parameters, --strategy {args.strategy} "
            f"on {world.size} x {world.device.type}",
            flush=True,
        )
    mesh = world.mesh(mesh_shape)
    strategy.shard(model, mesh)
    _allocate(model, world.device)
    if isinstance(model, GPT):
        if is_announced:
            print(f"initializing the weights on {world.device.type}", flush=True)
        model.init_weights(args.seed)
    else:
        for param in model.parameters():  # ZeRO compares the ranks' weights before --model is read
            param.detach().zero_()
    return model, strategy.wrap(model, mesh), num_params


def _allocate(model: nn.Module, device: torch.device) -> None:
    """Allocate the meta parameters on the device, uninitialized; keep ties and values of buffers.

    Call it after sharding: ``to_empty`` then allocates only this rank's shards.
    """
    ties = [
        (module, name, param)
        for module in model.modules()
        for name, param in module.named_parameters(recurse=False, remove_duplicate=False)
    ]
    buffers = dict(model.named_buffers())
    model.to_empty(device=device)
    replacements: dict[nn.Parameter, nn.Parameter] = {}
    for module, name, param in ties:
        setattr(module, name, replacements.setdefault(param, getattr(module, name)))
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


def make_optimizer(
    args: argparse.Namespace, world: World, model: nn.Module, schedule: Schedule
) -> torch.optim.Optimizer:
    """Build the optimizer, without weight decay for biases and the weights of norms. Collective.

    Raises:
        UsageError: the strategy does not support the optimizer, the optimizer is not available on
            a rank, or a hyperparameter is invalid.
    """
    spec = OPTIMIZERS[args.optimizer]
    call_on_all_ranks(_check_available, args, world.device)
    # Not by ndim: FSDP1 flattens matrices.
    vectors = {
        id(p)
        for module in model.modules()
        for name, p in module.named_parameters(recurse=False)
        if name == "bias" or "Norm" in type(module).__name__
    }
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if id(p) not in vectors]},
        {"params": [p for p in model.parameters() if id(p) in vectors], "weight_decay": 0.0},
    ]
    common = {"betas": tuple(args.betas), "weight_decay": args.weight_decay}
    sharding = STRATEGIES[args.strategy].sharding(world.mesh())
    if sharding is not None and args.optimizer != "bf16":
        raise UsageError(
            f"--strategy {args.strategy} shards --optimizer bf16 only, not {args.optimizer}: "
            "use --strategy ddp or fsdp2."
        )
    try:
        if spec.path is None:
            backend = args.optimizer_backend
            return AdamW_BF16(
                groups, lr_function=schedule, backend=backend, sharding=sharding, **common
            )
        return spec.make(groups, lr=schedule(0), **common)
    except ValueError as error:
        raise UsageError(f"{error}; see --help") from error


def _check_available(args: argparse.Namespace, device: torch.device) -> None:
    """Raise UsageError if this machine lacks the optimizer's package, or kernels for the device."""
    reason = OPTIMIZERS[args.optimizer].unavailable_reason(device.type == "cuda")
    if reason is not None:
        raise UsageError(f"--optimizer {args.optimizer} {reason}.")
    if args.optimizer == "bf16" and args.optimizer_backend is not None:
        try:
            backend_module(device, args.optimizer_backend)
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
