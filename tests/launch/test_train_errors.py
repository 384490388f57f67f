"""launch/train.py with wrong arguments, and with errors on some ranks."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import distributed
import elastic
import pytest
import torch
import torch.distributed as dist
import train
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from training import build
from training.errors import UsageError
from training.optimizers import OptimizerSpec
from training.options import parse_args
from training.world import call_on_all_ranks

from sharded_bf16_adamw import AdamW_BF16, latest, save

from .train_runs import curve, finish, printed_on_ranks, run, start

pytestmark = pytest.mark.usefixtures("one_thread")


def write(path: Path, size: int) -> Path:
    path.write_bytes(b"x" * size)
    return path


def folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


# Arguments, given a temporary directory, and a regular expression for the message.
ERRORS = {
    "missing data": (
        lambda t: f"--data {t / 'none'}",
        "--data .*/none cannot be read .No such file",
    ),
    "too little data": (
        lambda t: f"--data {write(t / 'short', 20)}",
        "short holds 20 bytes, too few for --seq-len 16: give at least 170",
    ),
    "empty data": (lambda t: "--data=", "--data: the value is empty; see --help."),
    "binary data": (lambda t: f"--data {sys.executable}", "holds a binary file, not text"),
    "missing checkpoint": (
        lambda t: f"--resume {t / 'none'}",
        "--resume .*/none is neither a checkpoint nor a directory with one",
    ),
    "out is a file": (
        lambda t: f"--out {write(t / 'file', 1)}",
        "--out .*/file cannot be used",
    ),
    "uneven batch": (
        lambda t: "--batch-size 10 --grad-accum 4",
        "--batch-size 10 is not a multiple of 4 = 1 rank.s. x --grad-accum 4: use a multiple of 4",
    ),
    "unknown option": (lambda t: "--stpes 4", "unrecognized arguments: --stpes 4"),
    "unknown preset": (lambda t: "--preset huge", "invalid choice: 'huge'"),
    "no steps": (lambda t: "--steps 0", "--steps: 0 is not a positive number"),
    "not a number": (lambda t: "--steps many", "--steps: many is not a whole number"),
    "bad beta": (lambda t: "--betas 0.9 1.5", "Invalid beta parameter at index 1: 1.5"),
    "bad weight decay of torch's": (
        lambda t: "--optimizer torch-fp32 --weight-decay -1",
        "Invalid weight_decay value: -1",
    ),
    "negative lr": (lambda t: "--lr -1", "--lr: -1 is not a number of at least 0"),
    "negative final lr": (
        lambda t: "--final-lr -1",
        "--final-lr: -1 is not a number of at least 0",
    ),
    "negative clip": (lambda t: "--clip -1", "--clip: -1 is not a number of at least 0"),
    "NaN clip": (lambda t: "--clip nan", "--clip: nan is not a number of at least 0"),
    "infinite lr": (lambda t: "--lr inf", "--lr: inf is not a number of at least 0"),
    "abbreviation": (lambda t: "--warm 5", "unrecognized arguments: --warm 5"),
    "huge seed": (lambda t: f"--seed {1 << 32}", "--seed: 4294967296 is not below 2.32"),
    "huge vocabulary": (
        lambda t: f"--vocab-size {(1 << 32) + 1}",
        "--vocab-size: 4294967297 is above 2.32, the values of a uint32 token id",
    ),
    "no initial weights": (lambda t: "--init-from=", "--init-from: the value is empty"),
    "moments of nothing": (lambda t: "--init-moments", "--init-moments needs --init-from"),
    "export of a preset": (lambda t: "--export-hf float32", "--export-hf needs --model"),
    "missing config": (lambda t: f"--config {t / 'none'}", "--config .*/none cannot be read"),
    "unwritable config": (
        lambda t: f"--out {folder(t / 'out/config.toml').parent}",
        "out/config.toml cannot be written .Is a directory.",
    ),
    "unwritable checkpoints": (
        lambda t: f"--out {write(folder(t / 'other') / 'checkpoints', 1).parent}",
        "--out .*/other cannot be used .File exists: .*/other/checkpoints.",
    ),
    "unknown backend": (lambda t: "--optimizer-backend abacus", "Invalid backend: 'abacus'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_usage_error_prints_one_sentence_and_exits_with_code_2(tmp_path, capsys, case):
    arguments, message = ERRORS[case]
    assert run("--out", tmp_path / "out", "--steps 2", arguments(tmp_path)) == 2
    printed = capsys.readouterr()
    assert re.fullmatch(rf"error: [^\n]*{message}[^\n]*\n", printed.err), printed.err
    assert printed.out == ""
    assert not (tmp_path / "out/metrics.jsonl").exists()
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("arguments", "note"),
    [
        (
            "--optimizer torch-bf16 --optimizer-backend native",
            "--optimizer-backend native has no effect with --optimizer torch-bf16",
        ),
        (
            "--optimizer torch-bf16 --check-replicas 5",
            "--check-replicas 5 has no effect with --optimizer torch-bf16",
        ),
        (
            "--optimizer torch-bf16 --precision-stats 5",
            "--precision-stats 5 has no effect with --optimizer torch-bf16",
        ),
        (
            "--schedule constant --final-lr 1e-5",
            "--final-lr 1e-05 has no effect with --schedule constant",
        ),
        (
            "--steps 4 --warmup 5",
            "--warmup 5 is longer than --steps 4: the learning rate will not reach --lr 0.003",
        ),
        ("--steps 4 --warmup 4 --optimizer-backend native --final-lr 1e-5", None),
        ("--steps 1", None),
    ],
)
def test_option_without_effect_is_noted_on_rank_0_only(monkeypatch, capsys, arguments, note):
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        parse_args(arguments.split())
    err = capsys.readouterr().err
    assert err == "" if note is None else re.fullmatch(rf"note: {note}[^\n]*\n", err)


def test_help_shows_every_default(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    _, *options = re.split(r"^  (?=-)", capsys.readouterr().out, flags=re.MULTILINE)
    without = [option.split()[0] for option in options if "default:" not in option]
    assert len(options) > 20 and without == ["-h,", "--deterministic", "--no-progress"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_missing_gpu_is_an_error(capsys):
    assert train.main(["--device", "cuda"]) == 2
    message = "--device cuda needs a GPU for each of the 1 processes, but 0 were found"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--lr 0.01", r"another configuration .*--lr was 0.003, now 0.01.*: give the same options"),
        ("--preset small", r"another configuration .*--preset was tiny, now small"),
        ("--resume auto --preset small", "was trained with --preset tiny, not small"),
        ("--resume auto --optimizer torch-bf16", "was trained with --optimizer bf16, not torch"),
        ("--resume auto --steps 1", "is at step 2, past --steps 1"),
    ],
)
def test_run_is_neither_overwritten_nor_resumed_as_another(tmp_path, capsys, arguments, message):
    assert run("--out", tmp_path, "--steps 2") == 0
    before = curve(tmp_path)
    capsys.readouterr()
    assert run("--out", tmp_path, "--steps 2", arguments) == 2
    assert re.fullmatch(rf"error: [^\n]*{message}[^\n]*\n", capsys.readouterr().err)
    assert curve(tmp_path) == before


def test_damaged_or_foreign_checkpoint_is_not_resumed(tmp_path, capsys):
    assert run("--out", tmp_path, "--steps 2") == 0
    damaged = latest(tmp_path / "checkpoints")
    manifest = damaged / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"serial": 1', b'"serial": 2'))
    layer = torch.nn.Linear(2, 2).bfloat16()
    foreign = save(tmp_path / "foreign", 1, layer, AdamW_BF16(layer.parameters(), lr=0.1))
    for path, message in (
        (damaged, "cannot be used: manifest.json: it is damaged"),
        (foreign, "was not saved by train.py"),
    ):
        capsys.readouterr()
        assert run("--out", tmp_path, "--steps 2 --resume", path) == 2
        err = capsys.readouterr().err
        assert re.fullmatch(rf"error: the checkpoint {path} {message}[^\n]*\n", err)


def test_changed_seed_is_noted_on_resume(tmp_path, capsys):
    assert run("--out", tmp_path, "--steps 2") == 0
    assert run("--out", tmp_path, "--steps 5 --seed 1 --resume auto") == 0
    err = capsys.readouterr().err
    assert "note: changed since the checkpoint: --seed was 0, now 1; --steps was 2, now 5\n" in err
    assert "note: the schedule jumps: the learning rate of the next step is " in err


def test_operational_changes_are_noted_and_stored_but_not_by_a_refused_run(tmp_path, capsys):
    stored = tmp_path / "config.toml"
    assert run("--out", tmp_path, "--steps 2") == 0
    assert "\nkeep = 2\n" in stored.read_text() and stored.read_text().count("\n") > 30
    assert f"\noptions, also in {stored}:\n  preset=" in capsys.readouterr().out
    assert run("--out", tmp_path, "--steps 2 --lr 0.01 --keep 5") == 2
    assert "\nkeep = 2\n" in stored.read_text()
    capsys.readouterr()
    assert run("--out", tmp_path, "--steps 2 --keep 3 --no-async-save") == 0
    note = (
        "note: changed since the checkpoint: --async-save was True, now False; --keep was 2, now 3"
    )
    assert capsys.readouterr().err == f"{note}\n"
    assert "\nkeep = 3\n" in stored.read_text()


def test_stored_configuration_continues_or_repeats_its_run(tmp_path, capsys):
    options = "--preset nano --steps 3 --lr 0.002 --betas 0.8 0.9 --save-every 2 --seed 7"
    assert run("--out", tmp_path / "a", options) == 0
    config = tmp_path / "a/config.toml"
    capsys.readouterr()
    assert train.main(["--config", str(config)]) == 0
    printed = capsys.readouterr()
    assert "steps 3 to 3" in printed.out and printed.err == ""
    assert train.main(["--config", str(config), "--out", str(tmp_path / "b")]) == 0
    assert curve(tmp_path / "b") == curve(tmp_path / "a")


@pytest.mark.parametrize(("exit_code", "code"), [(2, 2), (-9, 1)])
def test_launcher_exits_with_the_code_of_the_worker_that_failed(
    monkeypatch, capsys, exit_code, code
):
    def torchrun(argv):
        assert argv == ["train.py"]
        failure = ProcessFailure(local_rank=3, pid=77, exitcode=exit_code, error_file="none")
        raise ChildFailedError("train.py", {3: failure})

    monkeypatch.setenv("PET_SIGNALS_TO_HANDLE", "none")  # keep the handlers of this process
    monkeypatch.setattr(elastic, "torchrun", torchrun)
    assert elastic.main(["train.py"]) == code
    message = f"local rank 3 (process 77) ended with exit code {exit_code}\n"
    assert capsys.readouterr().err == message


@pytest.mark.exhaustive  # the test above, and training/test_errors.py, have it without torchrun
def test_error_under_torchrun_is_printed_once_and_ends_all_ranks(tmp_path):
    code, _, err = finish(start(2, "--data /no/such/text", "--out", tmp_path))
    assert code == 2
    assert len(re.findall(r"^error: --data /no/such/text cannot be read", err, re.MULTILINE)) == 1
    assert 'launch/train.py", line' not in err, "no stack trace of the script"


def fail_on_rank_1(rank: int, world_size: int) -> str:
    def check() -> None:
        if rank == 1:
            raise UsageError("no disk")

    with pytest.raises(UsageError) as caught:
        call_on_all_ranks(check)
    return str(caught.value)


def test_error_on_one_rank_is_raised_on_all():
    assert distributed.run_ranks(2, fail_on_rank_1) == ["no disk", "no disk"]


def train_without_a_package_on_rank_1(rank: int, world_size: int, out: str, what: str) -> Any:
    real = OptimizerSpec.unavailable_reason, build.backend_module
    try:
        if rank == 1 and what == "package":
            OptimizerSpec.unavailable_reason = lambda self, has_cuda: "needs a package"
        if rank == 1 and what == "backend":
            build.backend_module = mock.Mock(side_effect=ValueError("no compiler"))
        options = "--strategy ddp --preset nano --steps 1 --optimizer-backend reference"
        return printed_on_ranks(rank, world_size, out, options)
    finally:
        OptimizerSpec.unavailable_reason, build.backend_module = real


@pytest.mark.parametrize(
    ("what", "message"), [("package", "--optimizer bf16 needs a package."), ("backend", "no comp")]
)
def test_optimizer_that_one_machine_lacks_is_an_error_on_all_ranks(tmp_path, what, message):
    results = distributed.run_ranks(2, train_without_a_package_on_rank_1, str(tmp_path), what)
    assert [code for code, *_ in results] == [2, 2]
    assert f"error: {message}" in results[0][2] and results[1][2] == ""


def test_single_refuses_several_ranks(tmp_path):
    (code, _, err), other = distributed.run_ranks(
        2, printed_on_ranks, str(tmp_path), "--strategy single"
    )
    assert code == other[0] == 2
    message = "--strategy single runs on one process, not 2: use --strategy ddp or fsdp2."
    assert f"error: {message}\n" in err and message not in other[2]
