"""Fixtures that tests of several folders share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [
    str(REPO),
    str(REPO / "tests"),
]  # the launch scripts are not installed; tests import helpers beside them


@pytest.fixture(scope="session")
def repo() -> Path:
    """The repository's root."""
    return REPO
