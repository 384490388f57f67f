"""A rank's save plan as tables of integers, which ranks send instead of DCP's objects."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
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

_RANK_LOCAL_PREFIX = "rng."  # of FQNs that only one rank has


class PlanTable(NamedTuple):
    """A rank's local plan in its order, in two sections. The second has only rank-local FQNs.

    The first section's header is the same on all ranks that shard a model alike.
    """

    sections: tuple[Section, ...]


class Section(NamedTuple):
    """Write items.

    Attributes:
        header: FQNs, types, properties and global sizes, which :class:`SectionHeader` parses.
        chunks: int64 of shape (2, columns): all offsets, then all sizes. Each item has one column
            per dimension, and a scalar has one column (offset 0, size 1).
    """

    header: bytes
    chunks: bytes


class Assignment(NamedTuple):
    """The items of a rank's local plan that the rank must write.

    Attributes:
        positions: int32, positions in the local plan.
        hints: int32, the index of each item's chunk among its tensor's chunks in the metadata.
        storage_data: ``SavePlan.storage_data``, from the storage writer.
    """

    positions: bytes
    hints: bytes
    storage_data: Any


class Locations(NamedTuple):
    """The places in files where a rank wrote the items of its plan.

    Attributes:
        files: file names.
        columns: int64 of shape (3, items), in the order of the plan: each item's index in
            ``files``, offset and length.
    """

    files: list[str]
    columns: bytes


class NotTabularError(Exception):
    """Tables cannot express a plan, or cannot show that it is valid."""


def to_table(plan: SavePlan) -> PlanTable | SavePlan:
    """Return a local plan as a table if possible, else the plan."""
    try:
        return _to_table(plan)
    except (NotTabularError, OverflowError):
        return plan


def to_assigned(plan: SavePlan, assignment: Assignment | SavePlan) -> SavePlan:
    """Return the plan that rank 0 has assigned to this rank.

    Args:
        plan: this rank's local plan.
        assignment: its element of the result of :func:`merge_plans`.
    """
    if isinstance(assignment, SavePlan):
        return assignment
    positions = np.frombuffer(assignment.positions, np.int32).tolist()
    hints = np.frombuffer(assignment.hints, np.int32).tolist()
    items = []
    for position, hint in zip(positions, hints, strict=True):
        item = plan.items[position]
        items.append(replace(item, index=replace(item.index, index=hint)))
    return replace(plan, items=items, storage_data=assignment.storage_data)


def to_locations(plan: SavePlan, results: list[WriteResult]) -> Locations:
    """Return where the storage writer wrote the items of ``plan``."""
    written = {result.index: result.storage_data for result in results}
    files: dict[str, int] = {}
    rows = []
    for item in plan.items:
        info = written[item.index]
        number = files.setdefault(info.relative_path, len(files))
        rows.append((number, info.offset, info.length))
    return Locations(list(files), np.array(rows, np.int64).reshape(-1, 3).T.tobytes())


def _to_table(plan: SavePlan) -> PlanTable:
    fqns = [item.index.fqn for item in plan.items]
    if plan.storage_data is not None or not plan.usable:
        raise NotTabularError
    if plan.planner_data != {fqn: (fqn,) for fqn in fqns} or list(plan.planner_data) != list(
        dict.fromkeys(fqns)
    ):
        raise NotTabularError
    end = len(fqns)
    while end and fqns[end - 1].startswith(_RANK_LOCAL_PREFIX):
        end -= 1
    return PlanTable((_to_section(plan.items[:end]), _to_section(plan.items[end:])))


def _to_section(items: list[WriteItem]) -> Section:
    entries, offsets, sizes = [], [], []
    properties: list[TensorProperties] = []
    for item in items:
        data = item.tensor_data
        if item.type not in (WriteItemType.TENSOR, WriteItemType.SHARD) or data is None:
            raise NotTabularError
        chunk, dims = data.chunk, len(data.size)
        if (
            item.index.offset != chunk.offsets
            or item.index.index is not None
            or item.bytes_io_data is not None
            or len(chunk.offsets) != dims
            or len(chunk.sizes) != dims
        ):
            raise NotTabularError
        if data.properties not in properties:
            properties.append(data.properties)
        is_shard = item.type == WriteItemType.SHARD
        entries.append(
            [item.index.fqn, is_shard, properties.index(data.properties), list(data.size)]
        )
        offsets += list(chunk.offsets) or [0]
        sizes += list(chunk.sizes) or [1]
    header = pickle.dumps((json.dumps(entries), properties))
    return Section(header, np.array([offsets, sizes], np.int64).tobytes())


def to_plan(table: PlanTable) -> SavePlan:
    """Inverse of :func:`to_table`."""
    items = []
    for section in table.sections:
        header = SectionHeader(section.header)
        offsets, sizes = np.frombuffer(section.chunks, np.int64).reshape(2, -1).tolist()
        for index, fqn in enumerate(header.fqns):
            columns = slice(header.starts[index], header.starts[index] + len(header.sizes[index]))
            chunk = ChunkStorageMetadata(torch.Size(offsets[columns]), torch.Size(sizes[columns]))
            data = TensorWriteData(chunk, header.properties[index], header.sizes[index])
            kind = WriteItemType.SHARD if header.is_shard[index] else WriteItemType.TENSOR
            items.append(WriteItem(MetadataIndex(fqn, chunk.offsets), kind, tensor_data=data))
    return SavePlan(items, planner_data={item.index.fqn: (item.index.fqn,) for item in items})


class SectionHeader:
    """The parsed header of a section: lists with one element per write item.

    Attributes:
        starts: the first column of each item.
    """

    def __init__(self, packed: bytes) -> None:
        text, properties = pickle.loads(packed)
        entries: list[Any] = json.loads(text)
        self.fqns: list[str] = [fqn for fqn, _, _, _ in entries]
        self.is_shard: list[bool] = [is_shard for _, is_shard, _, _ in entries]
        self.properties: list[TensorProperties] = [properties[i] for _, _, i, _ in entries]
        self.sizes = [torch.Size(size) for _, _, _, size in entries]
        widths = [max(1, len(size)) for size in self.sizes]
        self.starts = [end - width for end, width in zip(accumulate(widths), widths, strict=True)]
        self.shape = [n for size in self.sizes for n in (size or [1])]  # one element per column
