"""A repeated save uses the plan of the last one if no rank's layout has changed, and only then."""

from __future__ import annotations

import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from bits import assert_same_bits
from distributed import run_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultSavePlanner

from sharded_bf16_adamw import AdamW_BF16, load, save, wait_for_save
from sharded_bf16_adamw.checkpoint import dcp_storage, plan_cache, saving
from sharded_bf16_adamw.checkpoint.plan_cache import layout_of

from .layouts import BY_NAME, LAYOUTS, train

CACHED, PLANNED = (0, 0, 0), (1, 1, 1)


@contextmanager
def counted() -> Iterator[list[int]]:
    """Count this rank's local plans, gathered tables and scattered assignments."""
    counts = [0, 0, 0]

    def count(index: int, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[index] += 1
            return function(*args, **kwargs)

        return call

    local = DefaultSavePlanner.create_local_plan
    with (
        patch.object(DefaultSavePlanner, "create_local_plan", count(0, local)),
        patch.object(saving, "to_table", count(1, saving.to_table)),
        patch.object(saving, "scatter_object", count(2, saving.scatter_object)),
    ):
        yield counts


def trained(seed: int = 1) -> tuple[nn.Module, AdamW_BF16]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).bfloat16()
    optimizer = AdamW_BF16(model.parameters(), lr=1e-2)
    step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: AdamW_BF16) -> None:
    model(torch.randn(4, 5).bfloat16()).float().square().mean().backward()
    optimizer.step(zero_grad=True)


def state(model: nn.Module, optimizer: AdamW_BF16) -> dict[str, Any]:
    states = [optimizer.state[param] for param in model.parameters() if param in optimizer.state]
    return {
        **{key: value.clone() for key, value in model.state_dict().items()},
        **{f"{i}.{k}": v.clone() for i, values in enumerate(states) for k, v in values.items()},
    }


def save_and_wait(root: Any, model: nn.Module, optimizer: AdamW_BF16, async_: bool) -> None:
    save(root, 2, model, optimizer, async_=async_)
    wait_for_save()


def saved_metadata(path: Path) -> Any:
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.storage_meta = None  # the identity of the save
    return metadata


# ------------------------------------------------------------------------------- one process


@pytest.mark.parametrize("async_", [False, True])
def test_repeated_save_is_not_planned_again(tmp_path, async_):
    model, optimizer = trained()
    paths = []
    for number in range(1, 4):
        with counted() as counts:
            paths.append(save(tmp_path, number, model, optimizer, async_=async_))
            wait_for_save()
        assert tuple(counts) == (PLANNED if number == 1 else CACHED)
        expected = state(model, optimizer)
        other = trained(seed=9)
        load(paths[-1], *other)
        assert_same_bits(state(*other), expected)
        step(model, optimizer)
    assert saved_metadata(paths[0]) == saved_metadata(paths[1]) == saved_metadata(paths[2])


def add_buffer(model: nn.Module, optimizer: AdamW_BF16) -> None:
    model.register_buffer("extra", torch.ones(3))


def remove_buffer(model: nn.Module, optimizer: AdamW_BF16) -> None:
    del model[1].running_var


def change_dtype(model: nn.Module, optimizer: AdamW_BF16) -> None:
    model[1].running_mean = model[1].running_mean.float()


def change_shape(model: nn.Module, optimizer: AdamW_BF16) -> None:
    model[1].running_mean = torch.ones(4, 2, dtype=torch.bfloat16)


def reorder(model: nn.Module, optimizer: AdamW_BF16) -> None:
    model[1].running_mean, model[1].running_var = model[1].running_var, model[1].running_mean
    buffers = model[1]._buffers
    buffers["running_mean"] = buffers.pop("running_mean")


