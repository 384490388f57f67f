"""launch/train.py as a user runs it: alone and under torchrun, killed and resumed, and with wrong arguments."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import distributed
import pytest
import torch
import torch.distributed as dist
import train
from building import make_schedule
from data import Text, UsageError
from options import parse_args
from report import Metrics, read_metrics
from strategies import on_all_ranks

from sharded_bf16_adamw import AdamW_BF16, latest, save, verify
from sharded_bf16_adamw.checkpoint.storage import ChecksummedWriter
from sharded_bf16_adamw.checkpoint.stored import StoredCheckpoint

SCRIPT = Path(train.__file__)
OPTIMIZERS = ("bf16", "torch-fp32", "torch-bf16")
STATE_BYTES = {"bf16": 6.0, "torch-fp32": 8.0, "torch-bf16": 4.0}
SHORT = ["--device", "cpu", "--no-progress", "--seq-len", "16", "--batch-size", "12", "--eval-batches", "1"]
TIMEOUT = 200


def start(processes: int, *arguments: object) -> subprocess.Popen[str]:
    """The script with settings for a short run, under torchrun for more than one process."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(SCRIPT), *SHORT, *map(str, arguments)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; a script that hangs is killed with its workers, and fails the test."""
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    return process.returncode, out, err


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to torchrun and its workers, which have process groups of their own."""
    pids = [process.pid, *workers(process)]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def workers(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of the ranks that torchrun started."""
    stats = [path.read_text() for path in Path("/proc").glob("[0-9]*/stat") if path.exists()]
    return sorted(int(s.split()[0]) for s in stats if int(s.rpartition(")")[2].split()[1]) == process.pid)


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not any(line["step"] >= step for line in read_metrics(folder / "metrics.jsonl")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.02)


def curve(folder: Path) -> list[dict[str, float]]:
    """All metrics but the times."""
    return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in read_metrics(folder / "metrics.jsonl")]


def held_out(lines: list[dict[str, float]]) -> list[float]:
    return [line["held_out_loss"] for line in lines if "held_out_loss" in line]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in curve(folder) if "loss" in line]


def run(*arguments: object) -> int:
    return train.main([*SHORT, *map(str, arguments)])


@pytest.fixture(autouse=True)
def _one_thread():
    """As torchrun has it. Where cores are busy, threads that wait for each other are many times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


# ------------------------------------------------------------------------------------------------------------------ it trains


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp2"])
def test_one_process(tmp_path, capsys, strategy, optimizer):
    assert run("--out", tmp_path, "--strategy", strategy, "--optimizer", optimizer, "--steps", 6, "--eval-every", 3) == 0
    lines = curve(tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "held_out_loss" in line] == [0, 3, 6]
    first, middle, last = held_out(lines)
    assert first == pytest.approx(5.55, abs=0.1), "ln 256 before training"
    assert last < middle < first
    assert (tmp_path / "loss.png").stat().st_size > 5000
    said = capsys.readouterr().out
    assert f"held-out loss         {last:.4f}" in said
    assert f"{STATE_BYTES[optimizer]:.2f} per parameter" in said
    assert f"checkpoint            {tmp_path}/checkpoints/step-00000006" in said
    assert not dist.is_initialized()


def train_on_ranks(rank: int, world_size: int, folder: str, runs: dict[str, list[str]]) -> None:
    for name, arguments in runs.items():
        assert train.main([*SHORT, "--out", f"{folder}/{name}", *arguments]) == 0


def test_every_strategy_optimizer_and_accumulation_trains_alike_on_two_ranks(tmp_path):
    """The same weights and batches: curves differ by rounding only. A rank that trained alone, or on another's data, would show."""
    steps = ["--steps", "5"]
    runs = {
        f"{strategy}-{optimizer}-{accumulation}": [
            *steps,
            *f"--strategy {strategy} --optimizer {optimizer} --grad-accum {accumulation}".split(),
        ]
        for strategy, optimizer, accumulation in (
            *(("ddp", o, 1) for o in OPTIMIZERS),
            *(("fsdp2", o, 1) for o in OPTIMIZERS),
            ("ddp", "bf16", 2),
            ("fsdp2", "bf16", 3),
        )
    }
    for optimizer in OPTIMIZERS:
        assert run("--out", tmp_path / optimizer, "--optimizer", optimizer, *steps) == 0
    distributed.run_ranks(2, train_on_ranks, str(tmp_path), runs)
    for name, arguments in runs.items():
        alone = curve(tmp_path / arguments[arguments.index("--optimizer") + 1])
        here = curve(tmp_path / name)
        assert here[1] == pytest.approx(alone[1], rel=0.003), f"{name}: loss and gradient norm of the first step"
        assert held_out(here) == pytest.approx(held_out(alone), rel=0.003), name


