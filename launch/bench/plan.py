"""Measure the part of a save and a load that grows with the number of ranks, in one process.

    python launch/benchmark.py plan --ranks 1024 --tensors 1200

The process is rank 0 of FSDP2 in a process group of torch's ``fake`` backend. It runs ``save``
twice and ``load`` once. It makes the messages of the other ranks from its own, and unpickles them
as if received: all shards have equally many rows, so only offsets, random states and file names
differ. Files of other ranks are links to rank 0's file. The metadata is that of a real save.
``load`` plans all reads but reads no tensor.

Prints CPU seconds, without those for making messages, and the peak of resident memory during the
saves, less that before them.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from planning.activation_memory import fake_ranks
from torch import nn
from torch.distributed.distributed_c10d import _object_to_tensor, _tensor_to_object
from torch.distributed.fsdp import fully_shard
from torch.futures import Future
from torch.utils.serialization import config
from training.command_line import Parser, output_folder, positive, write_json
from training.errors import UsageError

from bench.resident import peak_bytes, used_bytes
from sharded_bf16_adamw import AdamW_BF16, wait_for_save
from sharded_bf16_adamw.checkpoint import async_save, loading, saving
from sharded_bf16_adamw.checkpoint.chunk_table import ChunkTable
from sharded_bf16_adamw.checkpoint.dcp_storage import CHUNKS, METADATA, ChunkReader
from sharded_bf16_adamw.checkpoint.optimizer_state import init_state
from sharded_bf16_adamw.checkpoint.plan_table import Locations, PlanTable, SectionHeader

PER_PARAM = 5  # tensors of a parameter: the weight, three states and the step
COLUMNS = 8
MB = 1e6
CPU = torch.device("cpu")


def main(argv: list[str]) -> int:
    parser = Parser("benchmark.py plan", __doc__)
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
        type=output_folder,
        metavar="FOLDER",
        help="copy the metadata of the saves here",
    )
    parser.add_json()
    args = parser.parse_args(argv)
    if args.ranks < 2 or args.tensors < PER_PARAM:
        raise UsageError(f"--ranks must be at least 2, and --tensors at least {PER_PARAM}.")
    torch.set_num_threads(1)
    with fake_ranks(args.ranks), tempfile.TemporaryDirectory() as folder:
        model, optimizer = build(args.ranks, args.tensors)
        figures, paths = simulate(model, optimizer, args.ranks, Path(folder))
        for path in paths if args.metadata else ():
            shutil.copy(path / METADATA, args.metadata / path.name)
    for name, value in figures.items():
        print(f"{name:52} {value:10.3f}")
    tensors = args.tensors // PER_PARAM * PER_PARAM + 1
    write_json(args.json, {"ranks": args.ranks, "tensors": tensors, "figures": figures})
    return 0


def build(ranks: int, tensors: int) -> tuple[nn.Module, AdamW_BF16]:
    """Build parameters with one row per rank, sharded by FSDP2, and their states."""
    torch.manual_seed(0)
    linear = [nn.Linear(COLUMNS, ranks, bias=False).bfloat16() for _ in range(tensors // PER_PARAM)]
    model = nn.Sequential(*linear)
    for layer in (*model, model):
        fully_shard(layer)
    optimizer = AdamW_BF16(model.parameters(), lr=1e-3)
    init_state(optimizer)
    return model, optimizer


def simulate(
    model: nn.Module, optimizer: AdamW_BF16, ranks: int, folder: Path
) -> tuple[dict[str, float], list[Path]]:
    """Return the figures, and the paths of the checkpoints."""
    figures: dict[str, float] = {}
    others, paths = OtherRanks(ranks, folder), []
    before = used_bytes(CPU) or 0
    with others.patch_collectives(), peak_bytes(CPU) as peak:
        for step, which in ((1, "first"), (2, "repeated")):
            others.sent = 0
            with (
                others.timed(saving, "_plan") as plan,
                others.timed(saving._Save, "run") as rest,
                others.timed(saving, "save") as call,
            ):
                paths.append(saving.save(folder, step, model, optimizer, async_=True))
                sent = others.sent
                wait_for_save()
            figures[f"{which} save: the asynchronous call"] = call[0]
            figures[f"{which} save: the plan in it"] = plan[0]
            figures[f"{which} save: bytes sent by a rank in it, MB"] = sent / MB
            figures[f"{which} save: the rest, in a thread"] = rest[0]
    if peak:
        figures["saves: peak of memory, MB"] = (peak[0] - before) / MB
    for name in (METADATA, CHUNKS):
        if (paths[0] / name).exists():
            figures[f"saves: {name}, MB"] = (paths[0] / name).stat().st_size / MB
    with (
        others.patch_collectives(),
        patch.object(ChunkReader, "read_data", read_nothing),
        others.timed(ChunkTable, "from_bytes") as parse,
        others.timed(loading, "_read_into") as plan,
        others.timed(loading, "load") as call,
    ):
        loading.load(folder, model, optimizer)
    figures["load: the call, without reading tensors"] = call[0]
    figures["load: table and plan of a rank"] = parse[-1] + plan[0]
    return figures, paths


def read_nothing(*_: Any) -> Future[None]:
    done: Future[None] = Future()
    done.set_result(None)
    return done


# -------------------------------------------------------------------------------- other ranks


@dataclass
class OtherRanks:
    """The ranks other than this process (rank 0), whose messages it makes in collectives.

    Attributes:
        ranks: number of ranks, this one included.
        root: folder of the checkpoints.
        sent: bytes of this rank's messages.
        excluded: CPU seconds for making the messages of other ranks, by thread.
        positions: for each rank, the items that it writes.
        lengths: the length in a file of each item.
    """

    ranks: int
    root: Path
    sent: int = 0
    excluded: dict[int, float] = field(default_factory=dict)
    positions: list[np.ndarray] = field(default_factory=list)
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @contextmanager
    def patch_collectives(self) -> Iterator[None]:
        with (
            patch.object(dist, "all_gather_object", self.all_gather_object),
            patch.object(dist, "gather_object", self.gather_object),
            patch.object(dist, "scatter_object_list", self.scatter_object_list),
            patch.object(dist, "broadcast_object_list", self.broadcast_object_list),
            patch.object(async_save, "borrow_group", lambda group: group),
        ):
            yield

    def all_gather_object(self, values: list[Any], value: Any, group: Any = None) -> None:
        self.sent += len(pickle.dumps(value))
        with self.excluding():
            messages = [
                _object_to_tensor(self.message_of_rank(value, rank), CPU, group)
                for rank in range(self.ranks)
            ]
        for rank, (tensor, size) in enumerate(messages):
            values[rank] = _tensor_to_object(tensor, size, group)

    def gather_object(self, value: Any, values: Any, group_dst: int, group: Any = None) -> None:
        assert group_dst == 0
        self.all_gather_object(values, value, group)

    def scatter_object_list(
        self, received: list[Any], values: Any, group_src: int, group: Any = None
    ) -> None:
        assert group_src == 0
        messages = [pickle.dumps(value) for value in values]
        received[0] = pickle.loads(messages[0])
        with self.excluding():
            self.positions = [
                np.frombuffer(pickle.loads(message)[1].positions, np.int32) for message in messages
            ]

    def broadcast_object_list(self, values: Any, group_src: int, group: Any = None) -> None:
        assert group_src == 0
        values[:] = pickle.loads(pickle.dumps(values))

    def message_of_rank(self, value: Any, rank: int) -> Any:
        """Return what ``rank`` sends in the collective in which rank 0 sends ``value``."""
        if isinstance(value, PlanTable):
            if rank == 0:
                self.lengths = item_lengths(value)
            return table_of_rank(value, rank)
        if isinstance(value, tuple) and value and isinstance(value[0], Locations):
            locations, files = value
            lengths = self.lengths[self.positions[rank]]
            columns = np.stack([0 * lengths, np.cumsum(lengths) - lengths, lengths]).tobytes()
            assert rank or columns == locations.columns
            name = f"__{rank}_0.distcp"
            if rank:
                (partial,) = self.root.glob(".partial-*")
                os.link(partial / "__0_0.distcp", partial / name)
            return Locations([name], columns), {name: files["__0_0.distcp"]}
        return value

    @contextmanager
    def excluding(self) -> Iterator[None]:
        start, thread = time.thread_time(), threading.get_ident()
        yield
        self.excluded[thread] = self.excluded.get(thread, 0) + time.thread_time() - start

    @contextmanager
    def timed(self, owner: Any, name: str) -> Iterator[list[float]]:
        """Yield a list that gets the CPU seconds of each call, in the thread that calls."""
        seconds: list[float] = []
        function = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            thread = threading.get_ident()
            start = time.thread_time() - self.excluded.get(thread, 0)
            result = function(*args, **kwargs)
            seconds.append(time.thread_time() - self.excluded.get(thread, 0) - start)
            return result

        with patch.object(owner, name, call):
            yield seconds


def table_of_rank(table: PlanTable, rank: int) -> PlanTable:
    """Return the table of ``rank``, made from rank 0's."""
    shared, own = table.sections
    header, chunks = (
        SectionHeader(shared.header),
        np.frombuffer(shared.chunks, np.int64).reshape(2, -1),
    )
    starts = [start for start, size in zip(header.starts, header.sizes, strict=True) if size]
    sharded = [start for start in starts if chunks[1, start] != header.shape[start]]
    chunks = chunks.copy()
    chunks[0, sharded] = rank * chunks[1, sharded]
    entries, properties = pickle.loads(own.header)
    entries = entries.replace("rng.0.", f"rng.{rank}.")
    return PlanTable(
        (
            shared._replace(chunks=chunks.tobytes()),
            own._replace(header=pickle.dumps((entries, properties))),
        )
    )


def item_lengths(table: PlanTable) -> np.ndarray:
    """Return the length in a file of each item in a table."""
    lengths = []
    for section in table.sections:
        header = SectionHeader(section.header)
        sizes = np.frombuffer(section.chunks, np.int64).reshape(2, -1)[1].tolist()
        lengths += [
            saved_bytes(properties.dtype, torch.Size(sizes[start : start + len(size)]))
            for properties, size, start in zip(
                header.properties, header.sizes, header.starts, strict=True
            )
        ]
    return np.array(lengths, np.int64)


@cache
def saved_bytes(dtype: torch.dtype, sizes: torch.Size) -> int:
    """Return the length in a file of a tensor."""
    buffer = io.BytesIO()
    with config.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
        torch.save(torch.empty(sizes, dtype=dtype), buffer)
    return buffer.tell()
