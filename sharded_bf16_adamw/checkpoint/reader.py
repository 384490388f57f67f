"""A checkpoint on disk as what it is: named tensors in parts. Needs no process group, no GPU and no model."""

from __future__ import annotations

import io
import os
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from .blocks import Block
from .dcp_storage import METADATA, read_metadata
from .directory import find_checkpoint, no_checkpoint
from .manifest import MANIFEST, decode, find_damage, read_manifest
from .safetensors_io import TensorInfo


class StoredCheckpoint:
    """A checkpoint that :func:`sharded_bf16_adamw.save` wrote, opened for reading by name.

    No pickle is executed: the metadata goes through an unpickler that knows only what describes tensors, the tensors through
    ``torch.load(weights_only=True)``.

    Attributes:
        path: its folder.
        manifest: what its manifest says.
        infos: shape and dtype of each tensor by its key, such as ``model.layer.weight``.
        blocks: in which parts each lies on disk, which is how it was sharded.

    Raises:
        FileNotFoundError: there is no checkpoint at ``path``.
        ValueError: manifest or metadata are damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        found = find_checkpoint(path)
        if found is None:
            raise no_checkpoint(path)
        self.path = found
        self.manifest = read_manifest(self.path)
        if METADATA not in self.manifest.files:
            raise self._unusable(f"{MANIFEST} does not list {METADATA}")
        metadata = read_metadata(self.path, self.manifest.files[METADATA])
        self.infos: dict[str, TensorInfo] = {}
        self.blocks: dict[str, list[Block]] = {}
        for key, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                self.infos[key] = TensorInfo(tuple(entry.size), entry.properties.dtype)
                self.blocks[key] = [
                    Block(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks
                ]
        self._storage = metadata.storage_data

    def check(self) -> None:
        """Raise ValueError, naming the file, where any file of the checkpoint is not what was written."""
        problems = find_damage(self.path, self.manifest.files)
        if problems:
            raise self._unusable("; ".join(problems))

    def read(self, key: str) -> Tensor:
        """The whole tensor in CPU memory; with the part being read in addition where it was sharded.

        Raises:
            ValueError: a part cannot be read.
        """
        info, blocks = self.infos[key], self.blocks[key]
        if len(blocks) == 1 and blocks[0].sizes == info.shape:
            return self._read_block(key, blocks[0])
        whole = torch.empty(info.shape, dtype=info.dtype, device="cpu")
        for block in blocks:
            block.of(whole).copy_(self._read_block(key, block))
        return whole

    def group_values(self) -> dict[str, dict[str, Any]]:
        """The hyper-parameters by parameter name, such as ``{"layer.weight": {"lr": 0.001, "betas": (0.9, 0.999), ...}}``."""
        options = [
            {name: decode(value) for name, value in group.options.items()}
            for group in self.manifest.groups
        ]
        return {
            fqn: own
            for group, own in zip(self.manifest.groups, options, strict=True)
            for fqn in group.params
        }

    def _read_block(self, key: str, block: Block) -> Tensor:
        place = self._storage.get(MetadataIndex(key, torch.Size(block.offsets)))
        if place is None or place.relative_path not in self.manifest.files:
            raise self._unusable(f"{METADATA} does not say where {key} lies")
        try:
            with (self.path / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                content = io.BytesIO(file.read(place.length))
            tensor = torch.load(content, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can raise anything
            raise self._unusable(
                f"{key} in {place.relative_path} cannot be read ({type(error).__name__})"
            ) from error
        info = self.infos[key]
        if not isinstance(tensor, Tensor) or (tuple(tensor.shape), tensor.dtype) != (
            block.sizes,
            info.dtype,
        ):
            raise self._unusable(f"{key} in {place.relative_path} is not what {METADATA} says")
        return tensor

    def _unusable(self, reason: str) -> ValueError:
        return ValueError(
            f"the checkpoint {self.path} cannot be used: {reason}; choose another checkpoint"
        )
