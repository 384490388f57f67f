"""Byte-level training text: a file, a directory, or the sources of Python's standard library.

A batch is a pure function of the seed and the step. So a checkpoint's data position is its step, a
resumed run sees the batches of an uninterrupted one, and the global batch does not depend on the
number of ranks.
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

from training.errors import UsageError

HELD_OUT = 10  # one part in so many, at the end of the text, is held out
SKIPPED_DIRS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Text:
    """Training and held-out text, both one-dimensional uint8 arrays, and the sequence length."""

    train: np.ndarray
    held_out: np.ndarray
    seq_len: int

    def batch(self, seed: int, step: int, size: int) -> Tensor:
        """Return the global batch of a step, int64 ``(size, seq_len + 1)``.

        Inputs are all columns but the last, targets all but the first.
        """
        generator = np.random.default_rng((seed, step))
        return self._windows(
            self.train, generator.integers(0, len(self.train) - self.seq_len, size)
        )

    def held_out_batch(self, index: int, batches: int, size: int) -> Tensor:
        """Return batch ``index`` of ``batches`` that cover the held-out text evenly.

        It is shaped as in :meth:`batch`, and always the same.
        """
        last = len(self.held_out) - self.seq_len - 1
        starts = np.linspace(0, last, batches * size).astype(np.int64)
        return self._windows(self.held_out, starts[index * size : (index + 1) * size])

    def _windows(self, source: np.ndarray, starts: np.ndarray) -> Tensor:
        windows = np.stack([source[s : s + self.seq_len + 1] for s in starts])
        return torch.from_numpy(windows.astype(np.int64))


def load_text(path: str | None, seq_len: int) -> Text:
    """Read a file, all visible files below a directory, or (None) the standard library's sources.

    Raises:
        UsageError: ``path`` is missing, unreadable, or too short for one sequence in each part.
    """
    name = path or "the standard library's sources"
    try:
        data = _standard_library() if path is None else _read(Path(path))
    except OSError as error:
        culprit = error.filename or name
        raise UsageError(
            f"--data {name} cannot be read ({error.strerror}: {culprit}): "
            "check the path and its permissions."
        ) from None
    cut = len(data) - len(data) // HELD_OUT
    if len(data) - cut <= seq_len:
        needed = HELD_OUT * (seq_len + 1)
        raise UsageError(
            f"--data {name} holds {len(data)} bytes, too few for --seq-len {seq_len}: "
            f"give at least {needed} or shorten --seq-len."
        )
    return Text(data[:cut], data[cut:], seq_len)


def _standard_library() -> np.ndarray:
    root = Path(sysconfig.get_path("stdlib"))
    return _concatenate(p for p in _files(root, SKIPPED_DIRS) if p.suffix == ".py")


def _read(path: Path) -> np.ndarray:
    if path.is_dir():
        return _concatenate(_files(path, set()))
    if path.stat().st_size == 0:  # mmap rejects an empty file
        return np.zeros(0, dtype=np.uint8)
    return np.memmap(path, dtype=np.uint8, mode="r")


def _files(root: Path, skipped: set[str]) -> Iterator[Path]:
    """Yield all visible files below ``root``, in an order that no file system changes."""

    def fail(error: OSError) -> None:
        raise error

    for directory, subdirs, names in os.walk(root, onerror=fail):
        subdirs[:] = sorted(s for s in subdirs if s not in skipped and not s.startswith("."))
        yield from (Path(directory, n) for n in sorted(names) if not n.startswith("."))


def _concatenate(paths: Iterable[Path]) -> np.ndarray:
    return np.frombuffer(b"".join(p.read_bytes() for p in paths), dtype=np.uint8)
