"""Saving from several GPUs with one current GPU, simulated on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from sharded_bf16_adamw.checkpoint import staging, state_dict
from sharded_bf16_adamw.checkpoint.dcp_storage import ChecksummedWriter


class OnGPU(Tensor):
    """A tensor that pretends to be on a GPU.

    A non-blocking copy from it arrives when its GPU is synchronized.
    """

    index: int
    queued: ClassVar[dict[int, list[Callable[[], Any]]]] = {}

    is_cuda = property(lambda self: True)
    device = property(lambda self: torch.device("cuda", self.index))

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is Tensor.detach:
            return args[0]
        if function is Tensor.copy_ and isinstance(args[1], cls):
            source = args[1].as_subclass(Tensor)
            assert kwargs == {"non_blocking": True}
            cls.queued.setdefault(args[1].index, []).append(lambda: args[0].copy_(source))
            return args[0]
        return super().__torch_function__(function, types, args, kwargs or {})


def on_gpu(index: int, value: float) -> Tensor:
    tensor = torch.full((4,), value).as_subclass(OnGPU)
    tensor.index = index
    return tensor


class Planner(DefaultSavePlanner):
    """A planner of tensors by name."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.plan = SavePlan(
            [WriteItem(MetadataIndex(name), WriteItemType.TENSOR) for name in tensors]
        )

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.tensors[write_item.index.fqn]


@pytest.fixture
def gpus(monkeypatch) -> SimpleNamespace:
    """Simulate four GPUs, with numbers as random states.

    ``.current`` is the current GPU, ``.used`` are those with a context.
    """
    state = SimpleNamespace(current=0, used={0}, random=[torch.tensor([10 + i]) for i in range(4)])
    OnGPU.queued = {}
    empty = torch.empty

    def index(device: Any) -> int:
        named = state.current if device in (None, "cuda") else device
        return named if isinstance(named, int) else named.index

    def synchronize(device: Any = None) -> None:
        for copy in OnGPU.queued.pop(index(device), []):
            copy()

    def set_rng_state(value: Tensor, device: Any = "cuda") -> None:
        state.random[index(device)] = value.clone()

    monkeypatch.setattr(
        torch, "empty", lambda *shape, pin_memory=False, **options: empty(*shape, **options)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: state.current)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(
        torch.cuda,
        "current_stream",
        lambda device=None: SimpleNamespace(synchronize=lambda: synchronize(device)),
    )
    monkeypatch.setattr(
        torch.cuda, "get_rng_state", lambda device="cuda": state.random[index(device)].clone()
    )
    monkeypatch.setattr(torch.cuda, "set_rng_state", set_rng_state)
    monkeypatch.setattr(
        torch._C, "_cuda_hasPrimaryContext", lambda gpu: gpu in state.used, raising=False
    )
    return state


@pytest.mark.parametrize("on", [[0], [1], [0, 1], [3, 1, 2]])
def test_staged_copies_from_any_gpu_are_complete(gpus, on):
    """Training continues after staging: a copy still in flight would be torn."""
    tensors = {f"of {index}": on_gpu(index, 1.0 + index) for index in on} | {
        "on the CPU": torch.full((4,), 9.0)
    }
    planner = Planner(tensors)
    staged = staging.StagedPlanner(planner, planner.plan, torch.optim.SGD([torch.zeros(1)]))
    found = [staged.resolve_data(item).tolist() for item in planner.plan.items]
    assert found == [[value] * 4 for value in [*(1.0 + index for index in on), 9.0]]


@pytest.mark.parametrize(
    ("on", "ahead"),
    [([0], True), ([1], False), ([0, 1], False), ([], False)],
    ids=["current", "another", "both", "none"],
)
def test_dcp_copies_ahead_from_the_current_gpu_only(gpus, monkeypatch, tmp_path, on, ahead):
    """DCP synchronizes no other GPU before it writes.

    Without tensors on a GPU it touches none: a thread's current GPU is the first, not this rank's.
    """
    seen = []
    monkeypatch.setattr(
        FileSystemWriter,
        "write_data",
        lambda self, plan, planner: seen.append(self.per_thread_copy_ahead > 0),
    )
    planner = Planner(
        {f"of {index}": on_gpu(index, 1.0) for index in on} | {"on the CPU": torch.ones(1)}
    )
    ChecksummedWriter(tmp_path).write_data(planner.plan, planner)
    assert seen == [ahead]


def test_writer_asks_for_no_current_gpu_if_the_device_is_not_cuda(monkeypatch, tmp_path):
    """A tensor on the meta device stands for one on MPS or XPU."""
    without_cuda = mock.Mock(side_effect=AssertionError("Torch not compiled with CUDA enabled"))
    monkeypatch.setattr(torch.cuda, "current_device", without_cuda)
    monkeypatch.setattr(FileSystemWriter, "write_data", lambda *_: None)
    planner = Planner({"elsewhere": torch.ones(1, device="meta")})
    writer = ChecksummedWriter(tmp_path)
    writer.write_data(planner.plan, planner)
    assert writer.per_thread_copy_ahead == 0


def loaded(saved: dict[str, Tensor]) -> None:
    """Restore random states as load() does: it reads in place what the checkpoint has."""
    here = {
        key: value
        for key, value in state_dict.get_rng_state(every_device=True).items()
        if key in saved
    }
    for key, value in here.items():
        value.copy_(saved[key])
    state_dict.set_rng_state(here)


def test_random_state_of_one_gpu_goes_to_the_current_gpu(gpus):
    saved = state_dict.get_rng_state()
    assert {key: value.tolist() for key, value in saved.items() if key != "rng.0.cpu"} == {
        "rng.0.cuda": [10]
    }, "as older versions save it"
    gpus.current, gpus.used = 2, {2}
    loaded(saved)
    assert list(map(int, gpus.random)) == [10, 11, 10, 13]


@pytest.mark.parametrize("current_later", [1, 0, 3])
def test_random_states_of_all_used_gpus_are_saved(gpus, current_later):
    gpus.current, gpus.used = 1, {1, 3}
    saved = state_dict.get_rng_state()
    assert sorted(saved) == ["rng.0.cpu", "rng.0.cuda", "rng.0.cuda.1", "rng.0.cuda.3"]
    gpus.random, gpus.current, gpus.used = (
        [torch.tensor([0])] * 4,
        current_later,
        {current_later},
    )  # others are used after the load
    loaded(saved)
    assert (int(gpus.random[1]), int(gpus.random[3])) == (11, 13)
