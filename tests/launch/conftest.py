"""The launch scripts import each other as scripts do: from their own folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
sys.path.insert(0, str(LAUNCH))


@pytest.fixture
def one_thread():
    """As torchrun has it. Where cores are busy, threads that wait for each other are many times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
