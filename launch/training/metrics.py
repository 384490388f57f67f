"""Write and read ``metrics.jsonl``, the values of each step of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


class MetricsFile:
    """A reporter that writes ``metrics.jsonl``, one JSON object per line.

    A line holds ``{step, loss, lr, grad_norm, nonfinite_steps, tokens_per_s}`` for each step and
    ``{step, held_out_loss}`` for each evaluation. With ``--precision-stats`` some steps also have a
    line of ``step`` and the fields of :class:`sharded_bf16_adamw.PrecisionStats`. ``step`` counts
    the steps taken, ``nonfinite_steps`` the steps whose loss or gradient norm was not finite.
    With ``--skip-spikes`` a step's line also has ``spikes``, the number of outliers skipped so far.
    Losses are in nats per token. A non-finite value, which JSON lacks, is ``null``.

    Args:
        path: the file; lines of steps after ``start`` are dropped, since the run repeats them.
        start: steps taken before this run.
        evaluated: False if the run repeats the evaluation of step ``start``.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, start: int, evaluated: bool = True) -> None:
        self.name = str(path)
        kept = [
            line
            for line in read_metrics(path)
            if 0 < start >= line["step"] + (not evaluated and "held_out_loss" in line)
        ]
        replacement = path.with_name(f".{path.name}.new")
        replacement.write_text("".join(map(_json_line, kept)))
        replacement.replace(path)
        self.file = path.open("ab", buffering=0)
        self.is_torn = False  # the last line is incomplete

    def log(self, step: int, values: Mapping[str, float]) -> None:
        text = ("\n" if self.is_torn else "") + _json_line({"step": step, **values})
        self.is_torn = self.file.write(text.encode()) != len(text)

    def close(self, failed: bool) -> None:
        self.file.close()


def _json_line(line: dict[str, Any]) -> str:
    values = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in line.items()
    }
    return json.dumps(values, allow_nan=False) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a ``metrics.jsonl``, or [] if it does not exist.

    Lines that a killed run or a full disk left incomplete are skipped.
    """
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict) and "step" in line]


def read_curve(path: Path, key: str) -> list[tuple[int, float]]:
    """Return (step, value) of each line of a ``metrics.jsonl`` that has ``key``; null as NaN."""
    return [
        (line["step"], math.nan if line[key] is None else line[key])
        for line in read_metrics(path)
        if key in line
    ]
