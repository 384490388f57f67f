"""CPU process groups between ranks that have created different numbers of groups."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

from sharded_bf16_adamw import AdamW_BF16, ZeRO
from sharded_bf16_adamw.sharding import collectives
from sharded_bf16_adamw.sharding.collectives import device_for, new_cpu_group, timeout_of

SOON = timedelta(seconds=5)


def summed(group) -> float:
    value = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(value, group=group)
    objects = [None] * dist.get_world_size(group)
    dist.all_gather_object(objects, dist.get_rank(), group=group)
    assert objects == dist.get_process_group_ranks(group)
    return value.item()


def test_timeout_of_a_backend_without_options_is_unknown():
    class Backend:  # as torch's base class, which MPI's and UCC's inherit from
        @property
        def options(self):
            raise RuntimeError("Backend mpi does not implement getBackendOptions")

    group = SimpleNamespace(_get_backend=lambda device: Backend())
    assert timeout_of(group, torch.device("cpu")) is None


def different_histories_worker(rank, world):
    dist.new_group([0, 1])  # counts only on ranks 0 and 1
    if rank == 3:
        new_cpu_group([3])
    sums = []
    for ranks in ([2, 1], [0, 1, 2], [0, 3], [1, 2, 3], [3, 2, 1, 0], [1, 2]):
        if rank in ranks:
            group = new_cpu_group(ranks, SOON)
            assert dist.get_process_group_ranks(group) == sorted(ranks)
            sums.append(summed(group))
    return sums


def test_new_cpu_group_on_ranks_with_different_group_counts():
    assert run_ranks(4, different_histories_worker) == [
        [6, 5, 10],
        [5, 6, 9, 10, 5],
        [5, 6, 9, 10, 5],
        [5, 9, 10],
    ]


def recreating_worker(rank, world):
    if rank == 0:
        new_cpu_group([0], SOON)
        dist.new_group([0], use_local_synchronization=True)
        return
    kept = []
    for turn in range(4):
        group = new_cpu_group([1, 2], SOON)
        assert summed(group) == 5
        if turn % 2:
            kept.append(group)
        else:
            dist.destroy_process_group(group)
        if rank == 1:
            new_cpu_group([1])
    assert [summed(group) for group in kept] == [5, 5]


def test_new_cpu_group_repeatedly_for_the_same_ranks():
    for _ in range(2):  # the second time under another default process group
        run_ranks(3, recreating_worker)


def failing_worker(rank, world):
    if rank < 2:
        with pytest.raises(RuntimeError, match=r"(?i)timed? ?out"):
            new_cpu_group([0, 1, 2], timedelta(seconds=0.3))
    dist.barrier()
    if rank < 2:
        assert summed(new_cpu_group([0, 1], SOON)) == 3
    else:
        with pytest.raises(RuntimeError, match=r"(?i)timed? ?out"):
            new_cpu_group([0, 1, 2], timedelta(seconds=0.3))
    dist.barrier()
    return summed(new_cpu_group([0, 1, 2], SOON))


def test_new_cpu_group_again_after_a_failure():
    assert run_ranks(3, failing_worker) == [6, 6, 6]


def refusing_worker(rank, world):
    for ranks, words in (
        ([0, 0, 1], r"\[0, 0, 1\]; list distinct"),
        ([0, 2], "list distinct global ranks below 2"),
        ([1 - rank], "lack rank"),
    ):
        with pytest.raises(ValueError, match=words):
            new_cpu_group(ranks)


def test_new_cpu_group_rejects_invalid_ranks():
    run_ranks(2, refusing_worker)


@pytest.mark.parametrize(
    ("config", "device", "wanted"),
    [
        ("cuda:nccl", "cpu", "cuda:1"),
        ("cuda:nccl", "cuda:3", "cuda:3"),
        ("cpu:gloo,cuda:nccl", "cpu", "cpu"),
        ("cpu:gloo", "cuda:0", "cpu"),
        ("cpu:gloo,cuda:gloo", "mps", "cpu"),
    ],
)
def test_device_for_a_group(monkeypatch, config, device, wanted):
    monkeypatch.setattr(dist, "get_backend_config", lambda group=None: config)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    assert device_for(None, torch.device(device)) == torch.device(wanted)


class FakeCUDA(torch.Tensor):
    """A CPU tensor that stands for its copy on a GPU."""


def nccl_only_worker(rank, world):
    """CPUOffloadPolicy keeps gradients on the CPU; the mesh's groups serve only "cuda"."""
    model = nn.Linear(8, 8, bias=False).bfloat16()
    fully_shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False))
    optimizer = AdamW_BF16(model.parameters(), lr=1e-2)
    model(torch.full((2, 8), rank + 1.0, dtype=torch.bfloat16)).sum().backward()
    expected = optimizer.clip_grad_norm_(1.0)
    to, reduce = torch.Tensor.to, dist.all_reduce

    def to_gpu(tensor, *args, **kwargs):
        if args and args[0] == torch.device("cuda", 0):
            return tensor.clone().as_subclass(FakeCUDA)
        return to(tensor, *args, **kwargs)

    def nccl_all_reduce(tensor, *args, **kwargs):
        if not isinstance(tensor, FakeCUDA):
            raise RuntimeError("No backend type associated with device type cpu")
        return reduce(tensor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(collectives, "served_devices", lambda group=None: ["cuda"])
        patched.setattr(torch.accelerator, "current_device_index", lambda: 0)
        patched.setattr(torch.Tensor, "to", to_gpu)
        patched.setattr(dist, "all_reduce", nccl_all_reduce)
        found = optimizer.clip_grad_norm_(1.0)
    assert type(found) is torch.Tensor
    return found.item(), expected.item()


def test_norm_of_cpu_gradients_with_nccl_only():
    found = run_ranks(2, nccl_only_worker)
    assert found[0] == found[1] and found[0][0] == found[0][1] > 0


def zero_on_a_part_worker(rank, world, stage):
    dist.new_group([0, 1])
    groups = [dist.new_group([1, 2], timeout=SOON), dist.new_group([0], timeout=SOON)]
    mesh = DeviceMesh.from_group(groups[rank == 0], "cpu")
    model = nn.Linear(4, 4).bfloat16()
    optimizer = AdamW_BF16(
        model.parameters(), lr=1e-2, sharding=ZeRO(mesh, stage=stage, broadcast_initial=True)
    )
    before = model.weight.detach().clone()
    fill = rank + 1.0 if stage == 2 else 1.0  # stage 1 needs gradients that DDP has averaged
    model(torch.full((2, 4), fill, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)
    return model.weight.detach()


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_on_ranks_with_different_group_counts(stage):
    _, one, two = run_ranks(3, zero_on_a_part_worker, stage)
    assert torch.equal(one, two)
