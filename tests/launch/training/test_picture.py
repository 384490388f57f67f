"""The picture of a run: a panel for each thing that it has reported."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training.picture import draw

Figure = pytest.importorskip("matplotlib.figure").Figure
STATS = ("lost_share", "carried_share", "edq", "plain_edq", "correction_rms", "weight_norm")
STATS += ("update_norm", "update_ratio", "exp_avg_norm", "exp_avg_sq_norm")


def lines_of(steps: int, stats: bool) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [{"step": 0, "held_out_loss": 5.5}]
    for step in range(1, steps + 1):
        loss = None if step == 3 else 5.0 / step
        grad_norm = 1000.0 if step == 4 else 1.0
        lines.append({"step": step, "loss": loss, "lr": 1e-3, "grad_norm": grad_norm})
        lines[-1]["tokens_per_s"] = 100.0 + step
        if stats and step % 2 == 0:
            lines.append({"step": step, **dict.fromkeys(STATS, 0.5 + step)})
    return lines


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Return a function that draws lines and returns the panels by title."""
    figures = []
    real = Figure.savefig

    def savefig(figure, *args, **kwargs):
        figures.append(figure)
        return real(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)

    def draw_lines(lines: list[dict[str, Any]]) -> dict[str, Any]:
        metrics, path = tmp_path / "metrics.jsonl", tmp_path / "metrics.png"
        metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert draw(metrics, path, "a title")
        assert path.stat().st_size > 5000
        return {axes.get_title(): axes for axes in figures[-1].axes}

    return draw_lines


def curves(axes: Any) -> dict[str, list[list[float]]]:
    return {
        line.get_label(): np.nan_to_num(line.get_xydata(), nan=-1).tolist() for line in axes.lines
    }


def test_losses_and_steps(drawn):
    panels = drawn(lines_of(4, stats=False))
    assert list(panels) == [
        "loss (nats per token)",
        "learning rate",
        "gradient norm",
        "tokens per second",
    ]
    assert curves(panels["loss (nats per token)"]) == {
        "training": [[1, 5.0], [2, 2.5], [3, -1], [4, 1.25]],
        "held out": [[0, 5.5]],
    }
    assert panels["gradient norm"].get_yscale() == "log"
    assert panels["tokens per second"].get_yscale() == "linear"
    assert panels["tokens per second"].get_ylim()[0] == 0.0


def test_precision_stats_have_panels_too(drawn):
    panels = drawn(lines_of(4, stats=True))
    assert list(panels)[4:] == [
        "share of updates",
        "effective descent quality",
        "rms of the correction (ulp)",
        "norm of update / norm of weight",
        "norm of weight",
        "norm of moments",
    ]
    values = [[2, 2.5], [4, 4.5]]
    shares = curves(panels["share of updates"])
    assert shares == {"lost by plain bf16": values, "carried by correction": values}
    assert set(curves(panels["effective descent quality"])) == {"this run", "plain bf16"}


def test_a_run_without_a_step_has_a_picture(drawn):
    assert list(drawn(lines_of(0, stats=False))) == ["loss (nats per token)"]
    assert list(drawn([])) == ["loss (nats per token)"]


def test_without_matplotlib_nothing_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not draw(Path(tmp_path / "none"), tmp_path / "picture.png", "")
    assert list(tmp_path.iterdir()) == []
