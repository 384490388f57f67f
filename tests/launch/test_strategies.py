"""``launch/train.py --strategy``: every strategy trains like one process, resumes, and says what it cannot do."""

from __future__ import annotations

import contextlib
import io
import math

import distributed
import pytest
import torch
import train
from report import read_metrics

SHORT = ["--device=cpu", "--no-progress", "--preset=nano", "--seq-len=16", "--batch-size=8"]
SHORT += ["--eval-batches=2", "--eval-every=3", "--save-every=0"]
RANKS = [("ddp", 2), ("fsdp1", 3), ("fsdp1", 2), ("fsdp2", 2), ("hsdp", 4), ("tp", 2), ("fsdp2+tp", 4)]
LIMIT = 0.005  # nats a byte, of about 5.5: the forward and backward of several ranks round otherwise than those of one


def train_worker(rank, world, *arguments):
    torch.manual_seed(0)
    return train.main([*SHORT, *map(str, arguments)])


def run(ranks, folder, *arguments):
    """Train on some ranks, or in this process on one; return the metrics."""
    arguments = ("--out", folder, *arguments)
    codes = distributed.run_ranks(ranks, train_worker, *arguments)
    assert codes == [0] * ranks
    return read_metrics(folder / "metrics.jsonl")


def held_out(lines):
    return {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}


def norms(lines):
    return [line["grad_norm"] for line in lines if "grad_norm" in line]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return run(1, tmp_path_factory.mktemp("single"), "--strategy", "single", "--steps", 6, "--batch-size", 12, "--lr", 0.01)


@pytest.mark.parametrize(("strategy", "ranks"), RANKS)
def test_trains_like_one_process(tmp_path, single, strategy, ranks):
    lines = run(ranks, tmp_path, "--strategy", strategy, "--steps", 6, "--batch-size", 12, "--lr", 0.01)
    expected, losses = held_out(single), held_out(lines)
    assert list(losses) == [0, 3, 6]
    assert expected[6] < expected[0] - 100 * LIMIT, "or the limit would not tell training from none"
    for step, loss in losses.items():
        assert loss == pytest.approx(expected[step], abs=LIMIT)
    assert norms(lines) == pytest.approx(norms(single), rel=0.01), "of all ranks together, each element once"


@pytest.mark.parametrize(("strategy", "ranks"), [("fsdp1", 2), ("hsdp", 4), ("tp", 2), ("fsdp2+tp", 4)])
def test_resumes_where_it_was(tmp_path, strategy, ranks):
    """The same losses, bit for bit, and a checkpoint that another strategy goes on from."""
    arguments = ("--strategy", strategy, "--save-every", 3, "--steps", 6, "--lr", 0.01)
    whole = run(ranks, tmp_path / "whole", *arguments)
    middle = tmp_path / "whole" / "checkpoints" / "step-00000003"
    resumed = run(ranks, tmp_path / "resumed", *arguments, "--resume", middle)
    later = [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in whole if line["step"] > 3]
    assert [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in resumed] == later
    other = run(2, tmp_path / "other", "--strategy", "fsdp2", *arguments[2:], "--resume", middle)
    assert held_out(other)[6] == pytest.approx(held_out(whole)[6], abs=LIMIT)


@pytest.mark.parametrize(("strategy", "ranks"), [("fsdp1", 2), ("tp", 2), ("fsdp2+tp", 4)])
def test_torchs_optimizer_trains_too(tmp_path, single, strategy, ranks):
    """The comparison that ``--optimizer torch-fp32`` is for: its first norm is the one of the same weights."""
    lines = run(ranks, tmp_path, "--strategy", strategy, "--steps", 2, "--batch-size", 12, "--optimizer", "torch-fp32")
    assert norms(lines)[0] == pytest.approx(norms(single)[0], rel=0.01)
    assert all(math.isfinite(loss) for loss in held_out(lines).values())


def refused_worker(rank, world, *arguments):
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = train.main([*SHORT, *map(str, arguments)])
    return code, errors.getvalue()


@pytest.mark.parametrize(
    ("ranks", "arguments", "message"),
    [
        (3, ["--strategy", "hsdp", "--batch-size", 12], "in pairs, which 3 cannot be: start an even number"),
        (3, ["--strategy", "fsdp2+tp", "--batch-size", 12], "in pairs, which 3 cannot be: start an even number"),
        (3, ["--strategy", "tp"], "2 heads do not divide into 3 tensor-parallel ranks"),
        (2, ["--strategy", "tp", "--seq-len", 15], "--seq-len 15 does not divide into 2 tensor-parallel ranks: use a multiple of 2"),
        (4, ["--strategy", "fsdp2+tp", "--batch-size", 3], "--batch-size 3 does not divide into 2 rank(s)"),
    ],
)
def test_what_cannot_be_divided_is_refused_on_every_rank(tmp_path, ranks, arguments, message):
    results = distributed.run_ranks(ranks, refused_worker, "--out", tmp_path, "--steps", 2, *arguments)
    assert [code for code, _ in results] == [2] * ranks
    assert message in results[0][1]
    assert not any(errors for _, errors in results[1:]), "one rank says it"


@pytest.mark.parametrize(("strategy", "ranks"), [("fsdp1", 2), ("hsdp", 4), ("fsdp2+tp", 4)])
def test_micro_batches_train_like_whole_ones(tmp_path, single, strategy, ranks):
    lines = run(ranks, tmp_path, "--strategy", strategy, "--steps", 6, "--batch-size", 12, "--lr", 0.01, "--grad-accum", 3)
    assert norms(lines) == pytest.approx(norms(single), rel=0.01)
    assert held_out(lines)[6] == pytest.approx(held_out(single)[6], abs=LIMIT)
