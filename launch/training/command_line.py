"""Parser, argument types and ``--json`` output of the commands in ``launch/``."""

from __future__ import annotations

import argparse
import json
import math
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from training.errors import UsageError


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UsageError and accepts no abbreviated options.

    ``--help`` keeps the line breaks of the description, which may be a module's docstring.
    """

    def __init__(self, prog: str | None = None, description: str | None = None) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(
            prog, description=description, formatter_class=formatter, allow_abbrev=False
        )

    def add_json(self) -> None:
        """Add ``--json FILE``, for the figures of a benchmark."""
        self.add_argument(
            "--json", type=output_file, metavar="FILE", help="write the figures to this file"
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help.")


def positive(text: str) -> int:
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def count(text: str) -> int:
    value = _whole(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def nonnegative(text: str) -> float:
    value = _number(text)
    if not 0.0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


def positive_float(text: str) -> float:
    value = _number(text)
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def share(text: str) -> float:
    value = _number(text)
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def finite(text: str) -> float:
    value = _number(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number") from None


def seed(text: str) -> int:
    value = count(text)
    if value >= 1 << 32:  # numpy's limit
        raise argparse.ArgumentTypeError(f"{text} is not below 2^32")
    return value


def vocab_size(text: str) -> int:
    value = positive(text)
    if value > 1 << 32:
        raise argparse.ArgumentTypeError(f"{text} is above 2^32, the values of a uint32 token id")
    return value


def nonempty(text: str) -> str:
    """Return a name or path; reject empty text, such as from an unset shell variable."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("the value is empty" if not text else "it has a NUL byte")
    return text


def output_file(text: str) -> Path:
    """Return the path of a file; create its folder, and reject a file that cannot be written."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder, not a file")
    output_folder(str(path.parent))
    if path.exists() and not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path} cannot be written (Permission denied)")
    return path


def output_folder(text: str) -> Path:
    """Return the path of a writable folder; create it if it does not exist."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"the folder {path} cannot be made ({error.strerror})"
        ) from error
    if not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"the folder {path} cannot be written to")
    return path


def write_json(path: Path | None, figures: Any) -> None:
    """Write figures to the file of ``--json``, if it was given."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=1) + "\n")


def is_installed(module: str) -> bool:
    """Return True if a module is installed; a folder with its name does not count."""
    spec = find_spec(module)
    return spec is not None and spec.origin is not None
