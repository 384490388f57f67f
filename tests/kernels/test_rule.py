"""The update rule on every CPU backend: bits, statistics, and the scalars of a step."""

from __future__ import annotations

import math
from fractions import Fraction
from types import ModuleType

import numpy as np
import pytest
import torch

from sharded_bf16_adamw import kernels
from sharded_bf16_adamw.kernels.reference import (
    _random_bits,
    _sqrt,
    lowbias32,
    power,
    step_key,
    step_scalars,
    stochastic_round,
)

from . import rule_checks, rule_long_checks, rule_option_checks, rule_oracle
from .backends import cpu_backends, skip_reason, update_of
from .rule_checks import bits, from_bits, random_patterns, typical
from .rule_oracle import (
    Hyperparams,
    exact_scalars,
    round_stochastically,
    step_bf16,
    to_nearest_even,
)


def checks_in(*modules: ModuleType) -> list:
    """Return a pytest parameter for each check of some modules."""
    return [
        pytest.param(check, id=name)
        for module in modules
        for name, check in vars(module).items()
        if name.startswith("check_")
    ]


@pytest.fixture(params=cpu_backends())
def update(request: pytest.FixtureRequest):
    """Return the update function of each backend in turn."""
    return update_of(request.param)


@pytest.mark.parametrize("check", checks_in(rule_checks, rule_option_checks))
def test_rule(check, update):
    check(update)


@pytest.mark.parametrize("check", checks_in(rule_long_checks))
def test_rule_over_thousands_of_steps(check):
    """One backend is enough, since all give the same bits; the reference would take minutes."""
    check(update_of("reference" if skip_reason("native") else "native"))


