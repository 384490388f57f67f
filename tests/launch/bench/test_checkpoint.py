"""launch/benchmark.py checkpoint: small runs to the end, with the figures in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import benchmark
import pytest
import torch
from bench import checkpoint
from planning.activation_memory import fake_ranks

from sharded_bf16_adamw.checkpoint import async_save

WIDTH = 64
SMALL = f"checkpoint --gb {8 * WIDTH**2 / 1e9} --rounds 1 --folder"  # one layer


@pytest.fixture(autouse=True)
def small_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "WIDTH", WIDTH)
    monkeypatch.setattr(checkpoint.os, "sync", lambda: None)  # waits for all of the machine's files


def test_ratios_of_each_round_are_written(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    assert benchmark.main([*SMALL.split(), str(tmp_path / "disk"), "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    (figure,) = figures["rounds"]
    (ratio,) = figures["ratios"]["throughput of load / plain read"]
    assert ratio == figure["plain read"] / figure["load"] > 0


def test_a_save_that_fails_in_the_background_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves: list[bool] = []
    save = checkpoint.save

    def fail(group: Any) -> None:
        raise OSError("the disk is full")

    def save_or_fail(*args: Any, async_: bool = False) -> object:
        saves.append(async_)
        if saves.count(True) == 2:  # during which the run trains
            return async_save.start(fail, None)
        return save(*args, async_=async_)

    monkeypatch.setattr(checkpoint, "save", save_or_fail)
    try:
        with pytest.raises(OSError, match="the disk is full"):
            checkpoint.main([*SMALL.split()[1:], str(tmp_path)])
    finally:
        checkpoint.dist.destroy_process_group()


def test_a_rank_writes_its_share_and_reads_what_it_loads(tmp_path: Path) -> None:
    with fake_ranks(2):
        for sharded, loaded in ((True, ["plain-0"]), (False, ["plain-0", "plain-1"])):
            both = checkpoint.build(0.0, torch.device("cpu"), sharded)
            own, files, size = checkpoint.plain_files(tmp_path, *both, sharded)
            assert own == tmp_path / "plain-0" and [path.name for path in files] == loaded
            assert size == (8 * WIDTH**2 + 4) // 2  # a layer and its step
