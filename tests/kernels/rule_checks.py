"""Checks of one step of the update rule.

Each takes the update function, so that it can be run on wrong rules (mutants) too. An update
function has the signature of ``sharded_bf16_adamw.kernels.adamw_bf16_``, without ``backend``. A
check returns nothing and raises AssertionError if the rule is violated. All randomness comes from
seeded generators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from bits import assert_same_bits
from torch import Tensor

from .rule_oracle import Hyperparams, step_bf16

Update = Callable[..., None]
DEFAULT = Hyperparams()
# bfloat16 patterns from zero to NaN; random_patterns adds the signs
SPECIAL = [0x0000, 0x0001, 0x007F, 0x0080, 0x3F80, 0x7F7F, 0x7F80, 0x7F81, 0x7FC0, 0x7FFF]


class State(NamedTuple):
    """The five tensors of one bfloat16 parameter; the gradient may be float32."""

    p: Tensor
    g: Tensor
    m: Tensor
    v: Tensor
    c: Tensor

    def map(self, f: Callable[[Tensor], Tensor]) -> State:
        return State(*(f(x) for x in self))


def bits(x: Tensor) -> np.ndarray:
    """Return the stored bits of a contiguous bfloat16 (uint16) or float32 (uint32) tensor."""
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(np.uint16)
    return x.view(torch.int32).numpy().view(np.uint32)


def from_bits(pattern: np.ndarray) -> Tensor:
    """Return a new tensor of the given bits: the inverse of :func:`bits`."""
    if pattern.dtype == np.uint16:
        return torch.from_numpy(pattern.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(pattern.view(np.int32).copy()).view(torch.float32)


def stepped(update: Update, state: State, t: int, h: Hyperparams = DEFAULT, **kwargs: Any) -> State:
    """Return the tensors after step ``t``. ``state`` does not change."""
    new = state.map(torch.clone)
    count = torch.tensor(float(t - 1))
    update([new.p], [new.g], [new.m], [new.v], [new.c], [count], **h._asdict(), **kwargs)
    assert count.item() == t
    return new


def expected(state: State, t: int, h: Hyperparams = DEFAULT, scale: float = 1.0):
    """Return the result of the independent implementation for ``state`` at step ``t``."""
    return step_bf16(*(bits(x) for x in state), t=t, h=h, scale=scale)


def assert_matches_oracle(new: State, wanted: Any) -> None:
    for name in ("p", "m", "v", "c"):
        assert_same_bits(getattr(new, name), from_bits(getattr(wanted, name)), name, any_nan=True)


def typical(n: int, seed: int, scale: float = 1e-2) -> State:
    """Return a state as in training.

    Weights are of size 1, gradients of size ``scale``, corrections below half an ulp.
    """
    gen = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(n, generator=gen)

    p, g, m, v = (
        normal().bfloat16(),
        (normal() * scale).bfloat16(),
        (normal() * scale / 3).bfloat16(),
        (normal() * scale).square(),
    )
    ulp = torch.from_numpy(np.spacing(np.abs(p.float().numpy()))) * 2**16
    c = (torch.rand(n, generator=gen) - 0.5) * ulp
    return State(p, g, m, v.bfloat16(), c.bfloat16())


def random_patterns(n: int, seed: int, grad: type = np.uint16) -> State:
    """Return uniformly random bits, then special values.

    They include all magnitudes, subnormals, infinities and NaNs.
    """
    rng = np.random.default_rng(seed)
    special = np.array([s | sign for s in SPECIAL for sign in (0, 0x8000)], dtype=np.uint16)
    columns = [
        np.concatenate([rng.integers(0, 1 << 16, n, dtype=np.uint16), rng.choice(special, n)])
        for _ in range(5)
    ]
    keep_sign = np.uint16(0x7FFF)
    columns[3][: n // 2] &= keep_sign  # half of v as in training: not negative
    state = State(*(from_bits(x) for x in columns))
    if grad is np.uint32:
        low = rng.integers(0, 1 << 16, 2 * n, dtype=np.uint32)
        state = state._replace(g=from_bits(columns[1].astype(np.uint32) << 16 | low))
    return state


def check_oracle(update: Update, n: int = 1 << 15) -> None:
    """Check every bit against the oracle.

    Inputs are random patterns and typical values, bfloat16 and float32 gradients, and small and
    large steps.
    """
    for seed, (t, h) in enumerate(
        [
            (1, Hyperparams()),
            (2, Hyperparams(lr=3e-4, beta1=0.95, beta2=0.95, eps=1e-6, weight_decay=0.0)),
            (777, Hyperparams(lr=1e-5, beta1=0.0, beta2=0.9999, eps=0.0)),
            (123_457, Hyperparams(lr=0.3, beta1=0.8, weight_decay=1e-2)),
        ]
    ):
        for state in (
            random_patterns(n, seed),
            random_patterns(n, seed, np.uint32),
            typical(n, seed),
            typical(n, seed, 1e-18),
        ):
            assert_matches_oracle(stepped(update, state, t, h), expected(state, t, h))


def check_scaled(update: Update) -> None:
    """Check that ``grad_scale`` multiplies in fp32 after hashing, and that ``maximize`` negates."""
    for state in (typical(5000, 1), random_patterns(5000, 2, np.uint32)):
        for scale in (0.3, 1.0, 0.0):
            scale32 = torch.tensor(scale)
            wanted = expected(state, 5, scale=scale32.item())
            assert_matches_oracle(stepped(update, state, 5, grad_scale=scale32), wanted)
            wanted = expected(state, 5, scale=-scale32.item())
            assert_matches_oracle(
                stepped(update, state, 5, grad_scale=scale32, maximize=True), wanted
            )
    state = typical(5000, 3)
    ascended = stepped(update, state, 5, Hyperparams(weight_decay=0.0), maximize=True)
    assert_matches_oracle(ascended, expected(state, 5, Hyperparams(weight_decay=0.0), scale=-1.0))


def rounding_errors(stored: Tensor, unrounded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the discarded fraction ``f`` and the rounding error of each element.

    The error is ``1 - f`` or ``-f``. Both are in units of the last place kept.
    """
    pattern = unrounded.view(np.uint32)
    f = (pattern & 0xFFFF) / 65536.0
    up = bits(stored).astype(np.int64) - (pattern >> 16)
    assert ((up == 0) | (up == 1)).all(), "a stored value is not a neighbour of the exact one"
    assert (up[f == 0] == 0).all(), "a value that bfloat16 holds exactly was changed"
    return f, up - f


