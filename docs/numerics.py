"""Reproduce the tables and plots of numerics.md: ``python docs/numerics.py``.

Rewrites the text between the markers of ``numerics.md`` and the plots in ``img/``. Takes about a
minute on one core. Seeded, so a second run writes the same figures. Needs matplotlib
(``pip install '.[docs]'``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import matplotlib
import torch
from torch import Tensor

from sharded_bf16_adamw.kernels import adamw_bf16_, reference

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "launch"))
from bench.markers import write_between_markers  # noqa: E402

BEGIN, END = "<!-- numerics:begin -->", "<!-- numerics:end -->"
V_STEPS, V_EVERY = 12_000, 200
GROUP = 2048  # elements of each kind of gradient
SLOPE_STEPS, SLOPE_LR = 3000, 1e-5
LR_PER_WEIGHT = [10.0**-k for k in range(2, 10)]


class Ours:
    """Our rule on a bfloat16 parameter, or our rule with one part changed.

    Args:
        start: the initial weights, bfloat16.
        change: returns a context manager that patches the reference backend.
        keep_correction: False sets the correction to zero after each step.
    """

    def __init__(
        self,
        start: Tensor,
        change: Callable[[], AbstractContextManager] | None = None,
        keep_correction: bool = True,
    ):
        self.p = start.clone()
        self.m, self.v, self.c = (torch.zeros_like(start) for _ in range(3))
        self.count = torch.zeros(())
        self.change, self.keep_correction = change, keep_correction

    def step(self, g: Tensor, lr: float, beta2: float, weight_decay: float) -> None:
        with self.change() if self.change else nullcontext():
            adamw_bf16_(
                *([tensor] for tensor in (self.p, g, self.m, self.v, self.c, self.count)),
                lr=lr,
                beta1=0.9,
                beta2=beta2,
                eps=1e-8,
                weight_decay=weight_decay,
                backend="reference" if self.change else None,
            )
        if not self.keep_correction:
            self.c.zero_()

    def weight(self) -> Tensor:
        return self.p.double() + self.c.double()


class TorchAdamW:
    """torch.optim.AdamW with parameters, states and operations of one dtype."""

    def __init__(self, start: Tensor, dtype: torch.dtype):
        self.p = torch.nn.Parameter(start.to(dtype, copy=True))
        self.optimizer = torch.optim.AdamW([self.p], foreach=False)

    def step(self, g: Tensor, lr: float, beta2: float, weight_decay: float) -> None:
        self.optimizer.param_groups[0].update(lr=lr, betas=(0.9, beta2), weight_decay=weight_decay)
        self.p.grad = g.to(self.p.dtype)
        self.optimizer.step()

    @property
    def v(self) -> Tensor:
        return self.optimizer.state[self.p]["exp_avg_sq"]

    def weight(self) -> Tensor:
        return self.p.detach().double()


def round_to_nearest() -> AbstractContextManager:
    return mock.patch.object(reference, "stochastic_round", lambda x, r: x.bfloat16())


def hash_without_step() -> AbstractContextManager:
    return mock.patch.object(reference, "step_key", return_value=0)


Rules = Mapping[str, Callable[[Tensor], "Ours | TorchAdamW"]]
RULES: Rules = {
    "round to nearest": lambda start: Ours(start, round_to_nearest),
    "all-bf16 operations": lambda start: TorchAdamW(start, torch.bfloat16),
    "fp32 master weights": lambda start: TorchAdamW(start, torch.float32),
    "ours": Ours,
}


def v_ratios(
    rules: Rules, gradient: Callable[[int], Tensor], start: Tensor, beta2: float, steps: int
) -> dict[str, Tensor]:
    """Run at lr 0 and return stored v / exact v of each rule.

    Returns:
        float64 tensors of shape ``(steps / V_EVERY, elements)``, by rule.
    """
    runs = {name: make(start) for name, make in rules.items()}
    exact = torch.zeros_like(start, dtype=torch.float64)
    ratios: dict[str, list[Tensor]] = {name: [] for name in rules}
    for t in range(1, steps + 1):
        g = gradient(t)
        exact.mul_(beta2).add_(g.double().square_(), alpha=1 - beta2)
        for run in runs.values():
            run.step(g, 0.0, beta2, 0.0)
        if t % V_EVERY == 0:
            for name, run in runs.items():
                ratios[name].append(run.v.double() / exact)
    return {name: torch.stack(r) for name, r in ratios.items()}


def slopes(
    rules: Rules, gradient: Callable[[], Tensor], start: Tensor, wd: float
) -> dict[str, Tensor]:
    """Run ``SLOPE_STEPS`` steps and compare each rule's displacement of the weight with float64's.

    ``start`` is bfloat16 of shape ``(groups, elements)``.

    Returns:
        The least-squares slope of each group, by rule.
    """
    runs = {name: make(start) for name, make in rules.items()}
    exact = TorchAdamW(start, torch.float64)
    for _ in range(SLOPE_STEPS):
        g = gradient()
        for run in [exact, *runs.values()]:
            run.step(g, SLOPE_LR, 0.999, wd)
    right = exact.weight() - start.double()
    return {
        name: ((run.weight() - start.double()) * right).sum(1) / right.square().sum(1)
        for name, run in runs.items()
    }


class Measured(NamedTuple):
    """The figures of the page."""

    v: dict[str, dict[str, Tensor]]  # stored v / exact v, by kind of gradient and rule
    slope: dict[str, Tensor]  # for each of LR_PER_WEIGHT, by rule
    rows: list[tuple[str, dict[str, str]]]  # of the first table
    ablation: list[tuple[str, str, str]]  # rows of the second table


def measure() -> Measured:
    gen = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen)

    def three_kinds(t: int) -> Tensor:
        g = normal(3, GROUP)
        g[1] *= 1.0 if t <= V_STEPS // 4 else 0.1
        g[2] *= torch.rand(GROUP, generator=gen) >= 0.95
        return g.bfloat16()

    kinds = ("Gaussian", "Gaussian that drops tenfold", "95 % zeros")
    by_rule = v_ratios(RULES, three_kinds, normal(3, GROUP).bfloat16(), 0.999, V_STEPS)
    v = {kind: {rule: r[:, i] for rule, r in by_rule.items()} for i, kind in enumerate(kinds)}
    rows = [
        (f"v, {kind}, β₂ = 0.999", {rule: with_spread(r[-1]) for rule, r in v[kind].items()})
        for kind in kinds
    ]
    long = v_ratios(
        RULES, lambda t: normal(GROUP).bfloat16(), normal(GROUP).bfloat16(), 0.9999, V_STEPS
    )
    rows.insert(
        1, ("v, Gaussian, β₂ = 0.9999", {rule: with_spread(r[-1]) for rule, r in long.items()})
    )

    size = 1 + torch.rand(len(LR_PER_WEIGHT), GROUP, generator=gen)
    start = (size * SLOPE_LR / torch.tensor(LR_PER_WEIGHT)[:, None]).bfloat16()
    drift = normal(*start.shape) / 2
    slope = slopes(RULES, lambda: (normal(*start.shape) + drift).bfloat16(), start, 0.0)
    for k in (2, 5, 7, 8):
        rows.append(
            (f"slope, lr / weight = 1e-{k}", {rule: f"{s[k - 2]:.3f}" for rule, s in slope.items()})
        )
    ones = size[:1].bfloat16()
    zero = torch.zeros_like(ones)
    decay = slopes(RULES, lambda: zero, ones, 0.1)
    rows.append(
        (
            "slope, decay alone: lr = 1e-5, wd = 0.1",
            {rule: f"{s[0]:.3f}" for rule, s in decay.items()},
        )
    )
    return Measured(v, slope, rows, ablation(gen))


def ablation(gen: torch.Generator) -> list[tuple[str, str, str]]:
    """Measure the rule without one of its parts.

    Returns:
        Rows ``(part left out, quantity, figure)``.
    """
    p, g = (torch.randn(GROUP, generator=gen).bfloat16() for _ in range(2))
    hashed = {"ours": Ours, "without": lambda start: Ours(start, hash_without_step)}
    constant = {
        name: r[len(r) // 3 :].mean()
        for name, r in v_ratios(hashed, lambda t: g, p, 0.999, 6000).items()
    }
    start, drift = (
        (1 + torch.rand(1, GROUP, generator=gen)).bfloat16(),
        torch.randn(1, GROUP, generator=gen) / 2,
    )
    corrected = {"ours": Ours, "without": lambda start: Ours(start, keep_correction=False)}
    moved = slopes(
        corrected, lambda: (torch.randn(1, GROUP, generator=gen) + drift).bfloat16(), start, 0.0
    )
    return [
        ("nothing", "time-mean of v, constant gradient", f"{constant['ours']:.3f}"),
        (
            "the step, from the hash",
            "time-mean of v, constant gradient",
            f"{constant['without']:.3f}",
        ),
        ("nothing", "slope, lr / weight = 1e-5", f"{moved['ours'].item():.3f}"),
        ("the correction", "slope, lr / weight = 1e-5", f"{moved['without'].item():.3f}"),
    ]


def with_spread(ratio: Tensor) -> str:
    mean, std = ratio.mean().item(), ratio.std().item()
    return f"{mean:.3f} ± {std:.3f}" if mean < 10 else f"{mean:.0f} ± {std:.0f}"


def tables(measured: Measured) -> str:
    """Return both tables in Markdown."""
    lines = ["| | " + " | ".join(RULES) + " |", "|---|" + "---|" * len(RULES)]
    lines += [
        f"| {name} | " + " | ".join(figures[rule] for rule in RULES) + " |"
        for name, figures in measured.rows
    ]
    lines += ["", "| left out | measured | |", "|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in measured.ablation]
    return "\n".join(lines)


STYLE: dict[str, dict[str, Any]] = {
    "round to nearest": {"color": "C1", "linestyle": "--"},
    "all-bf16 operations": {"color": "C3", "linestyle": ":"},
    # wide and pale, as ours lies upon it
    "fp32 master weights": {"color": "C7", "linewidth": 6, "alpha": 0.45},
    "ours": {"color": "C0"},
}


def plot_v(v: dict[str, dict[str, Tensor]], path: Path) -> None:
    figure, axes = plt.subplots(1, len(v), figsize=(10, 3.2), layout="constrained")
    for axis, (kind, by_rule) in zip(axes, v.items(), strict=True):
        for rule, ratio in by_rule.items():
            axis.semilogy(
                [V_EVERY * (i + 1) for i in range(len(ratio))],
                ratio.mean(1),
                label=rule,
                **STYLE[rule],
            )
        axis.set(title=kind, xlabel="step", ylim=(0.5, 300))
    axes[0].set_ylabel("stored v / exact v, mean")
    axes[-1].legend(fontsize="small")
    figure.savefig(path, dpi=100)


def plot_slope(slope: dict[str, Tensor], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for rule, s in slope.items():
        axis.semilogx(LR_PER_WEIGHT, s, marker=".", label=rule, **STYLE[rule])
    axis.set(xlabel="learning rate / weight", ylabel="displacement / exact displacement")
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=100)


def main() -> None:
    torch.set_num_threads(1)
    measured = measure()
    markdown = tables(measured)
    print(markdown)
    write_between_markers(HERE / "numerics.md", BEGIN, END, markdown)
    (HERE / "img").mkdir(exist_ok=True)
    plot_v(measured.v, HERE / "img" / "numerics_v.png")
    plot_slope(measured.slope, HERE / "img" / "numerics_slope.png")


if __name__ == "__main__":
    main()
