"""Pickle DCP's metadata of many chunks without making an object for each chunk.

The objects of two chunks differ only in a few integers. So the bytes of one object are repeated for
all chunks of a tensor, and numpy fills in the integers. ``pickle.load`` of the result equals
:meth:`ChunkTable.to_metadata`.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from .chunk_table import ChunkTable

_PROTOCOL = 2
# Constants of the objects of every chunk: the first places of pickle's memo, whose index is a byte.
_MEMO: list[Any] = [
    ChunkStorageMetadata,
    MetadataIndex,
    _StorageInfo,
    TensorStorageMetadata,
    torch.Size,
    *("offsets", "sizes", "fqn", "offset", "index", "relative_path", "length"),
    *("properties", "size", "chunks"),
]
_FIRST_KEY = 256  # place of the first key in pickle's memo; the places of files follow
_TUPLES = {0: b")", 1: b"\x85", 2: b"\x86", 3: b"\x87"}  # opcodes, by length


def dump_metadata(table: ChunkTable, metadata: Metadata, stream: Any) -> None:
    """Write the metadata of ``table`` to a file.

    Args:
        table: the chunks.
        metadata: all other fields; it has no tensors.
        stream: a binary file.
    """
    first_file = _FIRST_KEY + len(table.tensors)
    write = stream.write
    write(pickle.PROTO + bytes([_PROTOCOL]))
    constants = [*enumerate(_MEMO), *enumerate(table.files, first_file)]
    write(b"".join(_pickled(value) + _put(place) + pickle.POP for place, value in constants))
    fields = dict(vars(metadata))
    del fields["state_dict_metadata"], fields["storage_data"]
    write(_new(_pickled(Metadata)))
    for name, value in fields.items():
        write(_pickled(name) + _pickled(value))
    write(_pickled("state_dict_metadata") + pickle.EMPTY_DICT)
    for place, (key, tensor) in enumerate(table.tensors.items(), _FIRST_KEY):
        write(pickle.MARK + _pickled(key) + _put(place) + _new(_get(TensorStorageMetadata)))
        write(_get("properties") + _pickled(tensor.properties))
        write(_get("size") + _pickled(tensor.size) + _get("chunks"))
        write(pickle.EMPTY_LIST + pickle.MARK)
        write(_chunks(tensor.boxes))
        write(pickle.APPENDS + pickle.SETITEMS + pickle.BUILD + pickle.SETITEMS)
    write(_pickled("storage_data") + pickle.EMPTY_DICT)
    for place, tensor in enumerate(table.tensors.values(), _FIRST_KEY):
        write(pickle.MARK)
        write(_places(place, first_file, tensor.boxes[0], tensor.places))
        write(pickle.SETITEMS)
    write(pickle.SETITEMS + pickle.BUILD + pickle.STOP)


class _Record:
    """The bytes of an object, with room for integers that differ from chunk to chunk."""

    def __init__(self) -> None:
        self._bytes = b""
        self._columns: list[tuple[int, np.ndarray]] = []  # the first byte of each integer

    def add(self, *parts: bytes) -> None:
        self._bytes += b"".join(parts)

    def add_integers(self, column: np.ndarray, before: bytes | None = None) -> None:
        """Add an integer that is ``column[i]`` in record ``i``.

        ``before`` is an opcode with an argument of four bytes, by default the one for an integer.
        """
        if before is None and column.max(initial=0) >= 2**31:
            before, dtype = pickle.LONG1 + b"\x08", "<i8"
        else:
            before, dtype = before or pickle.BININT, "<i4"
        self._bytes += before
        self._columns.append((len(self._bytes), np.ascontiguousarray(column, dtype)))
        self._bytes += bytes(np.dtype(dtype).itemsize)

    def add_size(self, columns: np.ndarray) -> None:
        """Add a ``torch.Size`` of (dimensions, records) integers."""
        dims = len(columns)
        self.add(_get(torch.Size), b"" if dims in _TUPLES else pickle.MARK)
        for column in columns:
            self.add_integers(column)
        self.add(_TUPLES.get(dims, pickle.TUPLE), pickle.TUPLE1, pickle.REDUCE)

    def repeat(self, count: int) -> bytes:
        records = np.tile(np.frombuffer(self._bytes, np.uint8), (count, 1))
        for start, column in self._columns:
            width = column.itemsize
            records[:, start : start + width] = column.view(np.uint8).reshape(count, width)
        return records.tobytes()


def _chunks(boxes: np.ndarray) -> bytes:
    """Return a ``ChunkStorageMetadata`` for each chunk of a tensor."""
    record = _Record()
    record.add(_new(_get(ChunkStorageMetadata)), _get("offsets"))
    record.add_size(boxes[0])
    record.add(_get("sizes"))
    record.add_size(boxes[1])
    record.add(pickle.SETITEMS, pickle.BUILD)
    return record.repeat(boxes.shape[2])


def _places(key: int, first_file: int, offsets: np.ndarray, places: np.ndarray) -> bytes:
    """Return a ``MetadataIndex`` and a ``_StorageInfo`` for each chunk of a tensor."""
    count = places.shape[1]
    record = _Record()
    record.add(_new(_get(MetadataIndex)), _get("fqn"), _get_at(key), _get("offset"))
    record.add_size(offsets)
    record.add(_get("index"))
    record.add_integers(np.arange(count))
    record.add(pickle.SETITEMS, pickle.BUILD)
    record.add(_new(_get(_StorageInfo)), _get("relative_path"))
    record.add_integers(places[0] + first_file, pickle.LONG_BINGET)
    for name, column in (("offset", places[1]), ("length", places[2])):
        record.add(_get(name))
        record.add_integers(column)
    record.add(pickle.SETITEMS, pickle.BUILD)
    return record.repeat(count)


def _new(pickled_class: bytes) -> bytes:
    """Return the start of an object; its attributes, SETITEMS and BUILD follow."""
    return pickled_class + pickle.EMPTY_TUPLE + pickle.NEWOBJ + pickle.EMPTY_DICT + pickle.MARK


def _get(value: Any) -> bytes:
    return _GET[value]


def _get_at(place: int) -> bytes:
    return pickle.LONG_BINGET + place.to_bytes(4, "little")


def _put(place: int) -> bytes:
    return pickle.LONG_BINPUT + place.to_bytes(4, "little")


_GET = {value: pickle.BINGET + bytes([place]) for place, value in enumerate(_MEMO)}
assert len(_MEMO) <= _FIRST_KEY


def _pickled(value: Any) -> bytes:
    """Return the bytes that push ``value``, without use of the memo."""
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, _PROTOCOL)
    pickler.fast = True
    pickler.dump(value)
    return buffer.getvalue()[2:-1]  # without PROTO and STOP
