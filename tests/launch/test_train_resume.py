"""launch/train.py stopped, killed and resumed."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from functools import partial
from pathlib import Path

import distributed
import pytest
import torch.distributed as dist
from training.data import TokenDataset
from training.errors import STOPPED
from training.metrics import MetricsFile, read_metrics

from sharded_bf16_adamw import latest, verify
from sharded_bf16_adamw.checkpoint.dcp_storage import ChecksummedWriter
from sharded_bf16_adamw.checkpoint.reader import CheckpointReader

from . import train_runs
from .train_runs import (
    OPTIMIZERS,
    curve,
    finish,
    losses,
    printed_on_ranks,
    start,
    train_on_ranks,
    train_until_killed,
    wait_for_step,
    workers,
)

pytestmark = pytest.mark.usefixtures("one_thread")
run = partial(train_runs.run, "--preset nano")


@pytest.fixture
def stop_at(monkeypatch):
    """Return a function that sends this process SIGTERM when it reads a (0-based) step's batch."""

    def arrange(at: int) -> None:
        real = TokenDataset.batch

        def batch(self, seed, step, size):
            if step == at:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(self, seed, step, size)

        monkeypatch.setattr(TokenDataset, "batch", batch)

    return arrange


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_stopped_run_resumes_with_the_same_bits(tmp_path, capsys, stop_at, optimizer):
    options = f"--optimizer {optimizer} --steps 8 --eval-every 2"
    assert run("--out", tmp_path / "whole", options) == 0
    stop_at(4)
    assert run("--out", tmp_path / "stopped", options) == STOPPED
    assert "stopped at step 5" in capsys.readouterr().out
    assert [line["step"] for line in curve(tmp_path / "stopped")][-1] == 5
    assert run("--out", tmp_path / "stopped", options) == 0
    assert curve(tmp_path / "stopped") == curve(tmp_path / "whole")


@pytest.mark.parametrize(
    ("option", "saved"),
    [
        ("--async-save", 4),
        # killed between saves, not in one
        pytest.param("--no-async-save", 8, marks=pytest.mark.exhaustive),
    ],
)
def test_killed_run_resumes_from_its_last_checkpoint_with_the_same_bits(tmp_path, option, saved):
    """The run is killed in step 10 or later.

    A background save of step 8 may still be in flight, but has waited for that of step 4.
    """
    options = f"--preset nano --steps 40 --save-every 4 --eval-every 10 {option}"
    distributed.run_ranks(2, train_on_ranks, str(tmp_path), {"whole": options})
    killed = (str(tmp_path / "killed"), options, 10)
    codes = distributed.run_ranks_that_die(2, train_until_killed, *killed)
    assert codes == [-signal.SIGKILL] * 2
    before = curve(tmp_path / "killed")
    (code, out, err), other = distributed.run_ranks(
        2, printed_on_ranks, str(tmp_path / "killed"), f"{options} --resume auto"
    )
    assert code == other[0] == 0, err
    resumed_at = int(re.search(r"steps (\d+) to 40", out).group(1))
    assert saved <= resumed_at < 40 and resumed_at % 4 == 0
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    assert before == curve(tmp_path / "whole")[: len(before)]


def test_all_ranks_save_and_exit_if_torchrun_is_told_to_stop(tmp_path):
    options = "--preset nano --steps 100_000 --save-every 1 --eval-every 100_000"
    process = start(2, "--out", tmp_path, options)
    wait_for_step(process, tmp_path, 3)
    assert len(workers(process)) == 2
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert code == STOPPED, err
    step = int(re.search(r"stopped at step (\d+), saved", out).group(1))
    manifest = (tmp_path / f"checkpoints/step-{step:08d}/manifest.json").read_text()
    assert json.loads(manifest)["extra"]["step"] == step
    assert curve(tmp_path)[-1]["step"] == step


@pytest.fixture
def saves(monkeypatch):
    """Return the saves so far as (step, in the background), and the steps whose saves shall fail.

    A background save of such a step meets a full disk.
    """
    done: list[tuple[int, bool]] = []
    failing: set[int] = set()
    real = ChecksummedWriter.write_data

    def write_data(self, plan, planner):
        step = int(re.search(r"step-(\d+)", self.path.name).group(1))
        background = threading.current_thread() is not threading.main_thread()
        if background and step in failing:
            raise OSError(28, "No space left on device")
        done.append((step, background))
        return real(self, plan, planner)

    monkeypatch.setattr(ChecksummedWriter, "write_data", write_data)
    return done, failing


