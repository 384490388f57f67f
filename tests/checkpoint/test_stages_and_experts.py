"""Pipeline stages and experts with equal names on different ranks, and errors on one rank."""

from __future__ import annotations

import os
import threading
import time
import warnings
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel

from sharded_bf16_adamw import (
    AdamW_BF16,
    ModelParallel,
    export_fp32,
    import_fp32,
    load,
    save,
    verify,
    wait_for_save,
)
from sharded_bf16_adamw.checkpoint import async_save, commit, divergence, saving

from .test_tensor_subclasses import LoRA
from .trainings import read_folder


def trained(model: nn.Module, **options: Any) -> AdamW_BF16:
    optimizer = AdamW_BF16(model.parameters(), lr=1e-2, **options)
    for param in model.parameters():
        if param.requires_grad:
            param.grad = torch.ones_like(param)
    optimizer.step(zero_grad=True)
    return optimizer


def stages() -> ModelParallel:
    return ModelParallel(pp=dist.group.WORLD)


def layers(count: int, first: float, root: str = "layers") -> nn.Module:
    """Build a list of layers, named ``root`` unless that is empty."""
    linears = [nn.Linear(3, 3, bias=False) for _ in range(count)]
    model = nn.ModuleDict({root: nn.ModuleList(linears)}) if root else nn.Sequential(*linears)
    model.bfloat16()
    with torch.no_grad():
        for index, param in enumerate(model.parameters()):
            param.fill_(first + index)
    return model


def recut_worker(rank: int, world: int, folder: str) -> list[str]:
    """Save stages of 1 and 3 layers, each numbered from 0, and load them as 3 and 1."""
    messages = []
    for name in ("layers", ""):
        root = f"{folder}/{name}run"
        model = layers(1 + 2 * rank, 10.0 * rank, name)
        save(root, 1, model, trained(model, model_parallel=stages()))
        again = layers(1 + 2 * rank, -1.0, name)
        load(root, again, trained(again, model_parallel=stages()))
        same = [float(param.detach()[0, 0]) for param in again.parameters()]
        assert same == [float(param.detach()[0, 0]) for param in model.parameters()]
        other = layers(3 - 2 * rank, -1.0, name)
        with pytest.raises(ValueError, match="missing key") as caught:
            load(root, other, trained(other, model_parallel=stages()))
        messages.append(str(caught.value))
    return messages


def test_pipeline_cut_elsewhere_is_refused_if_stages_number_layers_from_0(tmp_path):
    for in_list, at_root in run_ranks(2, recut_worker, str(tmp_path)):
        assert "missing key model.layers.1.weight" in in_list and "@pp" in in_list
        assert "missing key model.1.weight" in at_root and "@pp" in at_root


def first_worker(rank: int, world: int, root: str) -> tuple[list[float], list[float]]:
    """Save 2 stages x 2 replicas whose weights and buffer have drifted within each stage."""
    stage = rank // 2
    pp = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]
    torch.manual_seed(stage)
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3)).bfloat16()
    optimizer = trained(model, model_parallel=ModelParallel(pp=pp))
    with torch.no_grad():
        model[0].weight.fill_(float(rank))
        model[1].running_mean.fill_(10.0 * rank)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(root, 1, model, optimizer, on_divergence="first")
    with torch.no_grad():
        model[0].weight.fill_(-1.0)
        model[1].running_mean.fill_(-1.0)
    load(root, model, optimizer)
    return model[0].weight.detach().flatten().tolist(), model[1].running_mean.tolist()


