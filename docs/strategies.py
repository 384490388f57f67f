"""Fill in the tables of ``docs/strategies.md``: ``python docs/strategies.py``. Needs no GPU; runs gloo on the CPU.

Runs the cases that the tests run, so it needs their packages (``pip install -e '.[test]'``).
"""

from __future__ import annotations

import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "tests")]

from tests.sharding import test_model_parallel, test_strategy_table  # noqa: E402


def main() -> None:
    page = REPO / "docs" / "strategies.md"
    text = page.read_text()
    for module in (test_strategy_table, test_model_parallel):
        begin, end = text.index(module.BEGIN) + len(module.BEGIN), text.index(module.END)
        text = f"{text[:begin]}\n{module.table()}\n{text[end:]}"
    page.write_text(text)


if __name__ == "__main__":
    main()
