"""What a run of ``train.py`` leaves behind: a progress bar, ``metrics.jsonl``, ``loss.png`` and a closing summary."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor


class Metrics:
    """``metrics.jsonl``: one JSON object a line, for each step ``{step, loss, lr, grad_norm, nonfinite_steps, tokens_per_s}`` and for each
    evaluation ``{step, held_out_loss}``. ``step`` counts the steps taken, ``nonfinite_steps`` those of them whose loss or gradient norm was
    not finite. Losses are nats a byte. A value that is not finite, which JSON does not have, is ``null``.

    Args:
        path: the file. Lines of steps after ``start`` are dropped, since a resumed run takes those steps again.
        start: steps taken before this run.
        steps: steps at the run's end, for the bar.
        bar: whether to show a progress bar on stderr.
    """

    def __init__(self, path: Path, start: int, steps: int, bar: bool) -> None:
        self.path = path
        lines = [
            _json_line(line) for line in read_metrics(path) if line["step"] <= start and start > 0
        ]
        path.write_text("".join(lines))
        self.file = path.open(
            "a", buffering=1
        )  # line by line, so that a killed run leaves whole lines
        self.bar = _bar(start, steps) if bar else None
        self.shown: dict[str, str] = {}

    def step(self, **line: Any) -> None:
        self.file.write(_json_line(line))
        if self.bar is not None:
            self._show(
                loss=line["loss"],
                lr=line["lr"],
                norm=line["grad_norm"],
                tokens_per_s=line["tokens_per_s"],
            )
            self.bar.update()

    def evaluation(self, step: int, held_out_loss: float) -> None:
        self.file.write(_json_line({"step": step, "held_out_loss": held_out_loss}))
        if self.bar is not None:
            self._show(held_out=held_out_loss)

    def close(self) -> None:
        self.file.close()
        if self.bar is not None:
            self.bar.close()

    def _show(self, **values: float) -> None:
        assert self.bar is not None
        self.shown.update({name: f"{value:.4g}" for name, value in values.items()})
        self.bar.set_postfix(self.shown, refresh=False)


def _json_line(line: dict[str, Any]) -> str:
    values = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in line.items()
    }
    return json.dumps(values, allow_nan=False) + "\n"


def _bar(start: int, steps: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        print("no progress bar: tqdm is not installed", file=sys.stderr)
        return None
    return tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``, without a last one that a killed run left incomplete; none where there is no file."""
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def plot_losses(metrics: Path, picture: Path, title: str) -> bool:
    """Draw training and held-out loss over steps. Returns False, and draws nothing, where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    lines = read_metrics(metrics)
    axes = (figure := Figure(figsize=(8, 4.5), layout="constrained")).subplots()
    for key, label, style in (
        ("loss", "training", {"alpha": 0.5, "linewidth": 1}),
        ("held_out_loss", "held out", {"marker": "."}),
    ):
        points = [
            (line["step"], math.nan if line[key] is None else line[key])
            for line in lines
            if key in line
        ]
        axes.plot([x for x, _ in points], [y for _, y in points], label=label, **style)
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)
    return True


def optimizer_state_bytes(
    optimizer: torch.optim.Optimizer, device: torch.device
) -> tuple[int, int]:
    """Bytes of optimizer state that this rank holds, and their sum over all ranks. Of a DTensor, only the local shard counts."""
    states = [
        state for state in optimizer.state.values() if isinstance(state, dict)
    ]  # others may keep their own entries there
    tensors = [x for state in states for x in state.values() if isinstance(x, torch.Tensor)]
    local = [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
    mine = sum(x.numel() * x.element_size() for x in local)
    total = torch.tensor(mine, dtype=torch.int64, device=device)
    dist.all_reduce(total)
    return mine, int(total)


def summary(
    *,
    held_out_loss: float,
    state_bytes: tuple[int, int],
    parameters: int,
    ranks: int,
    step_seconds: float,
    folder: Path,
    checkpoint: Path,
    nonfinite_steps: int,
    skipped: bool,
) -> str:
    """The lines that a finished run prints."""
    mine, total = state_bytes
    return "\n".join(
        (
            f"held-out loss         {held_out_loss:.4f} nats per byte",
            f"optimizer state       {mine:,} bytes on rank 0, {total:,} on {ranks} rank(s): {total / parameters:.2f} per parameter",
            f"optimizer step        {step_seconds * 1e3:.2f} ms on average, clipping included",
            f"non-finite steps      {nonfinite_steps}{', skipped' if nonfinite_steps and skipped else ''}",
            f"metrics               {folder / 'metrics.jsonl'}",
            f"checkpoint            {checkpoint}",
        )
    )
