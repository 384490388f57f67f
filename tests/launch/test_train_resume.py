"""launch/train.py stopped, killed and resumed."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from pathlib import Path

import distributed
import pytest
import torch.distributed as dist
import train
from training.data import Text
from training.metrics import Metrics, read_metrics

from sharded_bf16_adamw import latest, verify
from sharded_bf16_adamw.checkpoint.dcp_storage import ChecksummedWriter
from sharded_bf16_adamw.checkpoint.reader import StoredCheckpoint

from .train_runs import (
    OPTIMIZERS,
    SHORT,
    curve,
    finish,
    kill,
    losses,
    run,
    start,
    train_on_ranks,
    wait_for_step,
    workers,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def stop_at(monkeypatch):
    """A function that makes this process receive SIGTERM as it takes the batch of a (0-based) step."""

    def arrange(at: int) -> None:
        batch = Text.batch

        def batch_and_signal(self, seed, step, size):
            if step == at:
                os.kill(os.getpid(), signal.SIGTERM)
            return batch(self, seed, step, size)

        monkeypatch.setattr(Text, "batch", batch_and_signal)

    return arrange


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_told_to_stop_saves_and_resumes_with_the_same_bits(
    tmp_path, capsys, stop_at, optimizer
):
    arguments = ("--optimizer", optimizer, "--steps", 8, "--eval-every", 2)
    assert run("--out", tmp_path / "whole", *arguments) == 0
    stop_at(4)
    assert run("--out", tmp_path / "stopped", *arguments) == 0
    assert "stopped at step 5" in capsys.readouterr().out
    assert [line["step"] for line in curve(tmp_path / "stopped")][-1] == 5
    assert run("--out", tmp_path / "stopped", *arguments, "--resume", "auto") == 0
    assert curve(tmp_path / "stopped") == curve(tmp_path / "whole")


@pytest.mark.parametrize(("option", "saved"), [("--no-async-save", 8), ("--async-save", 4)])
def test_a_killed_run_resumes_from_its_last_checkpoint_with_the_same_bits(tmp_path, option, saved):
    """Killed in step 10 or later. In the background the save of step 8 may still be under way, but has waited for that of step 4."""
    arguments = ("--steps", 40, "--save-every", 4, "--eval-every", 10, option)
    code, _, err = finish(start(2, "--out", tmp_path / "whole", *arguments))
    assert code == 0, err
    killed = start(2, "--out", tmp_path / "killed", *arguments)
    wait_for_step(killed, tmp_path / "killed", 10)
    kill(killed)
    assert finish(killed)[0] == -signal.SIGKILL
    before = curve(tmp_path / "killed")
    code, out, err = finish(start(2, "--out", tmp_path / "killed", *arguments, "--resume", "auto"))
    assert code == 0, err
    resumed_at = int(re.search(r"steps (\d+) to 40", out).group(1))
    assert saved <= resumed_at < 40 and resumed_at % 4 == 0
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    assert before == curve(tmp_path / "whole")[: len(before)]


def test_when_one_rank_is_told_to_stop_all_save_and_exit_cleanly(tmp_path):
    process = start(
        2, "--out", tmp_path, "--steps", 100_000, "--save-every", 1, "--eval-every", 100_000
    )
    wait_for_step(process, tmp_path, 3)
    ranks = workers(process)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 0, err
    step = int(re.search(r"stopped at step (\d+), saved", out).group(1))
    assert (
        json.loads((tmp_path / f"checkpoints/step-{step:08d}/manifest.json").read_text())["extra"][
            "step"
        ]
        == step
    )
    assert curve(tmp_path)[-1]["step"] == step


@pytest.fixture
def saves(monkeypatch):
    """Steps saved so far, each with whether it was in the background. A step in ``failing`` meets a full disk there."""
    done: list[tuple[int, bool]] = []
    failing: set[int] = set()
    write_data = ChecksummedWriter.write_data

    def write(self, plan, planner):
        step, background = (
            int(re.search(r"step-(\d+)", self.path.name).group(1)),
            threading.current_thread() is not threading.main_thread(),
        )
        if background and step in failing:
            raise OSError(28, "No space left on device")
        done.append((step, background))
        return write_data(self, plan, planner)

    monkeypatch.setattr(ChecksummedWriter, "write_data", write)
    return done, failing


@pytest.mark.parametrize(("option", "background"), [((), True), (("--no-async-save",), False)])
def test_a_run_saves_in_the_background_and_when_told_to_stop_completely(
    tmp_path, stop_at, saves, option, background
):
    arguments = ("--steps", 8, "--eval-every", 2, "--save-every", 2, *option)
    assert run("--out", tmp_path / "whole", *arguments) == 0
    assert saves[0] == [(2, background), (4, background), (6, background), (8, background)]
    assert latest(tmp_path / "whole/checkpoints").name == "step-00000008", (
        "the last one has been waited for"
    )
    saves[0].clear()
    stop_at(4)
    assert run("--out", tmp_path / "stopped", *arguments) == 0
    assert saves[0] == [(2, background), (4, background), (5, False)]
    assert run("--out", tmp_path / "stopped", *arguments, "--resume", "auto") == 0
    assert curve(tmp_path / "stopped") == curve(tmp_path / "whole")
    for name in ("whole", "stopped"):
        assert verify(tmp_path / name / "checkpoints") == []
    assert values_in(tmp_path / "stopped") == values_in(tmp_path / "whole")


def values_in(folder: Path) -> dict[str, list[float]]:
    stored = StoredCheckpoint(folder / "checkpoints")
    return {
        key: stored.read(key).flatten().tolist()
        for key in stored.infos
        if key.startswith(("model.", "optimizer."))
    }


@pytest.mark.parametrize(("failing", "steps"), [(4, 5), (4, 4)])
def test_a_save_that_failed_in_the_background_ends_the_run_after_one_of_its_end(
    tmp_path, saves, failing, steps
):
    saves[1].add(failing)
    try:
        with pytest.raises(
            RuntimeError,
            match=r"cannot save the checkpoint .*step-00000004: on rank 0, OSError: .*No space left",
        ):
            run("--out", tmp_path, "--steps", steps, "--save-every", 2)
        assert dist.is_initialized(), "it was said before the process group was destroyed"
    finally:
        dist.destroy_process_group()
    assert saves[0] == [(2, True), (steps, False)]
    assert latest(tmp_path / "checkpoints").name == f"step-{steps:08d}"


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_run_resumes_on_another_number_of_ranks(tmp_path, world_size):
    """The bits of the weights are tested with the checkpoints; here, that data, schedule and metrics go on where they were."""
    steps = ["--steps", "8", "--eval-every", "4", "--strategy", "fsdp2"]
    first = ["--save-every", "4", "--keep", "2"]
    distributed.run_ranks(2, train_on_ranks, str(tmp_path), {"run": [*steps, *first]})
    whole = curve(tmp_path / "run")
    resume = ["--resume", str(tmp_path / "run/checkpoints/step-00000004")]
    distributed.run_ranks(world_size, train_on_ranks, str(tmp_path), {"run": [*steps, *resume]})
    resumed = curve(tmp_path / "run")
    assert resumed[:6] == whole[:6], "the lines up to step 4 stay"
    assert len(resumed) == len(whole) == 11
    for here, there in zip(resumed[6:], whole[6:], strict=True):
        assert here == pytest.approx(there, rel=0.01)


def test_resuming_a_finished_run_reports_it_again(tmp_path, capsys):
    assert run("--out", tmp_path, "--steps", 2) == 0
    before, said = curve(tmp_path), capsys.readouterr().out
    assert run("--out", tmp_path, "--steps", 2, "--resume", "auto") == 0
    assert curve(tmp_path) == before
    loss = re.compile(r"held-out loss.*")
    assert loss.search(capsys.readouterr().out).group() == loss.search(said).group()


def test_resume_auto_starts_afresh_where_there_is_nothing(tmp_path):
    assert run("--out", tmp_path, "--steps", 2, "--resume", "auto") == 0
    assert len(losses(tmp_path)) == 2


def damage(path: Path, name: str) -> None:
    """Flip a bit in the middle of a file of a checkpoint."""
    (file,) = path.glob(name)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["*.distcp", "manifest.json", ".metadata"])
def test_a_damaged_latest_checkpoint_is_not_the_end(tmp_path, capsys, name):
    arguments = ("--steps", 4, "--eval-every", 2, "--save-every", 2)
    assert run("--out", tmp_path, *arguments) == 0
    whole = curve(tmp_path)
    good, damaged = tmp_path / "checkpoints/step-00000002", tmp_path / "checkpoints/step-00000004"
    damage(damaged, name)
    for resume, use in (("auto", "newest-good"), (damaged, good)):
        capsys.readouterr()
        assert run("--out", tmp_path, *arguments, "--resume", resume) == 2
        err = capsys.readouterr().err
        assert re.fullmatch(
            rf"error: the checkpoint {damaged} cannot be used: [^\n]*; {good} is undamaged: use --resume {use}\n",
            err,
        ), err
    assert run("--out", tmp_path, *arguments, "--resume", "newest-good") == 0
    said = capsys.readouterr()
    assert "steps 2 to 4" in said.out and re.search(
        rf"^note: [^\n]*{damaged} [^\n]*\n", said.err, re.MULTILINE
    )
    assert curve(tmp_path) == whole
    assert verify(tmp_path / "checkpoints") == [] and not damaged.exists(), (
        "the step saved again replaces the damaged one"
    )


def test_newest_good_of_nothing_starts_afresh_and_of_damaged_ones_alone_does_not(tmp_path, capsys):
    assert run("--out", tmp_path, "--steps", 2, "--resume", "newest-good") == 0
    damage(latest(tmp_path / "checkpoints"), "*.distcp")
    for resume in ("newest-good", "auto"):
        capsys.readouterr()
        assert run("--out", tmp_path, "--steps", 2, "--resume", resume) == 2
        assert re.search(
            rf"error: [^\n]*no checkpoint in {tmp_path}/checkpoints is undamaged",
            capsys.readouterr().err,
        )


def resume_from_damage(rank: int, world_size: int, folder: str) -> list[int]:
    arguments = [*SHORT, "--out", folder, "--steps", "4", "--eval-every", "2", "--save-every", "2"]
    codes = [train.main(arguments)]
    if rank == 0:
        (Path(folder) / "checkpoints/step-00000004/__1_0.distcp").write_bytes(
            b""
        )  # which rank 1 checks
    dist.barrier()
    return [
        *codes,
        *(train.main([*arguments, "--resume", resume]) for resume in ("auto", "newest-good")),
    ]


def test_two_ranks_resume_from_the_newest_good_checkpoint(tmp_path):
    assert distributed.run_ranks(2, resume_from_damage, str(tmp_path)) == [[0, 2, 0]] * 2


def test_metrics_drop_what_a_resumed_run_repeats_and_an_incomplete_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 0, "held_out_loss": 5}\n{"step": 1, "loss": 4}\n{"step": 2, "loss": 3}\n{"step": 3, "lo'
    )
    Metrics(path, start=1, steps=5, bar=False).close()
    assert [line["step"] for line in read_metrics(path)] == [0, 1]
    Metrics(path, start=0, steps=5, bar=False).close()
    assert read_metrics(path) == [], "a run from the start begins a new file"
