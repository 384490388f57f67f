"""launch/train.py as a user runs it: alone, on ranks, with every strategy and optimizer."""

from __future__ import annotations

import re

import distributed
import pytest
import torch.distributed as dist
from training.build import make_schedule
from training.options import parse_args

from .train_runs import OPTIMIZERS, STATE_BYTES, curve, finish, held_out, run, start, train_on_ranks

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp2"])
def test_one_process(tmp_path, capsys, strategy, optimizer):
    assert (
        run(
            "--out",
            tmp_path,
            "--strategy",
            strategy,
            "--optimizer",
            optimizer,
            "--steps",
            6,
            "--eval-every",
            3,
        )
        == 0
    )
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
        assert here[1] == pytest.approx(alone[1], rel=0.003), (
            f"{name}: loss and gradient norm of the first step"
        )
        assert held_out(here) == pytest.approx(held_out(alone), rel=0.003), name


def test_a_tenth_of_an_epoch_on_two_ranks_reaches_the_loss_of_one(tmp_path):
    """The main job in short, by the command that users run."""
    code, out, err = finish(start(2, "--out", tmp_path, "--steps", 12))
    assert code == 0, err
    first, *_, last = held_out(curve(tmp_path))
    assert last < first - 1
    mine, total = (
        int(x.replace(",", ""))
        for x in re.search(r"state +([\d,]+) bytes on rank 0, ([\d,]+) on 2", out).groups()
    )
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
        schedule = make_schedule(
            parse_args([*["--steps", "100", "--lr", "1", "--warmup", "4"], *arguments])
        )
        return [schedule(step) for step in range(100)]

    assert rates("--schedule", "constant") == [0.25, 0.5, 0.75] + [1.0] * 97
    assert rates("--schedule", "power")[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates("--schedule", "power")[15] == pytest.approx(0.5), (
        "a quarter of the peak's square at four times its step"
    )
    cosine = rates("--final-lr", "0.1")
    assert cosine[51] == pytest.approx(0.55)
    assert cosine[99] == pytest.approx(0.1)


def test_clipping_bounds_the_step_and_reports_the_norm_before_it(tmp_path):
    for optimizer in ("bf16", "torch-fp32"):
        for clip in ("0", "1e-9"):
            assert (
                run(
                    "--out",
                    tmp_path / optimizer / clip,
                    "--optimizer",
                    optimizer,
                    "--steps",
                    2,
                    "--clip",
                    clip,
                    "--weight-decay",
                    0,
                )
                == 0
            )
        free, clipped = (curve(tmp_path / optimizer / clip) for clip in ("0", "1e-9"))
        assert free[1]["grad_norm"] == clipped[1]["grad_norm"] > 1
        fell, fell_clipped = (held_out(lines)[0] - held_out(lines)[-1] for lines in (free, clipped))
        assert abs(fell_clipped) < 0.1 * fell, "eps outweighs such small gradients"