@pytest.mark.parametrize(("option", "background"), [("", True), ("--no-async-save", False)])
def test_run_saves_in_the_background_but_synchronously_when_stopped(
    tmp_path, stop_at, saves, option, background
):
    options = f"--steps 8 --eval-every 2 --save-every 2 {option}"
    assert run("--out", tmp_path / "whole", options) == 0
    assert saves[0] == [(2, background), (4, background), (6, background), (8, background)]
    assert latest(tmp_path / "whole/checkpoints").name == "step-00000008", "waited for"
    saves[0].clear()
    stop_at(4)
    assert run("--out", tmp_path / "stopped", options) == STOPPED
    assert saves[0] == [(2, background), (4, background), (5, False)]
    assert run("--out", tmp_path / "stopped", options, "--resume auto") == 0
    assert curve(tmp_path / "stopped") == curve(tmp_path / "whole")
    for name in ("whole", "stopped"):
        assert verify(tmp_path / name / "checkpoints") == []
    assert saved_tensors(tmp_path / "stopped") == saved_tensors(tmp_path / "whole")


def saved_tensors(out_dir: Path) -> dict[str, list[float]]:
    stored = CheckpointReader(out_dir / "checkpoints")
    return {
        key: stored.read(key).flatten().tolist()
        for key in stored.infos
        if key.startswith(("model.", "optimizer."))
    }


@pytest.mark.parametrize(("steps", "last"), [(5, 5), (4, 4), (9, 6)])
def test_failed_background_save_ends_the_run_after_a_last_save(
    tmp_path, capsys, saves, steps, last
):
    saves[1].add(4)
    assert run("--out", tmp_path, f"--steps {steps} --save-every 2") == 1
    message = r"cannot save the checkpoint \S*step-00000004: on rank 0, OSError: .*No space left"
    assert re.fullmatch(rf"error: {message}[^\n]*\n", capsys.readouterr().err)
    assert not dist.is_initialized()
    assert saves[0] == [(2, True), (last, False)]
    assert latest(tmp_path / "checkpoints").name == f"step-{last:08d}"


@pytest.mark.parametrize("world_size", [1, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_resume_on_another_world_size_continues_data_schedule_and_metrics(tmp_path, world_size):
    """The tests of checkpoints compare the bits of the weights."""
    options = "--steps 8 --eval-every 4 --strategy fsdp2"
    runs = {"run": f"{options} --save-every 4 --keep 2"}
    distributed.run_ranks(2, train_on_ranks, str(tmp_path), runs)
    whole = curve(tmp_path / "run")
    runs = {"run": f"{options} --resume {tmp_path}/run/checkpoints/step-00000004"}
    distributed.run_ranks(world_size, train_on_ranks, str(tmp_path), runs)
    resumed = curve(tmp_path / "run")
    assert resumed[:6] == whole[:6], "the lines up to step 4 stay"
    assert len(resumed) == len(whole) == 11
    for a, b in zip(resumed[6:], whole[6:], strict=True):
        assert a == pytest.approx(b, rel=0.01)


def test_resume_of_a_finished_run_prints_its_summary_again(tmp_path, capsys):
    assert run("--out", tmp_path, "--steps 2") == 0
    before, first_out = curve(tmp_path), capsys.readouterr().out
    assert run("--out", tmp_path, "--steps 2 --resume auto") == 0
    assert curve(tmp_path) == before
    loss = re.compile(r"held-out loss.*")
    assert loss.search(capsys.readouterr().out).group() == loss.search(first_out).group()


def test_resume_auto_without_a_checkpoint_starts_from_scratch(tmp_path):
    assert run("--out", tmp_path, "--steps 2 --resume auto") == 0
    assert len(losses(tmp_path)) == 2


def damage(path: Path, pattern: str) -> None:
    """Flip a bit in the middle of a file of a checkpoint."""
    (file,) = path.glob(pattern)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("pattern", "resume"),
    [
        ("*.distcp", ""),
        ("manifest.json", ""),
        (".metadata", "--resume newest-good"),
    ],
)
def test_damaged_checkpoint_is_an_error_or_replaced_by_an_undamaged_one(
    tmp_path, capsys, pattern, resume
):
    options = "--steps 4 --eval-every 2 --save-every 2"
    assert run("--out", tmp_path, options) == 0
    whole = curve(tmp_path)
    good, damaged = tmp_path / "checkpoints/step-00000002", tmp_path / "checkpoints/step-00000004"
    damage(damaged, pattern)
    for given, use in (("auto", "newest-good"), (damaged, good)):
        capsys.readouterr()
        assert run("--out", tmp_path, options, "--resume", given) == 2
        err = capsys.readouterr().err
        start = f"error: the checkpoint {damaged} cannot be used: "
        end = f"; {good} is undamaged: use --resume {use}\n"
        assert re.fullmatch(rf"{start}[^\n]*{end}", err), err
    assert run("--out", tmp_path, options, resume) == 0
    printed = capsys.readouterr()
    assert "steps 2 to 4" in printed.out
    assert re.search(rf"^note: [^\n]*{damaged} [^\n]*\n", printed.err, re.MULTILINE)
    assert curve(tmp_path) == whole
    assert verify(tmp_path / "checkpoints") == [] and not damaged.exists(), "saved again"


def test_newest_good_needs_an_undamaged_checkpoint_unless_there_is_none(tmp_path, capsys):
    assert run("--out", tmp_path, "--steps 2 --resume newest-good") == 0
    damage(latest(tmp_path / "checkpoints"), "*.distcp")
    for resume in ("newest-good", "auto"):
        capsys.readouterr()
        assert run("--out", tmp_path, "--steps 2 --resume", resume) == 2
        message = f"no checkpoint in {tmp_path}/checkpoints is undamaged"
        assert re.search(rf"error: [^\n]*{message}", capsys.readouterr().err)


def test_newest_good_starts_from_scratch_if_no_save_was_completed(tmp_path, capsys):
    (tmp_path / "checkpoints/step-00000002").mkdir(parents=True)  # killed in the first save
    assert run("--out", tmp_path, "--steps 2 --resume newest-good") == 0
    assert "step-00000002 has no manifest.json" in capsys.readouterr().err


def test_only_checkpoint_that_is_damaged_is_named_with_its_damage(tmp_path, capsys):
    assert run("--out", tmp_path, "--steps 2") == 0
    damage(latest(tmp_path / "checkpoints"), "*.distcp")
    capsys.readouterr()
    assert run("--out", tmp_path, "--steps 2") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"__0_0\.distcp is not what was .*; no checkpoint in .* is undamaged$", error)


