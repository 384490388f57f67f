"""Resume of launch/train.py after any exit, and shutdown within the grace period."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

import distributed
import pytest
import torch
import torch.distributed as dist
import train
from torch.distributed.elastic.utils.distributed import get_free_port
from training import evaluation, out_dir, reporters, signals_and_watchdog, step
from training.data import TokenDataset
from training.errors import STOPPED
from training.metrics import MetricsFile
from training.rendezvous import store_of_attempt

from sharded_bf16_adamw import latest
from sharded_bf16_adamw.checkpoint.root_lock import RootLock

from . import chaos
from .train_runs import (
    ELASTIC,
    SCRIPT,
    TIMEOUT,
    command_line,
    curve,
    finish,
    run,
    start,
    train_on_ranks,
    wait_for_step,
    workers,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------------------------------ resuming


def test_restarted_command_resumes_from_its_own_checkpoint(tmp_path, capsys):
    """With ``--resume PATH`` of another run, a restart keeps the steps trained since."""
    assert run("--out", tmp_path / "old", "--steps 2") == 0
    resume_old = f"--steps 4 --save-every 1 --resume {tmp_path}/old"
    assert run("--out", tmp_path / "new", resume_old) == 0
    assert "steps 2 to 4" in capsys.readouterr().out
    assert run("--out", tmp_path / "new", resume_old) == 0
    printed = capsys.readouterr()
    assert "steps 4 to 4" in printed.out and "note: continuing from" in printed.err
    (tmp_path / "new/checkpoints/step-00000004/manifest.json").write_text("{")
    assert run("--out", tmp_path / "new", resume_old) == 0
    printed = capsys.readouterr()
    assert "steps 3 to 4" in printed.out and "note: continuing from" in printed.err
    assert "step-00000004 cannot be used: manifest.json" in printed.err
    assert run("--out", tmp_path / "new", resume_old, "--lr 0.01") == 0
    assert "steps 2 to 4" in capsys.readouterr().out, "another command"


def test_run_without_a_checkpoint_says_that_it_starts_again(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 4}\n')
    assert run("--out", tmp_path, "--steps 1") == 0
    message = f"note: {tmp_path}/checkpoints has no checkpoint yet: the run starts from scratch\n"
    assert capsys.readouterr().err == message


def test_second_run_into_one_directory_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(out_dir, "LOCK_TIMEOUT_S", 0.2)
    lock = RootLock(tmp_path)
    assert run("--out", tmp_path, "--steps 1") == 2
    message = f"error: --out {tmp_path} is in use: process {os.getpid()} on "
    advice = f"is training there; give another --out, or remove {tmp_path}/.writer if "
    assert re.fullmatch(rf"{message}[^\n]* {advice}[^\n]*\n", capsys.readouterr().err)
    lock.release()
    assert run("--out", tmp_path, "--steps 1") == 0
    RootLock(tmp_path).release()


def test_restarts_use_separate_prefixes_of_one_store():
    """A worker that died while joining leaves its request in the store."""
    store = dist.HashStore()

    def attempt(size: int) -> list[dist.Store]:
        found: list[dist.Store] = [None] * size

        def join(rank: int) -> None:
            found[rank] = store_of_attempt(store, rank, size)

        threads = [threading.Thread(target=join, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT)
        return found

    store.set("ask/2", "a dead process")
    first, second = attempt(3), attempt(2)
    for number, views in enumerate((first, second)):
        views[0].set("key", str(number))
        assert [view.get("key") for view in views] == [str(number).encode()] * len(views)
    assert first[0].get("key") == b"0"


def train_until(rank: int, world_size: int, out_dir: str, options: str, stop_at: int) -> int:
    """Train; the last rank is told to stop in the (1-based) step ``stop_at``."""
    real = TokenDataset.batch

    def batch(self, seed, step, size):
        if step + 1 == stop_at and rank == world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, seed, step, size)

    TokenDataset.batch = batch
    try:
        return run("--out", out_dir, options)
    finally:
        TokenDataset.batch = real


def test_run_continues_on_four_three_and_two_ranks(tmp_path):
    options = "--preset nano --steps 9 --eval-every 3 --save-every 0 --strategy fsdp2"
    assert run("--out", tmp_path / "whole", options) == 0
    for world_size, stop_at, code in ((4, 3, STOPPED), (3, 6, STOPPED), (2, 0, 0)):
        arguments = (str(tmp_path / "run"), options, stop_at)
        assert distributed.run_ranks(world_size, train_until, *arguments) == [code] * world_size
    whole, lines = curve(tmp_path / "whole"), curve(tmp_path / "run")
    assert [line["step"] for line in lines] == [line["step"] for line in whole]
    for line, expected in zip(lines, whole, strict=True):
        assert line == pytest.approx(expected, rel=0.02)


@pytest.mark.exhaustive  # a minute each
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("nodes", "events"),
    [(1, ["kill worker", "kill torchrun"]), (2, ["SIGTERM to one node", "kill torchrun"])],
)
def test_killed_workers_and_torchrun_do_not_change_the_loss_curve(tmp_path, nodes, events):
    def train_undisturbed(job):
        options = f"{chaos.OPTIONS} --steps {job.steps}"
        distributed.run_ranks(2, train_on_ranks, str(tmp_path), {job.out.name: options})

    limits = (60, 60.0, TIMEOUT)
    happened = chaos.soak(
        tmp_path, events, (2,), *limits, seed=0, nodes=nodes, undisturbed=train_undisturbed
    )
    assert happened == dict.fromkeys(events, 1)


# ------------------------------------------------------------------------------------ stopping


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp2", "zero2"])
def test_stop_between_micro_batches_discards_the_step(tmp_path, capsys, monkeypatch, strategy):
    options = f"--preset nano --strategy {strategy} --grad-accum 3 --steps 4 --eval-every 2"
    assert run("--out", tmp_path / "whole", options) == 0
    calls = 0
    real = step.compute_loss

    def compute_loss(module, batch):
        nonlocal calls
        calls += module.training and torch.is_grad_enabled()
        if calls == 8:  # the second micro-batch of the third step
            os.kill(os.getpid(), signal.SIGTERM)
        return real(module, batch)

    monkeypatch.setattr(step, "compute_loss", compute_loss)
    assert run("--out", tmp_path / "stopped", options) == STOPPED
    assert "stopped at step 2" in capsys.readouterr().out and calls == 8
    assert run("--out", tmp_path / "stopped", options) == 0
    assert curve(tmp_path / "stopped") == curve(tmp_path / "whole")


def test_interrupted_evaluation_runs_after_resume(tmp_path, monkeypatch):
    options = "--preset nano --steps 4 --eval-every 2 --save-every 2"
    assert run("--out", tmp_path / "whole", options) == 0
    real = evaluation.held_out_loss
    for after in (0, 2, 4):

        def held_out_loss(run, after=after):
            if run.step == after:
                os.kill(os.getpid(), signal.SIGHUP)
            return real(run)

        monkeypatch.setattr(evaluation, "held_out_loss", held_out_loss)
        before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
        out = tmp_path / f"stopped-{after}"
        try:
            assert run("--out", out, options) == STOPPED
        finally:
            signal.signal(signal.SIGHUP, before)
        monkeypatch.undo()
        assert latest(out / "checkpoints").name == f"step-{after:08d}"
        assert run("--out", out, options) == 0
        assert curve(out) == curve(tmp_path / "whole"), after


# A run that gets signals in a save that does not end, each after the one before is handled.
HANGING_SAVE = """
import os, signal, sys, threading, time
import train
from training import saving
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell
def send_signals():
    for each in {signals}:
        os.kill(os.getpid(), each)
        time.sleep(1)
