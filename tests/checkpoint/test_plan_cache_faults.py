"""A cached plan is reused for its own layout only, and has no locations of chunks in files."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bits import assert_same_bits
from distributed import run_ranks
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import Shard as ShardOf
from torch.distributed._shard.sharded_tensor import init_from_local_shards
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from sharded_bf16_adamw import AdamW_BF16, load, save, wait_for_save
from sharded_bf16_adamw.checkpoint import plan_cache
from sharded_bf16_adamw.checkpoint.plan_cache import layout_of


def trained(seed: int = 1) -> tuple[nn.Module, AdamW_BF16]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3)).bfloat16()
    optimizer = AdamW_BF16(model.parameters(), lr=1e-2)
    take_step(model, optimizer)
    return model, optimizer


def take_step(model: nn.Module, optimizer: AdamW_BF16) -> None:
    model(torch.randn(4, 5).bfloat16()).float().square().mean().backward()
    optimizer.step(zero_grad=True)


def state(model: nn.Module, optimizer: AdamW_BF16) -> dict[str, Any]:
    tensors = {f"{i}.{k}": v for i, s in enumerate(optimizer.state.values()) for k, v in s.items()}
    return {k: v.detach().clone() for k, v in {**model.state_dict(), **tensors}.items()}


def plan_identity(optimizer: AdamW_BF16) -> Any:
    """Return the identity of the cached plan, or None."""
    planned = plan_cache._plans.get(optimizer)
    return planned and planned.identity


def metadata(path: Path) -> Any:
    found = pickle.loads((path / ".metadata").read_bytes())
    found.storage_meta = None  # the identity of the save
    return found


# ------------------------------------------------------------------------------- one process


def test_states_that_come_after_the_first_save_are_saved(tmp_path):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3)).bfloat16()
    optimizer = AdamW_BF16(model.parameters(), lr=1e-2)
    save(tmp_path, 1, model, optimizer)
    take_step(model, optimizer)
    path = save(tmp_path, 2, model, optimizer)
    other = trained(seed=9)
    load(path, *other)
    assert_same_bits(state(*other), state(model, optimizer))


def test_renamed_parameter_is_saved_under_its_new_name(tmp_path):
    model, optimizer = trained()
    save(tmp_path, 1, model, optimizer)
    renamed = nn.Module()
    renamed.first, renamed.second = model[0], model[1]
    path = save(tmp_path, 2, renamed, optimizer)
    assert "model.first.weight" in metadata(path).state_dict_metadata
    assert "model.0.weight" not in metadata(path).state_dict_metadata


def test_save_after_load_saves_what_was_loaded(tmp_path):
    model, optimizer = trained()
    first = save(tmp_path, 1, model, optimizer)
    expected = state(model, optimizer)
    for number in range(2, 4):
        take_step(model, optimizer)
        load(first, model, optimizer)
        path = save(tmp_path, number, model, optimizer)
        other = trained(seed=9)
        load(path, *other)
        assert_same_bits(state(*other), expected)


@pytest.mark.parametrize("asynchronous", [(False, True, False), (True, False, True)])
def test_repeated_plan_takes_places_from_its_own_save(tmp_path, asynchronous):
    """The files differ: an asynchronous save writes copies, whose strides take fewer bytes.

    The strides of dimensions of size 1 are arbitrary. There are enough for another alignment.
    """
    model, optimizer = trained()
    sizes, strides = (*[1] * 40, 3), (*[70000] * 40, 1)
    model.register_buffer("table", torch.randn(3).bfloat16().as_strided(sizes, strides))
    identities, places = set(), []
    for number, async_ in enumerate(asynchronous):
        take_step(model, optimizer)
        path = save(tmp_path, number, model, optimizer, async_=async_)
        wait_for_save()
        identities.add(plan_identity(optimizer))
        places.append(metadata(path).storage_data)
        other = trained(seed=9)
        other[0].register_buffer("table", torch.zeros(sizes).bfloat16())
        load(path, *other)
        assert_same_bits(state(*other), state(model, optimizer))
    assert len(identities) == 1
    assert places[0] == places[2] != places[1]


# ------------------------------------------------------------------------------ several ranks


def renumbered_worker(rank: int, world: int, root: str) -> None:
    """Join a new process group under another rank between two saves."""
    model, optimizer = trained()
    save(root, 1, model, optimizer)
    before, layout = plan_identity(optimizer), layout_of({"a": torch.ones(2)}, None)
    assert before is not None
    dist.barrier()
    dist.destroy_process_group()
    store = dist.FileStore(f"{root}/store", world)
    dist.init_process_group("gloo", store=store, rank=world - 1 - rank, world_size=world)
    assert layout_of({"a": torch.ones(2)}, None) != layout
    take_step(model, optimizer)
    path = save(root, 2, model, optimizer)
    assert plan_identity(optimizer) not in (None, before)
    other = trained(seed=9)
    load(path, *other)
    assert_same_bits(state(*other), state(model, optimizer))


def test_plan_is_not_that_of_the_same_process_under_another_rank(tmp_path):
    run_ranks(2, renumbered_worker, str(tmp_path))


SHAPE = (6, 5)


def sharded(ranks: Any, placements: Any, dtype: torch.dtype = torch.bfloat16) -> DTensor:
    """Return a tensor of ``SHAPE`` on a mesh of ``ranks``; each element is its own number."""
    mesh = DeviceMesh("cpu", ranks)
    local = torch.arange(30).reshape(SHAPE).to(dtype)
    for dim, placement in enumerate(placements):
        if isinstance(placement, Shard):
            coordinate = mesh.get_coordinate()[dim]
            local = local.chunk(mesh.size(dim), placement.dim)[coordinate].contiguous()
    shape = torch.Size(SHAPE)
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=shape, stride=(SHAPE[1], 1)
    )


DTENSORS: dict[str, Callable[[], Tensor]] = {
    "rows": lambda: sharded([0, 1], [Shard(0)]),
    "columns": lambda: sharded([0, 1], [Shard(1)]),
    "ranks in another order": lambda: sharded([1, 0], [Shard(0)]),
    "another mesh": lambda: sharded([[0], [1]], [Shard(0), Replicate()]),
    "replicated": lambda: sharded([0, 1], [Replicate()]),
    "float32": lambda: sharded([0, 1], [Shard(0)], torch.float32),
    "plain": lambda: torch.arange(30).reshape(SHAPE).bfloat16(),
}


def dtensors_worker(rank: int, world: int, root: str) -> None:
    """Save each kind before and after the first one; each element loads into its place."""
    model, optimizer = trained()
    expected = torch.arange(30).reshape(SHAPE)
    for number, (first, second) in enumerate(itertools.permutations(DTENSORS, 2)):
        if "rows" not in (first, second):
            continue
        model.register_buffer("table", DTENSORS[first]())
        save(root, 2 * number, model, optimizer, keep=1)
        before = plan_identity(optimizer)
        model.register_buffer("table", DTENSORS[second]())
        path = save(root, 2 * number + 1, model, optimizer, keep=2)
        assert plan_identity(optimizer) not in (None, before), (first, second)
        model.register_buffer("table", torch.zeros(SHAPE, dtype=model.table.dtype))
        load(path, model, optimizer)
        assert torch.equal(model.table, expected.to(model.table.dtype)), (first, second)


def test_sharded_tensor_of_another_layout_is_planned_anew(tmp_path):
    run_ranks(2, dtensors_worker, str(tmp_path))


class ManyShards(Tensor):
    """A local tensor that plans its own items, as torchrec's ``LocalShardsWrapper`` does."""


