"""Folders under a root: names, flushes, foreign manifests and newest_good()."""

from __future__ import annotations

import json
import os
import shutil
import unittest
import zlib
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from sharded_bf16_adamw import AdamW_BF16, latest, load, newest_good, prune, save, verify
from sharded_bf16_adamw.checkpoint import commit, directory
from sharded_bf16_adamw.checkpoint.file_checksums import crc32_text
from sharded_bf16_adamw.checkpoint.manifest import read_manifest

from .victims import assert_holds, make, patch_system_call, save_step


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_other_folders_are_neither_counted_nor_removed(tmp_path):
    first = save_step(tmp_path, 1, sharded=False)
    kept = [tmp_path / name for name in ("step-00000001-best", "step-one", "step-1")]
    for path in kept:
        shutil.copytree(first, path)
    (tmp_path / ".exporting-out").mkdir()
    save_step(tmp_path, 1, sharded=False, keep=2)
    save_step(tmp_path, 2, sharded=False, keep=2)
    ours = ["step-00000001-2", "step-00000002"]
    assert names(tmp_path) == sorted(
        [".exporting-out", "LATEST", *ours, *(path.name for path in kept)]
    )
    assert prune(tmp_path, 1) == [tmp_path / "step-00000001-2"]
    (tmp_path / "LATEST").unlink()
    assert latest(tmp_path) == tmp_path / "step-00000002"
    for path in kept:
        assert_holds(path, 1)


@pytest.fixture
def operations(monkeypatch):
    """Record operations on folders and files, with paths."""
    done: list[tuple[str, str]] = []

    def watch(module: Any, name: str) -> None:
        original = getattr(module, name)

        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            done.append((name, str(path)))
            return original(path, *args, **kwargs)

        monkeypatch.setattr(module, name, call)

    for name in ("rename", "replace", "mkdir"):
        watch(os, name)
    for module in (directory, commit):
        watch(module, "sync_folder")
    watch(shutil, "rmtree")
    return done


