"""Which back ends this machine can test on CPU tensors."""

from __future__ import annotations

from functools import cache, partial

import pytest

from sharded_bf16_adamw import kernels

from .rule_checks import Update


def update_of(backend: str) -> Update:
    """The update function of one back end."""
    return partial(kernels.adamw_bf16_, backend=backend)


@cache
def why_not(backend: str) -> str | None:
    """Why a back end cannot update CPU tensors here, or None where it can. The reference always can."""
    if backend == "reference":
        return None
    try:
        kernels.check_backend(backend)
    except ValueError as error:  # no compiler at installation, for one
        return str(error)
    return None


def cpu_backends() -> list:
    """One pytest parameter for each of ``kernels.BACKENDS`` that serves CPU tensors, skipped with the reason where it does not run here."""
    return [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                why_not(name) is not None, reason=f"back end {name}: {why_not(name)}"
            ),
        )
        for name in kernels.BACKENDS
        if name
        != "triton"  # for GPU tensors; its interpreter is too slow for checks of these sizes
    ]
