"""The backends that this machine can test on CPU tensors."""

from __future__ import annotations

from functools import cache, partial

import pytest

from sharded_bf16_adamw import kernels

from .rule_checks import Update


def update_of(backend: str) -> Update:
    """Return the update function of one backend."""
    return partial(kernels.adamw_bf16_, backend=backend)


@cache
def skip_reason(backend: str) -> str | None:
    """Return why a backend cannot update CPU tensors on this machine, or None if it can."""
    if backend == "reference":
        return None
    try:
        kernels.check_backend(backend)
    except ValueError as error:  # for example, there was no compiler at installation
        return str(error)
    return None


def cpu_backends() -> list:
    """Return a pytest parameter for each backend of CPU tensors.

    One that is not available on this machine is skipped, with the reason.
    """
    return [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                skip_reason(name) is not None, reason=f"backend {name}: {skip_reason(name)}"
            ),
        )
        # Triton is for GPU tensors; its interpreter is too slow for checks of these sizes.
        for name in kernels.BACKENDS
        if name != "triton"
    ]
