"""Reporters of train.py: what each of them gets, also in a resumed run, and their failures."""

from __future__ import annotations

import math
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import pytest
import torch
import train
from training import options, reporters
from training.command_line import is_installed
from training.metrics import read_metrics
from training.reporters import Reporters
from training.signals_and_watchdog import Supervisor

from ..train_runs import run

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = "--preset nano --eval-every 2 --precision-stats 2"


def install(monkeypatch, folder: Path, name: str, code: str = "") -> None:
    """Make a package importable that consists of ``code``."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, name, raising=False)


FAKE_WANDB = """
from types import SimpleNamespace

runs = []

class Run:
    def __init__(self, **kwargs):
        self.kwargs, self.logged, self.metrics, self.exit_code = kwargs, [], [], None
        self.id = kwargs["id"] or f"id{len(runs)}"
        self.settings = {}
        self.config = SimpleNamespace(update=self.update)

    def update(self, values, allow_val_change):
        assert allow_val_change
        self.settings.update(values)

    def define_metric(self, name, step_metric):
        self.metrics.append((name, step_metric))

    def log(self, values):
        if FAILS_AT is not None and values["step"] >= FAILS_AT:
            raise ConnectionError("no route to host\\nsecond line")
        self.logged.append(values)

    def finish(self, exit_code):
        self.exit_code = exit_code

FAILS_AT = None

def init(**kwargs):
    if FAILS_AT == "start":
        raise RuntimeError("api_key not configured (no-tty).")
    runs.append(Run(**kwargs))
    return runs[-1]
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch) -> ModuleType:
    install(monkeypatch, tmp_path / "packages", "wandb", FAKE_WANDB)
    import wandb

    yield wandb
    del sys.modules["wandb"]


def test_wandb_gets_what_metrics_jsonl_gets_and_one_run_for_a_resumed_training(tmp_path, wandb):
    options = f"{SHORT} --save-every 2 --wandb bf16 --steps 4"
    assert run("--out", tmp_path / "out", options) == 0
    (first,) = wandb.runs
    assert (first.kwargs["project"], first.kwargs["name"], first.kwargs["id"]) == (
        "bf16",
        "out",
        None,
    )
    assert first.logged == read_metrics(tmp_path / "out/metrics.jsonl")
    assert {"step", "edq"} < first.logged[3].keys() and first.logged[3]["step"] == 2
    assert first.metrics == [("*", "step")] and first.exit_code == 0
    assert first.settings["steps"] == 4 and first.settings["preset"] == "nano"
    assert run("--out", tmp_path / "out", options, "--steps 5 --resume auto") == 0
    assert wandb.runs[1].id == wandb.runs[1].kwargs["id"] == first.id
    assert {values["step"] for values in wandb.runs[1].logged} == {5}
    assert run("--out", tmp_path / "new", options) == 0
    assert wandb.runs[2].kwargs["id"] is None, "another training"


def test_wandb_learns_that_a_training_failed(tmp_path, wandb):
    diverging = "--lr 1e12 --clip 0 --schedule constant --warmup 1 --max-nonfinite 2 --save-every 1"
    options = f"--preset nano --steps 9 --wandb p {diverging}"
    assert run("--out", tmp_path / "out", options, is_drawn=True) == 1
    assert wandb.runs[0].exit_code == 1
    assert (tmp_path / "out/metrics.png").stat().st_size > 5000, "the picture shows what happened"