def test_on_divergence_first_saves_the_first_replica_of_each_stage(tmp_path):
    for rank, (weights, means) in enumerate(run_ranks(4, first_worker, str(tmp_path))):
        first = 2 * (rank // 2)
        assert weights == [float(first)] * 9 and means == [10.0 * first] * 3


class WithExtraState(nn.Module):
    def __init__(self, value: float, as_tensor: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.value, self.as_tensor = value, as_tensor

    def get_extra_state(self) -> Any:
        return torch.tensor([self.value]) if self.as_tensor else self.value

    def set_extra_state(self, state: Any) -> None:
        self.value = float(state)


def extra_state_worker(rank: int, world: int, kind: str, as_tensor: bool, root: str) -> list[float]:
    torch.manual_seed(rank)
    parts = [WithExtraState(10.0 * rank + index, as_tensor) for index in range(2)]
    model = nn.ModuleDict({"parts": nn.ModuleList(parts)}).bfloat16()
    experts: Any = {"list": model["parts"], "modules": list(parts), "one": parts[0]}.get(kind)
    parallel = stages() if experts is None else ModelParallel(ep=dist.group.WORLD, experts=experts)
    if kind == "one":
        parts[1].value = 5.0  # not an expert: the same on every rank
        torch.manual_seed(9)
        nn.init.normal_(parts[1].linear.weight), nn.init.normal_(parts[1].linear.bias)
    optimizer = trained(model, model_parallel=parallel)
    expected = [part.value for part in parts]
    save(root, 1, model, optimizer)
    for part in parts:
        part.value = -1.0
    load(root, model, optimizer)
    assert [part.value for part in parts] == expected
    return expected


@pytest.mark.parametrize(
    ("kind", "as_tensor"),
    [
        *(("stages", False), ("list", False), ("modules", False), ("one", False)),
        *(("stages", True), ("one", True)),
    ],
)
def test_extra_states_of_stages_and_experts_are_restored(tmp_path, kind, as_tensor):
    values = run_ranks(2, extra_state_worker, kind, as_tensor, str(tmp_path))
    assert values[0] != values[1]


def quantised_worker(rank: int, world: int, root: str) -> bool:
    """Save frozen quantised weights of layers that each stage numbers from 0."""

    def build(seed: int) -> tuple[nn.Module, AdamW_BF16]:
        model = nn.ModuleDict({"layers": nn.ModuleList([LoRA(seed)])})
        trainable = [param for param in model.parameters() if param.requires_grad]
        return model, AdamW_BF16(trainable, lr=1e-2, model_parallel=stages())

    model, optimizer = build(rank)
    save(root, 1, model, optimizer)
    other, other_optimizer = build(7)
    load(root, other, other_optimizer)
    a, b = model["layers"][0].base, other["layers"][0].base
    return torch.equal(a.qdata, b.qdata) and torch.equal(a.scale, b.scale)


def test_quantised_weights_of_stages_are_restored(tmp_path):
    assert run_ranks(2, quantised_worker, str(tmp_path)) == [True, True]


def exported_worker(rank: int, world: int, root: str) -> bool:
    model = layers(2, 10.0 * rank)
    optimizer = trained(model, model_parallel=stages())
    weights = [param.detach().clone() for param in model.parameters()]
    save(root, 1, model, optimizer)
    export_fp32(root, f"{root}/out")
    other = layers(2, -1.0)
    import_fp32(f"{root}/out", other, trained(other, model_parallel=stages()))
    return all(
        torch.equal(param.detach(), weight)
        for param, weight in zip(other.parameters(), weights, strict=True)
    )


def test_export_of_stages_that_number_layers_from_0_is_imported(tmp_path):
    assert run_ranks(2, exported_worker, str(tmp_path)) == [True, True]


def shared_list_worker(rank: int, world: int, root: str) -> bool:
    """Save a list of experts that has two names and is given expert by expert."""
    torch.manual_seed(0)
    model = nn.Module()
    model.a = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    model.b = model.a
    torch.manual_seed(rank)
    with torch.no_grad():
        for param in model.a.parameters():
            param.normal_()
    model.bfloat16()
    optimizer = trained(
        model, model_parallel=ModelParallel(ep=dist.group.WORLD, experts=list(model.a))
    )
    before = [param.detach().clone() for param in model.a.parameters()]
    save(root, 1, model, optimizer)
    with torch.no_grad():
        for param in model.a.parameters():
            param.zero_()
    load(root, model, optimizer)
    return all(
        torch.equal(param.detach(), value)
        for param, value in zip(model.a.parameters(), before, strict=True)
    )


def test_experts_of_a_list_given_one_by_one_get_global_numbers(tmp_path):
    assert run_ranks(2, shared_list_worker, str(tmp_path)) == [True, True]
    export_fp32(tmp_path, tmp_path / "out")
    weights = {name for name in read_folder(tmp_path / "out") if name.endswith("weight")}
    assert weights == {f"{x}.{i}.weight" for x in "ab" for i in range(4)}


def fsdp1_worker(rank: int, world: int, root: str) -> tuple[str, bool]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("pp", "dp"))
        options: dict[str, Any] = {"device_id": torch.device("cpu"), "use_orig_params": True}
        model = FullyShardedDataParallel(
            nn.Linear(4, 4).bfloat16(), device_mesh=mesh["dp"], **options
        )
        optimizer = AdamW_BF16(
            model.parameters(), lr=1e-2, model_parallel=ModelParallel(pp=mesh["pp"])
        )
        with pytest.raises(ValueError, match="FSDP1") as caught:
            save(f"{root}/staged", 1, model, optimizer)
        torch.manual_seed(0)
        # Without a mesh, states are ShardedTensors.
        plain = FullyShardedDataParallel(nn.Linear(4, 4).bfloat16(), **options)
        optimizer = AdamW_BF16(plain.parameters(), lr=1e-2)
        plain(torch.ones(2, 4).bfloat16()).float().sum().backward()
        optimizer.step(zero_grad=True)
        before = [param.detach().clone() for param in plain.parameters()]
        save(f"{root}/alone", 1, plain, optimizer)
        with torch.no_grad():
            for param in plain.parameters():
                param.zero_()
        load(f"{root}/alone", plain, optimizer)
    return str(caught.value), all(
        torch.equal(a.detach(), b) for a, b in zip(plain.parameters(), before, strict=True)
    )


def test_fsdp1_is_refused_in_a_stage_but_works_without_a_mesh(tmp_path):
    for message, same in run_ranks(2, fsdp1_worker, str(tmp_path)):
        assert message.startswith("FullyShardedDataParallel (FSDP1) does not tell which ranks")
        assert same


def wrong_on_one_rank_worker(rank: int, world: int, root: str) -> list[str]:
    torch.manual_seed(0)
    model = nn.Linear(3, 3).bfloat16()
    optimizer = trained(model)
    messages = []
    real = divergence.checksums

    def out_of_memory(tensors: Any) -> list[int]:
        raise torch.OutOfMemoryError("out of memory")

    cannot_start = mock.Mock(side_effect=RuntimeError("can't start new thread"))
    calls: list[Any] = [
        lambda: save(root if rank == 0 else None, 1, model, optimizer),  # type: ignore[arg-type]
        lambda: load(root if rank == 0 else 7, model, optimizer),  # type: ignore[arg-type]
        lambda: save(root, 1, model, optimizer, async_=rank == 0),
        lambda: save(root, 1, model, optimizer),
        lambda: save(root, 1, model, optimizer, on_divergence=("first", "raise")[rank]),
        lambda: save(root, 1, model, optimizer, async_=True),
    ]
    for number, call in enumerate(calls):
        start = cannot_start if number == 5 and rank == 1 else threading.Thread.start
        divergence.checksums = out_of_memory if number == 3 and rank == 1 else real  # type: ignore[assignment]
        try:
            with mock.patch.object(async_save._Pending, "start", start):
                call()
            messages.append("no error")
        except (ValueError, RuntimeError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    divergence.checksums = real  # type: ignore[assignment]
    for asynchronous in (True, False):  # the ranks are still in step
        save(root, 2, model, optimizer, async_=asynchronous)
    return messages


def test_error_on_one_rank_is_raised_on_all(tmp_path):
    results = run_ranks(2, wrong_on_one_rank_worker, str(tmp_path))
    for root_, path, asynchronous, memory, on_divergence, thread in results:
        assert root_.startswith("ValueError: root must be a path, but it is of type NoneType;")
        assert path.startswith("ValueError: path must be a path, but it is of type int; pass")
        assert asynchronous.startswith(
            "ValueError: ranks give different values of async_: True on rank 0 and False on rank 1"
        )
        assert memory.startswith(
            "RuntimeError: cannot compare tensors between ranks: on rank 1, OutOfMemoryError: out"
        )
        assert on_divergence.startswith(
            "ValueError: ranks give different values of on_divergence: 'first' on rank 0 and"
        )
        assert thread == (
            "RuntimeError: cannot start the thread of a save: on rank 1, RuntimeError: can't start "
            "new thread"
        )


def two_threads_worker(rank: int, world: int, root: str) -> list[str]:
    """Save two models by two threads; the first one's files are slow to write on rank 0."""
    torch.manual_seed(0)
    models = {name: nn.Linear(size, size).bfloat16() for name, size in (("a", 64), ("b", 32))}
    optimizers = {name: trained(model) for name, model in models.items()}
    began = {name: threading.Event() for name in models}
    problems: list[str] = []
    real = saving._Save.run

    def slow(self: Any, group: Any) -> None:
        if rank == 0 and self.partial.parent.name == "a":
            time.sleep(0.3)
        real(self, group)

    def job(name: str) -> None:
        try:
            if name == "b":
                began["a"].wait(60)
            save(f"{root}/{name}", 1, models[name], optimizers[name], async_=True)
            began[name].set()
            wait_for_save()
        except Exception as error:
            problems.append(f"{name}: {error!r}")
        finally:
            began[name].set()

    with mock.patch.object(saving._Save, "run", slow):
        threads = [threading.Thread(target=job, args=(name,)) for name in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(80)
    dist.barrier()
    return problems + [problem for name in models for problem in verify(f"{root}/{name}")]


def test_two_threads_save_two_models_at_once(tmp_path):
    assert run_ranks(2, two_threads_worker, str(tmp_path)) == [[], []]


def unshared_worker(rank: int, world: int, root: str) -> list[str]:
    torch.manual_seed(0)
    model = nn.Linear(3, 3).bfloat16()
    optimizer = trained(model)
    save(f"{root}/shared", 1, model, optimizer)
    before = os.getcwd()
    os.makedirs(f"{root}/node{rank}")
    os.chdir(root if rank == 0 else f"{root}/node{rank}")  # the same path, another disk
    messages = []
    try:
        for call in (
            lambda: load("shared", model, optimizer),
            lambda: export_fp32(f"{root}/shared", "out", parallel=True),
        ):
            with (
                mock.patch.object(commit, "SEEN_WITHIN_S", 0.1),
                pytest.raises(ValueError, match="does not see") as caught,
            ):
                call()
            messages.append(str(caught.value))
    finally:
        os.chdir(before)
    return messages


def test_rank_that_does_not_see_the_folder_is_named(tmp_path):
    for of_load, of_export in run_ranks(2, unshared_worker, str(tmp_path)):
        assert of_load.startswith(
            "rank 1 does not see shared/step-00000001, which rank 0 reads: shared is not the same "
            "folder for all ranks"
        )
        assert of_export.startswith(
            "rank 1 does not see .exporting-out, which rank 0 has created: . is not the same folder"
        )
    assert not list(tmp_path.rglob(".exporting-out"))


def other_job_worker(rank: int, world: int, root: str) -> str:
    model = nn.Linear(3, 3).bfloat16()
    return save(root, 9, model, AdamW_BF16(model.parameters()), keep=2).name


def test_save_is_refused_after_another_jobs_save(tmp_path):
    """The two jobs would keep removing each other's checkpoints."""
    torch.manual_seed(0)
    model = nn.Linear(3, 3).bfloat16()
    optimizer = trained(model)
    save(tmp_path, 1, model, optimizer, keep=2)
    assert run_ranks(1, other_job_worker, str(tmp_path)) == ["step-00000009"]
    with pytest.raises(
        RuntimeError,
        match=r"another job has saved .*step-00000009 since this job's last save there",
    ):
        save(tmp_path, 2, model, optimizer, keep=2)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [
        "step-00000001",
        "step-00000009",
    ]
