"""Measure what rank 0 computes for all ranks in a save, and each rank in a load.

    python launch/benchmark.py plan --ranks 1024 --tensors 1200

One process stands for all ranks of FSDP2. It is rank 0 of a process group of torch's ``fake``
backend, so that its own plan is real. The plan of another rank is this one with shifted offsets and
another random state: every shard has as many rows. Nothing travels, and no tensor is written; the
metadata are those of a real save. CPU seconds of one thread, and the peak of resident memory above
the memory before (with the plans of all ranks, as rank 0 receives them).
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.fsdp import fully_shard
from torch.utils.serialization import config
from training.command_line import Parser, output_file, positive
from training.errors import UsageError

from sharded_bf16_adamw import AdamW_BF16
from sharded_bf16_adamw.checkpoint.dcp_storage import METADATA, ChecksummedWriter, parse_metadata
from sharded_bf16_adamw.checkpoint.gc_pause import gc_paused
from sharded_bf16_adamw.checkpoint.optimizer_state import init_state
from sharded_bf16_adamw.checkpoint.rank_names import RankNames
from sharded_bf16_adamw.checkpoint.save_plan import merge_plans, to_assigned, to_table
from sharded_bf16_adamw.checkpoint.state_dict import get_rng_state, get_state

PER_PARAM = 5  # tensors of a parameter: the weight, three states and the step
COLUMNS = 8
MB = 1e6


class Measured(dict[str, float]):
    """CPU seconds by what was computed, in the order of a save and a load."""

    @contextmanager
    def seconds(self, name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self[name] = time.process_time() - start


def main(argv: list[str]) -> int:
    parser = Parser(
        prog="benchmark.py plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--ranks", type=positive, default=1024, help="ranks to plan for (default: 1024)"
    )
    parser.add_argument(
        "--tensors",
        type=positive,
        default=1200,
        help="tensors in the checkpoint, five for each parameter (default: 1200)",
    )
    parser.add_argument(
        "--metadata",
        type=output_file,
        metavar="FILE",
        help="write the metadata of the save to this file",
    )
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write the figures to this file"
    )
    args = parser.parse_args(argv)
    if args.ranks < 2 or args.tensors < PER_PARAM:
        raise UsageError(f"--ranks must be at least 2, and --tensors at least {PER_PARAM}.")
    torch.set_num_threads(1)
    start_fake_world(args.ranks)
    try:
        tensors = state_of(*build(args.ranks, args.tensors))
        with tempfile.TemporaryDirectory() as folder:
            figures, content = simulate(tensors, args.ranks, Path(folder))
    finally:
        dist.destroy_process_group()
    for name, value in figures.items():
        print(f"{name:44} {value:10.3f}")
    if args.metadata:
        Path(args.metadata).write_bytes(content)
    if args.json:
        Path(args.json).write_text(
            json.dumps({"ranks": args.ranks, "tensors": len(tensors), "figures": figures}, indent=1)
        )
    return 0


def start_fake_world(ranks: int) -> None:
    """Make this process rank 0 of a group whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)


