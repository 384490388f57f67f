"""Damaged files, pickles and full disks: a checkpoint is loaded as saved or refused."""

from __future__ import annotations

import errno
import io
import os
import pickle
import random
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from bits import assert_same_bits
from distributed import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard

from sharded_bf16_adamw import AdamW_BF16, latest, load, save, verify, wait_for_save
from sharded_bf16_adamw.checkpoint import dcp_storage, file_checksums, manifest
from sharded_bf16_adamw.checkpoint.file_checksums import FileRecord, crc32_text

FLIPS = 240  # bits flipped, one at a time, over all files


def trained(seed: int, steps: int = 2) -> tuple[nn.Module, AdamW_BF16]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3)).to(torch.bfloat16)
    optimizer = AdamW_BF16(model.parameters(), lr=1e-2)
    for _ in range(steps):
        model(torch.randn(4, 5).bfloat16()).float().square().mean().backward()
        optimizer.step(zero_grad=True)
    return model, optimizer


def state(model: nn.Module, optimizer: AdamW_BF16) -> dict[str, object]:
    """Return all state that loading may change."""
    result: dict[str, object] = {
        name: param.detach().clone() for name, param in model.named_parameters()
    }
    for index, param in enumerate(model.parameters()):
        result.update(
            {f"{index}.{key}": value.clone() for key, value in optimizer.state[param].items()}
            if param in optimizer.state
            else {}
        )
    result["groups"] = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    result["random"] = torch.get_rng_state()
    return result


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path / "run", 2, *trained(seed=1))


@pytest.fixture
def target() -> tuple[nn.Module, AdamW_BF16]:
    return trained(seed=2)


def assert_refused(path: Path, target: tuple[nn.Module, AdamW_BF16], message: str) -> None:
    before = state(*target)
    with pytest.raises(ValueError, match=message) as caught:
        load(path, *target)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert_same_bits(state(*target), before)
    assert verify(path) != []


def files(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if file.is_file())


def test_undamaged_checkpoint_verifies(saved, target):
    assert [file.name for file in files(saved)] == [".metadata", "__0_0.distcp", "manifest.json"]
    assert verify(saved) == verify(saved.parent) == []
    load(saved, *target)


