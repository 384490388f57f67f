"""A resumed run of train.py reports the changes of its options."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from training import resume
from training.options import parse_args


@pytest.mark.parametrize(
    ("options", "processes", "notes"),
    [
        ("", 4, []),
        ("--grace 7 --no-progress --out elsewhere --print-every 3 --step-timeout 9", 4, []),
        ("--keep 5", 2, ["--keep was 2, now 5; the number of processes was 4, now 2"]),
        (
            "--lr 0.006 --schedule constant",
            4,
            [
                "--final-lr was 3e-06, now not given; --lr was 0.003, now 0.006; "
                "--schedule was cosine, now constant",
                "the schedule jumps: the learning rate of the next step is 0.006, not 0.003",
            ],
        ),
    ],
)
def test_changes_since_the_checkpoint_are_noted(monkeypatch, capsys, options, processes, notes):
    saved = vars(parse_args([]))
    manifest = SimpleNamespace(world_size=4, extra={"step": 30, "config": {**saved}})
    manifest.extra["config"]["betas"] = list(saved["betas"])  # as in JSON
    monkeypatch.setattr(resume.dist, "get_world_size", lambda: processes)
    resume._note_changes(parse_args(options.split()), manifest)
    lines = capsys.readouterr().err.splitlines()
    starts = ("note: changed since the checkpoint: ", "note: ")
    assert lines == [start + note for start, note in zip(starts, notes, strict=False)]
