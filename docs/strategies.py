"""Rewrite the tables of ``docs/strategies.md``: ``python docs/strategies.py``.

Runs the cases of the tests with gloo on the CPU, so it needs the tests' packages
(``pip install -e '.[test]'``) and no GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "tests"), str(REPO / "launch")]

from bench.markers import write_between_markers  # noqa: E402

from tests.sharding import test_model_parallel, test_strategy_table  # noqa: E402


def main() -> None:
    for module in (test_strategy_table, test_model_parallel):
        page = REPO / "docs" / "strategies.md"
        write_between_markers(page, module.BEGIN, module.END, module.table())


if __name__ == "__main__":
    main()
