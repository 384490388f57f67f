"""Every check fails on the wrong rules that it must catch, and passes on an unedited copy."""

from __future__ import annotations

import pytest

from sharded_bf16_adamw.kernels import backend, reference

from . import layout_checks, rule_checks, rule_long_checks, rule_option_checks
from .rule_mutants import MUTANTS, Mutant, mutated

LAYOUT_CHECKS = [check for name, check in vars(layout_checks).items() if name.startswith("check_")]
OTHER_CHECKS = [
    rule_checks.check_oracle,
    rule_checks.check_scaled,
    rule_option_checks.check_float32_gradient_folds,
    rule_option_checks.check_float32_parameters,
    rule_option_checks.check_found_inf,
    rule_option_checks.check_gradient_only_read,
    rule_option_checks.check_many_tensors,
    layout_checks.check_shapes,
]
CHECKS = {
    name: check
    for module in (layout_checks, rule_checks, rule_long_checks, rule_option_checks)
    for name, check in vars(module).items()
    if name.startswith("check_")
}
# Mutants fail early, or by far.
SHORTER = {"check_v_constant_gradient": {"steps": 2000}}
PAIRS = [
    pytest.param(mutant, check, id=f"{mutant.name}-{check}")
    for mutant in MUTANTS
    for check in mutant.caught_by
]


@pytest.mark.parametrize(("mutant", "check"), PAIRS)
def test_check_catches_mutant(mutant: Mutant, check: str):
    update = mutated(mutant)
    with pytest.raises(AssertionError):
        CHECKS[check](update, **SHORTER.get(check, {}))


def test_unedited_copy_passes():
    """So mutants fail because of their edit, not because of the copying."""
    for module, checks in (
        (reference, OTHER_CHECKS),
        (backend, [*LAYOUT_CHECKS, rule_option_checks.check_found_inf]),
    ):
        update = mutated(Mutant("none", (), (), module))
        for check in checks:
            check(update)


def test_every_check_catches_something():
    assert {check for mutant in MUTANTS for check in mutant.caught_by} == set(CHECKS)
