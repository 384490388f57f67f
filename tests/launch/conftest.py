"""Paths and fixtures of the tests of ``launch/``, which is not installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
sys.path.insert(0, str(LAUNCH))


@pytest.fixture
def one_thread():
    """Use one thread, as under torchrun: several are many times slower on busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
