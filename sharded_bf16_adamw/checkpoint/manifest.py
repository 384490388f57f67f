"""``manifest.json``: what a complete checkpoint holds, with the size and checksum of every file and of itself.

Checksums are CRC-32 (``zlib.crc32``): in Python's standard library, less work than the cryptographic hashes there, and certain to notice
any damage that spans no more than 32 bits; other damage passes with a probability of 2^-32. It guards against accidents, not against
somebody who rewrites files.
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

MANIFEST = "manifest.json"
FORMAT = 2  # of the folder; 1 had no checksums and kept hyper-parameters as pickles
BLOCK = 1 << 22  # bytes read at a time
_UNKNOWN = "0" * 8  # stands for the manifest's own checksum while that is computed


class FileRecord(NamedTuple):
    """Size in bytes and CRC-32 (8 hexadecimal digits) of a file."""

    bytes: int
    crc32: str


class ParamGroup(NamedTuple):
    """A parameter group of the optimizer: the names of its parameters and its options, such as ``lr``, by name."""

    params: list[str]
    options: dict[str, Any]


@dataclass
class Manifest:
    """What ``manifest.json`` says.

    Attributes:
        step: position of the run.
        serial: counts the saves under one root, so that of two folders the newer is known even where a resumed run went back in steps.
        world_size: number of ranks that saved.
        strategy: how the model was sharded, for people to read.
        versions: of torch and of this package.
        groups: the optimizer's parameter groups; options encoded as in :mod:`.plain`.
        values: what else of the model and optimizer is no tensor, by key, encoded likewise.
        extra: the caller's data.
        files: of every file but the manifest.
        ties: the names that are one tensor of the model, the one with the optimizer's state first; None where an older version saved.
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
        """The file's content."""
        body = {
            "format": FORMAT,
            **self.__dict__,
            "groups": [group._asdict() for group in self.groups],
            "files": {name: record._asdict() for name, record in sorted(self.files.items())},
        }
        blank = json.dumps({**body, "checksum": _UNKNOWN}, indent=1).encode() + b"\n"
        return _with_checksum(blank, _UNKNOWN, crc32_text(zlib.crc32(blank)))

    @staticmethod
    def from_bytes(content: bytes) -> Manifest:
        """Inverse of :meth:`to_bytes`.

        Raises:
            ValueError: the content is damaged, or of another format; says what is wrong, without the file's name.
        """
        try:
            body = json.loads(content)
            checksum = body.pop("checksum")
            version = body.pop("format")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise ValueError("it is damaged: it is not the JSON that a save writes") from None
        if not isinstance(checksum, str) or len(checksum) != len(_UNKNOWN):
            raise ValueError("it is damaged: its checksum is unreadable")
        if crc32_text(zlib.crc32(_with_checksum(content, checksum, _UNKNOWN))) != checksum:
            raise ValueError("it is damaged: its checksum does not match its content")
        if version != FORMAT:
            raise ValueError(f"it is of format {version} but this version reads format {FORMAT}")
        try:
            files = {name: FileRecord(**record) for name, record in body.pop("files").items()}
            groups = [ParamGroup(**group) for group in body.pop("groups")]
            manifest = Manifest(**body, groups=groups, files=files)
            understood = manifest._is_well_formed()
        except (KeyError, AttributeError, TypeError):
            understood = False
        if not understood:
            raise ValueError("it is not what this version writes, although its checksum is right")
        foreign = [name for name in files if not is_file_name(name)]
        if foreign:
            raise ValueError(
                f"it names {foreign[0]!r}, which is no file of the checkpoint's own folder"
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
        return all(
            isinstance(part, kind) for kind, parts in ((int, numbers), (list, lists), (str, texts), (dict, mappings)) for part in parts
        )  # fmt: skip


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint at ``path``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read or is damaged.
    """
    try:
        return Manifest.from_bytes((path / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the checkpoint {path} cannot be used: {MANIFEST}: {error}; load another checkpoint"
        ) from error


def find_damage(path: Path, files: dict[str, FileRecord]) -> list[str]:
    """Compare files with their records, reading each once as a stream.

    Returns:
        A sentence without a full stop for each file that is missing, unreadable or differs; empty where all is well.
    """
    problems = []
    block = memoryview(bytearray(BLOCK))
    for name, record in files.items():
        try:
            with open(path / name, "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if size != record.bytes:
                    problems.append(
                        f"{name} has {size} bytes, not the {record.bytes} that were written"
                    )
                    continue
                crc = 0
                while count := file.readinto(block):
                    crc = zlib.crc32(block[:count], crc)
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror or error})")
        else:
            if crc32_text(crc) != record.crc32:
                problems.append(
                    f"{name} is not what was written (CRC-32 {crc32_text(crc)}, not {record.crc32})"
                )
    return problems


def is_file_name(name: object) -> bool:
    """Whether ``name``, found in a file from elsewhere, means a file of a given folder and cannot lead out of it."""
    return (
        isinstance(name, str)
        and Path(name).name == name
        and name not in ("", "..")
        and "\0" not in name
    )


def crc32_text(crc: int) -> str:
    return f"{crc:08x}"


def _with_checksum(content: bytes, old: str, new: str) -> bytes:
    """Replace the value of the last key, ``checksum``."""
    before, key, after = content.rpartition(b'"checksum": "')
    return before + key + after.replace(old.encode(), new.encode(), 1)
