"""Files of a save have the bytes of DCP and torch.save, which is not called for each tensor."""

from __future__ import annotations

import errno
import io
from typing import Any

import pytest
import torch
from distributed import run_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultSavePlanner, filesystem
from torch.utils.serialization import config

from sharded_bf16_adamw import save
from sharded_bf16_adamw.checkpoint import dcp_storage, file_checksums, tensor_writer
from sharded_bf16_adamw.checkpoint.dcp_storage import ChecksummedWriter
from sharded_bf16_adamw.checkpoint.file_checksums import find_damage

from .layouts import BY_NAME, LAYOUTS, train

COUNT = 4  # tensors of each kind: the first, the one that builds the template, and two by template


def kinds() -> dict[str, Any]:
    """Return functions that make a tensor of a kind from a number."""
    quantize = getattr(torch, "quantize_per_tensor", None)  # deprecated
    quantized = {"quantized": lambda i: quantize(torch.ones(4), 0.5 + i, 0, torch.qint8)}
    return (quantized if quantize else {}) | {
        "bf16": lambda i: torch.full((3, 5), float(i)).bfloat16(),
        "fp32": lambda i: torch.full((3, 5), float(i)),
        "other shape": lambda i: torch.full((5, 3), float(i)),
        "bool": lambda i: torch.tensor([i % 2 == 0, True]),
        "float8": lambda i: torch.full((7,), float(i)).to(torch.float8_e4m3fn),
        "complex": lambda i: torch.full((2,), complex(i, 1)),
        "conjugate": lambda i: torch.full((2,), complex(i, 1)).conj(),
        "scalar": lambda i: torch.tensor(float(i)),
        "empty": lambda i: torch.empty(0, 4),
        "equal": lambda i: torch.zeros(6),
        "transposed": lambda i: torch.full((3, 5), float(i)).t(),
        "part of a storage": lambda i: torch.full((9,), float(i))[i % 5 : i % 5 + 4],
        "column": lambda i: torch.full((9, 2), float(i))[:, 1],
        "row": lambda i: torch.full((1, 4), float(i)),
        "strides of size 1": lambda i: torch.full((4,), float(i)).as_strided((1, 4), (99, 1)),
        "same in a larger storage": lambda i: torch.full((8,), float(i)).as_strided(
            (1, 4), (99, 1)
        ),
        "requires grad": lambda i: torch.full((4,), float(i), requires_grad=True),
        "parameter": lambda i: nn.Parameter(torch.full((4,), float(i))),
        "largest small one": lambda i: torch.full((1 << 18,), float(i)),
        "large": lambda i: torch.full(((1 << 18) + 1,), float(i)),
    }


pytestmark = pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")


def write(path: Any, tensors: dict[str, Tensor]) -> tuple[ChecksummedWriter, list[Any]]:
    planner = DefaultSavePlanner()
    planner.set_up_planner(tensors, is_coordinator=True)
    writer = ChecksummedWriter(path)
    writer.set_up_storage_writer(True, rank=0, use_collectives=True)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    plan = writer.prepare_global_plan([plan])[0]
    return writer, writer.write_data(plan, planner).wait()


@pytest.fixture
def calls(monkeypatch) -> list[Tensor]:
    """Return the tensors that torch.save gets."""
    seen: list[Tensor] = []
    real = torch.save
    monkeypatch.setattr(torch, "save", lambda x, *rest: (seen.append(x), real(x, *rest))[1])
    return seen


def mixed() -> dict[str, Tensor]:
    return {f"{name} {i}": make(i) for i in range(COUNT) for name, make in kinds().items()}


def test_files_are_those_of_torch_save(tmp_path, monkeypatch):
    tensors = mixed()
    writer, results = write(tmp_path / "ours", tensors)
    monkeypatch.delattr(ChecksummedWriter, "_write_data")
    reference, expected = write(tmp_path / "dcp", tensors)
    assert (tmp_path / "ours/__0_0.distcp").read_bytes() == (
        tmp_path / "dcp/__0_0.distcp"
    ).read_bytes()
    assert results == expected and len(results) == len(tensors)
    assert writer.files == reference.files
    assert find_damage(tmp_path / "ours", writer.files) == []


def test_tensors_that_were_not_detached_are_written_as_torch_save_writes_them():
    """A template of one tensor must not serve for another that has more than data."""
    writer, ours, expected = tensor_writer.TensorWriter(), io.BytesIO(), io.BytesIO()
    with config.patch("save.compute_crc32", False):
        for i in range(COUNT):
            tensors = [make(i) for name, make in kinds().items() if "part" not in name]
            tensors = [tensor for tensor in tensors if tensor_writer._is_storage_minimal(tensor)]
            if i >= 2:  # a plain tensor of this kind has its template by now
                noted = torch.full((3, 5), float(i))
                noted.note = f"an attribute {i}"
                with_grad = torch.full((3, 5), float(i), requires_grad=True)
                negative = torch._neg_view(torch.full((3, 5), float(i)))
                frozen = nn.Parameter(torch.full((3, 5), float(i)), requires_grad=False)
                tensors += [noted, with_grad, negative, frozen]
            for tensor in tensors:
                writer.write(tensor, ours)
                torch.save(tensor_writer._with_minimal_storage(tensor), expected)
    assert ours.getvalue() == expected.getvalue()


