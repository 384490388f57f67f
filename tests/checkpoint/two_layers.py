"""A trained model of two layers, wrapped by each strategy."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from sharded_bf16_adamw import AdamW_BF16, ZeRO

BF16 = torch.bfloat16


def layers(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(BF16)


def take_steps(model: nn.Module, optimizer: AdamW_BF16, steps: int = 3) -> None:
    for step in range(steps):
        model(torch.full((2, 4), 1.0 + step, dtype=BF16)).float().square().sum().backward()
        optimizer.step(zero_grad=True)


def trained(seed: int = 0) -> tuple[nn.Sequential, AdamW_BF16]:
    model = layers(seed)
    optimizer = AdamW_BF16(model.parameters(), lr=1e-2)
    take_steps(model, optimizer)
    return model, optimizer


def states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    named = dict(model.named_parameters())
    return {
        f"{name}.{key}": value.clone()
        for name, p in named.items()
        for key, value in optimizer.state.get(p, {}).items()
    }


def wrapped(layout: str, world: int, seed: int) -> tuple[nn.Module, list[nn.Module], AdamW_BF16]:
    """Return the model, its two layers and the optimizer."""
    inner = layers(seed)
    own = list(inner)
    model: nn.Module = inner
    mesh = init_device_mesh("cpu", (world,))
    if layout == "DDP":
        model = DistributedDataParallel(inner)
    elif layout == "FSDP2":
        for layer in inner:
            fully_shard(layer, mesh=mesh)
        model = fully_shard(inner, mesh=mesh)
    elif layout.startswith("FSDP1"):
        options: Any = {
            "device_mesh": mesh,
            "device_id": torch.device("cpu"),
            "use_orig_params": layout != "FSDP1",
        }
        for index in range(2):
            inner[index] = own[index] = FullyShardedDataParallel(inner[index], **options)
        model = FullyShardedDataParallel(inner, **options)
    sharding = ZeRO(mesh) if layout == "ZeRO-2" else None
    return model, own, AdamW_BF16(model.parameters(), lr=1e-2, sharding=sharding)
