"""Rewrite the tables of ``docs/strategies.md``: ``python docs/strategies.py``.

Runs the cases of the tests with gloo on the CPU, so it needs the tests' packages
(``pip install -e '.[test]'``) and no GPU.
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
