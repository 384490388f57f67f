"""Checks around the bfloat16 rule: float32 tensors, options of a call, several tensors at once.

Each takes the update function, as in ``rule_checks``.
"""

from __future__ import annotations

import torch
from bits import assert_same_bits
from torch import Tensor

from .rule_checks import Update, bits, stepped, typical
from .rule_oracle import Hyperparams


def float64_adamw(
    p: Tensor, gradients: list[Tensor], h: Hyperparams, maximize: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return weight, exp_avg and exp_avg_sq of torch's own AdamW in float64."""
    w = p.double().requires_grad_()
    optimizer = torch.optim.AdamW(
        [w],
        lr=h.lr,
        betas=(h.beta1, h.beta2),
        eps=h.eps,
        weight_decay=h.weight_decay,
        maximize=maximize,
    )
    for g in gradients:
        w.grad = g.double()
        optimizer.step()
    state = optimizer.state[w]
    return w.detach(), state["exp_avg"], state["exp_avg_sq"]


def assert_close(actual: Tensor, exact: Tensor, relative: float, what: str) -> None:
    error = ((actual.double() - exact).norm() / exact.norm()).item()
    assert error < relative, f"{what}: relative error {error:.2e}"


def check_float32_parameters(update: Update, steps: int = 50, n: int = 3000) -> None:
    """Check that float32 parameters follow AdamW in float64 to float32's precision.

    Their gradients are float32 or bfloat16.
    """
    gen, h = torch.Generator().manual_seed(30), Hyperparams(lr=1e-2)
    start = torch.randn(n, generator=gen)
    for dtype in (torch.float32, torch.bfloat16):
        for maximize in (False, True):
            gradients = [(torch.randn(n, generator=gen) * 0.1).to(dtype) for _ in range(steps)]
            p, m, v, count = start.clone(), torch.zeros(n), torch.zeros(n), torch.zeros(())
            for g in gradients:
                update([p], [g], [m], [v], [None], [count], **h._asdict(), maximize=maximize)
            w, m64, v64 = float64_adamw(start, gradients, h, maximize)
            # weights of size 1 have a resolution of 1e-7, and move by about .05
            assert_close(p - start, w - start.double(), 1e-5, "displacement")
            assert_close(m, m64, 1e-6, "exp_avg")
            assert_close(v, v64, 1e-6, "exp_avg_sq")


def check_tracks_float64(update: Update, steps: int = 200, n: int = 20_000) -> None:
    """Check that the true weight ``p + c`` follows AdamW in float64, elementwise, without drift."""
    gen, h = torch.Generator().manual_seed(31), Hyperparams(lr=1e-3, beta2=0.99)
    p = torch.randn(n, generator=gen).bfloat16()
    gradients = [torch.randn(n, generator=gen).bfloat16() for _ in range(steps)]
    w, _, _ = float64_adamw(p, gradients, h)
    start, m, v, c, count = (
        p.double(),
        torch.zeros_like(p),
        torch.zeros_like(p),
        torch.zeros_like(p),
        torch.zeros(()),
    )
    for g in gradients:
        update([p], [g], [m], [v], [c], [count], **h._asdict())
    moved, exact = p.double() + c.double() - start, w - start
    slope = ((moved * exact).sum() / exact.square().sum()).item()
    assert abs(slope - 1) < 0.002, f"the true weight moved {slope:.4f} of the way"
    # limited by the 8 bits of the moments
    assert_close(moved, exact, 0.01, "displacement of the true weight")
    half_ulp = p.abs().double() * 2**-8 + 1e-12
    assert (c.double().abs() <= half_ulp * 1.01).all(), (
        "the correction exceeds the rounding error of bfloat16"
    )


def check_float32_gradient_folds(update: Update) -> None:
    """Check the hash of float32 gradients.

    A float32 gradient that bfloat16 holds exactly has the effect of that bfloat16 gradient. The low
    bits of any other one reach the random bits.
    """
    state = typical(5000, 32)
    narrow, wide = stepped(update, state, 4), stepped(update, state._replace(g=state.g.float()), 4)
    assert_same_bits(wide._replace(g=narrow.g), narrow, "float32 gradient")
    finer = stepped(update, state._replace(g=state.g.float() * (1 + 2**-20)), 4)
    # by its value alone, so small a change affects almost no element
    rounded_otherwise = (finer.v != narrow.v).float().mean().item()
    assert rounded_otherwise > 0.1, (
        "the low bits of a float32 gradient do not reach the random bits"
    )


def check_found_inf(update: Update) -> None:
    """Check that a nonzero found_inf leaves every tensor, step and gradient unchanged.

    A found_inf of zero does not affect the step.
    """
    state = typical(5000, 33)
    new, count = state.map(torch.clone), torch.tensor(6.0)
    lists = [[new.p], [new.g], [new.m], [new.v], [new.c], [count]]
    update(*lists, **Hyperparams()._asdict(), found_inf=torch.tensor(1.0))
    assert count.item() == 6
    assert_same_bits(new, state, "found_inf")
    assert_same_bits(
        stepped(update, state, 7, found_inf=torch.tensor(0.0)),
        stepped(update, state, 7),
        "found_inf = 0",
    )


def check_gradient_only_read(update: Update) -> None:
    """Check that a step leaves the gradient unchanged, whatever its values."""
    state = typical(70_000, 34)
    for g in (state.g, state.g.float(), torch.full_like(state.g, torch.nan)):
        assert (bits(stepped(update, state._replace(g=g), 7).g) == bits(g)).all()


def check_many_tensors(update: Update) -> None:
    """Check one call for tensors of mixed dtypes, sizes and steps against a call for each.

    The lr of the one call is a number or a tensor.
    """
    h, sizes = Hyperparams(lr=2.0**-7), (1, 0, 7, 1024, 65_536, 65_539)
    for lr in (h.lr, torch.tensor(h.lr)):
        rows = [typical(n, 40 + i) for i, n in enumerate(sizes)]
        rows[2] = rows[2]._replace(g=rows[2].g.float())
        together = [row.map(torch.clone) for row in rows]
        counts = [torch.tensor(float(i)) for i in range(len(rows))]
        wide = [torch.ones(33), torch.full((33,), 0.3), torch.zeros(33), torch.zeros(33)]
        wide_alone, wide_count = [x.clone() for x in wide], torch.zeros(())
        p, g, m, v, c = (list(column) for column in zip(*together, strict=True))
        update(
            [*p, wide[0]],
            [*g, wide[1]],
            [*m, wide[2]],
            [*v, wide[3]],
            [*c, None],
            [*counts, wide_count],
            **h._replace(lr=lr)._asdict(),  # type: ignore[arg-type]
        )
        for i, row in enumerate(rows):
            assert counts[i].item() == i + 1
            assert_same_bits(together[i], stepped(update, row, i + 1, h), f"tensor {i}")
        update(*([x] for x in wide_alone), [None], [torch.zeros(())], **h._asdict())
        assert all(torch.equal(a, b) for a, b in zip(wide, wide_alone, strict=True))
        assert wide_count.item() == 1