def dtensor_layouts_worker(rank: int, world: int) -> None:
    tensor = sharded([0, 1], [Shard(0)])
    layout = layout_of({"a": tensor}, None)
    assert layout is not None
    assert layout != layout_of({"b": tensor}, None)
    taller = DTensor.from_local(
        tensor.to_local(), tensor.device_mesh, [Shard(0)], shape=torch.Size((7, 5)), stride=(5, 1)
    )
    assert layout != layout_of({"a": taller}, None)
    tensor._local_tensor = tensor._local_tensor.as_subclass(ManyShards)
    assert layout_of({"a": tensor}, None) is None


def test_layout_of_sharded_tensors_has_names_and_shapes_and_knows_their_class():
    run_ranks(2, dtensor_layouts_worker)


def flat_shards(rank: int, cut: int, size: int = 6, dtype: torch.dtype = torch.float32) -> Any:
    """Return a ``ShardedTensor``, as FSDP1's; rank 0 has its first ``cut`` elements."""
    start, end = ((0, cut), (cut, size))[rank]
    shard = ShardOf.from_tensor_and_offsets(torch.zeros(end - start, dtype=dtype), [start], rank)
    return init_from_local_shards([shard], size)


def sharded_tensors_worker(rank: int, world: int) -> None:
    def layout(*args: Any, key: str = "a") -> Any:
        return layout_of({key: flat_shards(rank, *args)}, None)

    assert layout(3) == layout(3)
    assert layout(3) != layout(3, key="b")
    assert layout(3) != layout(4)
    assert layout(3) != layout(3, 6, torch.bfloat16)
    if rank == 0:  # its own shard is the same
        assert layout(3) != layout(3, 7)
    else:
        layout(3), layout(3, 7)


def test_layout_of_fsdp1_has_names_sizes_shards_and_properties():
    run_ranks(2, sharded_tensors_worker)
