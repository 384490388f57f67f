"""Tensors of one name that differ between ranks are refused, or the first rank's are saved."""

from __future__ import annotations

import os
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sharded_bf16_adamw import AdamW_BF16, ModelParallel, gather_full_state_dict, load, save
from sharded_bf16_adamw.sharding.dtensor import to_local


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 6).bfloat16()
        self.norm = nn.BatchNorm1d(6).bfloat16()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x))


def built(kind: str, world: int) -> tuple[nn.Module, AdamW_BF16]:
    model: nn.Module = Net()
    if kind == "DDP":
        model = DistributedDataParallel(model)
    if kind == "HSDP":
        fully_shard(
            model,
            mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard")),
        )
    optimizer = AdamW_BF16(model.parameters(), lr=1e-2)
    optimizer.init_state()
    return model, optimizer


def drift(kind: str, model: nn.Module, optimizer: AdamW_BF16, rank: int) -> None:
    if kind == "buffer":
        model(torch.randn(4, 6, generator=torch.Generator().manual_seed(rank)).bfloat16())
    elif kind == "weight":
        next(model.parameters()).data[0, 0] += rank
    elif kind == "shard" and rank == dist.get_world_size() - 1:
        to_local(next(model.parameters()).detach())[0, 0] += 1
    elif kind == "state" and rank == 1:
        to_local(next(iter(optimizer.state.values()))["correction"])[0] += 1e-3
    elif kind == "shape" and rank == 1:
        model.norm.running_mean = torch.zeros(7).bfloat16()


def save_worker(
    rank: int, world: int, wrapper: str, kind: str, root: str
) -> tuple[str, str, list[str]]:
    model, optimizer = built(wrapper, world)
    save(root, 1, model, optimizer)
    drift(kind, model, optimizer, rank)
    results = []
    for call in (
        lambda: save(root, 2, model, optimizer),
        lambda: gather_full_state_dict(model, optimizer),
    ):
        try:
            call()
            results.append("no error")
        except ValueError as error:
            results.append(str(error))
    return results[0], results[1], sorted(os.listdir(root))


@pytest.mark.parametrize(
    ("wrapper", "kind", "name"),
    [
        ("none", "weight", "linear.weight"),
        ("none", "buffer", "norm.num_batches_tracked|norm.running_mean"),
        ("none", "state", r"optimizer.state.linear.weight.correction"),
        ("none", "shape", "norm.running_mean"),
        ("DDP", "buffer", "norm.running_mean"),
        ("DDP", "weight", "linear.weight"),
        ("HSDP", "shard", "linear.weight"),
    ],
)
def test_save_names_drifted_tensors_and_writes_nothing(tmp_path, wrapper, kind, name):
    import re

    for saved, gathered, names in run_ranks(
        4 if wrapper == "HSDP" else 2, save_worker, wrapper, kind, str(tmp_path)
    ):
        differ = r"tensors that should be the same differ between ranks"
        assert re.match(rf"{differ} \(the first between ranks \d and \d\): ({name})", saved), saved
        assert "on_divergence='first'" in saved and "ModelParallel" in saved
        assert names == ["LATEST", "step-00000001"]
        if kind == "state":
            assert "linear.weight.correction" in gathered
        else:
            assert gathered == "no error"


def large_worker(rank: int, world: int, kind: str, root: str) -> str:
    torch.manual_seed(0)
    model = nn.Linear(300, 300, bias=False).bfloat16()
    optimizer = AdamW_BF16(model.parameters(), lr=1e-2)
    optimizer.init_state()
    if rank == 1:
        if kind == "last weight":
            model.weight.data.view(torch.int16)[-1, -1] ^= 1
        else:  # an update by a gradient that was not averaged, of which only the states tell
            weight = model.weight.detach().clone()
            model.weight.grad = torch.full_like(model.weight, 1e-3)
            optimizer.step()
            with torch.no_grad():
                model.weight.copy_(weight)
    try:
        save(root, 1, model, optimizer)
    except ValueError as error:
        return str(error)
    return "saved"


@pytest.mark.parametrize(
    ("kind", "name"),
    [("last weight", "weight"), ("states", "optimizer.state.weight.correction")],
)
def test_save_compares_each_bit_of_a_large_weight_and_a_sample_of_its_states(tmp_path, kind, name):
    for message in run_ranks(2, large_worker, kind, str(tmp_path)):
        assert message.startswith("tensors that should be the same differ between ranks")
        assert f": {name}" in message