def test_a_tenth_of_an_epoch_on_two_ranks_reaches_the_loss_of_one(tmp_path):
    """The main job in short, by the command that users run."""
    code, out, err = finish(start(2, "--out", tmp_path, "--steps", 12))
    assert code == 0, err
    first, *_, last = held_out(curve(tmp_path))
    assert last < first - 1
    mine, total = (int(x.replace(",", "")) for x in re.search(r"state +([\d,]+) bytes on rank 0, ([\d,]+) on 2", out).groups())
    assert mine / total == pytest.approx(0.5, abs=0.001), "each rank holds its half"
    assert "--strategy fsdp2 on 2 x cpu" in out


def test_all_optimizers_see_the_same_schedule(tmp_path):
    arguments = ["--steps", "6", "--warmup", "2", "--lr", "1e-3", "--final-lr", "1e-5"]
    rates = []
    for optimizer in OPTIMIZERS:
        assert run("--out", tmp_path / optimizer, "--optimizer", optimizer, *arguments) == 0
        rates.append([line["lr"] for line in curve(tmp_path / optimizer) if "lr" in line])
    assert rates[0] == rates[1] == rates[2]
    assert rates[0][:2] == [5e-4, 1e-3]
    assert rates[0][-1] == pytest.approx(1e-5)
    assert rates[0][1:] == sorted(rates[0][1:], reverse=True)


