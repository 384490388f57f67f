"""Processes that import Triton anew, which reads TRITON_INTERPRET at import."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest


def pool(interpret: str) -> ProcessPoolExecutor:
    """Return a pool of one new process that imports Triton with TRITON_INTERPRET set."""
    executor = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", interpret)
        executor.submit(int).result()  # starts it
    return executor
