"""Plans of saves that are built on tables equal those of DCP's planner for every layout."""

from __future__ import annotations

import gc
import pickle
import random
import weakref
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint import load as dcp_load
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult

from sharded_bf16_adamw import AdamW_BF16, save
from sharded_bf16_adamw.checkpoint import saving
from sharded_bf16_adamw.checkpoint.dcp_storage import ChecksummedWriter
from sharded_bf16_adamw.checkpoint.plan_table import (
    Assignment,
    PlanTable,
    to_assigned,
    to_locations,
    to_plan,
    to_table,
)
from sharded_bf16_adamw.checkpoint.save_plan import merge_plans

from .layouts import BY_NAME, LAYOUTS

BF16 = TensorProperties(torch.bfloat16)
FP32 = TensorProperties(torch.float32)
Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes


def shard(fqn: str, size: tuple[int, ...], box: Box, properties: Any = BF16) -> WriteItem:
    return _item(fqn, size, box, properties, WriteItemType.SHARD)


def full(fqn: str, size: tuple[int, ...], properties: Any = BF16) -> WriteItem:
    return _item(fqn, size, ((0,) * len(size), size), properties, WriteItemType.TENSOR)


def _item(fqn: str, size: Any, box: Box, properties: Any, kind: WriteItemType) -> WriteItem:
    offsets, sizes = map(torch.Size, box)
    data = TensorWriteData(ChunkStorageMetadata(offsets, sizes), properties, torch.Size(size))
    return WriteItem(MetadataIndex(fqn, offsets), kind, tensor_data=data)


def local(*items: WriteItem) -> SavePlan:
    return SavePlan(list(items), planner_data={item.index.fqn: (item.index.fqn,) for item in items})


def prepare(plans: list[SavePlan]) -> list[SavePlan]:
    return ChecksummedWriter("unused").prepare_global_plan(plans)


