"""Fixtures shared by tests of several directories."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import numpy
import pytest

REPO = Path(__file__).resolve().parent.parent
# The launch scripts are not installed, and tests import the helpers of this directory.
sys.path[:0] = [str(REPO), str(REPO / "tests")]
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # They run torchrun at the same time: each needs a port of its own.
    os.environ["PET_MASTER_PORT"] = str(29500 + int(worker.removeprefix("gw")))
    # They share the cores. OpenMP's threads spin while they wait for one another.
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))


@pytest.fixture(scope="module", autouse=True)
def hide_imported_objects() -> None:
    """Hide what is alive from garbage collection, and from our searches of all objects.

    torch alone has 300,000 objects, and each search or full collection visits them all.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # else nanobind reports leaks


@pytest.fixture(scope="session")
def repo() -> Path:
    """Return the repository's root."""
    return REPO


@pytest.fixture(params=(1, 3 * 2 * 16 * 16, 2**20), ids=("1", "1536", "1048576"))
def batch_bytes(request, monkeypatch) -> int:
    """Update in batches of one parameter, of three weights of step_in_backward_cases, of all."""
    monkeypatch.setattr("sharded_bf16_adamw.step_in_backward.batch.BATCH_BYTES", request.param)
    return request.param


@pytest.fixture
def update_each_param_alone(monkeypatch) -> None:
    """Update each parameter on its own in the backward pass."""
    monkeypatch.setattr("sharded_bf16_adamw.step_in_backward.batch.BATCH_BYTES", 1)


@pytest.fixture(scope="session")
def triton_interpreter() -> None:
    """Skip where Triton's interpreter does not run."""
    triton = pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")
    versions = [
        tuple(int(part) for part in module.__version__.split(".")[:2]) for module in (triton, numpy)
    ]
    if versions[0] <= (3, 6) and versions[1] >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 needs numpy < 2.4")