SAVED_ONE_BY_ONE = {"conjugate", "transposed", "column", "quantized", "large"}


@pytest.mark.parametrize("name", kinds())
def test_torch_save_is_called_for_odd_tensors_only(tmp_path, calls, name):
    make = kinds()[name]
    write(tmp_path, {str(i): make(i) for i in range(30)} if name != "large" else mixed())
    if name in SAVED_ONE_BY_ONE - {"large"}:
        assert len(calls) == 30
    elif name != "large":
        assert len(calls) == 3  # the first, and two to build the template
    else:
        assert sum(each.nbytes > 1 << 20 for each in calls) == COUNT


def test_without_a_template_torch_save_writes_every_tensor(tmp_path, calls):
    """The output has a checksum of the data if torch is told to compute it."""
    tensors = [torch.full((3,), float(i)) for i in range(5)]
    writer = tensor_writer.TensorWriter()
    with config.patch("save.compute_crc32", True), (tmp_path / "ours").open("wb") as file:
        for tensor in tensors:
            writer.write(tensor, file)
        assert len(calls) == len(tensors) + 2
        with (tmp_path / "expected").open("wb") as expected:
            for tensor in tensors:
                torch.save(tensor, expected)
        assert tensor_writer.build_template(tensors[0]) is None
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "expected").read_bytes()


def test_output_that_depends_on_the_tensor_elsewhere_has_no_template(monkeypatch):
    real = torch.save

    def with_minimum(tensor, stream):
        real(tensor, stream)
        stream.write(bytes([int(tensor.min()) % 256]))

    with config.patch("save.compute_crc32", False):
        assert tensor_writer.build_template(torch.full((3,), 7)) is not None
        monkeypatch.setattr(torch, "save", with_minimum)
        assert tensor_writer.build_template(torch.full((3,), 7)) is None


def test_output_with_data_in_two_places_has_no_template(monkeypatch):
    def in_two_places(tensor, stream):
        data = tensor.numpy().tobytes()
        stream.write(b"head" + data[:2] + b"between" + data[2:])

    monkeypatch.setattr(torch, "save", in_two_places)
    assert tensor_writer.build_template(torch.full((3,), 7)) is None


@pytest.mark.parametrize("room", [0, 5_000, 20_000, 39_000])
def test_full_disk_is_the_error(tmp_path, monkeypatch, room):
    """It is full in torch.save, while a template is built, or in a write by template."""
    real = file_checksums._ChecksummedStream._write

    def write_if_room(self, data):
        if self.count + data.nbytes > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, data)

    monkeypatch.setattr(file_checksums._ChecksummedStream, "_write", write_if_room)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write(tmp_path, {str(i): torch.ones(3) for i in range(40)})
    assert caught.value.errno == errno.ENOSPC


def test_copies_from_a_gpu_are_written_in_the_order_of_dcp(monkeypatch):
    """DCP's loader sorts by size; each copy stays with its item."""
    tensors = {"large": torch.full((5,), 5.0), "small": torch.ones(1), "middle": torch.ones(3)}
    planner = DefaultSavePlanner()
    planner.set_up_planner(tensors, is_coordinator=True)
    items = planner.create_local_plan().items

    class Loader:
        def __init__(self, resolve, inflight_threshhold):
            assert inflight_threshhold == 7
            self.resolve, self.items = resolve, []

        def add(self, size, item):
            self.items.append((size, item))

        def values(self):
            for _, item in sorted(self.items, key=lambda pair: pair[0]):
                yield self.resolve(item), item

    monkeypatch.setattr(filesystem, "_OverlappingCpuLoader", Loader)
    found = [
        (item.index.fqn, len(tensor)) for tensor, item in dcp_storage._on_cpu(planner, items, 7)
    ]
    assert found == [("small", 1), ("middle", 3), ("large", 5)]
    monkeypatch.delattr(filesystem, "_OverlappingCpuLoader")
    found = [item.index.fqn for _, item in dcp_storage._on_cpu(planner, items, 7)]
    assert found == list(tensors)


def save_twice_worker(rank: int, world: int, name: str, root: str) -> None:
    module, optimizer = BY_NAME[name].build(world, seed=1)
    train(module, optimizer, 2)
    save(f"{root}/ours", 1, module, optimizer)
    ours = ChecksummedWriter._write_data
    del ChecksummedWriter._write_data
    try:
        save(f"{root}/dcp", 1, module, optimizer)
    finally:
        ChecksummedWriter._write_data = ours


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_saves_of_every_layout_have_the_files_of_torch_save(tmp_path, layout):
    run_ranks(min(2, max(layout.worlds)), save_twice_worker, layout.name, str(tmp_path))
    ours, dcp = (tmp_path / f"{name}/step-00000001" for name in ("ours", "dcp"))
    files = {path.name: path.read_bytes() for path in ours.glob("*.distcp")}
    assert files == {path.name: path.read_bytes() for path in dcp.glob("*.distcp")} and files