def z_score(f: np.ndarray, error: np.ndarray) -> float:
    """Return the summed error in standard deviations of a sum of unbiased stochastic roundings."""
    return float(error.sum() / np.sqrt((f * (1 - f)).sum()))


def check_one_step_unbiased(update: Update, n: int = 1 << 20) -> None:
    """Check that stochastic rounding of m, v and c has no mean error.

    It has none overall, and none in any decile of the discarded fraction.
    """
    state = typical(n, 10)
    new, wanted = stepped(update, state, 7), expected(state, 7)
    for name, unrounded in (("m", wanted.mn), ("v", wanted.vn), ("c", wanted.cn)):
        f, error = rounding_errors(getattr(new, name), unrounded)
        assert abs(z_score(f, error)) < 5, f"{name}: bias z = {z_score(f, error):.1f}"
        for decile in range(10):
            some = (f * 10).astype(int) == decile
            assert some.sum() > n / 40, f"{name}: too few samples to judge decile {decile}"
            z = z_score(f[some], error[some])
            assert abs(z) < 5, f"{name}, decile {decile}: bias z = {z:.1f}"


def check_uncorrelated(update: Update, n: int = 1 << 20) -> None:
    """Check that rounding errors correlate neither with their inputs nor with each other.

    Each error is compared with those of the next element and of the next step.
    """
    state = typical(n, 11)
    order = torch.argsort(state.g.float(), stable=True)
    state = state.map(lambda x: x[order])  # so that neighbours have similar gradients
    now, later = stepped(update, state, 20), stepped(update, state, 21)
    both = [(now, expected(state, 20)), (later, expected(state, 21))]
    for name, rounded in (("m", "mn"), ("v", "vn"), ("c", "cn")):
        e = [
            rounding_errors(getattr(new, name), getattr(wanted, rounded))[1] for new, wanted in both
        ]
        for what, r in (
            ("step", correlation(e[0], e[1])),
            ("element", correlation(e[0][1:], e[0][:-1])),
        ):
            assert abs(r) < 0.005, f"{name}: autocorrelation from {what} to {what} is {r:.4f}"
        for source in State._fields:
            r = correlation(e[0], getattr(state, source).double().numpy())
            assert abs(r) < 0.005, (
                f"{name}: correlation of the rounding error with {source} is {r:.4f}"
            )


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def check_each_input_mixes(update: Update, steps: int = 32, n: int = 4096) -> None:
    """Check that rounding errors look independent if only one of g, p, m, v, c varies."""
    patterns = np.arange(0x3000, 0x3000 + n, dtype=np.uint16)
    base = State(*(torch.full((n,), x).bfloat16() for x in (1e-2, 0.7, 2e-3, 1e-4, 1e-5)))
    for source in State._fields:
        state = base._replace(**{source: from_bits(patterns)})
        errors: dict[str, list[np.ndarray]] = {"m": [], "v": [], "c": []}
        for t in range(1, steps + 1):
            new, wanted = stepped(update, state, t), expected(state, t)
            for name, unrounded in (("m", wanted.mn), ("v", wanted.vn), ("c", wanted.cn)):
                errors[name].append(rounding_errors(getattr(new, name), unrounded)[1])
        for name, e in errors.items():
            assert_patternless(np.stack(e), patterns, f"{name} while only {source} varies")


