"""Training data: text files, ``.jsonl`` files, ``.bin`` files of token ids, or folders of one kind.

A batch is a pure function of the seed and the step. So the step of a checkpoint is also its
position in the data, a resumed run gets the same batches as an uninterrupted one, and the global
batch does not depend on the number of ranks.

Files are memory-mapped. Before that, rank 0 tokenizes ``.jsonl`` files, and text that needs a
tokenizer, into one ``.bin`` file, which later runs reuse.
"""

from __future__ import annotations

import functools
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from sharded_bf16_adamw.checkpoint.rank_errors import call_on_rank_0_via_store
from training.errors import UsageError

HELD_OUT_DIVISOR = 10  # the last tenth of the data is held out
SKIPPED_DIRS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
CHARS_AT_ONCE = 1 << 20  # characters that a tokenizer gets in one call


class Tokenizer(Protocol):
    """A mapping from text to token ids.

    Attributes:
        vocab_size: number of token ids.
        eos_token_id: token id that ends each text, or None.
        key: identifies the tokenizer in the names of cached files.
    """

    vocab_size: int
    eos_token_id: int | None
    key: str

    def encode(self, texts: list[str]) -> Sequence[Any]:
        """Return the token ids of each text."""


class ByteTokenizer:
    """UTF-8 bytes as token ids, for ``.jsonl`` files; byte 0 ends each text.

    Text files do without it: their bytes are memory-mapped, with no separator between files.
    """

    vocab_size = 256
    eos_token_id: int | None = 0
    key = "bytes"

    def encode(self, texts: list[str]) -> Sequence[Any]:
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]


@dataclass(frozen=True)
class DataFiles:
    """Files of one kind ("text", ".jsonl" or ".bin"); ``name`` stands for them in messages."""

    name: str
    kind: str
    paths: list[Path]


