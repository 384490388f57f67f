"""Pickle DCP's metadata of many chunks without making an object for each chunk.

The pickles of two chunks of a tensor differ only in a few integers. So the pickle of one chunk is
repeated for all chunks, and numpy fills in the integers. ``pickle.load`` of the result equals
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
# Constants in the pickle of every chunk. They come first in the memo, where a byte indexes them.
_MEMO: list[Any] = [
    ChunkStorageMetadata,
    MetadataIndex,
    _StorageInfo,
    TensorStorageMetadata,
    torch.Size,
    *("offsets", "sizes", "fqn", "offset", "index", "relative_path", "length"),
    *("properties", "size", "chunks"),
]
_FIRST_KEY = 256  # memo index of the first tensor's key; file names follow the keys
_TUPLES = {0: b")", 1: b"\x85", 2: b"\x86", 3: b"\x87"}  # opcodes, by length


def dump_metadata(table: ChunkTable, metadata: Metadata, stream: Any) -> None:
    """Write the metadata of ``table`` to a file.

    Args:
        table: the chunks.
        metadata: all other fields, without tensors.
        stream: a binary file.
    """
    first_file = _FIRST_KEY + len(table.tensors)
    write = stream.write
    write(pickle.PROTO + bytes([_PROTOCOL]))
    constants = [*enumerate(_MEMO), *enumerate(table.files, first_file)]
    write(b"".join(_pickled(value) + _put(index) + pickle.POP for index, value in constants))
    fields = dict(vars(metadata))
    del fields["state_dict_metadata"], fields["storage_data"]
    write(_new(_pickled(Metadata)))
    for name, value in fields.items():
        write(_pickled(name) + _pickled(value))
    write(_pickled("state_dict_metadata") + pickle.EMPTY_DICT)
    for index, (key, tensor) in enumerate(table.tensors.items(), _FIRST_KEY):
        write(pickle.MARK + _pickled(key) + _put(index) + _new(_get(TensorStorageMetadata)))
        write(_get("properties") + _pickled(tensor.properties))
        write(_get("size") + _pickled(tensor.size) + _get("chunks"))
        write(pickle.EMPTY_LIST + pickle.MARK)
        write(_chunks(tensor.boxes))
        write(pickle.APPENDS + pickle.SETITEMS + pickle.BUILD + pickle.SETITEMS)
    write(_pickled("storage_data") + pickle.EMPTY_DICT)
    for index, tensor in enumerate(table.tensors.values(), _FIRST_KEY):
        write(pickle.MARK)
        write(_storage_data(index, first_file, tensor.boxes[0], tensor.places))
        write(pickle.SETITEMS)
    write(pickle.SETITEMS + pickle.BUILD + pickle.STOP)


class _Record:
    """The pickle of one chunk, with gaps for the integers that differ between chunks."""

    def __init__(self) -> None:
        self._bytes = b""
        self._columns: list[tuple[int, np.ndarray]] = []  # start of each gap, and its integers

    def add(self, *parts: bytes) -> None:
        self._bytes += b"".join(parts)

    def add_integers(self, column: np.ndarray, opcode: bytes | None = None) -> None:
        """Add an integer that is ``column[i]`` in the pickle of chunk ``i``.

        ``opcode`` takes four bytes as its argument. By default it pushes an integer.
        """
        if opcode is None and column.max(initial=0) >= 2**31:
            opcode, dtype = pickle.LONG1 + b"\x08", "<i8"
        else:
            opcode, dtype = opcode or pickle.BININT, "<i4"
        self._bytes += opcode
        self._columns.append((len(self._bytes), np.ascontiguousarray(column, dtype)))
        self._bytes += bytes(np.dtype(dtype).itemsize)

    def add_size(self, columns: np.ndarray) -> None:
        """Add a ``torch.Size`` from integers of shape (dimensions, chunks)."""
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
    """Return the pickle of a ``ChunkStorageMetadata`` for each chunk of a tensor."""
    record = _Record()
    record.add(_new(_get(ChunkStorageMetadata)), _get("offsets"))
    record.add_size(boxes[0])
    record.add(_get("sizes"))
    record.add_size(boxes[1])
    record.add(pickle.SETITEMS, pickle.BUILD)
    return record.repeat(boxes.shape[2])


def _storage_data(key: int, first_file: int, offsets: np.ndarray, places: np.ndarray) -> bytes:
    """Return a tensor's pickled ``storage_data``; ``key`` and ``first_file`` are memo indices."""
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
    """Return the opcodes that start an object. Attributes, SETITEMS and BUILD must follow."""
    return pickled_class + pickle.EMPTY_TUPLE + pickle.NEWOBJ + pickle.EMPTY_DICT + pickle.MARK


def _get(value: Any) -> bytes:
    return _GET[value]


def _get_at(index: int) -> bytes:
    return pickle.LONG_BINGET + index.to_bytes(4, "little")


def _put(index: int) -> bytes:
    return pickle.LONG_BINPUT + index.to_bytes(4, "little")


_GET = {value: pickle.BINGET + bytes([index]) for index, value in enumerate(_MEMO)}
assert len(_MEMO) <= _FIRST_KEY


def _pickled(value: Any) -> bytes:
    """Return the opcodes that push ``value`` without the memo."""
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, _PROTOCOL)
    pickler.fast = True
    pickler.dump(value)
    return buffer.getvalue()[2:-1]  # without PROTO and STOP
