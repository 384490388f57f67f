"""Fixtures shared by tests of several directories."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
# The launch scripts are not installed, and tests import the helpers of this directory.
sys.path[:0] = [str(REPO), str(REPO / "tests")]


@pytest.fixture(scope="session")
def repo() -> Path:
    """Return the repository's root."""
    return REPO
