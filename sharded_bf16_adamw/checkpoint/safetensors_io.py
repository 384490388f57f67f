"""Read and write safetensors files: weights and nothing that could run.

A file is an 8-byte little-endian length, a JSON header of that length and the tensors' raw bytes, one behind the other::

    {"__metadata__": {"format": "pt"}, "layer.weight": {"dtype": "BF16", "shape": [4, 8], "data_offsets": [0, 64]}, ...}

Format: https://huggingface.co/docs/safetensors. A large model is a folder of such files with ``model.safetensors.index.json``, the layout
of Hugging Face models::

    {"metadata": {"total_size": 123}, "weight_map": {"layer.weight": "model-00001-of-00002.safetensors", ...}}
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .manifest import is_file_name

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100_000_000  # bytes: the limit of the reference implementation, so that a damaged length cannot exhaust memory


class TensorInfo(NamedTuple):
    """A tensor's shape and dtype, known without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """One safetensors file, opened: its header is read and checked, its tensors are read when asked for.

    Raises:
        ValueError: it is not a safetensors file, or is damaged: cut short, overlapping tensors, gaps, sizes that do not fit shapes.
        OSError: it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise ValueError(
                    f"{self.path} is not a safetensors file, or is damaged: its header does not fit into its {size} bytes"
                )
            header = file.read(length)
        self.infos: dict[str, TensorInfo] = {}
        self._offsets: dict[str, int] = {}
        try:
            self._read_header(json.loads(header), 8 + length, size)
        except (
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
            UnicodeDecodeError,
            json.JSONDecodeError,
        ) as error:
            raise ValueError(
                f"{self.path} is not a safetensors file, or is damaged: its header is not understood ({error!r})"
            ) from error

    def _read_header(self, header: dict[str, Any], start: int, size: int) -> None:
        ranges = []
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in DTYPES:
                raise ValueError(
                    f"{self.path}: {name} has dtype {entry['dtype']}, which torch does not have; convert the file first"
                )
            info = TensorInfo(tuple(entry["shape"]), DTYPES[entry["dtype"]])
            offsets = entry["data_offsets"]
            numbers = (
                all(type(x) is int and x >= 0 for x in (*offsets, *info.shape))
                and len(offsets) == 2
            )
            if not numbers or offsets[1] - offsets[0] != info.nbytes:
                raise ValueError(
                    f"{self.path} is damaged: the bytes {offsets} of {name} do not fit its shape {list(info.shape)}"
                )
            begin, end = offsets
            self.infos[name], self._offsets[name] = info, start + begin
            ranges.append((begin, end))
        expected = 0
        for begin, end in sorted(ranges):
            if begin != expected:
                raise ValueError(f"{self.path} is damaged: its tensors overlap or leave gaps")
            expected = end
        if start + expected != size:
            raise ValueError(
                f"{self.path} is damaged: it has {size} bytes where its header tells of {start + expected}"
            )

    def read(
        self, name: str, offsets: Sequence[int] | None = None, sizes: Sequence[int] | None = None
    ) -> Tensor:
        """Read a tensor, or the block of it at ``offsets`` with shape ``sizes``. Only the rows of the block are read from disk."""
        shape, dtype = self.infos[name]
        offsets, sizes = (
            offsets if offsets is not None else (0,) * len(shape),
            sizes if sizes is not None else shape,
        )
        row = math.prod(shape[1:]) * dtype.itemsize
        first, rows = (offsets[0], sizes[0]) if shape else (0, 1)
        raw = torch.empty(rows * row, dtype=torch.uint8, device="cpu")
        with self.path.open("rb") as file:
            file.seek(self._offsets[name] + first * row)
            if file.readinto(raw.numpy().data) != raw.numel():
                raise ValueError(f"{self.path} is damaged: it ends within {name}")
        tensor = raw.view(dtype).view((rows, *shape[1:]) if shape else ())
        for dim in range(1, len(shape)):
            tensor = tensor.narrow(dim, offsets[dim], sizes[dim])
        return tensor


def find_safetensors(path: str | os.PathLike[str]) -> dict[str, SafetensorsFile]:
    """The tensors of a file, or of a folder in the Hugging Face layout, by name.

    Raises:
        FileNotFoundError: there are none at ``path``.
        ValueError: a file is damaged, or the index and the files contradict each other.
    """
    path = Path(path)
    if path.is_dir() and (path / INDEX).exists():
        return _read_index(path / INDEX)
    if path.is_dir():
        path = path / SINGLE
    if path.name == INDEX:
        return _read_index(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}; give a safetensors file, or a folder with {INDEX} or {SINGLE}"
        )
    file = SafetensorsFile(path)
    return dict.fromkeys(file.infos, file)


def _read_index(path: Path) -> dict[str, SafetensorsFile]:
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        names = sorted(set(weight_map.values()))
    except (
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        UnicodeDecodeError,
        json.JSONDecodeError,
    ) as error:
        raise ValueError(
            f"{path} is not an index of safetensors files, or is damaged ({error!r})"
        ) from error
    for name in names:
        if not is_file_name(name):
            raise ValueError(
                f"{path} names the file {name!r}, which does not lie in its own folder"
            )
        if not (path.parent / name).is_file():
            raise FileNotFoundError(f"{path} names the file {name}, which is missing")
    files = {name: SafetensorsFile(path.parent / name) for name in names}
    for tensor, name in weight_map.items():
        if tensor not in files[name].infos:
            raise ValueError(f"{path} says that {tensor} is in {name}, which does not have it")
    return {tensor: files[name] for tensor, name in weight_map.items()}


def write_file(
    path: Path, infos: Mapping[str, TensorInfo], tensor_of: Callable[[str], Tensor]
) -> None:
    """Write one file, asking for one tensor at a time, and flush it to the disk.

    Args:
        infos: what the file will hold, in this order.
        tensor_of: gives the tensor of a name, on CPU, as ``infos`` says it is.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, info in infos.items():
        header[name] = {
            "dtype": NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [end, end + info.nbytes],
        }
        end += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, info in infos.items():
            tensor = tensor_of(name)
            assert (tuple(tensor.shape), tensor.dtype) == info, name
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            del tensor
        file.flush()
        os.fsync(file.fileno())


def write_folder(
    folder: Path,
    infos: Mapping[str, TensorInfo],
    tensor_of: Callable[[str], Tensor],
    max_shard_bytes: int,
) -> None:
    """Write files of at most ``max_shard_bytes`` of tensors (a larger tensor has a file to itself) and their index into ``folder``."""
    shards = _split(infos, max_shard_bytes)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / name, shard, tensor_of)
        weight_map.update(dict.fromkeys(shard, name))
    total = sum(info.nbytes for info in infos.values())
    with (folder / INDEX).open("w") as file:
        json.dump({"metadata": {"total_size": total}, "weight_map": weight_map}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def _split(infos: Mapping[str, TensorInfo], max_shard_bytes: int) -> list[dict[str, TensorInfo]]:
    shards: list[dict[str, TensorInfo]] = [{}]
    for name, info in infos.items():
        if shards[-1] and _total(shards[-1].values()) + info.nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = info
    return shards


def _total(infos: Iterable[TensorInfo]) -> int:
    return sum(info.nbytes for info in infos)
