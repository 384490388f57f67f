"""safetensors files: written and read as the library does; damaged or hostile files are refused."""

from __future__ import annotations

import json

import pytest
import torch
from bits import same_bits
from safetensors.torch import load_file, save_file

from sharded_bf16_adamw.checkpoint.blocks import Block
from sharded_bf16_adamw.checkpoint.safetensors_io import (
    DTYPES,
    INDEX,
    SafetensorsFile,
    TensorInfo,
    open_safetensors,
    write_file,
)


def tensors():
    generator = torch.Generator().manual_seed(0)
    made = {
        name: torch.randint(0, 2, (3, 2, 4), generator=generator).to(dtype)
        for name, dtype in DTYPES.items()
    }
    return {
        **made,
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
        "odd": torch.arange(5, dtype=torch.uint8),
    }


def write(path, content):
    write_file(
        path,
        {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in content.items()},
        content.__getitem__,
    )
    return path


def test_written_files_are_read_back_here_and_by_the_library(tmp_path):
    content = tensors()
    file = SafetensorsFile(write(tmp_path / "a.safetensors", content))
    assert list(file.infos) == list(content), "the order of the file"
    assert all(same_bits(file.read(name), value) for name, value in content.items())
    header_length = int.from_bytes((tmp_path / "a.safetensors").read_bytes()[:8], "little")
    assert header_length % 8 == 0, "aligned for readers that map the file"
    loaded = load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == content.keys()
    assert all(same_bits(loaded[name], value) for name, value in content.items())


def test_files_of_the_library_are_read(tmp_path):
    content = tensors()
    save_file(content, tmp_path / "b.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "b.safetensors")
    assert all(same_bits(file.read(name), value) for name, value in content.items())


def test_tensors_are_read_into_cpu_memory_under_another_default_device(tmp_path):
    file = SafetensorsFile(write(tmp_path / "a.safetensors", {"x": torch.ones(2)}))
    with torch.device("meta"):
        assert file.read("x").device.type == "cpu"


def test_block_equals_that_part_of_the_full_tensor(tmp_path):
    value = torch.arange(5 * 4 * 3, dtype=torch.float32).view(5, 4, 3)
    write(tmp_path / "a.safetensors", {"first": torch.ones(7), "x": value})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    for offsets, sizes in (
        ((0, 0, 0), (5, 4, 3)),
        ((2, 0, 0), (2, 4, 3)),
        ((4, 1, 2), (1, 2, 1)),
        ((1, 3, 0), (0, 1, 3)),
    ):
        expected = value[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
        assert torch.equal(file.read("x", Block(offsets, sizes)), expected)


def header(entry, size=8):
    text = json.dumps(entry).encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * size


def entry(begin=0, end=8, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


DAMAGED = {
    "empty": b"",
    "header longer than the file": (1000).to_bytes(8, "little") + b"{}",
    "length of 2**63": (1 << 63).to_bytes(8, "little") + b"{}",
    "not JSON": (4).to_bytes(8, "little") + b"\xff\xff{{",
    "a list": header([1]),
    "no offsets": header({"x": {"dtype": "F32", "shape": [2]}}),
    "unknown dtype": header({"x": entry(dtype="F7")}),
    "shape and bytes differ": header({"x": entry(shape=(3,))}),
    "negative shape": header({"x": entry(shape=(-1, -2))}),
    "huge shape": header({"x": entry(shape=(1 << 62, 1 << 62))}),
    "offset that is not an integer": header({"x": entry(begin=0.0)}),
    "three offsets": header({"x": {**entry(), "data_offsets": [0, 8, 8]}}),
    "deeply nested": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "overlap": header({"x": entry(), "y": entry(4, 12)}, 12),
    "gap": header({"x": entry(), "y": entry(12, 20)}, 20),
    "cut short": header({"x": entry()}, 7),
    "too long": header({"x": entry()}, 9),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused(case, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(DAMAGED[case])
    with pytest.raises(ValueError, match=r"a\.safetensors is not a safetensors file, or is dam"):
        SafetensorsFile(tmp_path / "a.safetensors")


def test_dtype_without_support_is_refused(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(header({"x": entry(shape=(1,), dtype="C64")}))
    with pytest.raises(ValueError, match="x has dtype C64, which is not supported; convert the"):
        SafetensorsFile(tmp_path / "a.safetensors")


def test_undamaged_file_of_the_same_form_is_read(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(header({"x": entry()}))
    assert torch.equal(SafetensorsFile(tmp_path / "a.safetensors").read("x"), torch.zeros(2))


INDICES = {
    "no JSON": ("{", ValueError, "is not an index of safetensors files"),
    "no map": ("{}", ValueError, "is not an index of safetensors files"),
    "outside": (
        '{"weight_map": {"x": "../a.safetensors"}}',
        ValueError,
        "is not a file of the index's own directory",
    ),
    "folder above": (
        '{"weight_map": {"x": ".."}}',
        ValueError,
        "names '..', which is not a file of the index's own directory",
    ),
    "number": (
        '{"weight_map": {"x": 5}}',
        ValueError,
        "names 5, which is not a file of the index's own directory",
    ),
    "missing file": (
        '{"weight_map": {"x": "b.safetensors"}}',
        FileNotFoundError,
        "names the file b.safetensors, which is missing",
    ),
    "missing tensor": (
        '{"weight_map": {"y": "a.safetensors"}}',
        ValueError,
        "says that y is in a.safetensors, but it is not",
    ),
}


@pytest.mark.parametrize("case", INDICES)
def test_wrong_index_is_refused(case, tmp_path):
    text, kind, message = INDICES[case]
    folder = tmp_path / "folder"
    folder.mkdir()
    for place in (tmp_path, folder):
        (place / "a.safetensors").write_bytes(header({"x": entry()}))
    (folder / INDEX).write_text(text)
    with pytest.raises(kind, match=message):
        open_safetensors(folder)
    (folder / INDEX).write_text('{"weight_map": {"x": "a.safetensors"}}')
    assert list(open_safetensors(folder)) == list(open_safetensors(folder / INDEX)) == ["x"]


def test_directory_with_a_single_file_is_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="give a safetensors file, or a directory with"):
        open_safetensors(tmp_path)
    write(tmp_path / "model.safetensors", {"x": torch.ones(2)})
    assert (
        list(open_safetensors(tmp_path))
        == list(open_safetensors(tmp_path / "model.safetensors"))
        == ["x"]
    )
