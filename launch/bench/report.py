"""Tables and the plot of a run of ``benchmark.py step``."""

from __future__ import annotations

import os
import platform
import statistics
from pathlib import Path
from typing import Any

import torch

from bench.markers import write_between_markers
from bench.measure import ratio, times_of
from bench.optimizers import BYTES_PER_PARAM, Contender
from sharded_bf16_adamw.env import cpu_model
from sharded_bf16_adamw.kernels import cpu

MIN_TRAFFIC = 1 << 16  # elements: with fewer, a share of the memory bandwidth is meaningless
LIMITS = (0.1, 3000.0)  # of the plot's x-axis, with room for the figures beside the bars


def machine(device: torch.device) -> dict[str, Any]:
    """Return the properties of the machine and software that the figures depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()
    isa = cpu.selected_isa() if device.type == "cpu" and cpu.unavailable_reason() is None else None
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
    return {
        "device": device.type,
        "name": name,
        "cores": cores,
        "isa": isa,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def describe(machine: dict[str, Any]) -> str:
    isa = f", {machine['isa']}" if machine["isa"] else ""
    details = f"{machine['cores']} cores{isa}"
    if machine["device"] != "cpu":
        details = f"CUDA or ROCm {machine['cuda']}"
    return (
        f"{machine['name']}, {details}, torch {machine['torch']}, "
        f"Python {machine['python']}, {machine['system']}"
    )


def rows(contenders: list[Contender], result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row for each contender.

    A row has ``seconds`` (median), ``ratio`` (time over ours, within rounds), ``share`` (of its
    ceiling) and ``note`` (why it was not measured).
    """
    found = []
    for c in contenders:
        times = times_of(result, c.key)
        ceiling = c.ceiling if result["numel"] >= MIN_TRAFFIC else None
        found.append(
            {
                "key": c.key,
                "label": c.label,
                "color": c.color,
                "seconds": statistics.median(times) if times else None,
                "ratio": ratio(result, c.key, "ours"),
                "share": ratio(result, ceiling, c.key) if ceiling else None,
                "note": "" if times else result["failures"].get(c.key, "not measured"),
            }
        )
    return found


def plain_table(result: dict[str, Any]) -> str:
    """Return a table of fixed columns, for a terminal."""
    width = max(len(row["label"]) for row in result["rows"])
    lines = [f"{'':{width}}  {'ms':>10}  {'GB/s*':>7}  {'x ours':>7}  {'ceiling':>8}"]
    for row in result["rows"]:
        if row["seconds"] is None:
            lines.append(f"{row['label']:{width}}  {row['note']}")
            continue
        speed = BYTES_PER_PARAM * result["numel"] / row["seconds"] / 1e9
        share = "" if row["share"] is None else f"{100 * row['share']:.1f} %"
        ratio_text = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        figures = f"{1e3 * row['seconds']:10.3f}  {speed:7.2f}  {ratio_text:>7}  {share:>8}"
        lines.append(f"{row['label']:{width}}  {figures}")
    note = f"* at {BYTES_PER_PARAM} B per parameter, the traffic of our step"
    return "\n".join([*lines, note])


def markdown(run: dict[str, Any], targets: list[str]) -> str:
    """Return the section of ``docs/benchmarks.md``: machine, tables by threads, targets."""
    parts = [
        f"Measured on: {describe(run['machine'])}.",
        "Milliseconds per step, medians over interleaved rounds; in brackets the time over that of "
        "`AdamW_BF16`, median of the ratios within a round (a copy ceiling's ratio is the share of "
        "it that `AdamW_BF16` reaches). Sizes are elements of one tensor (M and B are 2^20 and "
        "2^30), or tensors x elements. Forward and backward passes are not included.",
    ]
    for threads in dict.fromkeys(result["threads"] for result in run["results"]):
        results = [result for result in run["results"] if result["threads"] == threads]
        if run["machine"]["device"] != "cuda":
            parts.append(f"**{threads} thread{'s' if threads > 1 else ''}**")
        lines = [
            "| | " + " | ".join(result["size"] for result in results) + " |",
            "|---|" + "---:|" * len(results),
        ]
        for index, row in enumerate(results[0]["rows"]):
            cells = [_cell(result["rows"][index]) for result in results]
            lines.append(f"| {row['label']} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    if "fsdp2" in run:
        fsdp2, ratios = run["fsdp2"], run["fsdp2"]["ratios"]
        parts.append(
            f"FSDP2, {fsdp2['ranks']} gloo ranks, {fsdp2['parameters']} bf16 parameters: "
            f"`optimizer.clip_grad_norm_` + step is {ratios['torch']:.1f} times as fast as "
            "`torch.nn.utils.clip_grad_norm_` + `torch.optim.AdamW.step`, "
            f"{ratios['torch fused']:.1f} times as with `fused=True`, and "
            f"{ratios['torch clip with our step']:.1f} times as when torch clips and our step "
            f"follows; the clipping alone, {fsdp2['clip_ratio']:.1f} times."
        )
    parts.append("\n".join(["```text", *targets, "```"]))
    parts.append(
        f"![Time of a step over that of AdamW_BF16](img/benchmark_{run['machine']['device']}.png)"
    )
    return "\n\n".join([*parts, f"Repeat with `{run['command']}`."])


def _cell(row: dict[str, Any]) -> str:
    if row["seconds"] is None:
        return str(row["note"]).replace("|", "\\|").replace("<", "&lt;")
    share = "" if row["share"] is None else f", {100 * row['share']:.0f} % of ceiling"
    compared = "" if row["ratio"] is None or row["key"] == "ours" else f" ({row['ratio']:.2f}x)"
    return f"{_three_digits(1e3 * row['seconds'])}{compared}{share}"


def _three_digits(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def write_section(path: Path, device: str, text: str) -> None:
    """Write the section of a device into ``docs/benchmarks.md``."""
    begin, end = f"<!-- benchmark:{device}:begin -->", f"<!-- benchmark:{device}:end -->"
    write_between_markers(path, begin, end, text)


def plot(run: dict[str, Any], path: Path) -> bool:
    """Plot the time over ours on a log scale, a panel per size, for the first thread count.

    Returns:
        False if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    threads = run["results"][0]["threads"]
    panels = [result for result in run["results"] if result["threads"] == threads]
    measured = {row["key"] for panel in panels for row in panel["rows"] if row["ratio"] is not None}
    shown = [row for row in panels[0]["rows"] if row["key"] in measured]
    columns, lines = min(3, len(panels)), -(-len(panels) // 3)
    size = (3.5 + 2.4 * columns, (0.8 + 0.3 * len(shown)) * lines)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, panel in zip(axes.flat, panels, strict=False):
        by_key = {row["key"]: row for row in panel["rows"]}
        for at, row in enumerate(shown):
            value = by_key[row["key"]]["ratio"]
            if value is not None:
                end = max(value, LIMITS[0])
                cut = " (bar cut)" if value < LIMITS[0] else ""
                axis.barh(at, end - 1, left=1, color=row["color"])
                axis.text(1.15 * max(end, 1), at, f"{value:.2f}{cut}", va="center", fontsize=9)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set(title=panel["size"], xlim=LIMITS, xscale="log", xlabel="time over AdamW_BF16")
        axis.set_xticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
        axis.set_yticks(range(len(shown)), [row["label"] for row in shown], fontsize=9)
    axes[0][0].invert_yaxis()
    suffix = "" if run["machine"]["device"] == "cuda" else f", {threads} thread(s)"
    figure.suptitle(f"{run['machine']['name']}{suffix}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return True