def build(ranks: int, tensors: int) -> tuple[nn.Module, AdamW_BF16]:
    """Build parameters of one row a rank, sharded by FSDP2, and their states."""
    torch.manual_seed(0)
    linear = [nn.Linear(COLUMNS, ranks, bias=False).bfloat16() for _ in range(tensors // PER_PARAM)]
    model = nn.Sequential(*linear)
    for layer in (*model, model):
        fully_shard(layer)
    optimizer = AdamW_BF16(model.parameters(), lr=1e-3)
    init_state(optimizer)
    return model, optimizer


def state_of(model: nn.Module, optimizer: AdamW_BF16) -> dict[str, Any]:
    names = RankNames(model, optimizer)
    return {**get_state(model, optimizer, names).tensors, **get_rng_state()}


def simulate(tensors: dict[str, Any], ranks: int, folder: Path) -> tuple[Measured, bytes]:
    """Return the figures of a save and a load, and the metadata that the save writes."""
    measured = Measured()
    planner, writer = DefaultSavePlanner(), ChecksummedWriter(folder)
    with measured.seconds("save: plan of one rank"), gc_paused():
        planner.set_up_planner(tensors, writer.storage_meta(), is_coordinator=True)
        writer.set_up_storage_writer(True, rank=0, use_collectives=True)
        own = writer.prepare_local_plan(planner.create_local_plan())
        to_table(own)
    with gc_paused():
        sent = [pickle.dumps(to_table(plan_of_rank(own, rank))) for rank in range(ranks)]
    before = peak_bytes()
    with measured.seconds("save: plan of all ranks"), gc_paused():
        tables = [pickle.loads(each) for each in sent]
        assignments, metadata = merge_plans(tables, planner, writer.prepare_global_plan)
        scattered = [pickle.dumps(assignment) for assignment in assignments]
    with measured.seconds("save: the same plan again"), gc_paused():
        tables = [pickle.loads(each) for each in sent]
        again = merge_plans(tables, planner, writer.prepare_global_plan)
        scattered = [pickle.dumps(assignment) for assignment in again.assignments]
    measured["save: peak of memory, MB"] = (peak_bytes() - before) / MB
    measured["save: bytes from a rank, MB"] = len(sent[0]) / MB
    measured["save: bytes to a rank, MB"] = max(map(len, scattered)) / MB
    with gc_paused():
        results = [
            pickle.dumps(write(to_assigned(plan_of_rank(own, rank), assignment)))
            for rank, assignment in enumerate(assignments)
        ]
    with measured.seconds("save: metadata of all ranks"), gc_paused():
        writer.finish(metadata(), [pickle.loads(each) for each in results])
    content = (folder / METADATA).read_bytes()
    measured["save: metadata file, MB"] = len(content) / MB
    del tables, assignments, metadata, again, sent, scattered, results
    with measured.seconds("load: metadata"):
        saved = parse_metadata(content)
    load_planner = DefaultLoadPlanner()
    with measured.seconds("load: plan of one rank"), gc_paused():
        load_planner.set_up_planner(dict(tensors), saved, True)
        load_planner.finish_plan(load_planner.create_local_plan())
    return measured, content


def plan_of_rank(plan: SavePlan, rank: int) -> SavePlan:
    """Return rank 0's plan as another rank makes it."""
    mappings = {
        name_on(rank, key): tuple(name_on(rank, part) for part in path)
        for key, path in plan.planner_data.items()
    }
    return replace(
        plan, items=[item_of_rank(item, rank) for item in plan.items], planner_data=mappings
    )


def item_of_rank(item: WriteItem, rank: int) -> WriteItem:
    assert item.tensor_data is not None
    chunk, size = item.tensor_data.chunk, item.tensor_data.size
    offsets = chunk.offsets
    if chunk.sizes != size:
        offsets = torch.Size([rank * chunk.sizes[0], *offsets[1:]])
    return replace(
        item,
        index=MetadataIndex(name_on(rank, item.index.fqn), offsets, item.index.index),
        tensor_data=replace(item.tensor_data, chunk=replace(chunk, offsets=offsets)),
    )


def name_on(rank: int, key: str) -> str:
    return key.replace("rng.0.", f"rng.{rank}.") if key.startswith("rng.0.") else key


def write(plan: SavePlan) -> list[WriteResult]:
    """Return what a rank reports that has written its plan."""
    name, offset, results = f"{plan.storage_data.prefix}0.distcp", 0, []
    for item in plan.items:
        assert item.tensor_data is not None
        length = saved_bytes(item.tensor_data.properties.dtype, item.tensor_data.chunk.sizes)
        results.append(WriteResult(item.index, length, _StorageInfo(name, offset, length)))
        offset += length
    return results


@cache
def saved_bytes(dtype: torch.dtype, sizes: torch.Size) -> int:
    """Return the length of a tensor that is saved."""
    buffer = io.BytesIO()
    with config.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
        torch.save(torch.empty(sizes, dtype=dtype), buffer)
    return buffer.tell()


def peak_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
