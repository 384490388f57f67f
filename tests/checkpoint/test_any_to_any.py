"""Every layout and world size loads every other's checkpoint bit for bit.

The table in the documentation is generated from the result. By default each case loads its
share of the layouts. The loads between all pairs of cases are exhaustive tests.
"""

from __future__ import annotations

import math
import os
import re
import traceback
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from distributed import run_ranks
from torch.distributed.checkpoint import DefaultSavePlanner

from sharded_bf16_adamw import load, save
from sharded_bf16_adamw.checkpoint import dcp_storage

from .layouts import ANY, BY_NAME, LAYOUTS, everything, loss, train

UPDATE = "UPDATE_DOCS"  # environment variable: write the table instead of comparing it
Case = tuple[str, int]  # layout and world size
CASES = [(layout.name, world) for layout in LAYOUTS for world in layout.worlds]


def folder(root: str, case: Case) -> str:
    return f"{root}/{case[0]} on {case[1]}"


def save_worker(rank: int, world: int, root: str, case: Case) -> None:
    """Save twice, the second time with the cached plan; odd cases write a chunk table."""
    # The seed gives every checkpoint different values.
    module, optimizer = BY_NAME[case[0]].build(world, seed=CASES.index(case))
    train(module, optimizer, 2)
    save(folder(root, case), 2, module, optimizer, keep=1)
    train(module, optimizer, 1)
    threshold = 0 if CASES.index(case) % 2 else dcp_storage.CHUNKS_FILE_THRESHOLD
    with (
        patch.object(dcp_storage, "CHUNKS_FILE_THRESHOLD", threshold),
        patch.object(DefaultSavePlanner, "create_local_plan", side_effect=AssertionError),
    ):
        path = save(folder(root, case), 3, module, optimizer, {"saved by": case[0]}, keep=1)
    assert (path / dcp_storage.CHUNKS).exists() == (threshold == 0)
    expected = everything(module, optimizer)
    if rank == 0:
        torch.save(expected, folder(root, case) + "/expected.pt")


def share_of_layouts(case: Case) -> list[Case]:
    """Return saved cases of some layouts; the other cases of ``case``'s layout have the rest."""
    name, world = case
    layout, index = BY_NAME[name], list(BY_NAME).index(name)
    return [
        (saved.name, saved.worlds[(index + at) % len(saved.worlds)])
        for at, saved in enumerate(LAYOUTS)
        if at % len(layout.worlds) == layout.worlds.index(world)
    ]


def load_worker(
    rank: int, world: int, root: str, case: Case, saved_cases: list[Case]
) -> dict[Case, str]:
    """Load checkpoints; return an error for each, empty if all bits are as saved.

    Nothing is loaded after an error: a rank that raised would be out of step with the others.
    """
    results = dict.fromkeys(saved_cases, "not run")
    module, optimizer = BY_NAME[case[0]].build(world, seed=1000)
    for saved in saved_cases:
        try:
            assert load(folder(root, saved), module, optimizer).extra == {"saved by": saved[0]}
            expected = torch.load(folder(root, saved) + "/expected.pt")
            results[saved] = differences(everything(module, optimizer), expected)
        except Exception:
            results[saved] = traceback.format_exc()
            break
    return results


def differences(
    found: tuple[dict[str, Any], dict[str, Any]], expected: tuple[dict[str, Any], dict[str, Any]]
) -> str:
    missing = sorted(expected[0].keys() - found[0].keys())
    if missing:
        return f"missing keys: {missing}"
    started = [key for key in found[0].keys() - expected[0].keys() if found[0][key].any()]
    if started:  # zeros are right for a parameter that never had a gradient
        return f"unexpected nonzero keys: {started}"
    wrong = [
        key
        for key, value in expected[0].items()
        if value.dtype != found[0][key].dtype or not torch.equal(value, found[0][key])
    ]
    wrong += [
        f"options of {fqn}" for fqn, options in expected[1].items() if found[1].get(fqn) != options
    ]
    return f"values differ: {wrong}" if wrong else ""


