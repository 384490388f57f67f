"""Byte-level training text: a file, a folder, or the running interpreter's own standard library.

A batch is a pure function of the seed and the step. So a checkpoint's data position is its step, a resumed run sees what an
uninterrupted one would have, and the global batch is the same on every number of ranks.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

HELD_OUT = 10  # the last tenth is never trained on
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class UsageError(ValueError):
    """Something that the user can put right: shown as one sentence, without a stack trace."""


@dataclass(frozen=True)
class Text:
    """Training and held-out bytes, both one-dimensional uint8, and the sequence length that batches have."""

    train: np.ndarray
    held_out: np.ndarray
    seq_len: int

    def batch(self, seed: int, step: int, size: int) -> Tensor:
        """The global batch of a step: int64 ``(size, seq_len + 1)``; inputs are all but the last column, targets all but the first."""
        starts = np.random.default_rng((seed, step)).integers(
            0, len(self.train) - self.seq_len, size
        )
        return self._windows(self.train, starts)

    def held_out_batch(self, index: int, batches: int, size: int) -> Tensor:
        """Batch ``index`` of ``batches`` that together cover the held-out text evenly, always the same. Shaped as in ``batch``."""
        starts = np.linspace(0, len(self.held_out) - self.seq_len - 1, batches * size).astype(
            np.int64
        )
        return self._windows(self.held_out, starts[index * size : (index + 1) * size])

    def _windows(self, source: np.ndarray, starts: np.ndarray) -> Tensor:
        return torch.from_numpy(
            np.stack([source[s : s + self.seq_len + 1] for s in starts]).astype(np.int64)
        )


def load_text(path: str | None, seq_len: int) -> Text:
    """Read the text of a file or of all files below a folder, hidden ones excepted; None is the standard library's sources.

    Raises:
        UsageError: ``path`` is missing, unreadable, or too short for one sequence in each part.
    """
    name = path or "the standard library's sources"
    try:
        data = _standard_library() if path is None else _read(Path(path))
    except OSError as error:
        culprit = error.filename or name
        raise UsageError(
            f"--data {name} cannot be read ({error.strerror}: {culprit}): check the path and its permissions."
        ) from None
    cut = len(data) - len(data) // HELD_OUT
    if len(data) - cut <= seq_len:
        needed = HELD_OUT * (seq_len + 1)
        raise UsageError(
            f"--data {name} holds {len(data)} bytes, too few for --seq-len {seq_len}: give at least {needed} or shorten --seq-len."
        )
    return Text(data[:cut], data[cut:], seq_len)


def _standard_library() -> np.ndarray:
    root = Path(sysconfig.get_path("stdlib"))
    return _concatenate(p for p in _files(root, SKIPPED_FOLDERS) if p.suffix == ".py")


def _read(path: Path) -> np.ndarray:
    if path.is_dir():
        return _concatenate(_files(path, set()))
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype=np.uint8)
    return np.memmap(path, dtype=np.uint8, mode="r")


def _files(root: Path, skipped: set[str]) -> Iterator[Path]:
    """All visible files below ``root`` in an order that does not depend on the file system."""

    def fail(error: OSError) -> None:
        raise error

    for folder, subfolders, names in os.walk(root, onerror=fail):
        subfolders[:] = sorted(s for s in subfolders if s not in skipped and not s.startswith("."))
        yield from (Path(folder, n) for n in sorted(names) if not n.startswith("."))


def _concatenate(paths: Iterable[Path]) -> np.ndarray:
    return np.frombuffer(b"".join(p.read_bytes() for p in paths), dtype=np.uint8)
