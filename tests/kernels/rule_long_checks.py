"""Checks of the update rule over thousands of steps, against the same recurrences in float64.

Each takes the update function, as in ``rule_checks``, and checks several steps on the way, so that
a wrong rule fails early.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .rule_checks import Update


def v_ratios(
    update: Update,
    gradients: Callable[[int], Tensor],
    p: Tensor,
    v: Tensor,
    beta2: float,
    steps: int,
    every: int,
) -> Iterator[tuple[int, Tensor]]:
    """Run ``steps`` steps at lr 0 and yield ``(step, stored v / exact v)`` every few steps.

    Args:
        update: the update function.
        gradients: returns the bfloat16 gradient of a 1-based step.
        p: bfloat16 parameter. Not changed.
        v: bfloat16 exp_avg_sq at the start. Not changed.
        beta2: the decay rate of v.
        steps: the number of steps.
        every: the number of steps between two results.
    """
    p, exact, v = p.clone(), v.double(), v.clone()
    m, c, count = torch.zeros_like(p), torch.zeros_like(p), torch.zeros(())
    for t in range(1, steps + 1):
        g = gradients(t)
        lists = [[p], [g], [m], [v], [c], [count]]
        update(*lists, lr=0.0, beta1=0.9, beta2=beta2, eps=1e-8, weight_decay=0.0)
        exact.mul_(beta2).add_(g.double().square_(), alpha=1 - beta2)
        if t % every == 0:
            yield t, v.double() / exact


def assert_ratio(ratio: Tensor, tolerance: float, what: str, spread: float = float("inf")) -> None:
    mean, std = ratio.mean().item(), ratio.std().item()
    assert abs(mean - 1) < tolerance, f"{what}: mean of stored v / exact v is {mean:.4f}"
    assert std < spread, f"{what}: stored v / exact v scatters by {std:.4f}"


def check_v_gaussian(update: Update, steps: int = 10_000, n: int = 4096) -> None:
    """Check v at beta2 = .999: Gaussian gradients, some that drop tenfold, some 95 % sparse."""
    gen, drop_at = torch.Generator().manual_seed(20), steps // 5
    p = torch.randn(3 * n, generator=gen).bfloat16()
    spike = torch.zeros(3 * n, dtype=torch.bool)

    def gradients(t: int) -> Tensor:
        g = torch.randn(3 * n, generator=gen)
        if t > drop_at:
            g[n : 2 * n] *= 0.1
        spike[2 * n :] = torch.rand(n, generator=gen) < 0.95
        return g.masked_fill_(spike, 0.0).bfloat16()

    for t, ratio in v_ratios(update, gradients, p, torch.zeros_like(p), 0.999, steps, steps // 10):
        steady, dropped, sparse = ratio.split(n)
        assert_ratio(steady, 0.01, f"Gaussian, step {t}", spread=0.06)
        assert_ratio(dropped, 0.01, f"Gaussian that drops tenfold, step {t}")
        assert_ratio(sparse, 0.01, f"95 % sparse, step {t}")
    assert_ratio(dropped, 0.01, "Gaussian that dropped tenfold, at the end", spread=0.06)


def check_v_long_memory(update: Update, steps: int = 10_000, n: int = 4096) -> None:
    """Check v at beta2 = .9999.

    One step changes v by a hundredth of bfloat16's resolution.
    """
    gen = torch.Generator().manual_seed(21)
    p = torch.randn(n, generator=gen).bfloat16()
    for t, ratio in v_ratios(
        update,
        lambda t: torch.randn(n, generator=gen).bfloat16(),
        p,
        torch.zeros_like(p),
        0.9999,
        steps,
        steps // 10,
    ):
        assert_ratio(ratio, 0.01, f"Gaussian, beta2 .9999, step {t}", spread=0.06)


def check_v_constant_gradient(update: Update, steps: int = 6000, n: int = 1024) -> None:
    """Check the mean of v over time, with a constant gradient and fixed weights.

    The step is then the only input of the hash that changes.
    """
    gen = torch.Generator().manual_seed(22)
    p, g = (torch.randn(n, generator=gen).bfloat16() for _ in range(2))
    ratios = v_ratios(update, lambda t: g, p, torch.zeros_like(p), 0.999, steps, 20)
    ratio = torch.stack([r for t, r in ratios if t > steps // 3])
    assert_ratio(ratio.mean(dim=0), 0.01, "constant gradient, mean over time", spread=0.06)


def check_v_zero_gradient(update: Update, steps: int = 4000) -> None:
    """Check that v decays under zero gradients.

    The elements differ only in the weight: every fifth of the 65,280 finite ones.
    """
    p = torch.arange(0, 1 << 16, 5, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    p = p[p.isfinite()]
    zero = torch.zeros_like(p)
    for t, ratio in v_ratios(
        update, lambda t: zero, p, torch.full_like(p, 0.7), 0.999, steps, steps // 8
    ):
        assert_ratio(ratio, 0.02, f"zero gradient, step {t}")


def displacement_slopes(
    update: Update,
    p: Tensor,
    c: Tensor,
    gradients: Callable[[], Tensor],
    steps: int,
    lr: float,
    wd: float,
) -> Iterator[tuple[int, float]]:
    """Yield ``(step, displacement of the true weight / that in float64)`` twice.

    First after a tenth of the steps, then after all. The true weight is ``p + c``; both (bfloat16)
    are changed in place. The ratio is the slope of the least-squares line through the origin.
    """
    start = p.double() + c.double()
    m, v, count = torch.zeros_like(p), torch.zeros_like(p), torch.zeros(())
    w, m64, v64 = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for t in range(1, steps + 1):
        g = gradients()
        lists = [[p], [g], [m], [v], [c], [count]]
        update(*lists, lr=lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=wd)
        g64 = g.double()
        m64.mul_(0.9).add_(g64, alpha=0.1)
        v64.mul_(0.999).add_(g64.square_(), alpha=0.001)
        denominator = (v64 / (1 - 0.999**t)).sqrt_().add_(1e-8)
        w.mul_(1 - lr * wd).addcdiv_(m64, denominator, value=-lr / (1 - 0.9**t))
        if t in (steps // 10, steps):
            moved, exact = p.double() + c.double() - start, w - start
            yield t, ((moved * exact).sum() / exact.square().sum()).item()


def check_displacement(update: Update, steps: int = 3000, n: int = 8192) -> None:
    """Check that no update is lost.

    An update is 1e-5 or 1e-7 of the weight, far below bfloat16's resolution, or is decay alone.
    """
    gen = torch.Generator().manual_seed(23)
    size = 1 + torch.rand(n, generator=gen)  # so that lr / weight is lr, up to a factor of 2
    sign = torch.randint(0, 2, (n,), generator=gen) * 2 - 1
    p = (size * sign).bfloat16()
    drift = torch.randn(n, generator=gen) / 2

    def noisy() -> Tensor:
        return (torch.randn(n, generator=gen) + drift).bfloat16()

    zero = torch.zeros_like(p)
    for what, lr, wd, tolerance, gradients in (
        ("lr 1e-7", 1e-7, 0.0, 0.02, noisy),  # first, because mutants fail here
        ("lr 1e-5", 1e-5, 0.0, 0.01, noisy),
        ("decay only", 1e-5, 0.1, 0.01, lambda: zero),
    ):
        for t, slope in displacement_slopes(
            update, p.clone(), torch.zeros_like(p), gradients, steps, lr, wd
        ):
            allowed = tolerance if t == steps else 0.1
            assert abs(slope - 1) < allowed, (
                f"{what}, step {t}: the true weight moved {slope:.4f} of the way"
            )
