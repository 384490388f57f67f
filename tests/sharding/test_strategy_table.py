"""The table of docs/strategies.md: equal gradients give equal bits under every sharding.

The whole table is an exhaustive test, of 20 steps each. By default each strategy takes 8 steps on
one rank and on 2, 3 or 4.
"""

from __future__ import annotations

import functools

import pytest
import torch
from distributed import run_ranks

from .strategy_cases import (
    CASES,
    CLIP,
    COLUMNS,
    STEPS,
    Case,
    replay_worker,
    single_process,
    table_worker,
)

STEPS_BY_DEFAULT = 8  # the gradients' scales repeat after 7
BEGIN, END = "<!-- table of strategies: begin -->", "<!-- table of strategies: end -->"


def by_default(case: Case) -> set[int]:
    """Return the numbers of ranks that are tested by default: 1, and one of the others in turn."""
    several = [world for world in case.worlds if world > 1]
    return {1, several[CASES.index(case) % len(several)]}


RUNS = [
    pytest.param(
        case,
        world,
        STEPS_BY_DEFAULT if world in by_default(case) else STEPS,
        id=f"{case.name} on {world}",
        # the rest of all strategies on all numbers of ranks
        marks=[] if world in by_default(case) else pytest.mark.exhaustive,
    )
    for case in CASES
    for world in case.worlds
]


@functools.cache
def expected(steps: int):
    return single_process(steps)


@functools.cache
def differing(case: Case, world: int, steps: int) -> dict[str, tuple[int, int]]:
    """Return for each column (elements that differ from a single process, all elements)."""
    reference, norms = expected(steps)
    counts = {column: [0, 0] for column in COLUMNS}
    for result, own_norms in run_ranks(world, table_worker, case.name, steps):
        assert own_norms == norms
        assert result.keys() == reference.keys()
        for name, values in result.items():
            assert values.keys() == reference[name].keys()
            assert torch.equal(values["step"], reference[name]["step"])
            for column in COLUMNS:
                if column in values:
                    counts[column][0] += int((values[column] != reference[name][column]).sum())
                    counts[column][1] += values[column].numel()
    return {column: (wrong, total) for column, (wrong, total) in counts.items()}


def table() -> str:
    """Return the table in Markdown: by strategy and column the numbers of ranks with equal bits.

    A row of FSDP1 covers both values of use_orig_params.
    """
    lines = [f"| strategy | {' | '.join(COLUMNS)} |", "|---|" + "---|" * len(COLUMNS)]
    by_name: dict[str, list[Case]] = {}
    for case in CASES:
        by_name.setdefault(case.name.partition(", use_orig_params")[0], []).append(case)
    for name, cases in by_name.items():
        cells = []
        for column in COLUMNS:
            wrong = dict.fromkeys((world for case in cases for world in case.worlds), 0)
            for case in cases:
                for world in case.worlds:
                    wrong[world] += differing(case, world, STEPS)[column][0]
            cells.append(
                ", ".join(
                    f"{world} ({count} differ)" if count else str(world)
                    for world, count in wrong.items()
                )
            )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


@pytest.mark.parametrize(("case", "world", "steps"), RUNS)
def test_bits_match_single_process(case, world, steps):
    counts = differing(case, world, steps)
    assert {column: wrong for column, (wrong, _) in counts.items()} == dict.fromkeys(COLUMNS, 0)
    assert all(total > 0 for _, total in counts.values())


def test_some_steps_clip_and_some_do_not():
    _, norms = expected(STEPS_BY_DEFAULT)
    clipped = [norm > CLIP for norm in norms]
    assert any(clipped) and not all(clipped)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_update_matches_where_reductions_round(case):
    """The worker compares each shard with one process on the same reduced gradients."""
    world = 2 if 2 in case.worlds else 4
    reference, _ = single_process(3, exact=False, clip=None)
    for result in run_ranks(world, replay_worker, case.name, 3):
        unlike = [
            name
            for name, values in result.items()
            if not torch.equal(values["exp_avg"], reference[name]["exp_avg"])
        ]
        assert unlike, "these gradients were to round differently from those of one process"


@pytest.mark.exhaustive  # it needs all runs
def test_docs_show_the_table(repo):
    text = (repo / "docs" / "strategies.md").read_text()
    shown = text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()
    assert shown == table(), "run python docs/strategies.py"
