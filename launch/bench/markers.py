"""Generated sections of the documentation."""

from __future__ import annotations

from pathlib import Path


def write_between_markers(path: Path, begin: str, end: str, text: str) -> None:
    """Replace the text between two marker lines of a file; append both if it has neither.

    Raises:
        ValueError: the file has one marker without the other, or in the wrong order.
    """
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    if begin not in old and end not in old:
        old = f"{old.rstrip()}\n\n{begin}\n{end}\n"
    before, found_begin, rest = old.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(
            f"{path} lacks the lines {begin} and, after it, {end}, so nothing was written: "
            "restore them"
        )
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
