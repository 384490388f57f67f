"""The global plan of a save, computed on tables instead of DCP's objects.

With 1,024 ranks and 1,200 tensors there are a million write items, and DCP's planner takes a minute
on rank 0 while all GPUs are idle. Instead, each rank sends tables of integers, and rank 0 replies
with the positions of the items that the rank must write. The result equals that of DCP's
``DefaultSavePlanner.create_global_plan``, which is called if the tables cannot express the plan or
the plan may be invalid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, pairwise
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import TensorProperties
from torch.distributed.checkpoint.planner import SavePlan

from .chunk_table import ChunkTable, SavedTensor
from .plan_table import (
    Assignment,
    Locations,
    NotTabularError,
    PlanTable,
    SectionHeader,
    to_plan,
)

_MAX_INT = 2**62


class MergedPlan(NamedTuple):
    """The plan of all ranks.

    Attributes:
        assignments: the argument of :func:`to_assigned` for each rank.
        to_chunks: returns all chunks, given the locations of all ranks.
    """

    assignments: list[Assignment | SavePlan]
    to_chunks: Callable[[list[Locations]], ChunkTable]


def merge_plans(
    tables: list[PlanTable | SavePlan],
    planner: DefaultSavePlanner,
    prepare: Callable[[list[SavePlan]], list[SavePlan]],
) -> MergedPlan:
    """Assign each replicated write item to one of its ranks, and check the result.

    Args:
        tables: results of :func:`to_table`, in rank order.
        planner: makes the plan if the tables cannot express it.
        prepare: ``prepare_global_plan`` of the storage writer.

    Raises:
        ValueError: the chunks of a tensor overlap or do not make up the tensor.
    """
    as_tables = [table for table in tables if isinstance(table, PlanTable)]
    if len(as_tables) == len(tables):
        try:
            merger = _Merger(as_tables)
            prepared = prepare([SavePlan([])] * len(tables))
            return MergedPlan(
                merger.assignments([plan.storage_data for plan in prepared]), merger.to_chunks
            )
        except NotTabularError:
            pass
    plans, metadata = planner.create_global_plan(
        [to_plan(table) if isinstance(table, PlanTable) else table for table in tables]
    )

    # to_chunks stays in the plan cache, so it must not hold the plans: they have an object for each
    # write item of each rank. In this table, an item's number replaces its offset in a file.
    indices = [item.index for plan in plans for item in plan.items]
    num_items = len(indices)
    numbers = {index: _StorageInfo("", number, 0) for number, index in enumerate(indices)}
    numbered = ChunkTable.from_metadata(replace(metadata, storage_data=numbers))

    def to_chunks(locations: list[Locations]) -> ChunkTable:
        files, places = _join(locations)
        assert places.shape[1] == num_items, "a rank did not report where it wrote each item"
        tensors = {
            fqn: tensor._replace(places=places[:, tensor.places[1]])
            for fqn, tensor in numbered.tensors.items()
        }
        return ChunkTable(tensors, files, numbered.planner_data)

    return MergedPlan(list(prepare(plans)), to_chunks)


def _join(locations: list[Locations]) -> tuple[list[str], np.ndarray]:
    """Return all file names, and each write item's file number, offset and length: (3, items)."""
    files: dict[str, int] = {}
    parts = []
    for names, columns in locations:
        numbers = np.array([files.setdefault(name, len(files)) for name in names], np.int64)
        places = np.frombuffer(columns, np.int64).reshape(3, -1)
        parts.append(np.stack([numbers[places[0]], places[1], places[2]]))
    return list(files), np.concatenate(parts, axis=1)


class _Tensor(NamedTuple):
    """Global size and properties of a tensor, equal on all ranks."""

    size: torch.Size
    properties: TensorProperties


class _StackedSections:
    """All sections with the same header at the same position of the ranks' plans.

    Attributes:
        ranks: the ranks that have such a section, in order.
        first: the position of the section's first item in the plans.
        chunks: int64 of shape (ranks, 2, columns), as in :class:`Section`.
    """

    def __init__(self, header: SectionHeader, first: int) -> None:
        self.header, self.first = header, first
        self.ranks: list[int] = []
        self.parts: list[bytes] = []

    def finish(self) -> None:
        self.chunks = np.frombuffer(b"".join(self.parts), np.int64).reshape(len(self.ranks), 2, -1)
        del self.parts


class _Entry(NamedTuple):
    """A write item in each of the stacked sections; ``start`` is its first column."""

    stack: _StackedSections
    start: int
    is_shard: bool