def first_worker(rank: int, world: int, wrapper: str, root: str) -> bool:
    model, optimizer = built(wrapper, world)
    expected = [tensor.detach().clone() for tensor in map(to_local, model.parameters())]
    for param in model.parameters():
        local = to_local(param.detach())
        local.add_(rank >= world // 2)  # the first replica keeps its values
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save(root, 1, model, optimizer, on_divergence="first")
    assert any("differ between ranks" in str(warning.message) for warning in caught) == (rank == 0)
    other, other_optimizer = built(wrapper, world)
    with torch.no_grad():
        for param in other.parameters():
            to_local(param).zero_()
    load(root, other, other_optimizer)
    assert all(
        torch.equal(to_local(param), value)
        for param, value in zip(other.parameters(), expected, strict=True)
    )
    return wrapper != "HSDP" or replica_is_saved_alone(rank, model, optimizer, root)


def replica_is_saved_alone(rank: int, model: nn.Module, optimizer: AdamW_BF16, root: str) -> bool:
    """Save each replica by itself, with a buffer that differs between its ranks."""
    group = next(model.parameters()).device_mesh["shard"].get_group()
    first = 2 * (rank // 2)
    model.norm.running_mean.fill_(rank)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = save(f"{root}/{first}", 1, model, optimizer, group=group, on_divergence="first")
    full = gather_full_state_dict(model, optimizer, group=group)
    assert bool(full) == (rank == first)
    other, other_optimizer = built("HSDP", 4)
    load(path, other, other_optimizer, group=group)
    return other.norm.running_mean[0] == first and all(
        torch.equal(to_local(a), to_local(b))
        for a, b in zip(other.parameters(), model.parameters(), strict=True)
    )


@pytest.mark.parametrize("wrapper", ["none", "HSDP"])
def test_on_divergence_first_saves_the_first_replica(tmp_path, wrapper):
    assert run_ranks(4, first_worker, wrapper, str(tmp_path)) == [True] * 4


def undeclared_worker(rank: int, world: int, root: str) -> list[str]:
    """Two pipeline stages, without and with ModelParallel."""
    model = nn.ModuleDict({f"layer{rank}": nn.Linear(4, 4).bfloat16()})
    messages = []
    for declared in (False, True):
        parallel = ModelParallel(pp=dist.group.WORLD) if declared else None
        optimizer = AdamW_BF16(model.parameters(), lr=1e-2, model_parallel=parallel)
        try:
            messages.append(save(root, 1, model, optimizer).name)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_undeclared_pipeline_stages_are_refused(tmp_path):
    for undeclared, declared in run_ranks(2, undeclared_worker, str(tmp_path)):
        assert undeclared.startswith("rank 1 has a parameter layer1.bias that rank 0 does not have")
        assert "ModelParallel" in undeclared
        assert declared == "step-00000001"


def paths_worker(rank: int, world: int, root: str) -> list[str]:
    model = nn.Linear(4, 4).bfloat16()
    optimizer = AdamW_BF16(model.parameters(), lr=1e-2)
    torch.nn.init.ones_(model.weight), torch.nn.init.ones_(model.bias)
    messages = []
    calls: list[Any] = [
        lambda: save(f"{root}/{rank}", 1, model, optimizer),
        lambda: load(f"{root}/{rank}", model, optimizer),
        lambda: save(root, 1, model, optimizer, group=[0, 1]),
    ]
    for call in calls:
        try:
            call()
            messages.append("no error")
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_different_paths_on_ranks_are_refused(tmp_path):
    for saved, loaded, wrong_group in run_ranks(2, paths_worker, str(tmp_path)):
        assert saved == (
            f"ranks give different values of the folder to save in: '{tmp_path}/0' on rank 0 and "
            f"'{tmp_path}/1' on rank 1; pass the same value on all ranks, and group= if each part "
            "of the job has a model of its own"
        )
        assert loaded.startswith("ranks give different values of the checkpoint to load")
        assert wrong_group.startswith(
            "group must be a process group or None, but it is of type list"
        )
    assert os.listdir(tmp_path) == []


def halves_worker(rank: int, world: int, root: str) -> tuple[str, str, bool, bool]:
    """Save actor and critic at the same time, each sharded over one half of the job."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("role", "fsdp"))["fsdp"]
    role, group = ("actor", "critic")[rank // 2], mesh.get_group()

    def build(seed: int) -> tuple[nn.Module, AdamW_BF16]:
        torch.manual_seed(seed)
        model = fully_shard(nn.Linear(16, 16).bfloat16(), mesh=mesh)
        return model, AdamW_BF16(model.parameters(), lr=1e-2)

    model, optimizer = build(rank // 2)
    before = to_local(model.weight.detach()).clone()
    path = save(f"{root}/{role}", 1, model, optimizer, extra={"role": role}, group=group)
    later = save(f"{root}/{role}", 2, model, optimizer, async_=True, group=group)
    other, other_optimizer = build(9)
    extra = load(path, other, other_optimizer, group=group).extra
    first = torch.equal(before, to_local(other.weight.detach())) and extra == {"role": role}
    other, other_optimizer = build(10)
    load(later, other, other_optimizer, group=group)
    full = gather_full_state_dict(model, optimizer, group=group)
    assert bool(full) == (rank % 2 == 0)
    return (
        str(path.relative_to(root)),
        str(later.relative_to(root)),
        first,
        torch.equal(before, to_local(other.weight.detach())),
    )


def test_two_models_on_halves_of_the_job_have_separate_checkpoints(tmp_path):
    for rank, result in enumerate(run_ranks(4, halves_worker, str(tmp_path))):
        role = ("actor", "critic")[rank // 2]
        assert result == (f"{role}/step-00000001", f"{role}/step-00000002", True, True)
