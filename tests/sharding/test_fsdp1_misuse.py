"""FSDP1: misuse is an error; FSDP modules are looked up once."""

from __future__ import annotations

import gc

import pytest
import torch
from distributed import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from sharded_bf16_adamw import AdamW_BF16
from sharded_bf16_adamw.sharding import fsdp1

from .fsdp1_cases import wrap

BF16 = torch.bfloat16


def built_too_early_worker(rank, world):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(BF16)
    optimizer = AdamW_BF16(model.parameters(), lr=1e-2)
    wrapped = wrap(model, use_orig_params=False)
    wrapped(torch.ones(1, 4, dtype=BF16)).sum().backward()
    with pytest.raises(
        RuntimeError,
        match=r"built before .*FullyShardedDataParallel.*; "
        r"build AdamW_BF16\(model.parameters\(\)\) afterwards",
    ):
        optimizer.step()
    assert not optimizer.state


def test_optimizer_built_before_wrapping_is_an_error():
    run_ranks(2, built_too_early_worker)


def built_early_with_orig_params_worker(rank, world, stepped):
    """``use_orig_params=True`` keeps the parameter objects.

    An optimizer without state trains them; one with states of the old shapes must not.
    """
    model = nn.Linear(4, 4).to(BF16)
    optimizer = AdamW_BF16(model.parameters(), lr=1e-2)
    if stepped:
        model(torch.ones(1, 4, dtype=BF16)).sum().backward()
        optimizer.step(zero_grad=True)
    sharded = wrap(model)
    sharded(torch.ones(1, 4, dtype=BF16)).sum().backward()
    if stepped:
        with pytest.raises((RuntimeError, ValueError), match="shape"):
            optimizer.step()
        return None
    before = [p.detach().clone() for p in sharded.parameters()]
    optimizer.step()
    return [
        not torch.equal(a, b)
        for a, b in zip(before, sharded.parameters(), strict=True)
        if a.numel()
    ]


def test_optimizer_built_before_wrapping_trains_with_orig_params():
    assert all(
        all(changed) and changed
        for changed in run_ranks(2, built_early_with_orig_params_worker, False)
    )


def test_state_from_before_wrapping_is_an_error():
    run_ranks(2, built_early_with_orig_params_worker, True)


def module_gone_worker(rank, world):
    model = wrap(nn.Linear(4, 4).to(BF16))
    model(torch.ones(1, 4, dtype=BF16)).sum().backward()
    params = list(model.parameters())
    optimizer = AdamW_BF16(params, lr=1e-2)
    del model
    gc.collect()
    with pytest.raises(RuntimeError, match="no live FSDP module holds it"):
        optimizer.clip_grad_norm_(1.0)


def test_norm_without_live_fsdp_module_is_an_error():
    run_ranks(2, module_gone_worker)


def lookup_worker(rank, world):
    """Count the walks over all objects."""
    model = wrap(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(BF16))
    optimizer = AdamW_BF16(model.parameters(), lr=1e-2)
    walks = []
    original, fsdp1._register_handles = (
        fsdp1._register_handles,
        lambda: (walks.append(1), original()),
    )
    try:
        for _ in range(3):
            model(torch.ones(1, 4, dtype=BF16)).sum().backward()
            optimizer.clip_grad_norm_(1.0)
            optimizer.step(zero_grad=True)
    finally:
        fsdp1._register_handles = original
    return len(walks)


def test_fsdp_modules_are_registered_once():
    assert run_ranks(2, lookup_worker) == [1, 1]


def tensor_parallel_worker(rank, world):
    """FSDP1 over local shards of DTensors: updates are right, but a norm is impossible."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 4, bias=False)).to(BF16)
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    model = wrap(model, mesh=mesh["data"])
    optimizer = AdamW_BF16(model.parameters(), lr=1e-2)
    model(torch.ones(1, 4, dtype=BF16)).sum().backward()
    with pytest.raises(
        RuntimeError,
        match=r"over tensor-parallel parameters hides .* "
        r"use fully_shard \(FSDP2\) after parallelize_module",
    ):
        optimizer.clip_grad_norm_(1.0)
    guarded = AdamW_BF16(model.parameters(), lr=1e-2, skip_nonfinite=True)
    with pytest.raises(RuntimeError, match="the global gradient norm cannot be computed"):
        guarded.step()


def test_norm_of_fsdp1_over_tensor_parallel_is_an_error():
    run_ranks(4, tensor_parallel_worker)
