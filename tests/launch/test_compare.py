"""launch/compare.py: arguments, reuse of runs, the table, and one real comparison."""

import os
import re
import subprocess
import sys
from unittest import mock

import compare
import distributed
import pytest
import train
from training import options

from .train_runs import undrawn


def test_unknown_arguments_go_to_train_py():
    args, rest = compare.parse_args(["--seeds", "2", "--preset", "nano", "--lr", "1e-3"])
    assert (args.seeds, rest) == (2, ["--preset", "nano", "--lr", "1e-3"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seeds", "0"], "--seeds: 0 is not a positive number"),
        (["--jobs", "-1"], "--jobs: -1 is not a positive number"),
        (["--budget", "0"], "--budget: 0 is not a positive number"),
        (["--budget", "nan"], "--budget: nan is not a positive number"),
        (["--stpes", "4"], "unrecognized arguments: --stpes 4"),
        (["--lr", "-1"], "--lr: -1 is not a number of at least 0"),
        (
            ["--out", "/dev/null/x"],
            "--out: the folder /dev/null/x cannot be made",
        ),
        (["--seed", "3"], "--seed is set for each run: use --optimizers, --seeds and --out"),
        (["--seed=3"], "--seed is set for each run"),
        (["--optimizer", "bf16"], "--optimizer is set for each run"),
        (["--resume", "auto"], "--resume is set for each run"),
        (["--budget", "10", "--steps", "7"], "--budget chooses --steps: give one of them"),
        (["--optimizers", "adam"], "invalid choice: 'adam'"),
    ],
)
def test_errors_of_use(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert compare.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_optimizer_that_is_missing_is_named(capsys, monkeypatch):
    monkeypatch.setattr(compare.torch.cuda, "is_available", lambda: False)
    assert compare.main(["--optimizers", "flashoptim"]) == 2
    assert "error: --optimizers flashoptim runs on CUDA only" in capsys.readouterr().err


@pytest.fixture
def fake_runs(monkeypatch):
    """Replace train.py; return the runs it was asked for."""
    runs = []
    losses = {"torch-fp32": 2.0, "bf16": 2.25, "torch-bf16": 2.5}

    class Finished:
        returncode = 0

    def run(command, stdout, stderr, env):
        option = lambda name: command[command.index(name) + 1]  # noqa: E731
        name, seed = option("--optimizer"), int(option("--seed"))
        runs.append((name, seed, command[command.index("--save-every") + 2 :]))
        stdout.write("optimizer state   1 bytes: 6.00 per parameter\n")
        path = compare.Path(option("--out")) / "metrics.jsonl"
        loss = losses[name] + 0.1 * seed
        path.write_text(
            f'{{"step": 0, "held_out_loss": 5.5}}\n{{"step": 9, "held_out_loss": {loss}}}\n'
        )
        return Finished()

    monkeypatch.setattr(compare.subprocess, "run", run)
    return runs


THREE = ["--optimizers", "bf16", "torch-bf16"]  # and the baseline, which always runs


def test_the_table_pairs_gaps_by_seed(tmp_path, fake_runs, capsys):
    assert compare.main(["--out", str(tmp_path), "--seeds", "2", *THREE]) == 0
    out = capsys.readouterr().out
    assert "| torch.optim.AdamW, fp32 weights | 10.00 | 2.0500 ± 0.0500 |  |  |" in out
    ours = "| AdamW_BF16 (ours) | 8.00 | 2.3000 ± 0.0500 | +0.2500 ± 0.0000 | +0.2500 +0.2500 |"
    assert ours in out
    assert "compare.py --seeds 2 --optimizers bf16 torch-bf16`" in out
    names = [name for name, *_ in fake_runs]
    assert names.count("torch-fp32") == 2, "the baseline is always among them"


def test_one_seed_has_no_error(tmp_path, fake_runs, capsys):
    compare.main(["--out", str(tmp_path), "--seeds", "1", *THREE])
    out = capsys.readouterr().out
    assert "±" not in out and "nan" not in out
    assert "| AdamW_BF16 (ours) | 8.00 | 2.2500 | +0.2500 | +0.2500 |" in out


def test_runs_of_the_same_arguments_only_are_reused(tmp_path, fake_runs):
    compare.main(["--out", str(tmp_path), "--seeds", "1", *THREE, "--lr", "1"])
    compare.main(["--out", str(tmp_path), "--seeds", "1", *THREE, "--lr", "1"])
    assert len(fake_runs) == 3
    compare.main(["--out", str(tmp_path), "--seeds", "1", *THREE, "--lr", "2"])
    assert len(fake_runs) == 6


def test_a_budget_chooses_the_steps(tmp_path, fake_runs, monkeypatch):
    stale = tmp_path / "calibration/1"  # of an earlier comparison
    stale.mkdir(parents=True)
    (stale / "finished").touch()
    clock = iter([0.0, 10.0, 20.0, 32.5])  # a start takes 10 s, and a step 0.125 s
    monkeypatch.setattr(compare.time, "perf_counter", lambda: next(clock))
    compare.main(["--out", str(tmp_path), "--seeds", "2", *THREE, "--budget", "10"])
    # the two calibration runs do not evaluate after each step
    assert [args[:2] for *_, args in fake_runs[:2]] == 2 * [["--eval-every", "21"]]
    # 600 s for 6 runs: 100 s each
    assert [args for *_, args in fake_runs[2:]] == 6 * [["--steps", "720"]]


def test_a_budget_that_is_too_small_is_an_error(tmp_path, fake_runs, monkeypatch, capsys):
    clock = iter([0.0, 10.0, 20.0, 32.0])
    monkeypatch.setattr(compare.time, "perf_counter", lambda: next(clock))
    argv = ["--out", str(tmp_path), "--seeds", "9", "--budget", "1", *THREE]
    assert compare.main(argv) == 2
    assert "error: --budget 1 leaves 0 steps" in capsys.readouterr().err


def test_a_run_that_fails_ends_the_comparison_with_its_error(tmp_path, monkeypatch, capsys):
    calls = []

    class Failed:
        returncode = 1

    def run(command, stdout, stderr, env):
        calls.append(command)
        stdout.write("note: x\nerror: the disk is full.\nTraceback\n")
        return Failed()

    monkeypatch.setattr(compare.subprocess, "run", run)
    assert compare.main(["--out", str(tmp_path), "--seeds", "50", *THREE]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    start = "error: a run of --optimizer torch-fp32 failed: the disk is full. (log: "
    assert error.startswith(start) and error.endswith("-0/log.txt)")
    assert len(calls) < 10, "the other runs are not started"


def test_a_changed_config_is_another_comparison(tmp_path, fake_runs, capsys):
    config = tmp_path / "run.toml"
    argv = ["--out", str(tmp_path / "out"), "--seeds", "1", *THREE, "--config", str(config)]
    for lr in ("1e-3", "1e-3", "2e-3"):
        config.write_text(f"lr = {lr}")
        assert compare.main(argv) == 0
    assert len(fake_runs) == 6


def train_into(log: str, arguments: list[str]) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
    with undrawn():
        sys.exit(train.main(arguments))


def run_in_warm_process(command, stdout, stderr, env) -> subprocess.CompletedProcess:
    """Train in a process that has already imported torch."""
    process = distributed.forkserver.Process(target=train_into, args=(stdout.name, command[2:]))
    process.start()
    process.join()
    return subprocess.CompletedProcess(command, process.exitcode)


@pytest.mark.parametrize(
    "run_process",
    [run_in_warm_process, pytest.param(subprocess.run, marks=pytest.mark.exhaustive)],
)
def test_a_real_comparison_with_its_plot(tmp_path, capsys, run_process):
    argv = ["--out", str(tmp_path), "--seeds", "1", "--optimizers", "bf16", "--preset", "nano"]
    args = [*argv, "--steps", "2", "--eval-batches", "1"]
    with mock.patch.object(compare.subprocess, "run", run_process):
        assert compare.main(args) == 0
    gap = re.search(r"ours\) \| 8.00 \| [\d.]+ \| ([+-][\d.]+) ", capsys.readouterr().out)
    assert abs(float(gap[1])) < 0.05
    folder = next(path for path in tmp_path.iterdir() if path.is_dir())
    results = {name: compare.read_result(folder, name, 1) for name in ("torch-fp32", "bf16")}
    page = tmp_path / "quality.md"
    page.write_text("<!-- compare tiny: begin -->\nkept\n<!-- compare tiny: end -->\n")
    compare.write_docs(tmp_path, compare.parse_args(args)[0].model_name, results, "the table")
    assert "\nkept\n" in page.read_text()
    assert "<!-- compare nano: begin -->\nthe table\n<!-- compare nano: end -->" in page.read_text()
    assert (tmp_path / "img" / "quality_nano.png").stat().st_size > 5000


def test_the_section_of_the_docs_is_that_of_the_preset(tmp_path):
    out = ["--out", str(tmp_path), "--lr", "1"]
    assert compare.parse_args([*out, "--preset=small"])[0].model_name == "small"
    assert compare.parse_args(out)[0].model_name == options.DEFAULT_PRESET