def write(plans: list[SavePlan]) -> list[list[WriteResult]]:
    """Return the results of ranks that each write their plan to two files."""
    return [
        [
            WriteResult(item.index, 3, _StorageInfo(f"__{rank}_{n % 2}.distcp", n // 2 * 3, 3))
            for n, item in enumerate(plan.items)
        ]
        for rank, plan in enumerate(plans)
    ]


def everything(plans: list[SavePlan], metadata: Metadata) -> Any:
    """Return plans and metadata, and what ``==`` does not compare: hints and orders of dicts."""
    return (
        [[(item, item.index.index) for item in plan.items] for plan in plans],
        [(plan.storage_data, plan.usable) for plan in plans],
        list(metadata.state_dict_metadata.items()),
        list(metadata.planner_data.items()),
        {key: (key.index, info) for key, info in metadata.storage_data.items()},
    )


def by_dcp(plans: list[SavePlan], results: list[list[WriteResult]] | None = None) -> Any:
    merged, metadata = DefaultSavePlanner().create_global_plan(plans)
    of_ranks = write(merged) if results is None else results
    metadata.storage_data = {
        result.index: result.storage_data for results in of_ranks for result in results
    }
    return everything(prepare(merged), metadata)


def by_tables(plans: list[SavePlan], on_tables: bool | None = True) -> Any:
    """Merge as rank 0 does; with True, DCP's planner must not be used, with False it must."""
    tables = [pickle.loads(pickle.dumps(to_table(plan))) for plan in plans]
    merged, to_chunks = merge_plans(tables, DefaultSavePlanner(), prepare)
    if on_tables is not None:
        assert all(isinstance(each, Assignment) == on_tables for each in merged)
    assigned = [to_assigned(plan, each) for plan, each in zip(plans, merged, strict=True)]
    of_ranks = [to_locations(*each) for each in zip(assigned, write(assigned), strict=True)]
    return everything(assigned, to_chunks(of_ranks).to_metadata())


# ------------------------------------------------------------------------------ made-up layouts


def grid(size: tuple[int, ...], cuts: tuple[int, ...]) -> list[Box]:
    """Cut a tensor as torch.chunk does: the last chunks may be smaller, or empty at the end."""
    boxes: list[Box] = [((), ())]
    for length, parts in zip(size, cuts, strict=True):
        step = -(-length // parts)
        starts = [min(i * step, length) for i in range(parts)]
        boxes = [
            ((*offsets, start), (*sizes, min(step, length - start)))
            for offsets, sizes in boxes
            for start in starts
        ]
    return boxes


def random_plans(seed: int) -> list[SavePlan]:
    """Return plans of ranks with sharded, replicated and own tensors in different orders."""
    rng = random.Random(seed)
    world = rng.choice([1, 2, 3, 4, 6, 8, 16, 40])
    items: list[list[WriteItem]] = [[] for _ in range(world)]
    for number in range(rng.randint(1, 12)):
        fqn, properties = f"tensor {number}", rng.choice([BF16, FP32])
        holders = sorted(rng.sample(range(world), rng.randint(1, world)))
        if rng.random() < 0.7:
            holders = list(range(world))
        kind = rng.choice(["shard", "shard", "replicas", "grid", "several"])
        if kind == "replicas":
            size = rng.choice([(), (4,), (0, 3), (2, 3)])
            for rank in holders:
                items[rank].append(full(fqn, size, properties))
        elif kind == "several":  # two shards of a tensor on a rank, as ShardedTensor allows
            size = (2 * len(holders),)
            for index, rank in enumerate(holders):
                for part in rng.sample([0, 1], 2):
                    items[rank].append(
                        shard(fqn, size, ((part * len(holders) + index,), (1,)), properties)
                    )
        else:
            replicas = rng.choice([n for n in (1, 2, 3) if len(holders) % n == 0])
            parts = len(holders) // replicas
            rows = rng.choice([parts, 2 * parts, parts + 1, 1, 7])
            size, cuts = (rows, rng.randint(1, 3)), (parts, 1)
            if kind == "grid" and parts % 2 == 0:
                size, cuts = (rows, 5, 3), (parts // 2, 2, 1)
            boxes = grid(size, cuts) * replicas
            for rank, box in zip(holders, boxes, strict=True):
                items[rank].append(shard(fqn, size, box, properties))
    for rank, own in enumerate(items):
        if rng.random() < 0.2:
            rng.shuffle(own)
        own.append(full(f"rng.{rank}.cpu", (16,), TensorProperties(torch.uint8)))
    return [local(*own) for own in items]


@pytest.mark.parametrize("seed", range(150))
def test_made_up_plans_are_those_of_dcp(seed):
    plans = random_plans(seed)
    assert by_tables(plans, on_tables=True) == by_dcp(plans)


def test_table_is_the_plan():
    for seed in range(30):
        for plan in random_plans(seed):
            table = to_table(plan)
            assert isinstance(table, PlanTable) and to_plan(table) == plan


def test_replicas_go_to_the_rank_with_fewest_bytes():
    """Bytes are those of full tensors. Ties go to the first rank of a set, where 8 precedes 1."""
    ranks = [local(*(full(f"t{n}", (n,)) for n in range(9, 0, -1))) for _ in range(3)]
    assert by_tables(ranks) == by_dcp(ranks)
    ranks = [local() for _ in range(9)]
    for holders in ((1, 8), (8, 1), (2, 4, 8)):
        for rank in holders:
            ranks[rank] = local(*ranks[rank].items, full(f"on {holders}", (3,)))
    assert by_tables(ranks) == by_dcp(ranks)


@pytest.mark.parametrize(
    "boxes",
    [
        [((0,), (3,)), ((2,), (2,))],
        [((0,), (3,)), ((3,), (2,))],
        [((0,), (1,)), ((2,), (2,))],
        [((0,), (5,)), ((2,), (0,))],
        [((0,), (4,)), ((2,), (0,))],
        [((-1,), (3,)), ((2,), (2,))],
        [((0,), (2,)), ((1,), (2,))],
        [((-1,), (2,)), ((2,), (2,))],
        [((0,), (2,)), ((3,), (2,))],
    ],
    ids=[
        *("overlap", "too long", "gap", "too long and empty", "empty inside", "negative"),
        *("shifted", "negative, as long", "beyond the end, as long"),
    ],
)
def test_invalid_plans_are_the_errors_of_dcp(boxes):
    plans = [local(shard("t", (4,), box)) for box in boxes]

    def outcome(merge: Any) -> Any:
        try:
            return merge(plans)
        except ValueError as error:
            return str(error)

    of_dcp = outcome(by_dcp)
    assert isinstance(of_dcp, str), "DCP must refuse the plans"
    assert outcome(lambda plans: by_tables(plans, on_tables=None)) == of_dcp


def test_boxes_that_are_no_grid_are_planned_by_dcp():
    boxes = [
        ((0, 0), (1, 2)),
        ((0, 2), (2, 1)),
        ((2, 1), (1, 2)),
        ((1, 0), (2, 1)),
        ((1, 1), (1, 1)),
    ]
    plans = [local(shard("t", (3, 3), box)) for box in boxes]
    assert by_tables(plans, on_tables=False) == by_dcp(plans)


def odd_plans() -> dict[str, list[SavePlan]]:
    both = [((0,), (2,)), ((2,), (2,))]
    parts = [local(shard("t", (4,), box)) for box in both]
    nested = SavePlan(parts[1].items, planner_data={"t": ("a", "t")})
    more = SavePlan(parts[1].items, planner_data={"t": ("t",), "unwritten": ("unwritten",)})
    other = local(shard("t", (4,), both[1], FP32))
    huge = [local(shard("t", (2**40, 2**21), ((n * 2**39, 0), (2**39, 2**21)))) for n in (0, 1)]
    return {
        "nested": [parts[0], nested],
        "key without an item": [parts[0], more],
        "two dtypes": [parts[0], other],
        "huge": [local(*plan.items, shard("u", (2,), ((n,), (1,)))) for n, plan in enumerate(huge)],
        "twice on a rank": [local(*parts[0].items, *parts[0].items), parts[1]],
    }


@pytest.mark.parametrize("name", odd_plans())
def test_plans_that_tables_cannot_express_are_planned_by_dcp(name):
    plans = odd_plans()[name]

    def outcome(merge: Any) -> Any:
        try:
            return merge(plans)
        except ValueError as error:
            return str(error)

    assert outcome(lambda plans: by_tables(plans, on_tables=False)) == outcome(by_dcp)


def test_plan_that_tables_cannot_express_is_not_kept_for_the_next_save():
    """Rank 0 keeps ``to_chunks``, which must not hold the write items of all ranks."""
    tables = [pickle.loads(pickle.dumps(to_table(plan))) for plan in odd_plans()["nested"]]
    merged = merge_plans(tables, DefaultSavePlanner(), prepare)
    items = [weakref.ref(item) for plan in merged.assignments for item in plan.items]
    to_chunks = merged.to_chunks
    del merged, tables
    gc.collect()
    assert callable(to_chunks) and [item() for item in items] == [None, None]


def test_full_tensor_beside_its_shard_is_refused_as_by_dcp():
    plans = [local(shard("t", (4,), ((2,), (2,)))), local(full("t", (4,)))]
    with pytest.raises(AssertionError):
        by_dcp(plans)
    with pytest.raises(AssertionError):
        by_tables(plans)


def test_ranks_of_one_layout_share_a_block():
    """Random states have one name a rank, which must not put ranks in different blocks."""
    plans = [
        local(
            shard("t", (8,), ((rank,), (1,))), full(f"rng.{rank}.cpu", (3,)), full("rng.0.x", (1,))
        )
        for rank in range(8)
    ]
    headers = {to_table(plan).sections[0].header for plan in plans}
    assert len(headers) == 1
    assert by_tables(plans) == by_dcp(plans)


# --------------------------------------------------------------------------------- real layouts


def layout_worker(rank: int, world: int, name: str, root: str) -> list[Any]:
    """Save, and return the plan and metadata on tables and those of DCP."""
    module, optimizer = BY_NAME[name].build(world, seed=1)
    seen: dict[str, Any] = {}

    def record_table(plan: SavePlan) -> Any:
        seen["local"] = plan
        return to_table(plan)

    def record_assigned(plan: SavePlan, assignment: Any) -> SavePlan:
        seen["on tables"] = isinstance(assignment, Assignment)
        return to_assigned(plan, assignment)

    def record_written(plan: SavePlan, results: list[WriteResult]) -> Any:
        seen["assigned"], seen["results"] = plan, results
        return to_locations(plan, results)

    with (
        patch.object(saving, "to_table", record_table),
        patch.object(saving, "to_assigned", record_assigned),
        patch.object(saving, "to_locations", record_written),
    ):
        path = save(root, 1, module, optimizer)
    plans: list[Any] = [(seen["local"], seen["assigned"], seen["on tables"], seen["results"])]
    if world > 1:
        gathered: list[Any] = [None] * world
        dist.all_gather_object(gathered, plans[0])
        plans = gathered
    metadata = pickle.loads((path / ".metadata").read_bytes())
    assert all(on_tables for _, _, on_tables, _ in plans)
    assert everything([assigned for _, assigned, _, _ in plans], metadata) == by_dcp(
        [own for own, _, _, _ in plans], [results for _, _, _, results in plans]
    )
    assert [plan.storage_data for _, plan, _, _ in plans] == [
        _StoragePrefix(f"__{number}_") for number in range(world)
    ]
    return []


@pytest.mark.parametrize(
    ("name", "world"),
    [(layout.name, max(layout.worlds)) for layout in LAYOUTS] + [("FSDP2", 3), ("DDP", 3)],
)
def test_plans_of_real_layouts_are_those_of_dcp(tmp_path, name, world):
    run_ranks(world, layout_worker, name, str(tmp_path))


def test_dcp_loads_what_was_planned_on_tables(tmp_path):
    model = torch.nn.Linear(4, 2).bfloat16()
    path = save(tmp_path, 1, model, AdamW_BF16(model.parameters(), lr=1e-3))
    loaded = {"model.weight": torch.zeros(2, 4, dtype=torch.bfloat16)}
    dcp_load(loaded, checkpoint_id=path, no_dist=True)
    assert torch.equal(loaded["model.weight"], model.weight)
