"""Processes that import Triton anew: it reads TRITON_INTERPRET when it is imported."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest


def pool(interpret: str) -> ProcessPoolExecutor:
    """One fresh process that imports Triton with TRITON_INTERPRET set."""
    executor = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", interpret)
        executor.submit(int).result()  # starts it
    return executor
