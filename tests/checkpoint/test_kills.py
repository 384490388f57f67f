"""A run killed at any point of a save or removal keeps a complete checkpoint."""

from __future__ import annotations

import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sharded_bf16_adamw import latest, verify
from sharded_bf16_adamw.checkpoint.directory import complete_checkpoints

from .victims import assert_holds, operations, run, save_step

KILLS = 16  # at most, for each action
WRITE_KILLS = 4  # of them before a write
AT_ONCE = 3  # concurrent runs


def check(root: Path, steps: set[int]) -> int:
    """Assert that all checkpoints are complete; return the latest's step, one of ``steps``."""
    newest = latest(root)
    assert newest is not None
    assert newest == root / (root / "LATEST").read_text().strip(), (
        "LATEST must name an existing checkpoint"
    )
    step = int(newest.name.split("-")[1])
    assert step in steps
    for path in complete_checkpoints(root):
        assert verify(path) == []
        assert_holds(path, int(path.name.split("-")[1]))
    return step


def check_next_saves(parent: Path) -> None:
    """Assert that a new process can save to the roots in ``parent``, and removes leftovers."""
    assert run("next_saves", parent, world=1, victim=0, at=None, everybody=False) == [0]
    for root in filter(Path.is_dir, parent.iterdir()):
        assert check(root, {9}) == 9
        assert sorted(path.name for path in root.iterdir()) == ["LATEST", "step-00000009"]


@pytest.mark.parametrize(
    ("action", "world", "everybody"),
    [
        ("synchronous", 2, True),
        ("repeated_asynchronous", 2, False),
        ("pruning", 1, True),
        # The other value of everybody, saves with and without a stored plan, an existing step.
        pytest.param("synchronous", 2, False, marks=pytest.mark.exhaustive),
        pytest.param("asynchronous", 2, False, marks=pytest.mark.exhaustive),
        pytest.param("asynchronous", 2, True, marks=pytest.mark.exhaustive),
        pytest.param("repeated_asynchronous", 2, True, marks=pytest.mark.exhaustive),
        pytest.param("repeated", 2, False, marks=pytest.mark.exhaustive),
        pytest.param("same_step_again", 1, True, marks=pytest.mark.exhaustive),
    ],
)
def test_kill_at_any_point_loses_nothing(action, world, everybody, tmp_path):
    initial = tmp_path / "initial"
    for step in range(1, 7 if action == "pruning" else 3):
        save_step(initial, step, sharded=False)
    shutil.copytree(initial, tmp_path / "whole")
    assert run(action, tmp_path / "whole", world, victim=0, at=None, everybody=False) == [0] * world
    before, done = {"same_step_again": (2, 2), "pruning": (6, 6)}.get(action, (2, 3))
    assert check(tmp_path / "whole", {done}) == done
    chosen = choose_points(tmp_path / "whole", world, random.Random(action))
    assert len(chosen) >= KILLS - WRITE_KILLS

    def kill(index: int) -> int:
        victim, at = chosen[index]
        root = shutil.copytree(initial, tmp_path / "killed" / str(index))
        assert run(action, root, world, victim, at, everybody)[victim] == -9, (
            "the victim must be killed"
        )
        return check(root, {before, done})

    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(kill, range(len(chosen))))
    check_next_saves(tmp_path / "killed")
    assert set(found) == {before, done}, (
        "kills must fall both before and after the new checkpoint becomes the latest"
    )


def choose_points(root: Path, world: int, generator: random.Random) -> list[tuple[int, int]]:
    """Choose ranks and operations: folder changes and flushes first, then some writes."""
    points = [
        (rank, at, name) for rank in range(world) for at, name in enumerate(operations(root, rank))
    ]
    special = [(rank, at) for rank, at, name in points if name != "write"]
    writes = [(rank, at) for rank, at, name in points if name == "write"]
    count = KILLS - WRITE_KILLS
    if len(special) > count:  # always the last one, which is after publication
        special = [*generator.sample(special[:-1], count - 1), special[-1]]
    return [*special, *generator.sample(writes, min(len(writes), KILLS - len(special)))]