def test_schedules():
    def rates(*arguments: str) -> list[float]:
        schedule = make_schedule(parse_args([*["--steps", "100", "--lr", "1", "--warmup", "4"], *arguments]))
        return [schedule(step) for step in range(100)]

    assert rates("--schedule", "constant") == [0.25, 0.5, 0.75] + [1.0] * 97
    assert rates("--schedule", "power")[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates("--schedule", "power")[15] == pytest.approx(0.5), "a quarter of the peak's square at four times its step"
    cosine = rates("--final-lr", "0.1")
    assert cosine[51] == pytest.approx(0.55)
    assert cosine[99] == pytest.approx(0.1)


def test_clipping_bounds_the_step_and_reports_the_norm_before_it(tmp_path):
    for optimizer in ("bf16", "torch-fp32"):
        for clip in ("0", "1e-9"):
            assert (
                run("--out", tmp_path / optimizer / clip, "--optimizer", optimizer, "--steps", 2, "--clip", clip, "--weight-decay", 0) == 0
            )
        free, clipped = (curve(tmp_path / optimizer / clip) for clip in ("0", "1e-9"))
        assert free[1]["grad_norm"] == clipped[1]["grad_norm"] > 1
        fell, fell_clipped = (held_out(lines)[0] - held_out(lines)[-1] for lines in (free, clipped))
        assert abs(fell_clipped) < 0.1 * fell, "eps outweighs such small gradients"


# -------------------------------------------------------------------------------------------------------- it stops and resumes


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_told_to_stop_saves_and_resumes_with_the_same_bits(tmp_path, capsys, stop_at, optimizer):
    arguments = ("--optimizer", optimizer, "--steps", 8, "--eval-every", 2)
    assert run("--out", tmp_path / "whole", *arguments) == 0
    stop_at(4)
    assert run("--out", tmp_path / "stopped", *arguments) == 0
    assert "stopped at step 5" in capsys.readouterr().out
    assert [line["step"] for line in curve(tmp_path / "stopped")][-1] == 5
    assert run("--out", tmp_path / "stopped", *arguments, "--resume", "auto") == 0
    assert curve(tmp_path / "stopped") == curve(tmp_path / "whole")


def test_a_killed_run_resumes_from_its_last_checkpoint_with_the_same_bits(tmp_path):
    arguments = ("--steps", 40, "--save-every", 4, "--eval-every", 10)
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
    assert 4 <= resumed_at < 40 and resumed_at % 4 == 0, "the save of step 8 has waited for that of step 4"
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    assert before == curve(tmp_path / "whole")[: len(before)]


def test_when_one_rank_is_told_to_stop_all_save_and_exit_cleanly(tmp_path):
    process = start(2, "--out", tmp_path, "--steps", 100_000, "--save-every", 1, "--eval-every", 100_000)
    wait_for_step(process, tmp_path, 3)
    ranks = workers(process)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 0, err
    step = int(re.search(r"stopped at step (\d+), saved", out).group(1))
    assert json.loads((tmp_path / f"checkpoints/step-{step:08d}/manifest.json").read_text())["extra"]["step"] == step
    assert curve(tmp_path)[-1]["step"] == step


@pytest.fixture
def saves(monkeypatch):
    """Steps saved so far, each with whether it was in the background. A step in ``failing`` meets a full disk there."""
    done: list[tuple[int, bool]] = []
    failing: set[int] = set()
    write_data = ChecksummedWriter.write_data

    def write(self, plan, planner):
        step, background = int(self.path.name.rpartition("-")[2]), threading.current_thread() is not threading.main_thread()
        if background and step in failing:
            raise OSError(28, "No space left on device")
        done.append((step, background))
        return write_data(self, plan, planner)

    monkeypatch.setattr(ChecksummedWriter, "write_data", write)
    return done, failing


@pytest.mark.parametrize(("option", "background"), [((), True), (("--no-async-save",), False)])
def test_a_run_saves_in_the_background_and_when_told_to_stop_completely(tmp_path, stop_at, saves, option, background):
    arguments = ("--steps", 8, "--eval-every", 2, "--save-every", 2, *option)
    assert run("--out", tmp_path / "whole", *arguments) == 0
    assert saves[0] == [(2, background), (4, background), (6, background), (8, background)]
    assert latest(tmp_path / "whole/checkpoints").name == "step-00000008", "the last one has been waited for"
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
    return {key: stored.read(key).flatten().tolist() for key in stored.infos if key.startswith(("model.", "optimizer."))}


@pytest.mark.parametrize(("failing", "steps"), [(4, 5), (4, 4)])
def test_a_save_that_failed_in_the_background_ends_the_run_after_one_of_its_end(tmp_path, saves, failing, steps):
    saves[1].add(failing)
    try:
        with pytest.raises(RuntimeError, match=r"cannot save the checkpoint .*step-00000004: on rank 0, OSError: .*No space left"):
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


def test_metrics_drop_what_a_resumed_run_repeats_and_an_incomplete_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "held_out_loss": 5}\n{"step": 1, "loss": 4}\n{"step": 2, "loss": 3}\n{"step": 3, "lo')
    Metrics(path, start=1, steps=5, bar=False).close()
    assert [line["step"] for line in read_metrics(path)] == [0, 1]
    Metrics(path, start=0, steps=5, bar=False).close()
    assert read_metrics(path) == [], "a run from the start begins a new file"


# ------------------------------------------------------------------------------------------------------------ errors of use


def write(path: Path, size: int) -> Path:
    path.write_bytes(b"x" * size)
    return path


ERRORS = {
    "missing data": (lambda t: ["--data", t / "none"], "--data .*/none cannot be read .No such file"),
    "too little data": (lambda t: ["--data", write(t / "short", 20)], "short holds 20 bytes, too few for --seq-len 16: give at least 170"),
    "missing checkpoint": (lambda t: ["--resume", t / "none"], "--resume .*/none is neither a checkpoint nor a folder with one"),
    "folder is a file": (lambda t: ["--out", write(t / "file", 1)], "--out .*/file cannot be created"),
    "uneven batch": (lambda t: ["--batch-size", 10, "--grad-accum", 4], "--batch-size 10 does not divide into 1 rank.s. x --grad-accum 4"),
    "unknown option": (lambda t: ["--stpes", 4], "unrecognized arguments: --stpes 4"),
    "unknown preset": (lambda t: ["--preset", "huge"], "invalid choice: 'huge'"),
    "no steps": (lambda t: ["--steps", 0], "--steps: 0 is not a positive number"),
    "not a number": (lambda t: ["--steps", "many"], "--steps: invalid positive value: 'many'"),
    "bad hyper-parameter": (lambda t: ["--betas", 0.9, 1.5], "Invalid beta parameter at index 1: 1.5"),
    "bad hyper-parameter of torch's": (lambda t: ["--optimizer", "torch-fp32", "--weight-decay", -1], "Invalid weight_decay value: -1"),
    "negative lr": (lambda t: ["--lr", -1], "Invalid learning rate: -"),
    "unknown back end": (lambda t: ["--optimizer-backend", "abacus"], "Invalid backend: 'abacus'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_of_use_is_one_sentence_and_exit_code_2(tmp_path, capsys, case):
    arguments, sentence = ERRORS[case]
    assert run("--out", tmp_path / "out", "--steps", 2, *arguments(tmp_path)) == 2
    said = capsys.readouterr()
    assert re.fullmatch(rf"error: [^\n]*{sentence}[^\n]*\n", said.err), said.err
    assert said.out == ""
    assert not (tmp_path / "out/metrics.jsonl").exists()
    assert not dist.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_asking_for_a_gpu_that_is_not_there(capsys):
    assert train.main(["--device", "cuda"]) == 2
    assert "--device cuda needs a GPU for each of the 1 processes, but 0 were found" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "already holds a run: add --resume auto to continue it"),
        (["--resume", "auto", "--preset", "small"], "was trained with --preset tiny, not small"),
        (["--resume", "auto", "--optimizer", "torch-bf16"], "was trained with --optimizer bf16, not torch-bf16"),
        (["--resume", "auto", "--steps", "1"], "is at step 2, past --steps 1"),
    ],
)
def test_a_run_is_not_overwritten_nor_resumed_as_another(tmp_path, capsys, arguments, sentence):
    assert run("--out", tmp_path, "--steps", 2) == 0
    before = curve(tmp_path)
    capsys.readouterr()
    assert run("--out", tmp_path, "--steps", 2, *arguments) == 2
    assert re.fullmatch(rf"error: [^\n]*{sentence}[^\n]*\n", capsys.readouterr().err)
    assert curve(tmp_path) == before


