"""Statements of docs/migration.md about a ZeRO state in torch's AdamW. Update it if one fails."""

import pytest
import torch
from distributed import run_ranks
from torch.distributed.device_mesh import init_device_mesh

from sharded_bf16_adamw import AdamW_BF16, ZeRO


def load_into_torch(rank, world_size):
    torch.manual_seed(0)
    model = torch.nn.Linear(16, 4).bfloat16()
    mesh = init_device_mesh("cpu", (world_size,))
    optimizer = AdamW_BF16(model.parameters(), lr=1e-3, sharding=ZeRO(mesh))
    model(torch.ones(8, 16).bfloat16()).float().square().mean().backward()
    optimizer.step(zero_grad=True)
    other = torch.optim.AdamW(model.parameters(), lr=1e-3)
    other.load_state_dict(optimizer.state_dict())
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match=r"got mixed torch.Tensor and DTensor"):
        other.step()


def test_zero_state_loads_into_torch_adamw_but_does_not_step():
    run_ranks(2, load_into_torch)
