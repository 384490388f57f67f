"""``benchmark.py plan`` writes the metadata that a save on as many real ranks writes."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import benchmark
import pytest
from distributed import run_ranks_that_die

TENSORS = 15


def save_worker(rank: int, world: int, launch: str, root: str) -> None:
    from sharded_bf16_adamw import save

    sys.path.insert(0, launch)
    try:
        from bench.plan import build
    finally:
        sys.path.remove(launch)
    model, optimizer = build(world, TENSORS)
    for step in (1, 2):
        save(root, step, model, optimizer)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("ranks", [3, pytest.param(8, marks=pytest.mark.exhaustive)])
def test_simulation_has_the_metadata_of_real_ranks(ranks: int, repo: Path, tmp_path: Path) -> None:
    options = f"--ranks {ranks} --tensors {TENSORS} --metadata {tmp_path} --json {tmp_path}/j"
    assert benchmark.main(["plan", *options.split()]) == 0
    # run_ranks would keep its workers, up to eight, until the last test
    arguments = (save_worker, str(repo / "launch"), str(tmp_path / "run"))
    assert run_ranks_that_die(ranks, *arguments) == [0] * ranks
    for name in ("step-00000001", "step-00000002"):
        simulated = pickle.loads((tmp_path / name).read_bytes())
        real = pickle.loads((tmp_path / "run" / name / ".metadata").read_bytes())
        simulated.storage_meta.save_id = real.storage_meta.save_id
        assert simulated == real
        assert list(simulated.state_dict_metadata) == list(real.state_dict_metadata)
        assert [(key, key.index) for key in simulated.storage_data] == [
            (key, key.index) for key in real.storage_data
        ]
    figures = json.loads((tmp_path / "j").read_text())
    assert figures["ranks"] == ranks and figures["tensors"] == TENSORS + 1
    assert all(value >= 0 for value in figures["figures"].values()) and figures["figures"]
