"""safetensors files: what we write the format's own package reads, and the other way round; damaged or hostile files are refused."""

from __future__ import annotations

import json

import pytest
import torch

from sharded_bf16_adamw.checkpoint.safetensors_io import (
    DTYPES,
    INDEX,
    SafetensorsFile,
    TensorInfo,
    find_safetensors,
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


def same(a, b):
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.reshape(-1).view(torch.uint8).equal(b.reshape(-1).view(torch.uint8))
    )


def test_what_is_written_is_read_by_us_and_by_the_formats_own_package(tmp_path):
    content = tensors()
    file = SafetensorsFile(write(tmp_path / "a.safetensors", content))
    assert (
        all(same(file.read(name), value) for name, value in content.items())
        and file.infos.keys() == content.keys()
    )
    assert int.from_bytes((tmp_path / "a.safetensors").read_bytes()[:8], "little") % 8 == 0, (
        "aligned for those that map the file"
    )
    package = pytest.importorskip("safetensors.torch")
    theirs = package.load_file(tmp_path / "a.safetensors")
    assert theirs.keys() == content.keys() and all(
        same(theirs[name], value) for name, value in content.items()
    )
    package.save_file(content, tmp_path / "b.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "b.safetensors")
    assert all(same(file.read(name), value) for name, value in content.items())


def test_blocks_are_those_of_the_whole(tmp_path):
    value = torch.arange(5 * 4 * 3, dtype=torch.float32).view(5, 4, 3)
    file = SafetensorsFile(write(tmp_path / "a.safetensors", {"first": torch.ones(7), "x": value}))
    for offsets, sizes in (
        ((0, 0, 0), (5, 4, 3)),
        ((2, 0, 0), (2, 4, 3)),
        ((4, 1, 2), (1, 2, 1)),
        ((1, 3, 0), (0, 1, 3)),
    ):
        expected = value[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
        assert torch.equal(file.read("x", offsets, sizes), expected)


def header(entry, size=8):
    text = json.dumps(entry).encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * size


def entry(begin=0, end=8, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


DAMAGED = {
    "empty": (b"", "its header does not fit into its 0 bytes"),
    "header longer than the file": (
        (1000).to_bytes(8, "little") + b"{}",
        "its header does not fit",
    ),
    "no JSON": ((4).to_bytes(8, "little") + b"\xff\xff{{", "its header is not understood"),
    "a list": (header([1]), "its header is not understood"),
    "no offsets": (header({"x": {"dtype": "F32", "shape": [2]}}), "its header is not understood"),
    "unknown dtype": (
        header({"x": entry(dtype="F4")}),
        "x has dtype F4, which torch does not have",
    ),
    "shape and bytes differ": (
        header({"x": entry(shape=(3,))}),
        r"the bytes \[0, 8\] of x do not fit its shape \[3\]",
    ),
    "negative": (header({"x": entry(shape=(-1, -2))}), "do not fit its shape"),
    "no number": (header({"x": entry(begin=0.0)}), "do not fit its shape"),
    "three offsets": (
        header({"x": {**entry(), "data_offsets": [0, 8, 8]}}),
        r"the bytes \[0, 8, 8\] of x do not fit",
    ),
    "deep": ((200_000).to_bytes(8, "little") + b"[" * 200_000, "its header is not understood"),
    "overlap": (header({"x": entry(), "y": entry(4, 12)}, 12), "its tensors overlap or leave gaps"),
    "gap": (header({"x": entry(), "y": entry(12, 20)}, 20), "its tensors overlap or leave gaps"),
    "cut short": (header({"x": entry()}, 7), "where its header tells of"),
    "too long": (header({"x": entry()}, 9), "where its header tells of"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused(case, tmp_path):
    content, message = DAMAGED[case]
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        SafetensorsFile(tmp_path / "a.safetensors")


def test_the_damaged_files_differ_from_a_good_one_in_that_alone(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(header({"x": entry()}))
    assert torch.equal(SafetensorsFile(tmp_path / "a.safetensors").read("x"), torch.zeros(2))


INDICES = {
    "no JSON": ("{", ValueError, "is not an index of safetensors files"),
    "no map": ("{}", ValueError, "is not an index of safetensors files"),
    "outside": (
        '{"weight_map": {"x": "../a.safetensors"}}',
        ValueError,
        "does not lie in its own folder",
    ),
    "folder above": (
        '{"weight_map": {"x": ".."}}',
        ValueError,
        "names the file '..', which does not lie in its own folder",
    ),
    "number": (
        '{"weight_map": {"x": 5}}',
        ValueError,
        "names the file 5, which does not lie in its own folder",
    ),
    "missing file": (
        '{"weight_map": {"x": "b.safetensors"}}',
        FileNotFoundError,
        "names the file b.safetensors, which is missing",
    ),
    "missing tensor": (
        '{"weight_map": {"y": "a.safetensors"}}',
        ValueError,
        "says that y is in a.safetensors, which does not have it",
    ),
}


@pytest.mark.parametrize("case", INDICES)
def test_wrong_indices_are_refused(case, tmp_path):
    text, kind, message = INDICES[case]
    folder = tmp_path / "folder"
    folder.mkdir()
    for place in (tmp_path, folder):
        (place / "a.safetensors").write_bytes(header({"x": entry()}))
    (folder / INDEX).write_text(text)
    with pytest.raises(kind, match=message):
        find_safetensors(folder)
    (folder / INDEX).write_text('{"weight_map": {"x": "a.safetensors"}}')
    assert list(find_safetensors(folder)) == list(find_safetensors(folder / INDEX)) == ["x"]


def test_folder_with_a_single_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="give a safetensors file, or a folder with"):
        find_safetensors(tmp_path)
    write(tmp_path / "model.safetensors", {"x": torch.ones(2)})
    assert (
        list(find_safetensors(tmp_path))
        == list(find_safetensors(tmp_path / "model.safetensors"))
        == ["x"]
    )
