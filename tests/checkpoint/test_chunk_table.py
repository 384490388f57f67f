"""Chunk tables equal DCP's metadata in memory, in a file, and as a pickle."""

from __future__ import annotations

import io
import json
import pickle
import zlib
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint import load as dcp_load
from torch.distributed.checkpoint.metadata import (
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from sharded_bf16_adamw import AdamW_BF16, load, save, verify
from sharded_bf16_adamw.checkpoint import dcp_storage
from sharded_bf16_adamw.checkpoint.chunk_table import ChunkTable, SavedTensor
from sharded_bf16_adamw.checkpoint.dcp_storage import (
    CHUNKS,
    CHUNKS_FILE_THRESHOLD,
    parse_metadata,
    read_chunks,
)
from sharded_bf16_adamw.checkpoint.file_checksums import FileRecord, crc32_text
from sharded_bf16_adamw.checkpoint.manifest import read_manifest
from sharded_bf16_adamw.checkpoint.metadata_pickle import dump_metadata

FILES = ["__0_0.distcp", "__1_0.distcp", "__1_1.distcp"]


def table(largest: int = 90) -> ChunkTable:
    """Return the chunks of tensors with 0 to 5 dimensions; all integers are below ``largest``."""
    generator = np.random.default_rng(0)
    tensors = {}
    for dims, count in ((0, 1), (1, 1), (1, 300), (2, 7), (3, 1), (4, 2), (5, 3), (2, 0)):
        places = generator.integers(0, largest, (3, count))
        places[0] = generator.integers(0, len(FILES), count)
        boxes = generator.integers(0, largest, (2, dims, count))
        if dims:
            boxes[0, 0] = np.arange(count)  # the offsets are different
        size = torch.Size(generator.integers(0, largest, dims).tolist())
        properties = TensorProperties(
            [torch.bfloat16, torch.uint8, torch.float8_e4m3fn][count % 3], requires_grad=dims > 1
        )
        tensors[f"model.größe.{dims}.{count}"] = SavedTensor(size, properties, boxes, places)
    return ChunkTable(tensors, FILES, {key: (key,) for key in tensors})


def everything(metadata: Metadata) -> Any:
    """Return the metadata, and what ``==`` does not compare: hints, types and orders."""
    return (
        metadata,
        list(metadata.state_dict_metadata),
        [(vars(key), vars(value)) for key, value in metadata.storage_data.items()],
        [
            [type(size) for size in vars(chunk).values()]
            for entry in metadata.state_dict_metadata.values()
            for chunk in entry.chunks
        ],
    )


@pytest.mark.parametrize("largest", [90, 2**31, 2**40])
def test_pickle_by_columns_is_that_of_the_objects(largest):
    chunks = table(largest)
    rest = Metadata({}, chunks.planner_data, {}, StorageMeta(save_id="x"), version="1.0.0")
    stream = io.BytesIO()
    dump_metadata(chunks, rest, stream)
    expected = chunks.to_metadata()
    expected.storage_meta, expected.version = rest.storage_meta, rest.version
    expected = pickle.loads(pickle.dumps(expected))
    assert everything(pickle.loads(stream.getvalue())) == everything(expected)
    assert everything(parse_metadata(stream.getvalue())) == everything(expected)


@pytest.mark.parametrize("largest", [90, 2**31, 2**40])
def test_table_is_the_same_after_a_round_trip(largest):
    chunks = table(largest)
    for again in (
        ChunkTable.from_bytes(chunks.to_bytes()),
        ChunkTable.from_metadata(chunks.to_metadata()),
    ):
        assert list(again.tensors) == list(chunks.tensors)
        for key, tensor in chunks.tensors.items():
            other = again.tensors[key]
            assert (other.size, other.properties.dtype) == (tensor.size, tensor.properties.dtype)
            assert np.array_equal(other.boxes, tensor.boxes)
            assert [again.files[number] for number in other.places[0]] == [
                chunks.files[number] for number in tensor.places[0]
            ]
            assert np.array_equal(other.places[1:], tensor.places[1:])


def changed(**header: Any) -> bytes:
    line, _, packed = table().to_bytes().partition(b"\n")
    return json.dumps({**json.loads(line), **header}).encode() + b"\n" + packed


def with_numbers(numbers: Any) -> bytes:
    line, _, packed = table().to_bytes().partition(b"\n")
    columns = np.frombuffer(zlib.decompress(packed), "<i8").copy()
    return line + b"\n" + zlib.compress(numbers(columns).tobytes())


BROKEN = {
    "empty": b"",
    "no JSON": b"{\n",
    "a list": b"[]\n",
    "not compressed": table().to_bytes().partition(b"\n")[0] + b"\nx",
    "cut": table().to_bytes()[:-9],
    "too long": with_numbers(lambda columns: np.append(columns, 0)),
    "too short": with_numbers(lambda columns: columns[:-1]),
    "negative": with_numbers(lambda columns: -columns),
    "a file that is not listed": changed(files=FILES[:1]),
    "a file elsewhere": changed(files=["../x", *FILES[1:]]),
    "a file without a name": changed(files=[3, *FILES[1:]]),
    "no dtype": changed(tensors=[["a", "torch.nn", [1], 1]]),
    "no such dtype": changed(tensors=[["a", "torch.bfloat17", [1], 1]]),
    "negative size": changed(tensors=[["a", "torch.uint8", [-1], 1]]),
    "negative count": changed(tensors=[["a", "torch.uint8", [1], -1]]),
    "huge count": changed(tensors=[["a", "torch.uint8", [1], 2**70]]),
    "text as size": changed(tensors=[["a", "torch.uint8", "x", 1]]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_table_is_an_error(name):
    with pytest.raises(ValueError, match=r"^it is not a table of chunks \("):
        ChunkTable.from_bytes(BROKEN[name])


def test_only_chunks_of_this_rank_become_objects(tmp_path):
    """A load plans the reads that DCP's planner does, without the chunks of other ranks."""
    rows = np.arange(0, 40, 2)
    boxes = np.stack([np.stack([rows, 0 * rows]), np.stack([0 * rows + 2, 0 * rows + 3])])
    places = np.stack([0 * rows, 100 * rows, 0 * rows + 100])
    saved = SavedTensor(torch.Size([40, 3]), TensorProperties(torch.bfloat16), boxes, places)
    chunks = ChunkTable({"t": saved, "other": saved}, FILES)
    plan, metadata = chunks.plan_reads({"t": torch.zeros(40, 3)})
    planner = DefaultLoadPlanner()
    planner.set_up_planner({"t": torch.zeros(40, 3)}, chunks.to_metadata(), True)
    assert plan.items == planner.create_local_plan().items and len(plan.items) == 20
    assert list(metadata.state_dict_metadata) == ["t"] and len(metadata.storage_data) == 20


# ------------------------------------------------------------------------------- checkpoints


def trained(seed: int) -> tuple[torch.nn.Module, AdamW_BF16]:
    torch.manual_seed(seed)
    model = torch.nn.Linear(4, 2).bfloat16()
    optimizer = AdamW_BF16(model.parameters(), lr=1e-2)
    model(torch.ones(1, 4).bfloat16()).float().sum().backward()
    optimizer.step(zero_grad=True)
    return model, optimizer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a checkpoint that was saved as if it had many chunks."""
    with patch.object(dcp_storage, "CHUNKS_FILE_THRESHOLD", 0):
        return save(tmp_path, 1, *trained(0))


def test_table_is_written_for_many_chunks_only(tmp_path, path):
    assert {file.name for file in path.iterdir()} == {
        *(".metadata", ".chunks", "__0_0.distcp", "manifest.json")
    }
    few = save(tmp_path, 2, *trained(0))
    assert not (few / CHUNKS).exists() and CHUNKS_FILE_THRESHOLD > 10_000
    chunks = ChunkTable.from_bytes((path / CHUNKS).read_bytes()).to_metadata()
    metadata = pickle.loads((path / ".metadata").read_bytes())
    assert chunks.storage_data == metadata.storage_data
    assert {
        key: (entry.size, entry.chunks) for key, entry in chunks.state_dict_metadata.items()
    } == {key: (entry.size, entry.chunks) for key, entry in metadata.state_dict_metadata.items()}


def test_dcp_loads_a_checkpoint_of_many_chunks(path):
    loaded = {"model.weight": torch.zeros(2, 4, dtype=torch.bfloat16)}
    dcp_load(loaded, checkpoint_id=path, no_dist=True)
    assert torch.equal(loaded["model.weight"], trained(0)[0].weight)


def test_load_reads_the_table_instead_of_the_metadata(path, monkeypatch):
    monkeypatch.setattr(dcp_storage, "parse_metadata", lambda _: pytest.fail("parsed"))
    model, optimizer = trained(1)
    load(path, model, optimizer)
    assert torch.equal(model.weight, trained(0)[0].weight)


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_damaged_table_is_refused(path, damage):
    content = bytearray((path / CHUNKS).read_bytes())
    content[40] ^= 1
    (path / CHUNKS).write_bytes(content if damage == "flipped" else content[:-1])
    if damage == "missing":
        (path / CHUNKS).unlink()
    model, optimizer = trained(1)
    before = model.weight.clone()
    with pytest.raises(ValueError, match=r"\.chunks .*load another checkpoint"):
        load(path, model, optimizer)
    assert torch.equal(model.weight, before) and len(verify(path)) == 1


def test_stale_table_is_refused(tmp_path, path):
    """The table of another checkpoint is valid in itself; only its checksum tells."""
    other = torch.nn.Linear(4, 3).bfloat16()
    with patch.object(dcp_storage, "CHUNKS_FILE_THRESHOLD", 0):
        newer = save(tmp_path, 2, other, AdamW_BF16(other.parameters(), lr=1e-2))
    (path / CHUNKS).write_bytes((newer / CHUNKS).read_bytes())
    with pytest.raises(ValueError, match=r"\.chunks does not match its checksum in the man"):
        read_chunks(path, read_manifest(path).files)


@pytest.mark.parametrize("name", ["cut", "a file that is not listed"])
def test_broken_table_with_a_right_checksum_is_refused(path, name):
    files = read_manifest(path).files
    (path / CHUNKS).write_bytes(BROKEN[name])
    files[CHUNKS] = FileRecord(len(BROKEN[name]), crc32_text(zlib.crc32(BROKEN[name])))
    with pytest.raises(ValueError, match=r"cannot be used: \.chunks: it is not a table"):
        read_chunks(path, files)


def without_fields(kind: type) -> Any:
    return object.__new__(kind)


CRAFTED = {
    "nothing": without_fields(Metadata),
    "entry without fields": Metadata({"a": without_fields(TensorStorageMetadata)}, None, {}),
    "entry that is no tensor's": Metadata({"a": StorageMeta()}, None, {}),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_metadata_with_a_right_checksum_is_refused(tmp_path, name):
    content = pickle.dumps(CRAFTED[name])
    (tmp_path / ".metadata").write_bytes(content)
    files = {".metadata": FileRecord(len(content), crc32_text(zlib.crc32(content)))}
    with pytest.raises(ValueError, match=r"cannot be used: \.metadata: .*load another checkpoint"):
        read_chunks(tmp_path, files)


@pytest.mark.parametrize("name", [".metadata", CHUNKS])
def test_file_without_a_checksum_is_not_read(path, name):
    files = read_manifest(path).files
    del files["__0_0.distcp"]
    if name == ".metadata":
        del files[CHUNKS]
    with pytest.raises(ValueError, match=rf"\{name} names __0_0.distcp, which its manifest does"):
        read_chunks(path, files)
    del files[".metadata"]
    with pytest.raises(ValueError, match=r"its manifest does not list \.metadata"):
        read_chunks(path, files)
