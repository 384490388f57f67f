"""Tables of plans, and the generated part of ``docs/planning.md``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from planning.models import LLAMA_8B, LLAMA_70B, Shape
from planning.planner import Options, Plan, plan_all

GB = 1e9
DEVICE_GB = 80
MODELS = {"8B": LLAMA_8B, "70B": LLAMA_70B}
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
TABLE_GPUS = (8, 64, 256, 1024)
SHOWN = ("ddp", "zero1", "zero2", "fsdp1", "fsdp2", "hsdp", "tp", "fsdp2+tp")
COLUMNS = ("strategy", "grad-accum", "weights", "gradients", "states", "buffers", "activations")


def table(plans: Iterable[Plan], memory: float | None = None) -> str:
    """Return a Markdown table of plans in GB, with ``memory`` also whether each fits into it."""
    names = [*COLUMNS, "**total**", "sent", *(["fits"] if memory else [])]
    rows = [names, ["---"] * len(names)]
    for each in plans:
        peak = each.peak
        parts = (each.weights, peak.gradients, each.states, peak.buffers, peak.activations)
        row = [
            each.strategy,
            str(each.micro_batches),
            *map(_gb, (*parts, each.total, each.sent_bytes)),
        ]
        rows.append([*row, *(["yes" if each.total <= memory else "no"] if memory else [])])
    return _markdown(rows)


def docs(options: Options) -> str:
    """Return the tables of ``docs/planning.md``."""
    parts = []
    for name, shape in MODELS.items():
        plans = _by_gpus(shape, options, TABLE_GPUS)
        rows = [["", *(f"{gpus:,} GPUs" for gpus in TABLE_GPUS)], ["---"] * (len(TABLE_GPUS) + 1)]
        for strategy in SHOWN:
            cells = (_cell(plans[gpus].get(strategy)) for gpus in TABLE_GPUS)
            rows.append([strategy, *cells])
        parts.append(f"**{name}**\n\n{_markdown(rows)}")
    return "\n\n".join(parts)


def plot(options: dict[str, Options], path: Path) -> None:
    """Plot memory over the number of GPUs, for two optimizers: ``options`` by label."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    for axes, (name, shape) in zip(figure.subplots(1, 2), MODELS.items(), strict=True):
        for (label, each), style in zip(options.items(), ("-", "--"), strict=True):
            plans = _by_gpus(shape, each, GPUS)
            for index, strategy in enumerate(SHOWN):
                points = [(n, plans[n][strategy].total / GB) for n in GPUS if strategy in plans[n]]
                if points:
                    title = f"{strategy}, {label}"
                    axes.plot(*zip(*points, strict=True), style, color=f"C{index}", label=title)
        axes.axhline(DEVICE_GB, color="black", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="GB on each GPU", title=name)
        axes.set_xticks(GPUS, map(str, GPUS))
        axes.minorticks_off()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize="x-small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _by_gpus(shape: Shape, options: Options, gpus: Iterable[int]) -> dict[int, dict[str, Plan]]:
    return {n: {p.strategy: p for p in plan_all(shape, n, SHOWN, options)[0]} for n in gpus}


def _cell(plan: Plan | None) -> str:
    if plan is None:
        return ""
    total = _gb(plan.total)
    return f"{f'**{total}**' if plan.total <= DEVICE_GB * GB else total} / {_gb(plan.sent_bytes)}"


def _gb(nbytes: float) -> str:
    gb = nbytes / GB
    return f"{gb:,.0f}" if gb >= 100 else f"{gb:.3g}"


def _markdown(rows: Iterable[Iterable[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