def assert_patternless(e: np.ndarray, patterns: np.ndarray, what: str) -> None:
    """Assert that the errors ``e[step, element]`` have no pattern.

    They correlate with no bit of the input, nor with the errors of the previous step or of elements
    1 to 511 away.
    """
    r = correlation(e[1:].ravel(), e[:-1].ravel())
    assert abs(r) < 0.02, f"{what}: steps correlate by {r:.3f}"
    for bit in range(12):
        r = correlation(e.ravel(), np.tile(patterns >> bit & 1, len(e)))
        assert abs(r) < 0.02, f"{what}: bit {bit} correlates by {r:.3f}"
    spectrum = np.abs(np.fft.rfft(e - e.mean(axis=1, keepdims=True), 2 * e.shape[1])) ** 2
    lagged = np.fft.irfft(spectrum.sum(axis=0))[:512]
    assert lagged[0] > 0, f"{what}: all elements are rounded alike"
    lag = 1 + int(np.abs(lagged[1:]).argmax())
    r = lagged[lag] / lagged[0]
    assert abs(r) < 0.02, f"{what}: elements {lag} apart correlate by {r:.3f}"


def check_layout_free(update: Update, n: int = 70_001) -> None:
    """Check that permuting or splitting the elements permutes or splits the result, bit for bit."""
    state, gen = typical(n, 12), torch.Generator().manual_seed(13)
    whole = stepped(update, state, 9)
    order = torch.randperm(n, generator=gen)
    permuted = stepped(update, state.map(lambda x: x[order]), 9)
    for a, b in zip(whole, permuted, strict=True):
        assert torch.equal(a[order].view(torch.int16), b.view(torch.int16)), (
            "permuted elements are rounded differently"
        )
    for sizes in ([1, n - 1], [n // 2, n - n // 2], [n // 3] * 3 + [n - 3 * (n // 3)]):
        pieces = [
            stepped(update, State(*piece), 9)
            for piece in zip(*(x.split(sizes) for x in state), strict=True)
        ]
        for a, b in zip(whole, map(torch.cat, zip(*pieces, strict=True)), strict=True):
            assert torch.equal(a.view(torch.int16), b.view(torch.int16)), (
                f"split into {sizes}, elements are rounded differently"
            )


def check_nonfinite(update: Update) -> None:
    """Check that NaN of any payload and infinity are preserved.

    Rounding makes no finite value infinite.
    """
    n, quiet = 4096, Hyperparams(lr=0.0, weight_decay=0.0)
    base = typical(n, 14)
    for pattern in (0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0x7F800001, 0xFFFF8000):
        new = stepped(update, base._replace(g=from_bits(np.full(n, pattern, dtype=np.uint32))), 3)
        for name, x in (("p", new.p), ("m", new.m), ("v", new.v), ("c", new.c)):
            assert x.isnan().all(), f"{name} lost the NaN of gradient {pattern:#x}"
    for sign in (1, -1):
        new = stepped(update, base._replace(g=torch.full((n,), sign * torch.inf).bfloat16()), 3)
        assert (
            (new.m == sign * torch.inf).all() and (new.v == torch.inf).all() and new.p.isnan().all()
        )
    largest = torch.finfo(torch.bfloat16).max
    full = torch.full((n,), largest).bfloat16()
    keep = quiet._replace(beta1=0.0, beta2=0.0)  # m = g and v = g * g exactly
    many = typical(1 << 19, 14)  # enough elements that some draw the random bits 0
    for sign in (1, -1):
        g = torch.full_like(many.g, sign * largest)
        assert (stepped(update, many._replace(g=g), 3, keep).m == g).all(), (
            "the largest finite value was changed by rounding"
        )
    for sign in (1, -1):
        new = stepped(update, base._replace(p=sign * full, c=torch.zeros_like(full)), 3, quiet)
        assert (new.p == sign * full).all() and (new.c == 0).all()
