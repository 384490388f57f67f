"""Every layout and number of ranks loads what every other one saved, bit for bit; the table in the documentation is this test's result."""

from __future__ import annotations

import os
import re
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks

from sharded_bf16_adamw import load, save

from .layouts import ANY, BY_NAME, LAYOUTS, everything, loss, train

UPDATE = "UPDATE_DOCS"  # environment variable: write the table instead of comparing it
Case = tuple[str, int]  # layout and number of ranks
CASES = [(layout.name, world) for layout in LAYOUTS for world in layout.worlds]


def folder(root: str, case: Case) -> str:
    return f"{root}/{case[0]} on {case[1]}"


def save_worker(rank: int, world: int, root: str) -> None:
    for seed, case in enumerate(CASES):
        if case[1] == world:
            module, optimizer = BY_NAME[case[0]].build(
                world, seed
            )  # every checkpoint holds other bits
            train(module, optimizer, 3)
            save(folder(root, case), 3, module, optimizer, extra={"saved by": case[0]})
            expected = everything(module, optimizer)
            if rank == 0:
                torch.save(expected, folder(root, case) + "/expected.pt")


def load_worker(rank: int, world: int, root: str) -> dict[tuple[Case, Case], str]:
    """By pair, what went wrong: empty where all bits were as saved."""
    results = {}
    expected = {case: torch.load(folder(root, case) + "/expected.pt") for case in CASES}
    for here in CASES:
        if here[1] == world:
            module, optimizer = BY_NAME[here[0]].build(world, seed=1000)
            for saved in CASES:
                try:
                    assert load(folder(root, saved), module, optimizer).extra == {"saved by": saved[0]}
                    results[saved, here] = differences(
                        everything(module, optimizer), expected[saved]
                    )
                except Exception:
                    results[saved, here] = traceback.format_exc()
    return results


def differences(
    found: tuple[dict[str, Any], dict[str, Any]], expected: tuple[dict[str, Any], dict[str, Any]]
) -> str:
    missing = sorted(expected[0].keys() - found[0].keys())
    if missing:
        return f"no {missing}"
    started = [key for key in found[0].keys() - expected[0].keys() if found[0][key].any()]
    if started:  # a parameter that never had a gradient is to be at step 0
        return f"more than was saved: {started}"
    wrong = [
        key
        for key, value in expected[0].items()
        if value.dtype != found[0][key].dtype or not torch.equal(value, found[0][key])
    ]
    wrong += [
        f"options of {fqn}" for fqn, options in expected[1].items() if found[1].get(fqn) != options
    ]
    return f"other bits: {wrong}" if wrong else ""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Case, Case], str]:
    root = str(tmp_path_factory.mktemp("any_to_any"))
    for world in ANY:
        run_ranks(world, save_worker, root)
    merged: dict[tuple[Case, Case], str] = {}
    for world in ANY:
        for of_rank in run_ranks(world, load_worker, root):
            for pair, wrong in of_rank.items():
                merged[pair] = merged.get(pair, "") + wrong
    return merged


@pytest.mark.parametrize("name", BY_NAME)
def test_what_a_layout_saved_loads_under_every_other_with_the_same_bits(name, results):
    pairs = {pair: wrong for pair, wrong in results.items() if pair[0][0] == name}
    assert len(pairs) == len(BY_NAME[name].worlds) * len(CASES)
    wrong = {pair: what for pair, what in pairs.items() if what}
    assert not wrong, f"{len(wrong)} of {len(pairs)}, such as {next(iter(wrong.items()))}"


def table(results: dict[tuple[Case, Case], str]) -> str:
    """Rows saved, columns loaded; a cell counts the pairs of numbers of ranks that agree bit for bit, and all of them."""
    lines = [
        "| saved \\ loaded | "
        + " | ".join(f"{layout.name}<br>{worlds(layout)}" for layout in LAYOUTS)
        + " |",
        "|---|" + "---|" * len(LAYOUTS),
    ]
    for saved in LAYOUTS:
        cells = []
        for here in LAYOUTS:
            outcomes = [
                results[(saved.name, a), (here.name, b)] == ""
                for a in saved.worlds
                for b in here.worlds
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


def test_the_table_in_the_documentation_is_what_this_test_found(results, repo):
    page = Path(repo) / "docs" / "checkpoints.md"
    text = page.read_text()
    marked = re.compile(
        r"(<!-- any-to-any: made by tests/checkpoint/test_any_to_any.py -->\n).*?(<!-- end -->)",
        re.DOTALL,
    )
    assert marked.search(text)
    updated = marked.sub(lambda match: f"{match[1]}\n{table(results)}\n\n{match[2]}", text)
    if os.environ.get(UPDATE):
        page.write_text(updated)
    assert updated == text or os.environ.get(UPDATE), (
        f"run this test with {UPDATE}=1 to write the new table"
    )


# ------------------------------------------------------------------------------------------------------ a run that moves about

JOURNEY = [("FSDP2", 4), ("ZeRO-2", 2), ("FSDP1", 3), ("single", 1)]


def journey_worker(rank: int, world: int, root: str, name: str, first: bool) -> tuple[float, float]:
    """The loss on a fixed batch right after loading, and right before saving after further training."""
    module, optimizer = BY_NAME[name].build(world, seed=0 if first else 77)
    if not first:
        load(root, module, optimizer)
    loaded = loss(module)
    train(module, optimizer, 3)
    save(root, optimizer.param_groups[0]["schedule_step"], module, optimizer)
    return loaded, loss(module)


def test_a_run_goes_on_under_other_layouts_with_the_same_losses(tmp_path):
    before = None
    for index, (name, world) in enumerate(JOURNEY):
        outcomes = run_ranks(world, journey_worker, str(tmp_path), name, index == 0)
        assert all(outcome == outcomes[0] for outcome in outcomes)
        loaded, after = outcomes[0]
        if before is not None:
            assert loaded == before, (name, world)
        assert after != loaded and after == after
        before = after
