"""A run killed at any point of a save or a removal keeps a whole checkpoint that ``latest`` finds."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sharded_bf16_adamw import latest, verify
from sharded_bf16_adamw.checkpoint.folders import complete_checkpoints

from .victims import assert_holds, run, save_step

KILLS = 24  # of each action
AT_ONCE = 3


def prepare(root: Path) -> None:
    """Steps 1 and 2 are there before."""
    for step in (1, 2):
        save_step(root, step, sharded=False)


def check(root: Path, steps: set[int]) -> int:
    """Everything that can be seen is whole, and the latest is one of ``steps``. Returns which."""
    newest = latest(root)
    assert newest is not None
    assert newest == root / (root / "LATEST").read_text().strip(), "LATEST names a checkpoint that is there"
    step = int(newest.name.split("-")[1])
    assert step in steps
    for path in complete_checkpoints(root):
        assert verify(path) == []
        assert_holds(path, int(path.name.split("-")[1]))
    return step


def check_next_save(root: Path) -> None:
    """It works, and cleans up."""
    save_step(root, 9, sharded=False, keep=1)
    assert check(root, {9}) == 9
    assert sorted(path.name for path in root.iterdir()) == ["LATEST", "step-00000009"]


@pytest.mark.parametrize(
    ("action", "world", "everybody"),
    [
        ("synchronous", 2, False),
        ("synchronous", 2, True),
        ("asynchronous", 2, False),
        ("asynchronous", 2, True),
        ("same_step_again", 1, True),
        ("pruning", 1, True),
    ],
)
def test_a_kill_at_any_point_loses_nothing(action, world, everybody, tmp_path):
    codes, operations = run(action, start(tmp_path / "whole"), world, 0, None, False)
    assert codes == [0] * world
    done = {"same_step_again": 2, "pruning": 2}.get(action, 3)
    assert check(tmp_path / "whole", {done}) == done
    generator = random.Random(action)
    points = [(rank, at) for rank in range(world) for at in range(operations[rank])]
    assert len(points) >= 20
    chosen = generator.sample(points, min(KILLS, len(points)))

    def kill(index: int) -> int:
        victim, at = chosen[index]
        root = start(tmp_path / str(index))
        codes, _ = run(action, root, world, victim, at, everybody)
        assert codes[victim] == -9, "killed before its end"
        found = check(root, {2, done})
        check_next_save(root)
        return found

    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(kill, range(len(chosen))))
    assert len(found) >= 20
    assert done == 2 or set(found) == {2, 3}, "kills fell before and after the moment in which the new one becomes the latest"


def start(root: Path) -> Path:
    prepare(root)
    return root