class Matrix:
    """Checkpoints of all cases and the results of loading them, each computed at its first use.

    Each test spends time on its own case only, and the time limit applies to one case.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self._saved: set[Case] = set()
        self._loaded: dict[Case, dict[Case, str]] = {}

    def save(self, case: Case) -> None:
        if case not in self._saved:
            run_ranks(case[1], save_worker, self._root, case)
            self._saved.add(case)

    def load(self, case: Case, saved_cases: list[Case]) -> dict[Case, str]:
        """Return the error of each checkpoint loaded under ``case``, empty if there is none."""
        loaded = self._loaded.setdefault(case, {})
        missing = [saved for saved in saved_cases if saved not in loaded]
        for saved in missing:
            self.save(saved)
        if missing:
            errors_by_rank = run_ranks(case[1], load_worker, self._root, case, missing)
            loaded.update(
                {saved: "".join(errors[saved] for errors in errors_by_rank) for saved in missing}
            )
        return {saved: loaded[saved] for saved in saved_cases}


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(str(tmp_path_factory.mktemp("any_to_any")))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layout_saves(case, matrix):
    matrix.save(case)


def check_loads(matrix: Matrix, case: Case, saved_cases: list[Case]) -> None:
    wrong = {saved: error for saved, error in matrix.load(case, saved_cases).items() if error}
    assert not wrong, f"{len(wrong)} of {len(saved_cases)}, such as {next(iter(wrong.items()))}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layout_loads_its_share_of_the_layouts_bitwise(case, matrix):
    check_loads(matrix, case, share_of_layouts(case))


def test_loads_by_default_are_between_all_layouts_all_numbers_of_ranks_and_from_every_case():
    pairs = [(saved, case) for case in CASES for saved in share_of_layouts(case)]
    assert {saved for saved, _ in pairs} == set(CASES)
    assert len({(saved[0], case[0]) for saved, case in pairs}) == len(LAYOUTS) ** 2 == len(pairs)
    assert {(saved[1], case[1]) for saved, case in pairs} == {(a, b) for a in ANY for b in ANY}


@pytest.mark.exhaustive  # the other 760 of 841 loads
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layout_loads_every_checkpoint_bitwise(case, matrix):
    check_loads(matrix, case, CASES)


def table(matrix: Matrix) -> str:
    """Return a table with saved layouts as rows and loaded ones as columns.

    A cell counts the pairs of world sizes that agree bit for bit, and all pairs.
    """
    results = {
        (saved, case): error for case in CASES for saved, error in matrix.load(case, CASES).items()
    }
    lines = [
        "| saved \\ loaded | "
        + " | ".join(f"{layout.name}<br>{worlds(layout)}" for layout in LAYOUTS)
        + " |",
        "|---|" + "---|" * len(LAYOUTS),
    ]
    for saved in LAYOUTS:
        cells = []
        for loaded in LAYOUTS:
            outcomes = [
                results[(saved.name, a), (loaded.name, b)] == ""
                for a in saved.worlds
                for b in loaded.worlds
            ]
            cells.append(f"{sum(outcomes)}/{len(outcomes)}")
        lines.append(f"| {saved.name}, {worlds(saved)} | " + " | ".join(cells) + " |")
    exact = sum(wrong == "" for wrong in results.values())
    return "\n".join(
        [*lines, "", f"{exact} of {len(results)} pairs of layout and number of ranks are exact."]
    )


def worlds(layout: Any) -> str:
    return (
        "1"
        if layout.worlds == (1,)
        else f"{layout.worlds[0]}-{layout.worlds[-1]}"
        if layout.worlds == ANY
        else ", ".join(map(str, layout.worlds))
    )


@pytest.mark.exhaustive  # it needs all loads
def test_docs_table_is_up_to_date(matrix, repo):
    page = Path(repo) / "docs" / "checkpoints.md"
    text = page.read_text()
    marked = re.compile(
        r"(<!-- any-to-any: made by tests/checkpoint/test_any_to_any.py -->\n).*?(<!-- end -->)",
        re.DOTALL,
    )
    assert marked.search(text)
    updated = marked.sub(lambda match: f"{match[1]}\n{table(matrix)}\n\n{match[2]}", text)
    if os.environ.get(UPDATE):
        page.write_text(updated)
    assert updated == text or os.environ.get(UPDATE), (
        f"run this test with {UPDATE}=1 to write the new table"
    )


# ------------------------------------------------------------------------ a run that changes layout

JOURNEY = [("FSDP2", 4), ("ZeRO-2", 2), ("FSDP1", 3), ("single", 1)]


def journey_worker(rank: int, world: int, root: str, name: str, first: bool) -> tuple[float, float]:
    """Return the loss on a fixed batch after loading, and after further training and saving."""
    module, optimizer = BY_NAME[name].build(world, seed=0 if first else 77)
    if not first:
        load(root, module, optimizer)
    loaded = loss(module)
    train(module, optimizer, 3)
    save(root, optimizer.param_groups[0]["schedule_step"], module, optimizer)
    return loaded, loss(module)


def test_run_continues_under_other_layouts_with_the_same_loss(tmp_path):
    before = None
    for index, (name, world) in enumerate(JOURNEY):
        outcomes = run_ranks(world, journey_worker, str(tmp_path), name, index == 0)
        assert all(outcome == outcomes[0] for outcome in outcomes)
        loaded, after = outcomes[0]
        if before is not None:
            assert loaded == before, (name, world)
        assert after != loaded and math.isfinite(after)
        before = after