def test_global_generator_untouched(update):
    before = torch.get_rng_state()
    rule_checks.stepped(update, typical(1000, 50), 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_oracle_is_elementwise():
    """A test of the oracle: operations on arrays equal those on single elements."""
    state = [
        np.concatenate([bits(a)[:300], bits(b)[:300]])
        for a, b in zip(random_patterns(300, 51), typical(300, 52), strict=True)
    ]
    together = step_bf16(*state, t=11, h=Hyperparams())
    for i in range(state[0].size):
        alone = step_bf16(*(x[i] for x in state), t=11, h=Hyperparams())
        for a, b in zip(alone, together, strict=True):
            assert np.array_equal(a, b[i], equal_nan=b.dtype.kind == "f")


def test_oracle_rounds_as_torch_casts():
    """A test of the oracle: its integer rounding equals torch's cast to bfloat16."""
    x = np.random.default_rng(53).integers(0, 1 << 32, 1 << 18, dtype=np.uint32)
    finite = x[np.isfinite(x.view(np.float32))]
    assert (to_nearest_even(finite.view(np.float32)) == bits(from_bits(finite).bfloat16())).all()


def test_hash_equals_the_oracle():
    x = np.random.default_rng(54).integers(0, 1 << 32, 1 << 16, dtype=np.uint32)
    assert (
        bits_of_int32(lowbias32(torch.from_numpy(x.view(np.int32))))
        == rule_oracle.lowbias32(x.astype(np.uint64))
    ).all()


def test_hash_is_lowbias32():
    """hash-prospector's published inverse inverts it, so every shift and constant is right."""
    x = np.random.default_rng(57).integers(0, 1 << 32, 1 << 16, dtype=np.uint64)
    y = rule_oracle.lowbias32(x)
    y = (y ^ y >> 16) * 0x43021123 & 0xFFFFFFFF
    y = (y ^ y >> 15 ^ y >> 30) * 0x1D69E2A5 & 0xFFFFFFFF
    assert (y ^ y >> 16 == x).all()


ELEMENTS = {
    name: np.random.default_rng([58, i]).integers(0, 1 << 16, 1 << 12, dtype=np.uint16)
    for i, name in enumerate("gpmvc")
}


def random_bits_of(elements: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Return the random bits of m, v and c over 16 steps."""
    inputs = {name: from_bits(x) for name, x in elements.items()}
    draws = [_random_bits(**inputs, key=step_key(t)) for t in range(1, 17)]
    return [torch.cat(of_steps).numpy() for of_steps in zip(*draws, strict=True)]


@pytest.fixture(scope="module")
def random_bits_of_elements() -> list[np.ndarray]:
    return random_bits_of(ELEMENTS)


# A bit of the gradient, weight, exp_avg, exp_avg_sq or correction.
INPUTS = [(source, bit) for source in "gpmvc" for bit in range(16)]


@pytest.mark.parametrize(
    ("source", "bit"), INPUTS, ids=[f"{source}{bit}" for source, bit in INPUTS]
)
def test_every_input_bit_decorrelates_the_random_bits(
    source: str, bit: int, random_bits_of_elements: list[np.ndarray]
):
    """Elements that differ in one stored bit get uncorrelated random bits."""
    others = random_bits_of(ELEMENTS | {source: ELEMENTS[source] ^ np.uint16(1 << bit)})
    for draw, (a, b) in enumerate(zip(random_bits_of_elements, others, strict=True)):
        r = rule_checks.correlation(a, b)
        # five standard deviations of independent draws
        assert abs(r) < 0.02, f"draw {draw}: correlation {r:.3f}"


def test_random_bits_change_with_the_step_alone():
    """If only the step changes, the random bits are uniform over time and uncorrelated."""
    at_rest = {
        name: torch.tensor([x]).bfloat16()
        for name, x in (("g", 0.0), ("p", 1.0), ("m", 0.0), ("v", 1e-4), ("c", 0.0))
    }
    draws = np.array(
        [[int(x) for x in _random_bits(**at_rest, key=step_key(t))] for t in range(1, 4001)]
    )
    for r in draws.T:
        counts = np.bincount(r >> 12, minlength=16)
        chi_squared = ((counts - 250) ** 2 / 250).sum()
        assert chi_squared < 45  # 15 degrees of freedom: 1 in 10,000
        assert abs(rule_checks.correlation(r[1:], r[:-1])) < 0.064  # four standard deviations


def bits_of_int32(x: torch.Tensor) -> np.ndarray:
    return x.numpy().view(np.uint32)


def test_stochastic_round_every_nan_and_infinity():
    """Every float32 NaN stays NaN, and both infinities stay."""
    x = np.arange(0x7F800000, 0x80000000, dtype=np.uint32)
    r = np.random.default_rng(55).integers(0, 1 << 16, x.size, dtype=np.int32)
    for sign in (0, 0x80000000):
        value = from_bits(x | np.uint32(sign))
        rounded = stochastic_round(value, torch.from_numpy(r))
        assert rounded[1:].isnan().all()
        assert rounded[0] == value[0]


def test_stochastic_round_probability():
    """Of all 65,536 random patterns, as many round away from zero as the discarded bits say."""
    r = np.arange(1 << 16, dtype=np.int32)
    for pattern in (
        0x3F800000,
        0x3F800001,
        0x3F804321,
        0x3F80FFFF,
        0xBF808000,
        0x00000001,
        0x7F7F0000,
        0x007FFFFF,
    ):
        x = np.full(r.size, pattern, dtype=np.uint32)
        rounded = bits(stochastic_round(from_bits(x), torch.from_numpy(r)))
        assert (rounded != pattern >> 16).sum() == pattern & 0xFFFF
        assert (rounded == round_stochastically(x.view(np.float32), r.astype(np.uint64))).all()


def test_sqrt_is_correctly_rounded():
    x = np.random.default_rng(56).integers(0, 0x7F800000, 1 << 18, dtype=np.uint32)
    assert (bits(_sqrt(from_bits(x))) == np.sqrt(x.view(np.float32)).view(np.uint32)).all()


@pytest.mark.parametrize("t", [1, 2, 3, 10, 1000, 12_345, 1_000_003])
@pytest.mark.parametrize(
    "hyper",
    [
        Hyperparams(),
        Hyperparams(lr=3.3e-7, beta1=0.95, beta2=0.9999),
        Hyperparams(beta1=0.0, beta2=0.0, eps=0.0),
        Hyperparams(lr=0.0, beta1=0.1, beta2=0.99999),
    ],
)
def test_step_scalars(t: int, hyper: Hyperparams):
    """Each scalar is the float32 nearest to its exact value."""
    actual = step_scalars(t, kernels.Hyperparams(**hyper._asdict()))
    assert actual.step == t
    for name, exact in exact_scalars(t, hyper).items():
        assert getattr(actual, name) == float(np.float32(float(exact))), name


@pytest.mark.parametrize("base", [0.9, 0.95, 0.999, 0.9999, 0.0, 1.0])
def test_power(base: float):
    """Equal to repeated squaring with each product rounded to double; close to the exact power."""
    for exponent in [*range(20), 1000, 4095, 4096, 12_345]:
        result, square = Fraction(1), Fraction(base)
        for bit in reversed(f"{exponent:b}"):
            if bit == "1":
                result = Fraction(float(result * square))
            square = Fraction(float(square * square))
        assert power(base, exponent) == float(result)
        assert math.isclose(
            power(base, exponent), float(Fraction(base) ** exponent), rel_tol=2e-16 * (exponent + 1)
        )
