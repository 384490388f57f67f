"""``manifest.json``: the content of a checkpoint, with a checksum of every file and of itself."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .file_checksums import FileRecord, crc32_text

MANIFEST = "manifest.json"
FORMAT = 2  # of the checkpoint; format 1 had no checksums and pickled the hyperparameters
_PLACEHOLDER = "0" * 8  # stands for the manifest's own checksum while that is computed
_TUPLE, _TENSOR = "__tuple__", "__tensor__"


class ParamGroup(NamedTuple):
    """A parameter group of the optimizer: FQNs of its parameters, and options such as ``lr``."""

    params: list[str]
    options: dict[str, Any]


@dataclass
class Manifest:
    """The content of ``manifest.json``.

    Attributes:
        step: training step.
        serial: number of the save under its root. It orders checkpoints by age even if a resumed
            run repeats steps.
        world_size: number of ranks that saved.
        strategy: description of the sharding, for people to read.
        versions: versions of torch and of this package.
        groups: the optimizer's parameter groups, with options encoded by :func:`encode`.
        values: all values of model and optimizer that are not tensors, by key, encoded by
            :func:`encode`.
        extra: the caller's data.
        files: records of all files but the manifest.
        ties: lists of names that share one tensor; the optimizer state is under the first name.
            None in checkpoints of older versions.
    """

    step: int
    serial: int
    world_size: int
    strategy: str
    versions: dict[str, str]
    groups: list[ParamGroup]
    values: dict[str, Any]
    extra: dict[str, Any]
    files: dict[str, FileRecord] = field(default_factory=dict)
    ties: list[list[str]] | None = None

    def to_bytes(self) -> bytes:
        """Return the file's content."""
        body = {
            "format": FORMAT,
            **self.__dict__,
            "groups": [group._asdict() for group in self.groups],
            "files": {name: record._asdict() for name, record in sorted(self.files.items())},
        }
        content = json.dumps({**body, "checksum": _PLACEHOLDER}, indent=1).encode() + b"\n"
        return _with_checksum(content, _PLACEHOLDER, crc32_text(zlib.crc32(content)))

    @staticmethod
    def from_bytes(content: bytes) -> Manifest:
        """Inverse of :meth:`to_bytes`.

        Raises:
            ValueError: the content is damaged or has another format. The message does not name
                the file.
        """
        try:
            body = json.loads(content)
            checksum = body.pop("checksum")
            version = body.pop("format")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise ValueError("it is damaged: it is not a JSON manifest") from None
        if not isinstance(checksum, str) or len(checksum) != len(_PLACEHOLDER):
            raise ValueError("it is damaged: its checksum is unreadable")
        if crc32_text(zlib.crc32(_with_checksum(content, checksum, _PLACEHOLDER))) != checksum:
            raise ValueError("it is damaged: its checksum does not match its content")
        if version != FORMAT:
            raise ValueError(f"it is of format {version} but this version reads format {FORMAT}")
        try:
            files = {name: FileRecord(**record) for name, record in body.pop("files").items()}
            groups = [ParamGroup(**group) for group in body.pop("groups")]
            manifest = Manifest(**body, groups=groups, files=files)
            is_well_formed = manifest._is_well_formed()
        except (KeyError, AttributeError, TypeError):
            is_well_formed = False
        if not is_well_formed:
            raise ValueError(
                "its checksum matches, but its structure is unknown to this version; it may be "
                "from a newer one"
            )
        invalid = [name for name in files if not is_file_name(name)]
        if invalid:
            raise ValueError(
                f"it names {invalid[0]!r}, which is not a file in the checkpoint's folder"
            )
        return manifest

    def _is_well_formed(self) -> bool:
        numbers = [
            self.step,
            self.serial,
            self.world_size,
            *(record.bytes for record in self.files.values()),
        ]
        lists = [self.ties or [], *(self.ties or [])]
        texts = [
            *chain(*(self.ties or [])),
            self.strategy,
            *(record.crc32 for record in self.files.values()),
            *chain(*(group.params for group in self.groups)),
        ]
        mappings = [
            self.versions,
            self.values,
            self.extra,
            *(group.options for group in self.groups),
        ]
        typed = ((int, numbers), (list, lists), (str, texts), (dict, mappings))
        return all(isinstance(part, kind) for kind, parts in typed for part in parts)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a checkpoint whose other files are on the disk, and flush it."""
    write_durably(folder / MANIFEST, manifest.to_bytes())


def read_manifest(path: Path) -> Manifest:
    """Return the manifest of the checkpoint at ``path``.

    Raises:
        FileNotFoundError: there is no manifest.
        ValueError: the manifest cannot be read or is damaged.
    """
    try:
        return Manifest.from_bytes((path / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the checkpoint {path} cannot be used: {MANIFEST}: {error}; load another checkpoint"
        ) from error


def is_file_name(name: object) -> bool:
    """Return True if ``name``, from an untrusted file, names a file and has no folder part."""
    return (
        isinstance(name, str)
        and Path(name).name == name
        and name not in ("", "..")
        and "\0" not in name
    )


def _with_checksum(content: bytes, old: str, new: str) -> bytes:
    """Replace the value of the last key, ``checksum``."""
    before, key, after = content.rpartition(b'"checksum": "')
    return before + key + after.replace(old.encode(), new.encode(), 1)


# -------------------------------------------------------------------------------- values in JSON


def encode(value: Any) -> Any:
    """Convert plain data to values that JSON can hold, without loss.

    Tuples become ``{"__tuple__": [0.9, 0.95]}``; tensors of a few elements, such as a learning
    rate, ``{"__tensor__": 0.1, "dtype": "float32"}``.

    Args:
        value: None, bool, int, float, str, a small tensor, or lists, tuples and dicts (with str
            keys) of them.

    Raises:
        TypeError: ``value`` contains anything else.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, tuple):
        return {_TUPLE: [encode(item) for item in value]}
    if isinstance(value, Tensor):
        return {_TENSOR: value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: encode(item) for key, item in value.items()}
    raise TypeError(f"{type(value).__name__} is not plain data")


def decode(value: Any) -> Any:
    """Inverse of :func:`encode`.

    Raises:
        ValueError: ``value`` is not a result of :func:`encode`.
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if isinstance(value, dict):
        if _TUPLE in value:
            return tuple(decode(item) for item in value[_TUPLE])
        if _TENSOR in value:
            dtype = getattr(torch, str(value.get("dtype")), None)
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{value.get('dtype')} is not a dtype of torch")
            return torch.tensor(value[_TENSOR], dtype=dtype, device="cpu")
        return {key: decode(item) for key, item in value.items()}
    return value


def as_tensor(value: Any) -> Tensor:
    """Return a tensor unchanged, and any other value as a tensor on the CPU.

    ``torch.as_tensor`` without ``device`` would move a tensor to the default device.
    """
    return value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")


def write_durably(path: Path, content: bytes) -> None:
    """Write a new file and flush it to the disk."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
