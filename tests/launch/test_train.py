"""launch/train.py as a user runs it: on one process and several, with all optimizers."""

from __future__ import annotations

import re

import distributed
import pytest
import torch.distributed as dist
from training.build import make_schedule
from training.options import parse_args

from sharded_bf16_adamw import precision_sample

from .train_runs import (
    OPTIMIZERS,
    STATE_BYTES,
    curve,
    held_out,
    printed_on_ranks,
    run,
    train_on_ranks,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("strategy", "optimizer"),
    [*(("single", optimizer) for optimizer in OPTIMIZERS), ("ddp", "bf16"), ("fsdp2", "bf16")],
)
def test_one_process(tmp_path, capsys, strategy, optimizer):
    options = f"--strategy {strategy} --optimizer {optimizer} --steps 6 --eval-every 3"
    is_drawn = strategy == "fsdp2"
    assert run("--out", tmp_path, options, is_drawn=is_drawn) == 0
    lines = curve(tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "held_out_loss" in line] == [0, 3, 6]
    first, middle, last = held_out(lines)
    assert first == pytest.approx(5.55, abs=0.1), "ln 256 before training"
    assert last < middle < first
    assert not is_drawn or (tmp_path / "metrics.png").stat().st_size > 5000
    out = capsys.readouterr().out
    assert f"held-out loss         {last:.4f}" in out
    assert f"{STATE_BYTES[optimizer]:.2f} per parameter" in out
    assert f"checkpoint            {tmp_path}/checkpoints/step-00000006" in out
    assert not dist.is_initialized()


def test_summary_reports_the_median_step_time(tmp_path, capsys, monkeypatch):
    """The first steps compile and load kernels, which would dominate a mean."""
    import train

    durations = iter([5.0, 0.002, 0.003, 0.001, 0.002])
    real = train.update

    def update(run, loss):
        norm = real(run, loss)
        run.step_seconds[-1] = next(durations)
        return norm

    monkeypatch.setattr(train, "update", update)
    assert run("--out", tmp_path, "--steps 5") == 0
    line = "optimizer step        2.00 ms (median), clipping included, native backend"
    assert line in capsys.readouterr().out


def test_strategies_optimizers_and_accumulation_train_alike_on_two_ranks(tmp_path):
    """With the same weights and batches, curves differ by rounding only.

    A rank that trained alone, or on another rank's data, would show.
    """
    cases = [(strategy, o, 1) for strategy in ("ddp", "fsdp2") for o in OPTIMIZERS]
    cases += [("ddp", "bf16", 2), ("fsdp2", "bf16", 3)]
    runs = {
        f"{strategy}-{optimizer}-{accumulation}": "--preset nano --steps 5 "
        f"--strategy {strategy} --optimizer {optimizer} --grad-accum {accumulation}"
        for strategy, optimizer, accumulation in cases
    }
    for optimizer in OPTIMIZERS:
        options = f"--preset nano --steps 5 --optimizer {optimizer}"
        assert run("--out", tmp_path / optimizer, options) == 0
    distributed.run_ranks(2, train_on_ranks, str(tmp_path), runs)
    for name, (_, optimizer, _) in zip(runs, cases, strict=True):
        single, lines = curve(tmp_path / optimizer), curve(tmp_path / name)
        assert lines[1] == pytest.approx(single[1], rel=0.003), (
            f"{name}: loss and gradient norm of the first step"
        )
        assert held_out(lines) == pytest.approx(held_out(single), rel=0.003), name


def test_two_ranks_train(tmp_path):
    (code, out, err), other = distributed.run_ranks(
        2, printed_on_ranks, str(tmp_path), "--steps 12"
    )
    assert code == other[0] == 0, err
    first, *_, last = held_out(curve(tmp_path))
    assert last < first - 1
    state = re.search(r"state +([\d,]+) bytes on rank 0, ([\d,]+) on 2", out)
    local, total = (int(x.replace(",", "")) for x in state.groups())
    assert local / total == pytest.approx(0.5, abs=0.001), "each rank holds its half"
    assert "--strategy fsdp2 on 2 x cpu" in out


def test_all_optimizers_use_the_same_schedule(tmp_path):
    options = "--preset nano --steps 6 --warmup 2 --lr 1e-3 --final-lr 1e-5"
    lrs = []
    for optimizer in OPTIMIZERS:
        assert run("--out", tmp_path / optimizer, "--optimizer", optimizer, options) == 0
        lrs.append([line["lr"] for line in curve(tmp_path / optimizer) if "lr" in line])
    assert lrs[0] == lrs[1] == lrs[2]
    assert lrs[0][:2] == [5e-4, 1e-3]
    assert lrs[0][-1] == pytest.approx(1e-5)
    assert lrs[0][1:] == sorted(lrs[0][1:], reverse=True)


def test_schedules():
    def lrs(options: str) -> list[float]:
        schedule = make_schedule(parse_args(f"--steps 100 --lr 1 --warmup 4 {options}".split()))
        return [schedule(step) for step in range(100)]

    assert lrs("--schedule constant") == [0.25, 0.5, 0.75] + [1.0] * 97
    power = lrs("--schedule power")
    assert power[:4] == [0.25, 0.5, 0.75, 1.0]
    assert power[15] == pytest.approx(0.5), "half of the peak at four times the step of the peak"
    cosine = lrs("--final-lr 0.1")
    assert cosine[51] == pytest.approx(0.55)
    assert cosine[99] == pytest.approx(0.1)


def test_clipping_bounds_the_update_and_metrics_have_the_norm_before_it(tmp_path):
    for optimizer in ("bf16", "torch-fp32"):
        for clip in ("0", "1e-9"):
            options = f"--optimizer {optimizer} --steps 2 --clip {clip} --weight-decay 0"
            assert run("--out", tmp_path / optimizer / clip, options) == 0
        free, clipped = (curve(tmp_path / optimizer / clip) for clip in ("0", "1e-9"))
        assert free[1]["grad_norm"] == clipped[1]["grad_norm"] > 1
        fell, fell_clipped = (held_out(lines)[0] - held_out(lines)[-1] for lines in (free, clipped))
        assert abs(fell_clipped) < 0.1 * fell, "eps outweighs such small gradients"


def test_precision_stats_of_a_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(precision_sample, "BLOCK", 16)
    options = "--steps 2 --save-every 0 --precision-stats 2"
    assert run("--out", tmp_path / "all", options, "--precision-fraction 1") == 0
    assert run("--out", tmp_path / "sample", options, "--precision-fraction 0.25") == 0
    whole, sample = (
        next(line for line in curve(tmp_path / name) if "edq" in line) for name in ("all", "sample")
    )
    assert sample["elements"] == whole["elements"]
    assert sample["update_norm"] != whole["update_norm"]
    assert sample["update_norm"] == pytest.approx(whole["update_norm"], rel=0.1)


@pytest.mark.parametrize("strategy", ["single", "fsdp2"])
def test_precision_stats_are_logged_and_change_nothing(tmp_path, strategy):
    options = f"--strategy {strategy} --steps 5 --eval-every 5 --save-every 0"
    assert run("--out", tmp_path / "with", options, "--precision-stats 2") == 0
    assert run("--out", tmp_path / "without", options) == 0
    lines = curve(tmp_path / "with")
    stats = [line for line in lines if "edq" in line]
    assert [line["step"] for line in stats] == [2, 4]
    for line in stats:
        assert line["elements"] > 1000 and 0 < line["lost_share"] < 1
        assert line["edq"] == pytest.approx(1, abs=1e-2)
    others = [line for line in lines if "edq" not in line]
    assert others == curve(tmp_path / "without")