def test_files_are_flushed_before_they_are_visible(tmp_path, monkeypatch):
    """A flush before the last bytes have left Python's buffer would lose them.

    The model is so small that the metadata fits into that buffer.
    """
    flushed: dict[int, int] = {}
    fsync, rename = os.fsync, os.rename

    def record(descriptor: int) -> None:
        fsync(descriptor)
        flushed[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size

    def check(source: Any, target: Any) -> None:
        for path in Path(source).iterdir() if Path(source).is_dir() else [Path(source)]:
            assert flushed.get(path.stat().st_ino) == path.stat().st_size > 0, path
            checked.add(path.name)
        rename(source, target)

    checked: set[str] = set()
    monkeypatch.setattr(os, "fsync", record)
    patch_system_call(monkeypatch, os, "rename", check)
    model = nn.Linear(2, 2, bias=False).bfloat16()
    path = save(tmp_path, 1, model, AdamW_BF16(model.parameters(), lr=1e-2))
    assert (path / ".metadata").stat().st_size < 4096
    assert checked == {".metadata.tmp", ".metadata", "__0_0.distcp", "manifest.json"}


def test_removal_flushes_the_rename_before_it_deletes_files(tmp_path, operations):
    path = save_step(tmp_path, 1, sharded=False)
    operations.clear()
    directory.remove(path)
    assert operations[:2] == [("rename", str(path)), ("sync_folder", str(tmp_path))]
    ((name, hidden),) = operations[2:]
    assert name == "rmtree" and hidden.startswith(f"{tmp_path}/.removed-step-00000001-")


def test_only_new_parents_of_the_root_are_flushed(tmp_path, operations):
    root = tmp_path / "a" / "b"
    save_step(root, 1, sharded=False)
    synced = [Path(path) for name, path in operations if name == "sync_folder"]
    assert {tmp_path, tmp_path / "a", root} <= set(synced) and tmp_path.parent not in synced
    operations.clear()
    save_step(root, 2, sharded=False)
    synced = [Path(path) for name, path in operations if name == "sync_folder"]
    (partial,) = set(synced) - {root}
    assert partial.parent == root and partial.name.startswith(".partial-step-00000002-"), (
        "a user may not be allowed to read the folder above"
    )


# -------------------------------------------------------------------------------- foreign manifests


def rewrite(path: Path, **changes: Any) -> None:
    """Change values of a manifest, or remove those given as ``...``; the checksum matches."""
    body = {**json.loads((path / "manifest.json").read_bytes()), **changes}
    body = {key: value for key, value in body.items() if value is not ... and key != "checksum"}
    body["checksum"] = "0" * 8  # must be the last key
    blank = json.dumps(body).encode()
    (path / "manifest.json").write_bytes(
        blank[:-10] + f'{crc32_text(zlib.crc32(blank))}"}}'.encode()
    )


STRANGE = {
    "another key": (
        {"more": 1},
        "its checksum matches, but its structure is unknown to this version",
    ),
    "no groups": (
        {"groups": ...},
        "its checksum matches, but its structure is unknown to this version",
    ),
    "groups of numbers": (
        {"groups": [1]},
        "its checksum matches, but its structure is unknown to this version",
    ),
    "parameters that are no names": (
        {"groups": [{"params": [1], "options": {}}]},
        "its checksum matches, but its structure is unknown to this version",
    ),
    "files in a list": (
        {"files": []},
        "its checksum matches, but its structure is unknown to this version",
    ),
    "size that is no number": (
        {"files": {"a": {"bytes": "1", "crc32": ""}}},
        "its checksum matches, but its structure is unknown to this version",
    ),
    "serial that is no number": (
        {"serial": "newest"},
        "its checksum matches, but its structure is unknown to this version",
    ),
    "extra that is no dict": (
        {"extra": None},
        "its checksum matches, but its structure is unknown to this version",
    ),
    "file elsewhere": (
        {"files": {"../a": {"bytes": 1, "crc32": ""}}},
        r"it names '../a', which is not a file in the checkpoint's folder",
    ),
    "folder above": (
        {"files": {"..": {"bytes": 1, "crc32": ""}}},
        r"it names '..', which is not a file",
    ),
    "no name": ({"files": {"": {"bytes": 1, "crc32": ""}}}, r"it names '', which is not a file"),
    "name that no file can have": (
        {"files": {"a\0": {"bytes": 1, "crc32": ""}}},
        r"it names 'a\\x00', which is not a file",
    ),
}


@pytest.mark.parametrize("case", STRANGE)
def test_foreign_manifest_is_refused_and_later_saves_work(case, tmp_path):
    changes, message = STRANGE[case]
    good, bad = (save_step(tmp_path, step, sharded=False) for step in (1, 2))
    rewrite(good)
    assert verify(good) == [], "a manifest without changes must stay valid"
    rewrite(bad, **changes)
    for call in (read_manifest, lambda path: load(path, *make(0))):
        with pytest.raises(
            ValueError, match=f"the checkpoint {bad} cannot be used: manifest.json: {message}"
        ):
            call(bad)
    (tmp_path / "LATEST").unlink()
    assert latest(tmp_path) == good, "a damaged checkpoint counts as older"
    assert_holds(save_step(tmp_path, 3, sharded=False), 3)


def test_deeply_nested_manifest_is_refused(tmp_path):
    path = save_step(tmp_path, 1, sharded=False)
    (path / "manifest.json").write_bytes(b"[" * 200_000)
    with pytest.raises(ValueError, match=r"it is damaged: it is not a JSON manifest"):
        read_manifest(path)


@pytest.mark.parametrize("content", ["", ".", "..", "a\0b", "x" * 300, "a/b"])
def test_latest_that_names_no_folder_is_ignored(content, tmp_path):
    checkpoint = tmp_path / "step-00000001"
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_text("{}")
    (tmp_path / "LATEST").write_text(content)
    assert latest(tmp_path) == checkpoint


def test_unknown_dtype_is_refused(tmp_path):
    path = save_step(tmp_path, 1, sharded=False)
    groups = json.loads((path / "manifest.json").read_bytes())["groups"]
    groups[0]["options"]["lr"] = {"__tensor__": 0.1, "dtype": "load"}
    rewrite(path, groups=groups)
    with pytest.raises(ValueError, match="load is not a dtype of torch"):
        load(path, *make(0))


def test_saving_an_earlier_step_again_makes_it_the_latest(tmp_path):
    for step in (1, 2, 1):
        path = save(tmp_path, step, *make(step))
    assert latest(tmp_path) == path == tmp_path / "step-00000001-2"
    assert names(tmp_path) == ["LATEST", "step-00000001-2", "step-00000002"]


def test_published_and_removed_checkpoints_are_logged(tmp_path):
    with unittest.TestCase().assertLogs("sharded_bf16_adamw", "DEBUG") as logs:
        old, new = (save_step(tmp_path, step, sharded=False, keep=1) for step in (1, 2))
    size = sum(record.bytes for record in read_manifest(new).files.values())
    published, removed = logs.output[-2:]
    assert published.startswith(f"INFO:sharded_bf16_adamw:published checkpoint {new} ({size} bytes")
    assert removed == f"DEBUG:sharded_bf16_adamw:removed older checkpoint {old}"


# ------------------------------------------------------------------------------------ newest_good()


def flip_a_bit(path: Path) -> None:
    file = path / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_newest_good_is_the_last_undamaged_checkpoint(tmp_path):
    assert newest_good(tmp_path / "nothing") == (None, [])
    paths = [
        save_step(tmp_path, step, sharded=False) for step in (30, 10, 20, 5)
    ]  # in the order of saving, not of steps
    assert newest_good(tmp_path) == (paths[3], [])
    flip_a_bit(paths[3])
    (paths[2] / "__0_0.distcp").unlink()
    found, skipped = newest_good(tmp_path)
    assert found == paths[1] and len(skipped) == 2
    assert skipped[0].startswith(
        f"the checkpoint {paths[3]} is damaged: __0_0.distcp is not what was written"
    )
    assert skipped[1] == f"the checkpoint {paths[2]} is damaged: __0_0.distcp is missing"
    assert_holds(found, 10)
    for path in paths[:2]:
        flip_a_bit(path)
    found, skipped = newest_good(tmp_path)
    assert found is None and len(skipped) == 4


def test_newest_good_lists_folders_without_a_manifest(tmp_path):
    good, latest_one = (save_step(tmp_path, step, sharded=False) for step in (1, 2))
    (tmp_path / "step-00000003").mkdir()
    (tmp_path / "step-00000004").mkdir()
    (tmp_path / "step-00000004" / "__0_0.distcp").write_bytes(b"x")
    assert newest_good(tmp_path)[0] == latest_one
    (latest_one / "manifest.json").write_text("{}")
    found, skipped = newest_good(tmp_path)
    assert found == good
    assert skipped[:2] == [f"{tmp_path}/step-{step:08d} has no manifest.json" for step in (3, 4)]
    assert (
        skipped[2].startswith(
            f"the checkpoint {latest_one} cannot be used: manifest.json: it is damaged"
        )
        and len(skipped) == 3
    )