def test_flipped_bits_are_found(saved, target):
    """Flip bits at random places, half of them in a file's first and last 64 bytes."""
    generator = random.Random(0)
    flips = 0
    for file in files(saved):
        content = bytearray(file.read_bytes())
        for index in range(FLIPS // len(files(saved))):
            near_an_end = [*range(64), *range(len(content) - 64, len(content))]
            place = (
                generator.choice(near_an_end) if index % 2 else generator.randrange(len(content))
            )
            bit = 1 << generator.randrange(8)
            content[place] ^= bit
            file.write_bytes(content)
            assert_refused(saved, target, file.name.replace(".", r"\."))
            content[place] ^= bit
            flips += 1
        file.write_bytes(content)
    assert flips >= 200
    assert verify(saved) == []


def test_truncated_files_are_found(saved, target):
    count = 0
    for file in files(saved):
        content = file.read_bytes()
        for size in (0, 1, len(content) // 2, len(content) - 1):
            file.write_bytes(content[:size])
            cause = (
                "it is damaged"
                if file.name == "manifest.json"
                else f"has {size} bytes, not the {len(content)} that were written"
            )
            assert_refused(saved, target, file.name.replace(".", r"\.") + ".*" + cause)
            count += 1
        file.write_bytes(content + b"\0")
        assert_refused(saved, target, file.name.replace(".", r"\."))
        file.write_bytes(content)
    assert count == 12 and verify(saved) == []


def test_missing_files_are_found(saved, target):
    for file in files(saved):
        hidden = file.with_name("hidden")
        file.rename(hidden)
        if file.name == "manifest.json":
            before = state(*target)
            with pytest.raises(FileNotFoundError, match=f"there is no checkpoint at {saved}"):
                load(saved, *target)
            assert_same_bits(state(*target), before)
        else:
            assert_refused(saved, target, f"{file.name} is missing")
        hidden.rename(file)
    assert verify(saved) == []


def test_files_of_another_step_are_found(saved, target):
    other = save(saved.parent, 3, *trained(seed=1, steps=3))
    for name in [file.name for file in files(saved)]:
        keep = (saved / name).read_bytes()
        assert (other / name).read_bytes() != keep
        shutil.copy(other / name, saved / name)
        assert_refused(saved, target, "distcp" if name != ".metadata" else r"\.metadata")
        (saved / name).write_bytes(keep)
    assert verify(saved) == []


def test_unreadable_files_are_named(saved, target):
    (saved / "__0_0.distcp").unlink()
    (saved / "__0_0.distcp").mkdir()
    assert_refused(saved, target, "__0_0.distcp")


def refusing_worker(rank: int, world: int, root: str) -> str:
    torch.manual_seed(0)
    model = fully_shard(nn.Linear(8, 8).to(torch.bfloat16))
    optimizer = AdamW_BF16(model.parameters(), lr=1e-2)
    path = save(root, 1, model, optimizer)
    if rank == 0:
        content = bytearray((path / "__2_0.distcp").read_bytes())
        content[len(content) // 2] ^= 1
        (path / "__2_0.distcp").write_bytes(content)
    torch.distributed.barrier()
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(3.0)
    with pytest.raises(
        ValueError, match=r"__2_0.distcp is not what was written \(CRC-32 .{8}, not .{8}\)"
    ) as caught:
        load(root, model, optimizer)
    assert all(bool((param.to_local() == 3.0).all()) for param in model.parameters())
    return str(caught.value)


def test_damage_is_raised_on_all_ranks(tmp_path):
    sentences = run_ranks(3, refusing_worker, str(tmp_path))
    assert len(set(sentences)) == 1


# ------------------------------------------------------------------------------------------ pickles


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_pickle_in_metadata_is_not_executed(saved, target, monkeypatch, tmp_path):
    """The restricted unpickler refuses it even if the manifest has its checksum."""
    monkeypatch.chdir(tmp_path)
    bomb = pickle.dumps(Bomb())
    (saved / ".metadata").write_bytes(bomb)
    assert_refused(saved, target, r"\.metadata")
    record = manifest.read_manifest(saved)
    record.files[".metadata"] = FileRecord(len(bomb), crc32_text(zlib.crc32(bomb)))
    (saved / "manifest.json").write_bytes(record.to_bytes())
    before = state(*target)
    with pytest.raises(
        ValueError,
        match=r"\.metadata: it is not the metadata of a checkpoint \(it names posix.mkdir",
    ):
        load(saved, *target)
    assert_same_bits(state(*target), before)
    assert not Path("exploded").exists()
    pickle.loads(bomb)
    assert Path("exploded").exists(), "the test needs a pickle that executes code"


@pytest.mark.parametrize(
    "name",
    ["os.system", "builtins.eval", "torch.load", "torch.hub.load", "torch.serialization.load"],
)
def test_metadata_may_name_only_classes_of_tensors(name):
    module, _, attribute = name.rpartition(".")
    with pytest.raises(ValueError, match=f"it names {name}"):
        dcp_storage.parse_metadata(b"c" + module.encode() + b"\n" + attribute.encode() + b"\n.")


def test_metadata_with_pickled_objects_is_refused():
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

    with pytest.raises(ValueError, match=r"optimizer\.x is a pickled object; only tensors are"):
        dcp_storage.parse_metadata(
            pickle.dumps(Metadata({"optimizer.x": BytesStorageMetadata()}, storage_data={}))
        )
    for content in (
        b"",
        b"\x80",
        pickle.dumps({}),
        pickle.dumps(Metadata([], storage_data={})),
        pickle.dumps(Metadata({})),
    ):
        with pytest.raises(ValueError, match="it is not the metadata of a checkpoint"):
            dcp_storage.parse_metadata(content)


# ---------------------------------------------------------------------------------- saves that fail


class FullDisk(io.BufferedWriter):
    """A file on a disk that is full after ``room`` bytes."""

    room = 0

    def write(self, data):
        if len(memoryview(data).cast("B")) > FullDisk.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        FullDisk.room -= len(memoryview(data).cast("B"))
        return super().write(data)


def save_and_wait(root: Path, model: nn.Module, optimizer: AdamW_BF16, async_: bool) -> None:
    save(root, 3, model, optimizer, async_=async_)
    wait_for_save()


@pytest.mark.parametrize("async_", [False, True])
def test_full_disk_leaves_only_the_previous_checkpoint(async_, saved, monkeypatch):
    """Fill the disk at 20 places in a save: tensors, metadata, manifest and LATEST."""
    root = saved.parent
    model, optimizer = trained(seed=3)
    total = sum(file.stat().st_size for file in files(saved)) + len("step-00000002\n")

    def limited_open(path, mode="r", *args, **kwargs):
        return (
            FullDisk(io.FileIO(path, mode)) if mode == "xb" else open(path, mode, *args, **kwargs)
        )

    for module in (manifest, file_checksums):
        monkeypatch.setattr(module, "open", limited_open, raising=False)
    for index in range(20):
        FullDisk.room = (total - 16) * index // 19
        with pytest.raises(
            RuntimeError,
            match=r"cannot save the checkpoint .*: on rank 0, OSError: \[Errno 28\] No space "
            r"left on device",
        ):
            save_and_wait(root, model, optimizer, async_)
        assert latest(root) == saved and verify(root) == []
        assert not list(root.glob(".partial-*"))
        for unnamed in root.glob("step-00000003*"):  # complete, but LATEST could not be written
            assert verify(unnamed) == []
    FullDisk.room = 1 << 30
    assert save(root, 4, model, optimizer) == latest(root)
    assert sorted(path.name for path in root.iterdir() if path.name.startswith(".")) == []


def test_unwritable_folder_is_named(saved, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match=f"cannot save a checkpoint in {tmp_path}/file/run"):
        save(tmp_path / "file" / "run", 1, *trained(seed=3))

    # permissions would not stop a test that runs as root
    def refused(self, *args, **kwargs):
        raise PermissionError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(
        RuntimeError,
        match=r"cannot save a checkpoint in .*: on rank 0, PermissionError: .*Read-only file "
        r"system",
    ):
        save(saved.parent, 3, *trained(seed=3))
    assert latest(saved.parent) == saved and verify(saved) == []


def test_read_error_after_the_check_is_reported(saved, target, monkeypatch):
    def fails(self, plan, planner):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(dcp_storage.ChunkReader, "read_data", fails)
    with pytest.raises(
        RuntimeError,
        match=r"the model may be partly loaded, because the checkpoint .* could not be read "
        r"after it was checked",
    ):
        load(saved, *target)
