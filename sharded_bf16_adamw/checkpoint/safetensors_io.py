"""Read and write safetensors files, alone or sharded with an index as Hugging Face models are.

The ``safetensors`` library reads the files. Its ``save_file`` needs all tensors of a file at once,
but an export holds one tensor at a time. So :func:`write_file` writes the format itself: the
header's length in 8 little-endian bytes, a JSON header, and the raw bytes of the tensors::

    {"__metadata__": {"format": "pt"},
     "w": {"dtype": "BF16", "shape": [4, 8], "data_offsets": [0, 64]}}

A sharded model is a directory of such files with ``model.safetensors.index.json``::

    {"metadata": {"total_size": 64}, "weight_map": {"w": "model-00001-of-00002.safetensors", ...}}

Format: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .blocks import Block
from .manifest import is_file_name, write_durably

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
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class TensorInfo(NamedTuple):
    """Shape and dtype of a tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """An open safetensors file, whose header and size the library has checked.

    The file is memory-mapped, so it must not be truncated while it is open.

    Attributes:
        infos: shape and dtype of each tensor by name, in the order of the file.

    Raises:
        ValueError: the file is not a safetensors file, is damaged, or has a dtype not in
            ``DTYPES``.
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = safe_open(path, "pt")
        except SafetensorError as error:
            raise ValueError(
                f"{path} is not a safetensors file, or is damaged ({error}); get another copy"
            ) from error
        self.infos: dict[str, TensorInfo] = {}
        for name in self._file.offset_keys():
            header = self._file.get_slice(name)
            if header.get_dtype() not in DTYPES:
                raise ValueError(
                    f"{path}: {name} has dtype {header.get_dtype()}, which is not supported; "
                    "convert the file"
                )
            self.infos[name] = TensorInfo(tuple(header.get_shape()), DTYPES[header.get_dtype()])

    def read(self, name: str, block: Block | None = None) -> Tensor:
        """Return a tensor or one block of it, memory-mapped: only the parts in use are read."""
        with torch.device("cpu"):  # the caller's default device would apply otherwise
            tensor: Tensor = self._file.get_tensor(name)
        return tensor if block is None else block.view_in(tensor)


def open_safetensors(path: str | os.PathLike[str]) -> dict[str, SafetensorsFile]:
    """Open a file, an index, or a directory with one of them; map each tensor's name to its file.

    Raises:
        FileNotFoundError: there is no such file, or a file that the index names is missing.
        ValueError: a file is damaged, or the index contradicts the files.
    """
    path = Path(path)
    if path.is_dir():
        path = path / (INDEX if (path / INDEX).exists() else SINGLE)
    if path.name == INDEX:
        return _open_index(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}; give a safetensors file, or a directory with {INDEX} or {SINGLE}"
        )
    file = SafetensorsFile(path)
    return dict.fromkeys(file.infos, file)


def _open_index(path: Path) -> dict[str, SafetensorsFile]:
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        file_names = sorted(set(weight_map.values()))
    except (KeyError, TypeError, AttributeError, RecursionError, ValueError) as error:
        raise ValueError(
            f"{path} is not an index of safetensors files, or is damaged ({error!r}); get another "
            "copy"
        ) from error
    for file_name in file_names:
        if not is_file_name(file_name):
            raise ValueError(
                f"{path} names {file_name!r}, which is not a file of the index's own directory"
            )
        if not (path.parent / file_name).is_file():
            raise FileNotFoundError(f"{path} names the file {file_name}, which is missing")
    files = {file_name: SafetensorsFile(path.parent / file_name) for file_name in file_names}
    for name, file_name in weight_map.items():
        if name not in files[file_name].infos:
            raise ValueError(f"{path} says that {name} is in {file_name}, but it is not")
    return {name: files[file_name] for name, file_name in weight_map.items()}


def write_file(
    path: Path, infos: Mapping[str, TensorInfo], get_tensor: Callable[[str], Tensor]
) -> None:
    """Write one file, holding one tensor at a time, and flush it to the disk.

    Args:
        path: the file.
        infos: shape and dtype of each tensor, in the order of the file.
        get_tensor: returns the named tensor, in CPU memory, with the shape and dtype in ``infos``.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, info in infos.items():
        header[name] = {
            "dtype": DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [end, end + info.nbytes],
        }
        end += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors for readers that map the file
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, info in infos.items():
            tensor = get_tensor(name)
            assert (tuple(tensor.shape), tensor.dtype) == info, name
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            del tensor  # before the next one is made
        file.flush()
        os.fsync(file.fileno())


def write_sharded(
    directory: Path,
    infos: Mapping[str, TensorInfo],
    get_tensor: Callable[[str], Tensor],
    max_shard_bytes: int,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Write files of at most ``max_shard_bytes`` of tensors and their index into ``directory``.

    A larger tensor has a file to itself. If several ranks write, each writes a share of the files,
    and a file has at most ``1 / world_size`` of all bytes. Rank 0 writes the index.
    """
    share = -(-_total_bytes(infos.values()) // world_size)
    shards = _split_into_shards(infos, min(max_shard_bytes, share))
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        if number % world_size == rank:
            write_file(directory / file_name, shard, get_tensor)
        weight_map.update(dict.fromkeys(shard, file_name))
    if rank != 0:
        return
    index = {"metadata": {"total_size": _total_bytes(infos.values())}, "weight_map": weight_map}
    write_durably(directory / INDEX, json.dumps(index, indent=2).encode())


def _split_into_shards(
    infos: Mapping[str, TensorInfo], max_shard_bytes: int
) -> list[dict[str, TensorInfo]]:
    shards: list[dict[str, TensorInfo]] = [{}]
    for name, info in infos.items():
        if shards[-1] and _total_bytes(shards[-1].values()) + info.nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = info
    return shards


def _total_bytes(infos: Iterable[TensorInfo]) -> int:
    return sum(info.nbytes for info in infos)
