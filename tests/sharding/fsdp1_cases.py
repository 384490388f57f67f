"""Models wrapped by FSDP1, for its tests."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel

from .strategy_cases import BY_NAME, Layers, backward, make_batch


def wrap(module, use_orig_params=True, mesh=None, **options):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # FSDP1 is deprecated
        return FullyShardedDataParallel(
            module,
            device_mesh=mesh,
            use_orig_params=use_orig_params,
            device_id=torch.device("cpu"),
            **options,
        )


def wrapped(use_orig_params, strategy="FULL_SHARD"):
    return BY_NAME[f"FSDP1 {strategy}, use_orig_params={use_orig_params}"].wrap(
        Layers(), dist.get_world_size()
    )


def train(model, optimizer, steps):
    for step in steps:
        backward(model, make_batch(step))
        optimizer.step(zero_grad=True)
