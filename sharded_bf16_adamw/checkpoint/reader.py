"""Read a checkpoint's tensors by name. Needs no process group, no GPU and no model."""

from __future__ import annotations

import io
import os
import re
from typing import Any

import torch
from torch import Tensor

from .blocks import Block
from .chunk_table import ChunkTable
from .dcp_storage import METADATA, read_chunks
from .directory import existing_checkpoint
from .file_checksums import find_damage, share_of
from .manifest import decode, read_manifest
from .safetensors_io import TensorInfo


def _natural_order(item: tuple[str, Any]) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", item[0])]


class CheckpointReader:
    """An open checkpoint that :func:`sharded_bf16_adamw.save` wrote.

    Reading executes no code from the checkpoint: the unpickler of the metadata knows only the
    classes of tensor metadata, and tensors are read by ``torch.load(weights_only=True)``.

    Attributes:
        path: the checkpoint's directory.
        manifest: its manifest.
        infos: shape and dtype of each tensor by key, such as ``model.layer.weight``. Keys are
            sorted, with ``layers.2`` before ``layers.10``.
        blocks: the parts of each tensor on disk, which show how it was sharded.

    Raises:
        FileNotFoundError: there is no checkpoint at ``path``.
        ValueError: the manifest or the metadata is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = existing_checkpoint(path)
        self.manifest = read_manifest(self.path)
        table = ChunkTable.from_bytes(read_chunks(self.path, self.manifest.files))
        self.infos: dict[str, TensorInfo] = {}
        self.blocks: dict[str, list[Block]] = {}
        self._locations: dict[str, list[tuple[str, int, int]]] = {}
        for key, tensor in sorted(table.tensors.items(), key=_natural_order):
            self.infos[key] = TensorInfo(tuple(tensor.size), tensor.properties.dtype)
            self.blocks[key] = tensor.blocks()
            self._locations[key] = [
                (table.files[number], offset, length)
                for number, offset, length in tensor.places.T.tolist()
            ]

    def verify(self, rank: int = 0, world_size: int = 1) -> None:
        """Compare every file with its checksum, or one rank's share of the files.

        Raises:
            ValueError: a file is damaged or missing; the message names it.
        """
        damage = find_damage(self.path, share_of(self.manifest.files, rank, world_size))
        if damage:
            raise self._error("; ".join(damage))

    def read(self, key: str) -> Tensor:
        """Return a full tensor in CPU memory. If it was sharded, needs memory for one more block.

        Raises:
            ValueError: a block cannot be read.
        """
        info, blocks = self.infos[key], self.blocks[key]
        if len(blocks) == 1 and blocks[0].sizes == info.shape:
            return self._read_block(key, 0)
        full_tensor = torch.empty(info.shape, dtype=info.dtype, device="cpu")
        for index, block in enumerate(blocks):
            block.view_in(full_tensor).copy_(self._read_block(key, index))
        return full_tensor

    def hyperparams(self) -> dict[str, dict[str, Any]]:
        """Return the group options by parameter: ``{"layer.weight": {"lr": 0.001, ...}, ...}``."""
        options_by_param = {}
        for group in self.manifest.groups:
            options = {name: decode(value) for name, value in group.options.items()}
            options_by_param.update(dict.fromkeys(group.params, options))
        return options_by_param

    def _read_block(self, key: str, index: int) -> Tensor:
        file_name, offset, length = self._locations[key][index]
        try:
            with (self.path / file_name).open("rb") as file:
                file.seek(offset)
                content = io.BytesIO(file.read(length))
            tensor = torch.load(content, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can raise anything
            raise self._error(
                f"{key} in {file_name} cannot be read ({type(error).__name__})"
            ) from error
        expected = TensorInfo(self.blocks[key][index].sizes, self.infos[key].dtype)
        if not isinstance(tensor, Tensor) or (tuple(tensor.shape), tensor.dtype) != expected:
            raise self._error(
                f"{key} in {file_name} has another shape or dtype than {METADATA} says"
            )
        return tensor

    def _error(self, reason: str) -> ValueError:
        return ValueError(
            f"the checkpoint {self.path} cannot be used: {reason}; choose another checkpoint"
        )