def test_a_damaged_or_foreign_checkpoint_is_not_resumed(tmp_path, capsys):
    assert run("--out", tmp_path, "--steps", 2) == 0
    damaged = latest(tmp_path / "checkpoints")
    (damaged / "manifest.json").write_bytes((damaged / "manifest.json").read_bytes().replace(b'"serial": 1', b'"serial": 2'))
    layer = torch.nn.Linear(2, 2).bfloat16()
    foreign = save(tmp_path / "foreign", 1, layer, AdamW_BF16(layer.parameters(), lr=0.1))
    for path, sentence in ((damaged, "cannot be used: manifest.json: it is damaged"), (foreign, "was not saved by train.py")):
        capsys.readouterr()
        assert run("--out", tmp_path, "--steps", 2, "--resume", path) == 2
        assert re.fullmatch(rf"error: the checkpoint {path} {sentence}[^\n]*\n", capsys.readouterr().err)


def test_a_changed_seed_is_noted_on_resume(tmp_path, capsys):
    assert run("--out", tmp_path, "--steps", 2) == 0
    assert run("--out", tmp_path, "--steps", 3, "--seed", 1, "--resume", "auto") == 0
    assert "note: seed changed since the checkpoint" in capsys.readouterr().err


def test_an_error_under_torchrun_is_said_once_and_leaves_no_rank_waiting(tmp_path):
    code, _, err = finish(start(2, "--data", "/no/such/text", "--out", tmp_path))
    assert code != 0
    assert len(re.findall(r"^error: --data /no/such/text cannot be read", err, re.MULTILINE)) == 1
    assert 'launch/train.py", line' not in err, "the script's own stack is not shown"


def fails_on_rank_1(rank: int, world_size: int) -> str:
    def check() -> None:
        if rank == 1:
            raise UsageError("no disk")

    with pytest.raises(UsageError) as caught:
        on_all_ranks(check)
    return str(caught.value)


def test_an_error_on_one_rank_is_raised_on_all():
    assert distributed.run_ranks(2, fails_on_rank_1) == ["no disk", "no disk"]


def test_single_refuses_several_ranks(tmp_path):
    code, _, err = finish(start(2, "--strategy", "single", "--out", tmp_path))
    assert code != 0
    assert "error: --strategy single runs on one process, not 2: use --strategy ddp or fsdp2." in err