class MemmapTokens:
    """Concatenated token ids of several files, read on demand."""

    def __init__(self, paths: list[Path], dtype: np.dtype[Any]) -> None:
        sizes = [(path, path.stat().st_size // dtype.itemsize) for path in paths]
        self._paths = [path for path, size in sizes if size]  # mmap rejects an empty file
        self._ends = np.cumsum([size for _, size in sizes if size], dtype=np.int64)
        self._dtype = dtype

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, window: slice) -> np.ndarray:
        start, stop, _ = window.indices(len(self))
        parts = []
        index = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            begin, end = (int(self._ends[index - 1]) if index else 0), int(self._ends[index])
            mapped = _memmap(self._paths[index], self._dtype)
            parts.append(mapped[start - begin : min(end, stop) - begin])
            start, index = end, index + 1
        return np.concatenate(parts) if parts else np.zeros(0, self._dtype)


@functools.lru_cache(maxsize=64)  # an open memmap holds a file descriptor
def _memmap(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    return np.memmap(path, dtype, mode="r", shape=(path.stat().st_size // dtype.itemsize,))


@dataclass(frozen=True)
class TokenDataset:
    """Token ids: the first ``num_train_tokens`` for training, the others held out.

    Attributes:
        tokens: all token ids.
        num_train_tokens: number of token ids before the held-out ones.
        seq_len: tokens in a sequence.
        vocab_size: number of token ids that the model knows.
        name: name of the data in messages.
    """

    tokens: MemmapTokens | np.ndarray
    num_train_tokens: int
    seq_len: int
    vocab_size: int = ByteTokenizer.vocab_size
    name: str = ""

    def batch(self, seed: int, step: int, size: int) -> Tensor:
        """Return the global batch of a step, int64 ``(size, seq_len + 1)``.

        Inputs are all columns but the last, targets all but the first.
        """
        generator = np.random.default_rng((seed, step))
        return self._windows(generator.integers(0, self.num_train_tokens - self.seq_len, size))

    def held_out_batch(self, index: int, num_batches: int, size: int) -> Tensor:
        """Return batch ``index`` of ``num_batches`` that cover the held-out data evenly.

        The shape is that of :meth:`batch`; the content is the same in every call.
        """
        last = len(self.tokens) - self.num_train_tokens - self.seq_len - 1
        starts = np.linspace(0, last, num_batches * size).astype(np.int64) + self.num_train_tokens
        return self._windows(starts[index * size : (index + 1) * size])

    def _windows(self, starts: np.ndarray) -> Tensor:
        windows = np.stack([self.tokens[s : s + self.seq_len + 1] for s in starts])
        largest = int(windows.max())
        if largest >= self.vocab_size:
            raise UsageError(
                f"--data {self.name} has the token id {largest}, but the model's ids end at "
                f"{self.vocab_size - 1}: give data of the model's tokenizer, or --token-dtype if "
                "the integers of the file have another size."
            )
        return torch.from_numpy(windows.astype(np.int64))


# ------------------------------------------------------------------------------------------ files


def find_files(path: str | None) -> DataFiles:
    """List the data files.

    Args:
        path: a file; or a folder, for all visible files below it; or None for the sources of
            Python's standard library.

    Raises:
        UsageError: ``path`` is missing, unreadable or empty, or holds files of several kinds or
            binary files other than ``.bin``.
    """
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        sources = [p for p in _walk(root, SKIPPED_DIRS) if p.suffix == ".py"]
        return DataFiles("the standard library's sources", "text", sources)
    try:
        is_folder = Path(path).is_dir()
        paths = list(_walk(Path(path), {"__pycache__"})) if is_folder else [Path(path)]
        if not paths:
            raise UsageError(f"--data {path} holds no visible files: give another folder.")
        kinds = sorted({p.suffix if p.suffix in (".bin", ".jsonl") else "text" for p in paths})
        if len(kinds) > 1:
            raise UsageError(
                f"--data {path} holds {' and '.join(kinds)} files: give a file, or a folder of one "
                "kind."
            )
        kind = kinds[0]
        for p in paths:
            with p.open("rb") as file:
                if kind != ".bin" and b"\0" in file.read(8192):
                    raise UsageError(
                        f"--data {path} holds a binary file, not text ({p}): give text, .jsonl or "
                        ".bin (token ids) files."
                    )
    except OSError as error:
        raise UsageError(
            f"--data {path} cannot be read ({error.strerror}: {error.filename or path}): "
            "check the path and its permissions."
        ) from None
    return DataFiles(path, kind, paths)


def _walk(root: Path, skipped: set[str]) -> Iterator[Path]:
    """Yield all visible files below ``root`` in sorted order."""

    def fail(error: OSError) -> None:
        raise error

    for directory, subdirs, names in os.walk(root, onerror=fail):
        subdirs[:] = sorted(s for s in subdirs if s not in skipped and not s.startswith("."))
        yield from (Path(directory, n) for n in sorted(names) if not n.startswith("."))


def load_dataset(
    files: DataFiles,
    seq_len: int,
    vocab_size: int = ByteTokenizer.vocab_size,
    tokenizer: Tokenizer | None = None,
    token_dtype: str | None = None,
    cache: str | os.PathLike[str] = ".",
) -> TokenDataset:
    """Open the data; if it must be tokenized and the cache lacks it, tokenize it first.

    In a distributed run every rank calls this function, and rank 0 tokenizes.

    Args:
        files: the result of :func:`find_files`.
        seq_len: tokens in a sequence.
        vocab_size: number of token ids that the model knows.
        tokenizer: tokenizer of the text; None for its UTF-8 bytes.
        token_dtype: "uint16" or "uint32", the integers of ``.bin`` files; None for the smallest
            that holds all ids below ``vocab_size``.
        cache: folder for tokenized data, which a later run with the same data reuses.

    Raises:
        UsageError: the data is malformed, or too short for a training and a held-out sequence.
    """
    paths, unit = files.paths, "tokens"
    dtype = np.dtype(token_dtype or ("uint16" if vocab_size <= 1 << 16 else "uint32"))
    if files.kind == "text" and tokenizer is None:
        dtype, unit = np.dtype("uint8"), "bytes"
    elif files.kind != ".bin":
        chosen = tokenizer or ByteTokenizer()
        dtype = np.dtype("uint16" if chosen.vocab_size <= 1 << 16 else "uint32")
        paths = [_tokenize_once(files, chosen, dtype, Path(cache))]
    odd = next((p for p in paths if p.stat().st_size % dtype.itemsize), None)
    if odd is not None:
        raise UsageError(
            f"--data {files.name} is not of {dtype} token ids ({odd} has {odd.stat().st_size} "
            "bytes): give --token-dtype, or another file."
        )
    tokens = MemmapTokens(paths, dtype)
    num_train_tokens = len(tokens) - len(tokens) // HELD_OUT_DIVISOR
    if len(tokens) - num_train_tokens <= seq_len:
        raise UsageError(
            f"--data {files.name} holds {len(tokens)} {unit}, too few for --seq-len {seq_len}: "
            f"give at least {HELD_OUT_DIVISOR * (seq_len + 1)} or shorten --seq-len."
        )
    return TokenDataset(tokens, num_train_tokens, seq_len, vocab_size, files.name)


# ---------------------------------------------------------------------------------------- tokens


def _tokenize_once(
    files: DataFiles, tokenizer: Tokenizer, dtype: np.dtype[Any], folder: Path
) -> Path:
    def tokenize() -> str:
        stats = [(str(p.absolute()), p.stat()) for p in files.paths]
        source = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        path = folder / f"tokens-{zlib.crc32(repr((tokenizer.key, source)).encode()):08x}.bin"
        if not path.exists():
            print(f"writing the token ids of {files.name} to {path}", flush=True)
            partial = path.with_suffix(".partial")
            _tokenize(files, tokenizer, dtype, partial)
            partial.rename(path)
        return str(path)

    # The other ranks wait on the store, since tokenizing may exceed a collective's timeout.
    try:
        return Path(call_on_rank_0_via_store("tokenize", folder, tokenize))
    except UsageError:  # a ValueError too
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"--data {files.name}: {error}") from error


class _TextPart(NamedTuple):
    """A part of a text, which ends at a line break or at the end of the text."""

    text: str
    is_last: bool


def _tokenize(files: DataFiles, tokenizer: Tokenizer, dtype: np.dtype[Any], path: Path) -> None:
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    with path.open("wb") as out:
        for parts in _batches(_text_parts(files)):
            ids_of_parts = tokenizer.encode([part.text for part in parts])
            for ids, part in zip(ids_of_parts, parts, strict=True):
                out.write(np.asarray(ids, dtype).tobytes())
                out.write(np.asarray(eos if part.is_last else [], dtype).tobytes())


def _batches(parts: Iterator[_TextPart]) -> Iterator[list[_TextPart]]:
    """Yield lists of parts with about ``CHARS_AT_ONCE`` characters, for tokenizers with threads."""
    batch, size = [], 0
    for part in parts:
        batch.append(part)
        size += len(part.text)
        if size >= CHARS_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _text_parts(files: DataFiles) -> Iterator[_TextPart]:
    """Yield each line of a ``.jsonl`` file as one part, and each text file in several parts."""
    for path in files.paths:
        try:
            with path.open(encoding="utf-8", newline="") as file:
                if files.kind == ".jsonl":
                    for number, line in enumerate(file, 1):
                        if line.strip():
                            yield _TextPart(_text_field(files.name, path, number, line), True)
                else:
                    while lines := file.readlines(CHARS_AT_ONCE):
                        yield _TextPart("".join(lines), False)
                    yield _TextPart("", True)
        except UnicodeDecodeError as error:
            raise UsageError(
                f"--data {files.name} has a file that is not UTF-8 text ({path}): convert it."
            ) from error


def _text_field(name: str, path: Path, number: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
        text.encode()  # raises for lone surrogates
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UsageError(
            f'--data {name}: line {number} of {path} is not a JSON object with a string "text": '
            "correct or remove it."
        ) from None
    return text
