"""Checkpoints saved with ZeRO load without it and vice versa, bit for bit."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
from distributed import run_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from sharded_bf16_adamw import EMA, LR, AdamW_BF16, ZeRO, load, save

from .cases import assert_same_bits, collect, one_dimensional, zero

FLATTENED = StateDictOptions(flatten_optimizer_state_dict=True)


def build(strategy, fill=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 13), nn.Linear(13, 7), nn.Linear(7, 1)).to(torch.bfloat16)
    model[1].float()
    if fill is not None:
        for p in model.parameters():
            nn.init.constant_(p, fill)
    sharding = zero(int(strategy[-1])) if strategy.startswith("zero") else None
    if strategy == "fsdp2":
        for layer in model:
            fully_shard(layer, mesh=one_dimensional())
        fully_shard(model, mesh=one_dimensional())
    optimizer = AdamW_BF16(
        model.parameters(),
        lr_function=LR(lr=1e-2, preheat_steps=5),
        weight_decay=0.1,
        sharding=sharding,
    )
    return (DistributedDataParallel(model) if strategy == "zero1" else model), optimizer


def steps(model, optimizer, first, count):
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            # Equal on all ranks, so that the mean is exact.
            grad = torch.randint(-8, 9, p.shape, generator=generator).to(p.dtype)
            p.grad = (
                distribute_tensor(grad, p.device_mesh, p.placements)
                if isinstance(p, DTensor)
                else grad
            )
        optimizer.step(zero_grad=True)


def collect_unwrapped(model, optimizer):
    return {
        name.removeprefix("module."): value for name, value in collect(model, optimizer).items()
    }


def save_worker(rank, world, root, strategy):
    model, optimizer = build(strategy)
    steps(model, optimizer, 0, 4)
    save(root, 4, model, optimizer)
    dcp.save(
        get_optimizer_state_dict(model, optimizer, options=FLATTENED), checkpoint_id=f"{root}/torch"
    )
    saved = collect_unwrapped(model, optimizer)
    steps(model, optimizer, 4, 2)
    return saved, collect_unwrapped(model, optimizer)


def load_worker(rank, world, root, strategy):
    model, optimizer = build(strategy, fill=7.0)
    load(root, model, optimizer)
    loaded = collect_unwrapped(model, optimizer)
    other, other_optimizer = build(strategy, fill=7.0)
    # torch creates the states by a step with zero gradients.
    state = get_optimizer_state_dict(other, other_optimizer, options=FLATTENED)
    dcp.load(state, checkpoint_id=f"{root}/torch")
    set_optimizer_state_dict(other, other_optimizer, state, options=FLATTENED)
    by_torch = {
        key: value
        for key, value in collect_unwrapped(other, other_optimizer).items()
        if key.count(".") == 2
    }
    steps(model, optimizer, 4, 2)
    return loaded, by_torch, collect_unwrapped(model, optimizer)


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (("zero2", 2), [("single", 1), ("fsdp2", 3), ("zero2", 3), ("zero1", 2), ("zero2", 2)]),
        (("fsdp2", 3), [("zero2", 2), ("zero1", 4)]),
        (("single", 1), [("zero2", 4)]),
        (("zero1", 3), [("fsdp2", 2)]),
    ],
    ids=str,
)
def test_checkpoints_load_under_other_strategies(saved, loaded, tmp_path):
    at_save, later = run_ranks(saved[1], save_worker, str(tmp_path), saved[0])[0]
    states = {key: value for key, value in at_save.items() if key.count(".") == 2}
    for strategy, world in loaded:
        for found, by_torch, continued in run_ranks(world, load_worker, str(tmp_path), strategy):
            assert_same_bits(found, at_save)
            assert_same_bits(by_torch, states)
            assert_same_bits(continued, later)


def save_alone_worker(rank, world, path):
    torch.manual_seed(0)
    model = nn.Linear(4, 2).bfloat16()
    optimizer = AdamW_BF16(model.parameters(), sharding=ZeRO(one_dimensional()))
    ema = EMA(model, optimizer)
    model(torch.ones(1, 4).bfloat16()).sum().backward()
    optimizer.step(zero_grad=True)
    ema.update()
    torch.save(optimizer.state_dict(), path)


LOAD_ALONE = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from sharded_bf16_adamw import EMA, AdamW_BF16, ZeRO

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
assert "torch.distributed.tensor" not in sys.modules  # only the optimizer imports it
model = torch.nn.Linear(4, 2).bfloat16()
optimizer = AdamW_BF16(model.parameters(), sharding=ZeRO(init_device_mesh("cpu", (1,))))
optimizer.load_state_dict(torch.load(sys.argv[1]))
print(optimizer.state[model.weight]["step"].item())
ema = EMA(model, optimizer)
model(torch.ones(1, 4).bfloat16()).sum().backward()
optimizer.step(zero_grad=True)
ema.update()
with ema.swapped():
    model(torch.ones(1, 4).bfloat16())
optimizer.state_dict()
"""


def test_state_loads_in_a_process_that_imports_no_dtensor_itself(repo, tmp_path):
    path = tmp_path / "state.pt"
    run_ranks(1, save_alone_worker, path)
    command = [sys.executable, "-c", LOAD_ALONE, path]
    result = subprocess.run(command, cwd=repo, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "1.0\n"), result.stderr