@pytest.mark.parametrize("change", [add_buffer, remove_buffer, change_dtype, change_shape, reorder])
def test_changed_layout_is_planned_anew(tmp_path, change):
    model, optimizer = trained()
    save(tmp_path, 1, model, optimizer)
    change(model, optimizer)
    with counted() as counts:
        path = save(tmp_path, 2, model, optimizer)
    assert tuple(counts) == PLANNED
    with patch.object(plan_cache, "pop_plan", lambda *_: None):
        assert saved_metadata(path) == saved_metadata(save(tmp_path, 3, model, optimizer))


@pytest.mark.parametrize("async_", [False, True])
def test_failed_save_leaves_no_plan(tmp_path, async_):
    model, optimizer = trained()
    save(tmp_path, 1, model, optimizer)
    with (
        patch.object(saving.ChecksummedWriter, "write_data", side_effect=OSError("disk")),
        pytest.raises(RuntimeError, match="disk"),
    ):
        save_and_wait(tmp_path, model, optimizer, async_)
    assert optimizer not in plan_cache._plans
    with counted() as counts:
        save(tmp_path, 3, model, optimizer)
    assert tuple(counts) == PLANNED


def test_plan_of_one_optimizer_is_not_that_of_another(tmp_path):
    model, optimizer = trained()
    save(tmp_path, 1, model, optimizer)
    with counted() as counts:
        save(tmp_path, 2, *trained())
    assert tuple(counts) == PLANNED


def test_cache_keeps_no_optimizer_alive(tmp_path):
    model, optimizer = trained()
    save(tmp_path, 1, model, optimizer, async_=True)
    wait_for_save()
    gone = weakref.ref(optimizer)
    del model, optimizer
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("value", ["text", type("Weights", (Tensor,), {})(2)], ids=["str", "class"])
def test_layout_of_unknown_values_is_unknown(value):
    assert layout_of({"a": torch.ones(2)}, None) is not None
    assert layout_of({"a": torch.ones(2), "b": value}, None) is None


@pytest.mark.parametrize(
    "other",
    [
        torch.ones(2, requires_grad=True),
        torch.ones(2).to_sparse(),
        torch.ones(2).double(),
        torch.ones(2, 1),
    ],
    ids=["requires_grad", "layout", "dtype", "shape"],
)
def test_layout_has_all_that_metadata_have(other):
    assert layout_of({"a": torch.ones(2)}, None) == layout_of({"a": torch.zeros(2)}, None)
    assert layout_of({"a": torch.ones(2)}, None) != layout_of({"a": other}, None)
    assert layout_of({"a": torch.ones(2)}, None) != layout_of({"b": torch.ones(2)}, None)


def test_layout_has_whether_memory_is_pinned():
    """As DCP's metadata do. Without an accelerator no memory can be pinned."""
    tensors = {"a": torch.ones(2)}
    unpinned = layout_of(tensors, None)
    with patch.object(Tensor, "is_pinned", lambda tensor: True):
        assert layout_of(tensors, None) != unpinned


# ------------------------------------------------------------------------------ several ranks


def one_rank_changes_worker(rank: int, world: int, root: str) -> list[tuple[int, ...]]:
    """Save four times; before the third, a buffer of rank 1 alone gets another dtype."""
    outcomes = []
    model, optimizer = trained()
    own = nn.Module()
    own.model = model
    if rank == 1:
        own.register_buffer("of rank 1", torch.ones(3))
    for number in range(1, 5):
        if number == 3 and rank == 1:
            own.register_buffer("of rank 1", torch.ones(3).double())
        with counted() as counts:
            path = save(root, number, own, optimizer)
        outcomes.append(tuple(counts))
        dtype = saved_metadata(path).state_dict_metadata["model.of rank 1"].properties.dtype
        assert dtype == (torch.float32 if number < 3 else torch.float64)
    return outcomes


def test_change_on_one_rank_is_planned_by_all(tmp_path):
    for outcomes in run_ranks(2, one_rank_changes_worker, str(tmp_path)):
        assert outcomes == [PLANNED, CACHED, PLANNED, CACHED]


