"""Outputs of ``train.py``: a progress bar, ``metrics.jsonl``, ``loss.png`` and a summary."""

from __future__ import annotations

import json
import math
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from sharded_bf16_adamw import PrecisionStats


class Metrics:
    """Writer of ``metrics.jsonl``, one JSON object per line, and of the progress on stderr.

    A line holds ``{step, loss, lr, grad_norm, nonfinite_steps, tokens_per_s}`` for each step and
    ``{step, held_out_loss}`` for each evaluation. With ``--precision-stats`` some steps also have a
    line of ``step`` and the fields of :class:`sharded_bf16_adamw.PrecisionStats`. ``step`` counts
    the steps taken, ``nonfinite_steps`` those of them whose loss or gradient norm was not finite.
    With ``--skip-spikes`` a step's line also has ``spikes``, the number of outliers skipped so far.
    Losses are in nats per token. A non-finite value, which JSON lacks, is ``null``.

    A full disk does not end training: lines that cannot be written are lost, with one note.

    Args:
        path: the file. Lines of steps after ``start`` are dropped: a resumed run repeats them.
        start: steps taken before this run.
        steps: steps at the end of the run, for the progress.
        bar: show progress on stderr: a bar on a terminal, else lines.
        evaluated: the evaluation of step ``start``, if any, is not repeated.
        print_every: steps between two lines of progress.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        start: int,
        steps: int,
        bar: bool,
        evaluated: bool = True,
        print_every: int = 1,
    ) -> None:
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
        self.has_noted = False
        self.steps, self.print_every = steps, print_every
        self.bar = _progress_bar(start, steps) if bar and sys.stderr.isatty() else None
        self.prints = bar and self.bar is None
        self.shown: dict[str, str] = {}

    def step(self, **line: Any) -> None:
        self._write(line)
        names = {"loss": "loss", "lr": "lr", "grad_norm": "norm", "tokens_per_s": "tokens_per_s"}
        self._show(**{shown: line[name] for name, shown in names.items()})
        if self.bar is not None:
            self.bar.update()
        elif self.prints and (line["step"] % self.print_every == 0 or line["step"] == self.steps):
            shown = "  ".join(f"{name} {value}" for name, value in self.shown.items())
            print(f"step {line['step']}/{self.steps}  {shown}", file=sys.stderr, flush=True)

    def evaluation(self, step: int, held_out_loss: float) -> None:
        self._write({"step": step, "held_out_loss": held_out_loss})
        self._show(held_out=held_out_loss)

    def precision(self, step: int, stats: PrecisionStats) -> None:
        self._write({"step": step, **stats.as_dict()})

    def close(self) -> None:
        self.file.close()
        if self.bar is not None:
            self.bar.close()

    def _write(self, line: dict[str, Any]) -> None:
        text = ("\n" if self.is_torn else "") + _json_line(line)
        try:
            self.is_torn = self.file.write(text.encode()) != len(text)
        except OSError as error:
            if not self.has_noted:
                print(
                    f"\nnote: {self.file.name} cannot be written ({error.strerror}): training "
                    f"goes on, its lines from step {line['step']} on are lost",
                    file=sys.stderr,
                )
            self.has_noted = True

    def _show(self, **values: float) -> None:
        self.shown.update({name: f"{value:.4g}" for name, value in values.items()})
        if self.bar is not None:
            self.bar.set_postfix(self.shown, refresh=False)


def _json_line(line: dict[str, Any]) -> str:
    values = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in line.items()
    }
    return json.dumps(values, allow_nan=False) + "\n"


def _progress_bar(start: int, steps: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        print("no progress bar: tqdm is not installed", file=sys.stderr)
        return None
    return tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a ``metrics.jsonl``, or [] if it does not exist.

    Lines that a killed run or a full disk left incomplete are skipped.
    """
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        with suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def read_curve(path: Path, key: str) -> list[tuple[int, float]]:
    """Return (step, value) of each line of a ``metrics.jsonl`` that has ``key``; null as NaN."""
    return [
        (line["step"], math.nan if line[key] is None else line[key])
        for line in read_metrics(path)
        if key in line
    ]


def plot_losses(metrics: Path, plot: Path, title: str) -> bool:
    """Plot training and held-out loss; return False if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    axes = (figure := Figure(figsize=(8, 4.5), layout="constrained")).subplots()
    for key, label, style in (
        ("loss", "training", {"alpha": 0.5, "linewidth": 1}),
        ("held_out_loss", "held out", {"marker": "."}),
    ):
        points = read_curve(metrics, key)
        axes.plot([x for x, _ in points], [y for _, y in points], label=label, **style)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(plot, dpi=120)
    return True


def optimizer_state_bytes(
    optimizer: torch.optim.Optimizer, device: torch.device
) -> tuple[int, int]:
    """Return the bytes of optimizer state on this rank, and their sum over all ranks. Collective.

    A DTensor counts with its local shard, a quantized tensor of torchao with its parts.
    """
    # Not every entry of optimizer.state need be a parameter's dict.
    states = [state for state in optimizer.state.values() if isinstance(state, dict)]
    tensors = [x for state in states for x in state.values() if isinstance(x, torch.Tensor)]
    local = [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
    local_bytes = sum(part.nbytes for x in local for part in parts_of(x))
    total = torch.tensor(local_bytes, dtype=torch.int64, device=device)
    dist.all_reduce(total)
    return local_bytes, int(total)


def parts_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors that a tensor subclass wraps, or the tensor itself."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    return [tensor] if flatten is None else [getattr(tensor, name) for name in flatten()[0]]


def summary(
    *,
    held_out_loss: float,
    state_bytes: tuple[int, int],
    parameters: int,
    world_size: int,
    step_seconds: float,
    out_dir: Path,
    checkpoint: Path,
    nonfinite_steps: int,
    skipped: bool,
    spikes: int | None,
) -> str:
    """Return the lines that a finished run prints."""
    local, total = state_bytes
    return "\n".join(
        (
            f"held-out loss         {held_out_loss:.4f} nats per token",
            f"optimizer state       {local:,} bytes on rank 0, {total:,} on {world_size} rank(s): "
            f"{total / parameters:.2f} per parameter",
            f"optimizer step        {step_seconds * 1e3:.2f} ms (median), clipping included",
            f"non-finite steps      {nonfinite_steps}"
            f"{', skipped' if nonfinite_steps and skipped else ''}",
            *([] if spikes is None else [f"spikes                {spikes}, skipped"]),
            f"metrics               {out_dir / 'metrics.jsonl'}",
            f"checkpoint            {checkpoint}",
        )
    )