def test_fallback_to_a_checkpoint_of_another_configuration_is_an_error(tmp_path, capsys):
    options = "--steps 4 --save-every 2"
    assert run("--out", tmp_path, options, "--lr 1e-3") == 0
    damage(latest(tmp_path / "checkpoints"), "manifest.json")
    assert run("--out", tmp_path, options, "--lr 2e-3 --resume newest-good") == 0
    damage(latest(tmp_path / "checkpoints"), "*.distcp")
    capsys.readouterr()
    assert run("--out", tmp_path, options, "--lr 2e-3") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "holds a run of another configuration" in error and "--lr was 0.001, now 0.002" in error


def test_folder_that_is_unsuitable_is_one_sentence(tmp_path, capsys, monkeypatch):
    def refuse(*args, **options):
        raise ValueError("the folder is not shared by all ranks")

    monkeypatch.setattr("training.saving.save", refuse)
    assert run("--out", tmp_path, "--steps 2") == 1
    assert "error: the folder is not shared by all ranks.\n" in capsys.readouterr().err


def resume_after_damage(rank: int, world_size: int, out_dir: str) -> list[int]:
    arguments = ("--out", out_dir, "--steps 4 --eval-every 2 --save-every 2")
    codes = [run(*arguments)]
    if rank == 0:  # damages the file that rank 1 checks
        (Path(out_dir) / "checkpoints/step-00000004/__1_0.distcp").write_bytes(b"")
    dist.barrier()
    return [*codes, *(run(*arguments, "--resume", x) for x in ("auto", "newest-good"))]


def test_two_ranks_resume_from_the_newest_good_checkpoint(tmp_path):
    assert distributed.run_ranks(2, resume_after_damage, str(tmp_path)) == [[0, 2, 0]] * 2


def test_metrics_drops_incomplete_lines_and_steps_that_a_resumed_run_repeats(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 0, "held_out_loss": 5}\n{"step": 1, "loss": 4}\n{"step": 2, "loss": 3}\n'
        '[]\n3\n{}\n{"step": 3, "lo'
    )
    MetricsFile(path, start=1).close(failed=False)
    assert [line["step"] for line in read_metrics(path)] == [0, 1]
    MetricsFile(path, start=0).close(failed=False)
    assert read_metrics(path) == [], "a run from scratch begins a new file"
