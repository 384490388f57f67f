"""export_fp32: true values, one tensor in memory at a time, and no partial results."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import pytest
import torch
from distributed import run_ranks
from safetensors.torch import load_file

from sharded_bf16_adamw import save
from sharded_bf16_adamw.bf16_split import join
from sharded_bf16_adamw.checkpoint import export, safetensors_io
from sharded_bf16_adamw.checkpoint.dcp_storage import ChecksummedWriter
from sharded_bf16_adamw.checkpoint.export import export_fp32
from sharded_bf16_adamw.checkpoint.reader import CheckpointReader
from sharded_bf16_adamw.checkpoint.safetensors_io import INDEX

from .layouts import LAYOUTS, Net, everything, train
from .trainings import read_folder, trained, true_values


def test_export_has_the_true_weights_and_the_library_reads_it(tmp_path):
    module, optimizer = trained()
    path = save(tmp_path / "run", 3, module, optimizer)
    assert export_fp32(tmp_path / "run", tmp_path / "out", max_shard_bytes=400) == tmp_path / "out"
    found, expected = read_folder(tmp_path / "out"), true_values(module, optimizer)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], weight), name
    assert not torch.equal(found["up.weight"], module.up.weight.float()), (
        "the corrections must make a difference"
    )
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == 4 * sum(
        param.numel() for param in module.parameters()
    )
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    loaded = {
        name: value for file in files for name, value in load_file(tmp_path / "out" / file).items()
    }
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in loaded)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [*files, INDEX]
    assert path.is_dir()


def test_bfloat16_export_has_the_stored_weights(tmp_path):
    module, optimizer = trained()
    save(tmp_path / "run", 3, module, optimizer)
    export_fp32(tmp_path / "run", tmp_path / "out", dtype=torch.bfloat16)
    found = read_folder(tmp_path / "out")
    for name, param in module.named_parameters():
        assert found[name].dtype == param.dtype and torch.equal(found[name], param), name
    assert [p.name for p in sorted((tmp_path / "out").iterdir())] == [
        "model-00001-of-00001.safetensors",
        INDEX,
    ]


def sharded_save_worker(rank: int, world: int, root: str) -> dict[str, torch.Tensor]:
    module, optimizer = next(layout for layout in LAYOUTS if layout.name == "FSDP2 + TP").build(
        world, 0
    )
    train(module, optimizer, 2)
    save(root, 2, module, optimizer)
    return everything(module, optimizer)[0]


def test_export_joins_tensors_sharded_over_two_mesh_dimensions(tmp_path):
    values = run_ranks(4, sharded_save_worker, str(tmp_path / "run"))[0]
    assert max(len(blocks) for blocks in CheckpointReader(tmp_path / "run").blocks.values()) == 4
    export_fp32(tmp_path / "run", tmp_path / "out")
    exported = read_folder(tmp_path / "out")
    assert exported.keys() == dict(Net().named_parameters()).keys()
    for name, found in exported.items():
        correction = values.get(f"{name}.correction")
        expected = values[name].float() if correction is None else join(values[name], correction)
        assert torch.equal(found, expected), name


def parallel_worker(rank: int, world: int, root: str, out: str) -> tuple[list[str], str]:
    written = []
    write_file = safetensors_io.write_file

    def write(path, *args):
        written.append(path.name)
        write_file(path, *args)

    safetensors_io.write_file = write
    try:
        export_fp32(root, out, parallel=True)
    finally:
        safetensors_io.write_file = write_file
    with pytest.raises(RuntimeError) as caught:
        export_fp32(root, out, parallel=True)
    return written, str(caught.value)


def test_parallel_export_is_that_of_one_process_written_by_all_ranks(tmp_path):
    module, optimizer = trained()
    save(tmp_path / "run", 3, module, optimizer)
    results = run_ranks(3, parallel_worker, str(tmp_path / "run"), str(tmp_path / "out"))
    found, expected = read_folder(tmp_path / "out"), true_values(module, optimizer)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    files = [file for written, _ in results for file in written]
    assert all(written for written, _ in results) and len(files) == len(set(files))
    assert sorted([*files, INDEX]) == sorted(p.name for p in (tmp_path / "out").iterdir())
    assert {error for _, error in results} == {
        f"cannot export to {tmp_path}/out: on rank 0, FileExistsError: {tmp_path}/out exists "
        "already; give the name of a new directory"
    }
    assert not list(tmp_path.glob(".exporting-*"))


def test_export_holds_one_tensor_at_a_time(tmp_path, monkeypatch):
    """Count the tensors that ``read`` returned and that are still alive."""
    import weakref

    module, optimizer = trained()
    save(tmp_path / "run", 3, module, optimizer)
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0
    original = CheckpointReader.read

    def read(self, key):
        nonlocal most
        tensor = original(self, key)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(CheckpointReader, "read", read)
    export_fp32(tmp_path / "run", tmp_path / "out")
    assert most == 2, "a weight and its correction"


def test_export_does_not_overwrite_and_a_failed_one_leaves_nothing(tmp_path, monkeypatch):
    module, optimizer = trained()
    save(tmp_path / "run", 3, module, optimizer)
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="out exists already; give the name of a new dir"):
        export_fp32(tmp_path / "run", tmp_path / "out")

    def fails(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="No space left"):
        export_fp32(tmp_path / "run", tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_export_into_the_directory_of_a_run_survives_a_save(tmp_path, monkeypatch):
    module, optimizer = trained()
    save(tmp_path, 3, module, optimizer)
    write_sharded = export.write_sharded

    def write_and_save(*args):
        write_sharded(*args)
        save(tmp_path, 4, module, optimizer)  # a save removes leftovers of failed saves

    monkeypatch.setattr(export, "write_sharded", write_and_save)
    export_fp32(tmp_path, tmp_path / "out")
    assert read_folder(tmp_path / "out").keys() == dict(module.named_parameters()).keys()


def test_export_waits_for_the_save_in_flight(tmp_path, monkeypatch):
    """Otherwise it would silently export the previous checkpoint."""
    module, optimizer = trained()
    save(tmp_path / "run", 3, module, optimizer)
    train(module, optimizer, 1)
    write_data = ChecksummedWriter.write_data

    def slow(*args):
        time.sleep(0.1)
        return write_data(*args)

    monkeypatch.setattr(ChecksummedWriter, "write_data", slow)
    save(tmp_path / "run", 4, module, optimizer, async_=True)
    export_fp32(tmp_path / "run", tmp_path / "out")
    found, expected = read_folder(tmp_path / "out"), true_values(module, optimizer)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_damaged_checkpoint_is_refused(tmp_path):
    module, optimizer = trained()
    path = save(tmp_path / "run", 3, module, optimizer)
    (file,) = path.glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        ValueError,
        match=f"the checkpoint {path} cannot be used: {file.name} is not what was written",
    ):
        export_fp32(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": torch.float16}, "Invalid dtype: torch.float16"),
        ({"max_shard_bytes": 0}, "Invalid max_shard_bytes: 0"),
    ],
)
def test_invalid_arguments_are_refused(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_fp32(tmp_path, tmp_path / "out", **arguments)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint at"):
        export_fp32(tmp_path, tmp_path / "out")