def failing_rank_worker(rank: int, world: int, root: str, where: str) -> list[tuple[int, ...]]:
    model, optimizer = trained()
    save(root, 1, model, optimizer)
    failing = {"rank 1": rank == 1, "publish": rank == 0}[where]
    owner, name = {
        "rank 1": (saving.ChecksummedWriter, "write_data"),
        "publish": (saving, "publish"),
    }[where]
    real = getattr(owner, name)
    error = {"side_effect": OSError("disk")} if failing else {"new": real}
    with patch.object(owner, name, **error):
        for async_ in (True, False):
            with pytest.raises(RuntimeError, match=r"on rank \d, OSError: disk"):
                save_and_wait(root, model, optimizer, async_)
            assert optimizer not in plan_cache._plans
    outcomes = []
    for number in (3, 4):
        with counted() as counts:
            save(root, number, model, optimizer)
        outcomes.append(tuple(counts))
    expected = state(model, optimizer)
    other = trained(seed=9)
    load(root, *other)
    assert_same_bits(state(*other), expected)
    return outcomes


@pytest.mark.parametrize("where", ["rank 1", "publish"])
def test_save_that_fails_on_one_rank_leaves_no_plan_on_any(tmp_path, where):
    for outcomes in run_ranks(2, failing_rank_worker, str(tmp_path), where):
        assert outcomes == [PLANNED, CACHED]


def lost_plan_worker(rank: int, world: int, root: str) -> list[tuple[int, ...]]:
    """Save while ranks hold plans of different saves."""
    model, optimizer = trained()
    outcomes = []
    for number in range(1, 4):
        with counted() as counts:
            path = save(root, number, model, optimizer)
        outcomes.append(tuple(counts))
        if number == 1 and rank == 1:  # as if another save had stored its plan here only
            plan_cache._plans[optimizer].identity = "another"
        if number == 2 and rank == 0:
            del plan_cache._plans[optimizer]
    expected = state(model, optimizer)
    other = trained(seed=9)
    load(path, *other)
    assert_same_bits(state(*other), expected)
    return outcomes


def test_ranks_that_hold_different_plans_plan_anew(tmp_path):
    for outcomes in run_ranks(3, lost_plan_worker, str(tmp_path)):
        assert outcomes == [PLANNED, PLANNED, PLANNED]


def groups_worker(rank: int, world: int, root: str) -> None:
    """Save one model in groups of different ranks; each checkpoint must be complete."""
    model, optimizer = trained()
    first = dist.new_group([0, 1])
    for number, group in enumerate((None, first, None, first)):
        if rank < 2 or group is None:
            path = save(f"{root}/{number}", 1, model, optimizer, group=group)
            other = trained(seed=9)
            load(path, *other, group=group)
            assert_same_bits(state(*other), state(model, optimizer))
        dist.barrier()


def test_plan_is_of_the_ranks_of_one_group(tmp_path):
    run_ranks(3, groups_worker, str(tmp_path))


def layouts_worker(rank: int, world: int, root: str, name: str) -> None:
    """Save asynchronously with the cached plan, and save without a cached plan."""
    module, optimizer = BY_NAME[name].build(world, seed=1)
    train(module, optimizer, 1)
    save(root, 1, module, optimizer)
    train(module, optimizer, 1)
    with counted() as counts, patch.object(dcp_storage, "CHUNKS_FILE_THRESHOLD", 0):
        cached = save(root, 2, module, optimizer, async_=True)
        wait_for_save()
    assert tuple(counts) == CACHED
    with patch.object(plan_cache, "pop_plan", lambda *_: None):
        planned = save(root, 3, module, optimizer)
    if rank == 0:
        assert saved_metadata(cached) == saved_metadata(planned)


@pytest.mark.parametrize(
    ("name", "world"), [(layout.name, max(layout.worlds)) for layout in LAYOUTS]
)
def test_every_layout_saves_by_its_last_plan(tmp_path, name, world):
    run_ranks(world, layouts_worker, str(tmp_path), name)
