"""Tensor parallelism, alone and under FSDP2: placements, partial gradients, norms, guard."""

from __future__ import annotations

import pytest
import torch
from bits import same_bits
from distributed import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from sharded_bf16_adamw import AdamW_BF16, load, save

from .strategy_cases import (
    BY_NAME,
    Layers,
    backward,
    collect,
    make_batch,
    make_optimizer,
    parallelize,
)

BF16 = torch.bfloat16
STATES = ("exp_avg", "exp_avg_sq", "correction")
TP, BOTH = "tensor parallel", "FSDP2 + tensor parallel (2 x 2)"


def wrap(name, world):
    return BY_NAME[name].wrap(Layers(), world)


def placements_worker(rank, world, name):
    wrapped = wrap(name, world)
    optimizer = make_optimizer(wrapped)
    backward(wrapped, make_batch(0))
    optimizer.step()
    found = {}
    for fqn, param in wrapped.module.named_parameters():
        states = [optimizer.state[param][key] for key in STATES if key in optimizer.state[param]]
        if isinstance(param, DTensor):
            found[fqn] = param.placements
            assert all(
                state.placements == param.placements and state.device_mesh == param.device_mesh
                for state in states
            )
            assert all(
                state.to_local().shape == param.to_local().shape and state.shape == param.shape
                for state in states
            )
        else:
            assert not any(isinstance(state, DTensor) for state in states)
    return found


def test_states_have_the_placements_of_parameters():
    for found in run_ranks(2, placements_worker, TP):
        assert found["tall.weight"] == (Shard(0),) and found["flat.weight"] == (Shard(1),)
        assert found["flat.bias"] == found["gain.weight"] == (Replicate(),)
        assert "single_row.weight" not in found, "a plain parameter"


def test_states_have_the_placements_of_parameters_under_fsdp2():
    for found in run_ranks(4, placements_worker, BOTH):
        assert found["wide.weight"] == (_StridedShard(0, split_factor=2), Shard(0))
        assert found["flat.weight"] == (Shard(0), Shard(1))
        assert found["gain.weight"] == (Shard(0), Replicate())
        assert found["single_row.weight"] == (Shard(0),), (
            "on the data mesh alone: another mesh in the same optimizer"
        )


def partial_worker(rank, world):
    """The rows of a gain's inputs are sharded, so each rank's gradient is a partial sum."""
    model = Layers()
    parallelize(model, init_device_mesh("cpu", (world,)))
    batch = {"gain": make_batch(0)["gain"]}
    model(batch).backward()
    weight = model.gain.weight
    placements = weight.grad.placements
    optimizer = AdamW_BF16([weight], lr=1e-2)
    norm = optimizer.clip_grad_norm_(1e9)
    optimizer.step()
    x, c = batch["gain"]
    whole = (x.double() * c.double()).sum(0)
    return (
        placements,
        norm.item(),
        whole.norm().item(),
        optimizer.state[weight]["exp_avg"].to_local(),
        (0.1 * whole).to(BF16),
    )


def test_partial_gradients_are_reduced():
    for placements, norm, expected_norm, exp_avg, expected in run_ranks(2, partial_worker):
        assert placements == (Partial(),), "else there is nothing to reduce"
        assert norm == pytest.approx(expected_norm, rel=1e-6)
        torch.testing.assert_close(exp_avg, expected, rtol=2**-7, atol=0)


def guard_worker(rank, world, name):
    """One row of a weight's gradient, which only one rank holds, is NaN."""
    wrapped = wrap(name, world)
    optimizer = AdamW_BF16(wrapped.module.parameters(), lr=1e-2, skip_nonfinite=True)
    backward(wrapped, make_batch(0))
    optimizer.step(zero_grad=True)
    before = collect(wrapped.module, optimizer)
    batch = make_batch(1)
    batch["wide"][1][:, 7] = float("nan")
    backward(wrapped, batch)
    nan_here = any(
        bool(p.grad.to_local().isnan().any())
        for p in wrapped.module.parameters()
        if isinstance(p, DTensor)
    )
    optimizer.step(zero_grad=True)
    after = collect(wrapped.module, optimizer)
    unchanged = all(
        torch.equal(after[fqn][key], before[fqn][key]) for fqn in before for key in before[fqn]
    )
    return nan_here, unchanged, optimizer.skipped_steps


@pytest.mark.parametrize(("world", "name"), [(2, TP), (4, BOTH)])
def test_nan_on_one_rank_skips_the_step_on_all(world, name):
    results = run_ranks(world, guard_worker, name)
    assert sum(nan_here for nan_here, *_ in results) == 1
    assert [rest for _, *rest in results] == [[True, 1]] * world


def checkpoint_worker(rank, world, folder, name, action):
    wrapped = wrap(name, world)
    optimizer = make_optimizer(wrapped)
    if action == "save":
        for step in range(3):
            backward(wrapped, make_batch(step))
            optimizer.step(zero_grad=True)
        save(folder, 3, wrapped.module, optimizer)
    else:
        load(folder, wrapped.module, optimizer)
    return collect(wrapped.module, optimizer)


@pytest.mark.parametrize(
    ("saver", "saving", "loader", "loading"),
    [(BOTH, 4, "FSDP2", 3), ("FSDP2", 3, BOTH, 4), (TP, 2, BOTH, 4)],
)
def test_checkpoints_between_tensor_parallel_and_other_layouts(
    tmp_path, saver, saving, loader, loading
):
    expected, *_ = run_ranks(saving, checkpoint_worker, tmp_path, saver, "save")
    for result in run_ranks(loading, checkpoint_worker, tmp_path, loader, "load"):
        assert same_bits(result, expected)


def mixed_worker(rank, world):
    """Parameters: plain, TP, FSDP2 on all ranks, HSDP, FSDP2 over TP; gradients are ones."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    models = [nn.Linear(6, 6, bias=False).to(BF16) for _ in range(5)]
    plain, tensor, all_ranks, hybrid, both = models
    for model in (tensor, both):
        parallelize_module(model, mesh["tensor"], ColwiseParallel())
    fully_shard(all_ranks, mesh=init_device_mesh("cpu", (world,)))
    fully_shard(hybrid, mesh=mesh)
    fully_shard(both, mesh=mesh["data"])
    params = [model.weight for model in models]
    for param in params:
        param.grad = torch.ones_like(param)
    assert sum(isinstance(param, DTensor) for param in params) == 4 and plain.weight in set(params)
    return AdamW_BF16(params, lr=1e-2).clip_grad_norm_(1.0).item() ** 2


def test_norm_over_several_meshes():
    for squared in run_ranks(4, mixed_worker):
        assert squared == pytest.approx(5 * 36, rel=1e-6)