@pytest.mark.parametrize(
    ("fails_at", "note"),
    [
        ("start", "W&B: api_key not configured (no-tty); training goes on without it"),
        (
            2,
            "W&B: no route to host; training goes on, but its values from step 2 on may be lost",
        ),
    ],
)
def test_wandb_that_fails_costs_one_note_and_no_training(tmp_path, wandb, capsys, fails_at, note):
    wandb.FAILS_AT = fails_at
    assert run("--out", tmp_path / "out", SHORT, "--steps 4 --wandb p") == 0
    assert capsys.readouterr().err == f"note: {note}\n"
    lines = read_metrics(tmp_path / "out/metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert (tmp_path / "out/checkpoints/step-00000004").is_dir()


@pytest.mark.parametrize("option", ["--wandb p", "--tensorboard"])
def test_missing_package_is_an_error_only_if_asked_for(tmp_path, monkeypatch, capsys, option):
    package = option.split()[0].removeprefix("--")
    for module in (options, reporters):
        monkeypatch.setattr(module, "is_installed", lambda name: name != package)
    monkeypatch.setattr(reporters, "TensorBoard", Recorder)
    assert run("--out", tmp_path / "out", "--preset nano --steps 1", option) == 2
    assert capsys.readouterr().err == (
        f"error: --{package} needs the package {package}: install it with pip install {package}, "
        "or leave out the option.\n"
    )
    assert not (tmp_path / "out").exists()
    assert run("--out", tmp_path / "out", "--preset nano --steps 1") == 0
    assert capsys.readouterr().err == ""


def test_folder_of_a_package_is_no_package(tmp_path, monkeypatch):
    """W&B writes its runs to a folder of its name."""
    (tmp_path / "some_reports").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not is_installed("some_reports") and not is_installed("no_such_package")
    (tmp_path / "some_reports/__init__.py").touch()
    assert is_installed("some_reports")


class FakeWriter:
    """Stand-in for torch's SummaryWriter."""

    written: list[tuple[str, float, int]]
    writers: list[FakeWriter] = []  # noqa: RUF012  # of all tests

    def __init__(self, log_dir: str, purge_step: int) -> None:
        self.log_dir, self.purge_step, self.written, self.closed = log_dir, purge_step, [], False
        self.writers.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.written.append((name, value, step))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def writers(tmp_path, monkeypatch) -> list[FakeWriter]:
    install(monkeypatch, tmp_path / "packages", "tensorboard")
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = FakeWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    FakeWriter.writers.clear()
    return FakeWriter.writers


def test_tensorboard_is_written_if_it_is_installed(tmp_path, writers):
    options = f"{SHORT} --save-every 2 --steps 4"
    assert run("--out", tmp_path / "out", options) == 0
    (first,) = writers
    assert (first.log_dir, first.purge_step) == (str(tmp_path / "out/tensorboard"), 0)
    assert first.closed and first.written == [
        (name, value, line["step"])
        for line in read_metrics(tmp_path / "out/metrics.jsonl")
        for name, value in line.items()
        if name != "step"
    ]
    assert run("--out", tmp_path / "out", options, "--steps 5 --resume auto") == 0
    assert writers[1].purge_step == 5, "step 4 is not repeated"
    assert run("--out", tmp_path / "without", options, "--no-tensorboard") == 0
    assert len(writers) == 2


def test_real_tensorboard_reads_the_curve(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = f"{SHORT} --save-every 2 --keep 9 --steps 4 --out {tmp_path}"
    assert run(options) == 0
    assert run(options, f"--resume {tmp_path}/checkpoints/step-00000002") == 0
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name in ("loss", "held_out_loss", "edq"):
        expected = [
            (line["step"], torch.tensor(line[name]).item())
            for line in read_metrics(tmp_path / "metrics.jsonl")
            if name in line
        ]
        assert [(event.step, event.value) for event in events.Scalars(name)] == expected


@pytest.mark.parametrize(("options", "code"), [("", 0), ("--lr 1e12 --clip 0 --warmup 1", 1)])
def test_last_reports_may_take_longer_than_step_timeout(tmp_path, monkeypatch, options, code):
    made, watched = [], []
    monkeypatch.setattr(train, "Supervisor", lambda: made.append(Supervisor()) or made[-1])
    monkeypatch.setattr(
        reporters.Picture, "close", lambda self, failed: watched.append(made[-1]._is_watched)
    )
    assert run("--out", tmp_path, "--preset nano --steps 4 --max-nonfinite 2", options) == code
    assert watched == [False]


class Recorder:
    name = "recorder"

    def __init__(self, name: object, fails: object) -> None:
        self.name, self.fails, self.calls = str(name), fails is True, []

    def log(self, step, values) -> None:
        self.calls.append((step, values))
        if self.fails:
            raise OSError(28, "No space left on device", "/full")

    def close(self, failed: bool) -> None:
        self.calls.append(failed)
        if self.fails:
            raise ValueError


def test_an_error_of_one_reporter_reaches_neither_training_nor_the_others(capsys):
    three = [Recorder("first", True), Recorder("second", False), Recorder("third", True)]
    with suppress(KeyError), Reporters(*three) as all_of_them:
        all_of_them.log(1, {"loss": math.nan})
        all_of_them.log(2, {"loss": 2.0})
        raise KeyError
    for reporter in three:
        assert reporter.calls[1:] == [(2, {"loss": 2.0}), True]
    assert capsys.readouterr().err == "".join(
        f"note: {name}: No space left on device; training goes on, but its values from step 1 on "
        "may be lost\n"
        for name in ("first", "third")
    )


def test_a_picture_that_cannot_be_written_is_noted_at_the_end(tmp_path, capsys):
    (tmp_path / "metrics.png").mkdir()
    assert run("--out", tmp_path, "--preset nano --steps 2", is_drawn=True) == 0
    printed = capsys.readouterr()
    assert (
        printed.err
        == f"note: {tmp_path}/metrics.png: Is a directory; its last values may be lost\n"
    )
    assert "checkpoint  " in printed.out
