"""The picture of a run, drawn from its ``metrics.jsonl``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.metrics import read_metrics

Curve = tuple[list[int], list[float]]


@dataclass(frozen=True)
class Panel:
    """Curves that share axes.

    Attributes:
        title: title of the panel.
        curves: label of each curve, by its key in ``metrics.jsonl``.
        limits: limits of the vertical axis; None for automatic.
    """

    title: str
    curves: Mapping[str, str]
    limits: tuple[float | None, float | None] = (None, None)


LOSS = Panel("loss (nats per token)", {"loss": "training", "held_out_loss": "held out"})
STEP_PANELS = (
    Panel("learning rate", {"lr": ""}, (0.0, None)),
    Panel("gradient norm", {"grad_norm": ""}),
    Panel("tokens per second", {"tokens_per_s": ""}, (0.0, None)),
)
# --precision-stats
PRECISION_PANELS = (
    Panel(
        "share of updates",
        {"lost_share": "lost by plain bf16", "carried_share": "carried by correction"},
        (-0.05, 1.05),
    ),
    Panel("effective descent quality", {"plain_edq": "plain bf16", "edq": "this run"}, (0.0, None)),
    Panel("rms of the correction (ulp)", {"correction_rms": ""}),
    Panel("norm of update / norm of weight", {"update_ratio": ""}),
    Panel("norm of weight", {"weight_norm": ""}),
    Panel("norm of moments", {"exp_avg_norm": "exp_avg", "exp_avg_sq_norm": "exp_avg_sq"}),
)
COLUMNS = 3
FEW = 50  # a curve of fewer points has a marker at each point
LOG_RATIO = 30.0  # logarithmic axis if the largest value exceeds this multiple of the smallest


class Picture:
    """A reporter that draws ``metrics.jsonl`` when the run ends.

    Args:
        metrics: the file to draw.
        path: file of the picture.
        title: title of the picture.
    """

    def __init__(self, metrics: Path, path: Path, title: str) -> None:
        self.name = str(path)
        self._metrics, self._path, self._title = metrics, path, title

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Do nothing: ``metrics.jsonl`` has these values, and those before the run was resumed."""

    def close(self, failed: bool) -> None:
        if draw(self._metrics, self._path, self._title):
            print(f"{'picture':22}{self._path}")
        else:
            print(f"no {self._path.name}: matplotlib is not installed")


def draw(metrics: Path, path: Path, title: str) -> bool:
    """Draw a run; return False if matplotlib is not installed.

    Losses are on top. Below them are the panels whose values the run has reported.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return False
    curves = _curves(metrics)
    panels = [p for p in (*STEP_PANELS, *PRECISION_PANELS) if p.curves.keys() & curves.keys()]
    rows = math.ceil(len(panels) / COLUMNS)
    figure = Figure(figsize=(10, 3.6 + 2.1 * rows), layout="constrained")
    grid = figure.add_gridspec(1 + rows, COLUMNS, height_ratios=[3.6] + rows * [2.1])
    top = figure.add_subplot(grid[0, :])
    _draw_panel(top, LOSS, curves)
    for index, panel in enumerate(panels):
        cell = grid[1 + index // COLUMNS, index % COLUMNS]
        _draw_panel(figure.add_subplot(cell, sharex=top), panel, curves)
    top.set_xlabel("step")
    top.xaxis.set_major_locator(MaxNLocator(5, integer=True))  # also for the panels that share x
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    return True


def _curves(metrics: Path) -> dict[str, Curve]:
    """Return steps and values of each key; null as NaN."""
    curves: dict[str, Curve] = {}
    for line in read_metrics(metrics):
        for key, value in line.items():
            steps, values = curves.setdefault(key, ([], []))
            steps.append(line["step"])
            values.append(math.nan if value is None else value)
    return curves


def _draw_panel(axes: Any, panel: Panel, curves: Mapping[str, Curve]) -> None:
    finite: list[float] = []
    for key, label in panel.curves.items():
        steps, values = curves.get(key, ([], []))
        finite += filter(math.isfinite, values)
        marker = "." if len(steps) < FEW else None
        axes.plot(steps, values, label=label, linewidth=1.0, marker=marker, alpha=0.8)
    if finite and 0.0 < LOG_RATIO * min(finite) < max(finite) and panel.limits[0] is None:
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", scilimits=(-3, 5), useOffset=False)
    axes.set_ylim(*panel.limits)
    axes.set_title(panel.title, fontsize="medium")
    axes.grid(alpha=0.3)
    if len(panel.curves) > 1:
        axes.legend(fontsize="small")