def save(*_, **__):
    threading.Thread(target=send_signals, daemon=True).start()
    time.sleep(600)
saving.save = save
sys.exit(train.main({arguments}))
"""


@pytest.mark.parametrize(
    ("signals", "grace", "code", "note", "message"),
    [
        (
            [signal.SIGUSR1],
            2,
            STOPPED,
            "SIGUSR1: stopping after this step",
            "--grace 2 s is over in the save of step 1",
        ),
        (
            [signal.SIGINT, signal.SIGINT],
            600,
            130,
            "SIGINT: stopping after this step; Ctrl-C again aborts",
            "aborted; the same command resumes from the last complete checkpoint",
        ),
    ],
)
def test_run_exits_within_grace_period_if_save_hangs(tmp_path, signals, grace, code, note, message):
    options = "--preset nano --steps 9 --save-every 1 --no-async-save --grace"
    arguments = command_line(options, grace, "--out", tmp_path / "run")
    script = tmp_path / "hanging_save.py"
    script.write_text(HANGING_SAVE.format(signals=list(map(int, signals)), arguments=arguments))
    codes, output = distributed.run_script(script, None)
    assert codes == [code], output
    assert output.endswith(f"\n{note}\nerror: rank 0: {message}.\n")


def test_torchrun_that_waits_for_other_nodes_can_be_stopped(tmp_path):
    port = get_free_port()
    options = f"--nnodes 2 --rdzv-backend c10d --rdzv-endpoint localhost:{port}"
    command = [sys.executable, str(ELASTIC), *options.split(), str(SCRIPT)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + TIMEOUT
    while socket.socket().connect_ex(("localhost", port)) != 0:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, err.splitlines()[-1]) == (STOPPED, "stopped by SIGUSR1")


def test_short_grace_is_noted(tmp_path, capsys):
    assert run("--out", tmp_path, "--preset nano --steps 6 --grace 1e-6") == 0
    assert re.fullmatch(r"note: --grace 1e-06 is short: [^\n]*\n", capsys.readouterr().err)
    assert run("--out", tmp_path / "long", "--preset nano --steps 6") == 0
    assert capsys.readouterr().err == ""


def test_short_grace_is_noted_after_the_first_long_save_and_once(tmp_path, capsys, monkeypatch):
    def save_slowly(run, in_background):
        real(run, in_background)
        run.save_seconds = 100.0

    real = train.save_checkpoint
    monkeypatch.setattr(train, "save_checkpoint", save_slowly)
    options = "--preset nano --steps 16 --save-every 8 --grace 99"
    assert run("--out", tmp_path, options) == 0
    note = r"note: --grace 99 is short: [^\n]* save take 100[^\n]*\n"
    assert re.fullmatch(note, capsys.readouterr().err)


def hang_on_rank_1(rank: int, world_size: int, error_file: str) -> None:
    if rank == 1:
        dist.recv(torch.zeros(1), src=0)  # until rank 0 ends
    with open(error_file, "w") as file:
        os.dup2(file.fileno(), 2)
    signals_and_watchdog.HANG_REPORT_S = 0.5  # no live rank has to report
    with signals_and_watchdog.Supervisor() as supervisor:
        supervisor.step_timeout = 1
        supervisor.beat("the optimizer step")
        dist.barrier()


def test_rank_that_hangs_ends_the_others_with_its_number(tmp_path):
    error_file = tmp_path / "stderr"
    assert distributed.run_ranks_that_die(2, hang_on_rank_1, str(error_file)) == [1, 1]
    assert error_file.read_text() == (
        "error: rank 0: no progress for --step-timeout 1 s: rank(s) 1 gave no sign of life while "
        "the others were in the optimizer step; a process is stopped or its machine hangs.\n"
    )


@pytest.mark.exhaustive  # the test above hangs a rank without torchrun
def test_stopped_worker_ends_the_job_with_its_number(tmp_path, monkeypatch):
    # the time after which torchrun kills the stopped worker
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "1")
    process = start(2, "--out", tmp_path, "--preset nano --steps 100_000 --step-timeout 5")
    wait_for_step(process, tmp_path, 3)
    stopped = workers(process)[1]
    os.kill(stopped, signal.SIGSTOP)
    try:
        code, _, err = finish(process)
    finally:
        with suppress(ProcessLookupError):
            os.kill(stopped, signal.SIGKILL)
    assert code == 1
    reason = re.search(r"^error: rank (\d): no progress for --step-timeout 5 s: (.*)$", err, re.M)
    other = 1 - int(reason.group(1))
    assert reason.group(2).startswith(f"rank(s) {other} gave no sign of life while the others were")


# ---------------------------------------------------------------------------------- outputs


def test_unwritable_metrics_are_an_error_at_the_start(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").mkdir()
    assert run("--out", tmp_path, "--steps 2") == 2
    message = f"error: {tmp_path}/metrics.jsonl cannot be written (Is a directory): make it "
    assert re.search(rf"^{re.escape(message)}[^\n]*\n\Z", capsys.readouterr().err, re.MULTILINE)


class FullDisk:
    """A file that takes half of its third line, and nothing for three lines after it."""

    def __init__(self, file):
        self.file, self.calls = file, 0

    def write(self, text: bytes) -> int:
        self.calls += 1
        if self.calls == 3:
            return self.file.write(text[: len(text) // 2])
        if self.calls in (4, 5, 6):
            raise OSError(28, "No space left on device")
        return self.file.write(text)

    def close(self) -> None:
        self.file.close()


def test_full_disk_costs_lines_of_metrics_but_no_training(tmp_path, capsys, monkeypatch):
    def open_metrics(*args):
        metrics = MetricsFile(*args)
        metrics.file = FullDisk(metrics.file)
        return metrics

    monkeypatch.setattr(reporters, "MetricsFile", open_metrics)
    options = "--preset nano --steps 8 --eval-every 8"
    assert run("--out", tmp_path, options) == 0
    assert [line["step"] for line in curve(tmp_path)] == [0, 1, 6, 7, 8, 8]
    assert re.fullmatch(
        rf"note: {tmp_path}/metrics.jsonl: No space left on device; training goes on, but its "
        r"values from step 3 on may be lost\n",
        capsys.readouterr().err,
    )


def test_progress_is_printed_in_lines_if_stderr_is_not_a_terminal(tmp_path, capsys):
    options = command_line("--preset nano --steps 5 --print-every 2 --out", tmp_path)
    options.remove("--no-progress")
    assert train.main(options) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["2/5", "4/5", "5/5"]
    assert all(re.search(r"  loss \d\.\d+  lr \S+  norm ", line) for line in lines)
