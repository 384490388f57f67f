"""The launch scripts import each other as scripts do: from their own folder."""

from __future__ import annotations

import sys
from pathlib import Path

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
sys.path.insert(0, str(LAUNCH))
