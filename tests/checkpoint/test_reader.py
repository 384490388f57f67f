"""Tensors read from a checkpoint equal those of torch.load, which is not called for each."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharded_bf16_adamw import AdamW_BF16, load, save
from sharded_bf16_adamw.checkpoint import dcp_storage, tensor_reader
from sharded_bf16_adamw.checkpoint.tensor_reader import TensorReader
from sharded_bf16_adamw.checkpoint.tensor_writer import TensorWriter, without_crc32
from tests.checkpoint.test_writer import COUNT, kinds

pytestmark = pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")


@pytest.fixture
def loads(monkeypatch) -> list[Any]:
    """Return the results of torch.load."""
    seen: list[Any] = []
    real = torch.load
    monkeypatch.setattr(
        torch, "load", lambda *args, **options: (seen.append(real(*args, **options)), seen[-1])[1]
    )
    return seen


def saved(tensor: Tensor) -> bytes:
    buffer = io.BytesIO()
    TensorWriter().write(tensor.detach(), buffer)
    return buffer.getvalue()


def read(reader: TensorReader, content: bytes) -> Tensor:
    return reader.read(io.BytesIO(content), len(content))


@pytest.mark.parametrize("name", kinds())
def test_tensors_are_those_that_were_saved(name):
    reader, make = TensorReader(), kinds()[name]
    with without_crc32():
        for i in range(COUNT + 1):
            expected, actual = make(i).detach(), read(reader, saved(make(i)))
            assert actual.dtype == expected.dtype and actual.size() == expected.size()
            assert torch.equal(actual, expected)


def test_torch_load_is_called_twice_for_each_kind(loads):
    reader = TensorReader()
    with without_crc32():
        for i in range(10):
            for size in ((3, 5), (5, 3), (15,)):
                for dtype in (torch.bfloat16, torch.float16):  # equal lengths in the file
                    expected = torch.arange(i, i + 15).to(dtype).view(size)
                    assert torch.equal(read(reader, saved(expected)), expected)
    assert len(loads) == 2 * 6


def test_every_byte_around_the_data_counts(monkeypatch):
    """A changed byte of the data is read as data; any other leaves the tensor to torch.load."""
    reader, data = TensorReader(), torch.arange(6.0)
    with without_crc32():
        content = saved(data)
        for _ in range(2):
            read(reader, content)
    at = content.index(data.numpy().tobytes())
    loaded = []
    monkeypatch.setattr(tensor_reader, "_load", lambda stream: loaded.append(1) or torch.ones(()))
    changed = []
    for i in range(len(content)):
        loaded.clear()
        read(reader, content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        if not loaded:
            changed.append(i)
    assert changed == list(range(at, at + data.nbytes))


def test_files_of_another_torch_are_read_by_torch_load_alone(loads):
    """Their bytes are not what this torch writes, so a template would never fit."""
    reader, built = TensorReader(), []
    real = tensor_reader.build_template
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_reader, "build_template", lambda x: (built.append(x), real(x))[1])
        for i in range(5):  # with torch's checksums
            assert torch.equal(read(reader, saved(torch.full((6,), i))), torch.full((6,), i))
    assert len(loads) == 5
    assert len(built) == 1, "it is not tried again for each tensor"


def test_large_tensors_are_not_copied_first(monkeypatch):
    streams = []
    monkeypatch.setattr(tensor_reader, "_load", lambda stream: streams.append(stream))
    stream = io.BytesIO(b"")
    TensorReader().read(stream, 2 * tensor_reader.MAX_BYTES + 1)
    assert streams == [stream]


def test_a_file_that_ends_early_is_an_error():
    with pytest.raises(EOFError, match="within a tensor of 9 bytes"):
        TensorReader().read(io.BytesIO(b"12345"), 9)


def test_a_load_of_many_small_tensors(tmp_path, loads):
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(40))).bfloat16()
    optimizer = AdamW_BF16(model.parameters(), lr=1e-3)
    for i, param in enumerate(model.parameters()):
        param.grad = torch.full_like(param, i + 1)
    optimizer.step()
    tensors = lambda: [  # noqa: E731
        x.clone() for p in model.parameters() for x in (p.detach(), *optimizer.state[p].values())
    ]
    expected = tensors()
    save(tmp_path, 1, model, optimizer)
    for tensor in (x for p in model.parameters() for x in (p.data, *optimizer.state[p].values())):
        tensor.zero_()
    loads.clear()
    load(tmp_path, model, optimizer)
    assert all(map(torch.equal, tensors(), expected))
    assert len(loads) < 10, "two for each of bf16 weights and states, steps, and the random state"


def test_a_tensor_of_another_shape_than_the_metadata_says_is_not_broadcast(tmp_path, monkeypatch):
    model = nn.Linear(4, 3, bias=False).bfloat16()
    optimizer = AdamW_BF16(model.parameters(), lr=1e-3)
    save(tmp_path, 1, model, optimizer)
    monkeypatch.setattr(
        dcp_storage.TensorReader, "read", lambda *args: torch.zeros(1, 4, dtype=torch.bfloat16)
    )
    monkeypatch.setattr(dcp_storage, "narrow_tensor_by_index", lambda tensor, *args: tensor)
    with pytest.raises(RuntimeError, match=r"size mismatch for .*: saved \(1, 4\), needed \("):
        load(tmp_path, model, optimizer)