class _Merger:
    """DCP's global plan, computed on arrays with one element per write item of each rank.

    The elements are in DCP's order: by rank, then by position in the rank's plan.
    """

    def __init__(self, tables: list[PlanTable]) -> None:
        self._world = len(tables)
        self._stacks: list[_StackedSections] = []
        self._read(tables)
        self._index_tensors()
        self._flatten()
        self._assign()
        self._number()
        self._validate()
        self._cut()

    def _read(self, tables: list[PlanTable]) -> None:
        stacks: dict[tuple[bytes, int], _StackedSections] = {}
        headers: dict[bytes, SectionHeader] = {}
        for rank, table in enumerate(tables):
            first = 0
            for packed, chunks in table.sections:
                if packed not in headers:
                    headers[packed] = SectionHeader(packed)
                header = headers[packed]
                if header.fqns:
                    stack = stacks.setdefault((packed, first), _StackedSections(header, first))
                    stack.ranks.append(rank)
                    stack.parts.append(chunks)
                first += len(header.fqns)
        self._stacks = list(stacks.values())
        for stack in self._stacks:
            stack.finish()

    def _index_tensors(self) -> None:
        """Assign each FQN a number, and a range of keys: one key for each possible offset."""
        self._tensors: dict[str, _Tensor] = {}
        for stack in self._stacks:
            header = stack.header
            tensors = map(_Tensor, header.sizes, header.properties)
            for fqn, tensor in zip(header.fqns, tensors, strict=True):
                if self._tensors.setdefault(fqn, tensor) != tensor:
                    raise NotTabularError
        self._numbers = {fqn: number for number, fqn in enumerate(self._tensors)}
        ends = list(accumulate(prod(n + 1 for n in each.size) for each in self._tensors.values()))
        nbytes = [
            prod(each.size) * each.properties.dtype.itemsize or 1 for each in self._tensors.values()
        ]
        items = sum(len(stack.ranks) * len(stack.header.fqns) for stack in self._stacks)
        if max([*ends[-1:], max(nbytes, default=0) * items]) >= _MAX_INT:
            raise NotTabularError
        self._bases = [0, *ends[:-1]]
        self._nbytes = np.array(nbytes, np.int64)  # of the full tensors, by which DCP balances

    def _flatten(self) -> None:
        """Fill the arrays: rank, position, FQN's number, key, entry, and row in the stack.

        Two items have the same key only if they are replicas.
        """
        columns: list[list[Any]] = []
        self._entries: list[_Entry] = []
        for stack in self._stacks:
            header = stack.header
            offsets, sizes, shape = stack.chunks[:, 0], stack.chunks[:, 1], np.array(header.shape)
            if (offsets < 0).any() or (sizes < 0).any() or (sizes > shape - offsets).any():
                raise NotTabularError
            weights = [
                prod(n + 1 for n in size[dim + 1 :])
                for size in header.sizes
                for dim in range(max(1, len(size)))
            ]
            fqns = np.array([self._numbers[fqn] for fqn in header.fqns])
            bases = np.array([self._bases[fqn] for fqn in fqns], np.int64)
            keys = np.add.reduceat(offsets * np.array(weights, np.int64), header.starts, axis=1)
            rows, items = keys.shape  # one row per rank of the stack
            columns.append(
                [
                    np.repeat(stack.ranks, items),
                    np.tile(stack.first + np.arange(items), rows),
                    np.tile(fqns, rows),
                    (keys + bases).ravel(),
                    np.tile(len(self._entries) + np.arange(items), rows),
                    np.repeat(np.arange(rows), items),
                ]
            )
            self._entries += [
                _Entry(stack, start, is_shard)
                for start, is_shard in zip(header.starts, header.is_shard, strict=True)
            ]
        joined = [np.concatenate(column) for column in zip(*columns, strict=True)] or [
            np.zeros(0, np.int64)
        ] * 6
        order = np.lexsort((joined[1], joined[0]))
        self._rank, self._position, self._fqn, self._key, self._entry, self._row = (
            column[order] for column in joined
        )

    def _assign(self) -> None:
        """Keep one item of each key: the item of the rank with the fewest bytes so far."""
        count = len(self._key)
        self._kept = np.ones(count, bool)
        order = np.argsort(self._key, kind="stable")
        starts = np.flatnonzero(np.diff(self._key[order], prepend=-1))
        ends = np.append(starts[1:], count)
        replicated = np.flatnonzero(ends - starts > 1)
        replicated = replicated[np.argsort(order[starts[replicated]])]  # in DCP's order
        # DCP assigns a key when it reads the plan of the key's first rank. The later ranks' plans
        # have not been read then, so of the key's ranks only the first has bytes of unreplicated
        # items yet: those before the key's item in its plan.
        unreplicated_bytes = np.zeros(count, np.int64)
        unreplicated = order[starts[ends - starts == 1]]
        unreplicated_bytes[unreplicated] = self._nbytes[self._fqn[unreplicated]]
        before = np.cumsum(unreplicated_bytes) - unreplicated_bytes
        rank_starts = np.searchsorted(self._rank, np.arange(self._world))
        before -= before[np.minimum(rank_starts, count - 1)][self._rank] if count else 0
        loads = [0] * self._world
        for start, end in zip(starts[replicated], ends[replicated], strict=True):
            items = order[start:end]
            ranks = self._rank[items].tolist()
            holders = set(ranks)
            if len(holders) != len(ranks):
                raise NotTabularError
            first_bytes, nbytes = int(before[items[0]]), int(self._nbytes[self._fqn[items[0]]])
            loads[ranks[0]] += first_bytes
            chosen = min(holders, key=loads.__getitem__)  # ties: in the set's order, as in DCP
            loads[ranks[0]] -= first_bytes
            loads[chosen] += nbytes
            self._kept[items] = False
            self._kept[items[ranks.index(chosen)]] = True

    def _number(self) -> None:
        """Assign each kept chunk its index among the kept chunks of its FQN."""
        kept = np.flatnonzero(self._kept)
        by_fqn = kept[np.argsort(self._fqn[kept], kind="stable")]
        starts = np.flatnonzero(np.diff(self._fqn[by_fqn], prepend=-1))
        self._hint = np.full(len(self._kept), -1)
        lengths = np.diff(np.append(starts, len(by_fqn)))
        self._hint[by_fqn] = np.arange(len(by_fqn)) - np.repeat(starts, lengths)
        # items per FQN, in the metadata's order
        parts = np.split(by_fqn, starts[1:]) if len(by_fqn) else []
        self._items = sorted(parts, key=lambda items: int(items[0]))
        self._fqns = list(self._tensors)

    def _validate(self) -> None:
        """Collect the chunks, and check them as DCP does.

        If a check fails, DCP's planner takes over and raises its own error.
        """
        self._boxes: list[np.ndarray] = []  # per FQN, in the metadata's order
        for items in self._items:
            size = self._tensors[self._fqns[self._fqn[items[0]]]].size
            chunks = self._chunks(items)
            self._boxes.append(chunks.transpose(1, 2, 0))
            if len(items) > 1 and not all(
                self._entries[entry].is_shard for entry in np.unique(self._entry[items])
            ):
                raise NotTabularError
            if not size:
                continue
            volumes = chunks[:, 1].prod(axis=1).tolist()
            if self._world > 1 and sum(volumes) != prod(size):
                raise NotTabularError
            if len(items) > 1 and not _are_disjoint(chunks, np.array(size)):
                raise NotTabularError

    def _chunks(self, items: np.ndarray) -> np.ndarray:
        """Return offsets and sizes of items of one FQN: (items, 2, dimensions)."""
        dims = len(self._tensors[self._fqns[self._fqn[items[0]]]].size)
        result = np.empty((len(items), 2, dims), np.int64)
        entries = self._entry[items]
        for entry in np.unique(entries):
            mask = entries == entry
            stack, start, _ = self._entries[entry]
            result[mask] = stack.chunks[self._row[items[mask]], :, start : start + dims]
        return result

    def _cut(self) -> None:
        """Split positions and hints by rank, and free all other arrays."""
        kept = np.flatnonzero(self._kept)
        starts = np.searchsorted(self._rank[kept], np.arange(self._world + 1))
        columns = [column[kept].astype(np.int32) for column in (self._position, self._hint)]
        self._parts = [
            [column[start:end].tobytes() for column in columns] for start, end in pairwise(starts)
        ]
        number = np.cumsum(self._kept) - 1  # among the kept items of all ranks
        self._order = [number[items].astype(np.int32) for items in self._items]
        self._fqns = [self._fqns[self._fqn[items[0]]] for items in self._items]
        self._mappings: dict[str, tuple[str]] = {}  # in DCP's order
        for stack in sorted(self._stacks, key=lambda stack: (-stack.ranks[-1], stack.first)):
            self._mappings.update({fqn: (fqn,) for fqn in stack.header.fqns})
        del self._kept, self._rank, self._position, self._hint, self._key, self._fqn, self._entry
        del self._row, self._items, self._stacks, self._entries, self._nbytes

    def assignments(self, storage_data: list[Any]) -> list[Assignment | SavePlan]:
        return [
            Assignment(positions, hints, data)
            for (positions, hints), data in zip(self._parts, storage_data, strict=True)
        ]

    def to_chunks(self, locations: list[Locations]) -> ChunkTable:
        files, places = _join(locations)
        tensors = {
            fqn: SavedTensor(*self._tensors[fqn], boxes, places[:, order])
            for fqn, boxes, order in zip(self._fqns, self._boxes, self._order, strict=True)
        }
        return ChunkTable(tensors, files, self._mappings)


def _are_disjoint(chunks: np.ndarray, size: np.ndarray) -> bool:
    """Return True if chunks with different offsets cannot overlap.

    This is so if, in each dimension, no chunk reaches beyond the next offset of another chunk.
    """
    empty = (chunks[:, 1] == 0).any(axis=1)
    if not (chunks[empty, 0] == size).any(axis=1).all():
        return False  # to DCP, an empty chunk may overlap the chunk around it
    offsets, ends = chunks[~empty, 0], chunks[~empty].sum(axis=1)
    for dim in range(len(size)):
        starts, index = np.unique(offsets[:, dim], return_inverse=True)
        last = np.zeros(len(starts), np.int64)
        np.maximum.at(last, index, ends[:, dim])
        if (last[:-1] > starts[1:]).any():
            return False
    return True
