"""A small bfloat16 model for the examples, its data, and comparisons by value."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def build_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1)).bfloat16()


def batch(step: int, rank: int = 0) -> tuple[Tensor, Tensor]:
    """Return the inputs and targets of a step; every run gets the same ones."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(32, 16, generator=generator).bfloat16()
    return x, x[:, :4].sum(1, keepdim=True)


def loss_of(model: nn.Module, step: int, rank: int = 0) -> Tensor:
    x, y = batch(step, rank)
    return (model(x).float() - y.float()).square().mean()


def bits(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return copies of this rank's weights and optimizer states."""
    return [
        (value.to_local() if isinstance(value, DTensor) else value).detach().clone()
        for group in optimizer.param_groups
        for param in group["params"]
        for value in (param, *optimizer.state[param].values())
    ]


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def trains_in_bf16(optimizer: torch.optim.Optimizer) -> bool:
    """Return True if all parameters are bfloat16 and corrections hold what their weights lack."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    corrections = [optimizer.state[param]["correction"] for param in params]
    return all(param.dtype == torch.bfloat16 for param in params) and any(
        bool((value.to_local() if isinstance(value, DTensor) else value).any())
        for value in corrections
    )
