"""The chunks of a checkpoint's tensors and their places in files, as columns of integers.

DCP describes each chunk by four objects. With 1,024 ranks and 1,200 tensors that is a pickle of
150 MB, which takes seconds to read. A table of the same chunks is a file of 1 MB, and a rank that
loads builds objects only for the chunks that it reads.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from .blocks import Block, local_boxes
from .manifest import is_file_name

_NONE = np.zeros(0, np.int64)
_COMPRESSION = 1  # zlib's level; higher ones take several times as long


class SavedTensor(NamedTuple):
    """A saved tensor: its chunks and where they are.

    Attributes:
        size: global shape.
        properties: torch's properties; only the dtype if the table was read from a file.
        boxes: int64 of shape (2, dimensions, chunks): offsets and sizes.
        places: int64 of shape (3, chunks): index in ``ChunkTable.files``, offset and length.
    """

    size: torch.Size
    properties: TensorProperties
    boxes: np.ndarray
    places: np.ndarray

    def blocks(self) -> list[Block]:
        """Return the chunks as blocks."""
        offsets, sizes = (
            [tuple(row) for row in part] for part in self.boxes.transpose(0, 2, 1).tolist()
        )
        return list(map(Block, offsets, sizes))

    def overlapping(self, boxes: list[Block]) -> np.ndarray:
        """Return the indices of the chunks that overlap with one of ``boxes``."""
        offsets, ends = self.boxes[0], self.boxes[0] + self.boxes[1]
        found = np.zeros(self.places.shape[1], bool)
        for box in boxes:
            first, count = (np.array(part, np.int64)[:, None] for part in box)
            found |= ((offsets < first + count) & (ends > first)).all(axis=0)
        return np.flatnonzero(found)


@dataclass
class ChunkTable:
    """All chunks of a checkpoint.

    Attributes:
        tensors: the chunks of each tensor, by key.
        files: names of the files with tensors.
        planner_data: that of DCP's ``Metadata``; empty if the table was read from a file.
    """

    tensors: dict[str, SavedTensor]
    files: list[str]
    planner_data: dict[str, Any] = field(default_factory=dict)

    @property
    def chunks(self) -> int:
        """Number of chunks of all tensors."""
        return sum(tensor.places.shape[1] for tensor in self.tensors.values())

    # -------------------------------------------------------------------------- DCP's metadata

    def to_metadata(self) -> Metadata:
        """Return DCP's metadata of all chunks."""
        metadata = Metadata({}, self.planner_data, {})
        for key, tensor in self.tensors.items():
            self._add(metadata, key, np.arange(tensor.places.shape[1]))
        return metadata

    @classmethod
    def from_metadata(cls, metadata: Metadata) -> ChunkTable:
        """Inverse of :meth:`to_metadata`.

        Raises:
            ValueError: the metadata lacks the place of a chunk.
        """
        storage = metadata.storage_data
        files: dict[str, int] = {}
        tensors = {}
        for key, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)
            places = []
            for chunk in entry.chunks:
                info = storage.get(MetadataIndex(key, chunk.offsets))
                if info is None:
                    raise ValueError(f"it has no file and offset for a chunk of {key}")
                file_index = files.setdefault(info.relative_path, len(files))
                places.append((file_index, info.offset, info.length))
            boxes = [[c.offsets for c in entry.chunks], [c.sizes for c in entry.chunks]]
            shape = 2, len(entry.chunks), len(entry.size)
            tensors[key] = SavedTensor(
                entry.size,
                entry.properties,
                np.array(boxes, np.int64).reshape(shape).transpose(0, 2, 1),
                np.array(places, np.int64).reshape(-1, 3).T,
            )
        return cls(tensors, list(files), metadata.planner_data or {})

    def plan_reads(self, tensors: dict[str, Any]) -> tuple[LoadPlan, Metadata]:
        """Plan which saved chunks this rank reads into its local shards of ``tensors``.

        Returns:
            DCP's plan, and the metadata of the chunks in it.
        """
        items: list[ReadItem] = []
        metadata = Metadata({}, None, {})
        known: dict[Any, list[Block]] = {}
        for key, tensor in tensors.items():
            boxes = local_boxes(tensor, known)
            self._add(metadata, key, self.tensors[key].overlapping(boxes))
            entry = metadata.state_dict_metadata[key]
            assert isinstance(entry, TensorStorageMetadata)
            chunks = [ChunkStorageMetadata(*map(torch.Size, box)) for box in boxes]
            items += create_read_items_for_chunk_list(key, entry, chunks)
        return LoadPlan(items), metadata

    def _add(self, metadata: Metadata, key: str, indices: np.ndarray) -> None:
        """Add the chunks ``indices`` of a tensor to DCP's metadata."""
        size, properties, boxes, places = self.tensors[key]
        offsets, sizes = boxes[:, :, indices].transpose(0, 2, 1).tolist()
        chunks = [
            ChunkStorageMetadata(torch.Size(chunk_offsets), torch.Size(chunk_sizes))
            for chunk_offsets, chunk_sizes in zip(offsets, sizes, strict=True)
        ]
        metadata.state_dict_metadata[key] = TensorStorageMetadata(properties, size, chunks)
        for index, (chunk, (file_index, offset, length)) in enumerate(
            zip(chunks, places[:, indices].T.tolist(), strict=True)
        ):
            metadata.storage_data[MetadataIndex(key, chunk.offsets, index)] = _StorageInfo(
                self.files[file_index], offset, length
            )

    # ------------------------------------------------------------------------------- in a file

    def to_bytes(self) -> bytes:
        """Serialize the table: a line of JSON, then compressed, delta-encoded columns."""
        header = {
            "files": self.files,
            "tensors": [
                [key, str(tensor.properties.dtype), list(tensor.size), tensor.places.shape[1]]
                for key, tensor in self.tensors.items()
            ],
        }
        columns = [
            np.diff(np.concatenate([_NONE, *(part.ravel() for part in parts)]), prepend=0)
            for parts in (
                [tensor.boxes for tensor in self.tensors.values()],
                [tensor.places for tensor in self.tensors.values()],
            )
        ]
        packed = zlib.compress(np.concatenate(columns).astype("<i8").tobytes(), _COMPRESSION)
        return json.dumps(header).encode() + b"\n" + packed

    @classmethod
    def from_bytes(cls, content: bytes) -> ChunkTable:
        """Inverse of :meth:`to_bytes`, except that only the dtype of the properties is restored.

        Raises:
            ValueError: ``content`` is not a table.
        """
        try:
            return cls._from_bytes(content)
        except Exception as error:  # a broken file can raise anything
            raise ValueError(f"it is not a table of chunks ({error})") from error

    @classmethod
    def _from_bytes(cls, content: bytes) -> ChunkTable:
        line, _, packed = content.partition(b"\n")
        header = json.loads(line)
        entries = [
            (str(key), _dtype(dtype), torch.Size(size), int(count))
            for key, dtype, size, count in header["tensors"]
        ]
        files = header["files"]
        if not all(map(is_file_name, files)) or any(
            min([count, *size]) < 0 for _, _, size, count in entries
        ):
            raise ValueError("it has invalid names or sizes")
        box_ends = [0, *accumulate(2 * len(size) * count for _, _, size, count in entries)]
        place_ends = [0, *accumulate(3 * count for _, _, _, count in entries)]
        length = box_ends[-1] + place_ends[-1]
        unpacked = zlib.decompressobj().decompress(packed, 8 * length + 1)
        numbers = np.frombuffer(unpacked, "<i8")
        if len(numbers) != length:
            raise ValueError("it is too short or too long")
        boxes, places = (np.cumsum(part) for part in np.split(numbers, [box_ends[-1]]))
        if min(boxes.min(initial=0), places.min(initial=0)) < 0:
            raise ValueError("it has negative numbers")
        tensors = {}
        for (key, dtype, size, count), box, place in zip(
            entries, box_ends, place_ends, strict=False
        ):
            tensors[key] = SavedTensor(
                size,
                TensorProperties(dtype),
                boxes[box : box + 2 * len(size) * count].reshape(2, len(size), count),
                places[place : place + 3 * count].reshape(3, count),
            )
            if (tensors[key].places[0] >= len(files)).any():
                raise ValueError(f"it has no file and offset for a chunk of {key}")
        return cls(tensors, files)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."))
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} is not a dtype")
    return dtype
