"""Fill in the table of ``docs/strategies.md``: ``python docs/strategies.py``. Needs no GPU; runs gloo on the CPU.

Runs the case that the tests run, so it needs their packages (``pip install -e '.[test]'``).
"""

from __future__ import annotations

import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "tests")]

from tests.sharding.test_strategy_table import BEGIN, END, table  # noqa: E402


def main() -> None:
    page = REPO / "docs" / "strategies.md"
    text = page.read_text()
    page.write_text(f"{text[: text.index(BEGIN)]}{BEGIN}\n{table()}\n{text[text.index(END) :]}")


if __name__ == "__main__":
    main()
