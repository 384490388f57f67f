"""launch/train.py with non-finite losses, gradients or weights.

Such steps are skipped and counted, and never saved over a good checkpoint.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import distributed
import pytest
import torch
import torch.distributed as dist
import train
from torch.distributed.tensor import DTensor
from training import spikes, step
from training.data import TokenDataset
from training.metrics import MetricsFile, read_metrics
from training.run_state import Run
from training.saving import state_is_finite

from sharded_bf16_adamw import AdamW_BF16, latest, verify

from . import train_runs
from .train_runs import OPTIMIZERS

pytestmark = pytest.mark.usefixtures("one_thread")
run = partial(train_runs.run, "--preset nano")

DIVERGING = "--lr 1e12 --clip 0 --schedule constant --warmup 1"
FAULTS = {
    "NaN": lambda loss: loss * math.nan,
    "inf, gradients finite": lambda loss: loss + math.inf,
}


def strict_lines(out_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of ``metrics.jsonl``; fail on NaN and Infinity, which are not JSON."""
    lines = (out_dir / "metrics.jsonl").read_text().splitlines()
    return [
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        for line in lines
    ]


def step_lines(out_dir: Path) -> list[dict[str, Any]]:
    return [line for line in strict_lines(out_dir) if "loss" in line]


def nonfinite_counts(out_dir: Path) -> list[int]:
    return [line["nonfinite_steps"] for line in step_lines(out_dir)]


def saved_steps(out_dir: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in (out_dir / "checkpoints").glob("step-*"))


def local_weights(run: Run) -> list[torch.Tensor]:
    return [
        (p.to_local() if isinstance(p, DTensor) else p).detach().clone()
        for p in run.optimizer.param_groups[0]["params"]
    ]


class FaultyLoss:
    """Context that changes this process's loss in some (0-based) steps.

    ``moved`` records for each step whether it changed a weight.
    """

    def __init__(self, steps: set[int], fault: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.moved: list[bool] = []
        self._steps, self._fault, self._step = steps, fault, -1
        self._patches = [
            mock.patch.object(TokenDataset, "batch", self._wrap_batch(TokenDataset.batch)),
            mock.patch.object(step, "compute_loss", self._wrap_loss(step.compute_loss)),
            mock.patch.object(train, "update", self._wrap_update(train.update)),
        ]

    def __enter__(self) -> FaultyLoss:
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in self._patches:
            patch.stop()

    def _wrap_batch(self, real):
        def batch(text, seed, step, size):
            self._step = step
            return real(text, seed, step, size)

        return batch

    def _wrap_loss(self, real):
        def compute_loss(module, batch):
            loss = real(module, batch)
            is_faulty = self._step in self._steps and torch.is_grad_enabled()
            return self._fault(loss) if is_faulty else loss

        return compute_loss

    def _wrap_update(self, real):
        def update(run, loss):
            before = local_weights(run)
            norm = real(run, loss)
            self.moved.append(not all(map(torch.equal, before, local_weights(run))))
            return norm

        return update


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_diverged_run_prints_one_error_and_keeps_its_good_checkpoint(tmp_path, capsys, optimizer):
    options = f"--optimizer {optimizer} --steps 60 --save-every 1 --keep 1 --max-nonfinite 4"
    assert run("--out", tmp_path, DIVERGING, options) == 1
    err = capsys.readouterr().err
    message = (
        "error: the loss or gradient norm was not finite in 4 consecutive steps, up to step 5: "
        f"the last good checkpoint is {tmp_path}/checkpoints/step-00000001; continue with "
    )
    assert len(re.findall(rf"^{message}[^\n]*$", err, re.MULTILINE)) == 1, err
    assert err.count("error:") == 1 and "note: step 2 is not saved" in err
    assert saved_steps(tmp_path) == [1] and verify(tmp_path / "checkpoints") == []
    assert nonfinite_counts(tmp_path) == [0, 1, 2, 3, 4]
    assert strict_lines(tmp_path)[-1]["grad_norm"] is None
    assert not dist.is_initialized()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nonfinite_step_is_skipped_and_counted(tmp_path, capsys, optimizer):
    options = f"--optimizer {optimizer} --steps 5 --eval-every 5"
    assert run("--out", tmp_path / "clean", options) == 0
    clean = step_lines(tmp_path / "clean")
    assert "non-finite steps      0\n" in capsys.readouterr().out
    for number, (name, fault) in enumerate(FAULTS.items()):
        out = tmp_path / str(number)
        with FaultyLoss({2}, fault) as faulty:
            assert run("--out", out, options) == 0
        assert faulty.moved == [True, True, False, True, True], name
        lines = step_lines(out)
        assert nonfinite_counts(out) == [0, 0, 1, 1, 1], name
        assert lines[2]["loss"] is None, name
        assert [x["lr"] for x in lines] == [x["lr"] for x in clean], "the schedule advances"
        assert "non-finite steps      1, skipped" in capsys.readouterr().out, name


def test_without_skipping_weights_turn_nan_and_are_not_saved(tmp_path, capsys):
    options = "--steps 4 --save-every 1 --no-skip-nonfinite --max-nonfinite 0"
    with FaultyLoss({1}, FAULTS["NaN"]) as faulty:
        assert run("--out", tmp_path, options) == 1
    assert faulty.moved[1]
    message = "a weight or an optimizer state is not finite after step 4, which is not saved"
    assert f"error: {message}" in capsys.readouterr().err
    assert saved_steps(tmp_path) == [1]


def test_only_consecutive_nonfinite_steps_end_the_run(tmp_path):
    with FaultyLoss({1, 2, 4, 5}, FAULTS["NaN"]):
        assert run("--out", tmp_path, "--steps 7 --max-nonfinite 3") == 0
    with FaultyLoss({1, 2, 3}, FAULTS["NaN"]):
        assert run("--out", tmp_path / "consecutive", "--steps 7 --max-nonfinite 3") == 1
    assert latest(tmp_path / "consecutive/checkpoints") is None


def test_nonfinite_last_step_is_saved_beside_the_good_checkpoint(tmp_path):
    with FaultyLoss({3}, FAULTS["NaN"]):
        assert run("--out", tmp_path, "--steps 4 --save-every 1 --keep 1") == 0
    assert saved_steps(tmp_path) == [3, 4]


def test_resume_restores_the_count_of_nonfinite_steps(tmp_path):
    with FaultyLoss({1}, FAULTS["NaN"]):
        assert run("--out", tmp_path, "--steps 3") == 0
    assert run("--out", tmp_path, "--steps 5 --resume auto") == 0
    assert nonfinite_counts(tmp_path) == [0, 1, 1, 1, 1]


def test_spike_is_skipped_and_counted_also_by_a_resumed_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(spikes, "WINDOW", 8)
    options = "--steps 12 --skip-spikes 20 --save-every 8 --keep 9 --precision-stats 1"
    # The second spike, which the resumed run repeats, exceeds the first one in the window.
    factors = iter((1e4, 1e8, 1e8))
    with FaultyLoss({6, 10}, lambda loss: loss * next(factors)) as faulty:
        assert run("--out", tmp_path, options) == 0
        assert [step for step, moved in enumerate(faulty.moved) if not moved] == [6, 10]
        assert "spikes                2, skipped" in capsys.readouterr().out
        counts = [line["spikes"] for line in step_lines(tmp_path)]
        assert counts == [0] * 6 + [1] * 4 + [2] * 2
        lines = strict_lines(tmp_path)
        measured = [line["step"] for line in lines if "weight_norm" in line]
        assert measured == [1, 2, 3, 4, 5, 6, 8, 9, 10, 12], "of steps that were taken"
        shutil.rmtree(tmp_path / "checkpoints/step-00000012")
        assert run("--out", tmp_path, options) == 0
    assert "steps 8 to 12" in capsys.readouterr().out
    for new, old in zip(strict_lines(tmp_path), lines, strict=True):
        assert {**new, "tokens_per_s": 0} == {**old, "tokens_per_s": 0}


def weight(run: Run) -> torch.Tensor:
    return run.optimizer.param_groups[0]["params"][0]


PARTS = {
    "weight": weight,
    "second moment": lambda run: run.optimizer.state[weight(run)]["exp_avg_sq"],
}


def corrupting_update(step: int, part: str, on_this_rank: bool) -> Any:
    """Return a patch that sets an element of a weight or state to inf in a (0-based) step.

    The step's loss is finite.
    """
    real = train.update

    def update(run: Run, loss: float) -> float:
        norm = real(run, loss)
        if run.step == step and on_this_rank:
            tensor = PARTS[part](run)
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            with torch.no_grad():
                local.view(-1)[-1:] = math.inf
        return norm

    return mock.patch.object(train, "update", update)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("option", ["--async-save", "--no-async-save"])
def test_nonfinite_weights_and_states_are_not_saved(tmp_path, capsys, part, option):
    with corrupting_update(1, part, True):
        assert run("--out", tmp_path, "--steps 4 --save-every 1 --keep 1", option) == 1
    err = capsys.readouterr().err
    message = "a weight or an optimizer state is not finite after step 2, which is not saved: "
    assert re.fullmatch(rf"error: {message}[^\n]*\n", err), err
    assert saved_steps(tmp_path) == [1] and verify(tmp_path / "checkpoints") == []


RUNS = [
    ("NaN", "--strategy zero2 --grad-accum 2"),
    ("NaN", "--strategy fsdp2 --optimizer torch-fp32"),
    ("inf, gradients finite", "--strategy zero1"),
    ("inf, gradients finite", "--strategy fsdp1"),
    ("inf, gradients finite", "--strategy ddp --optimizer torch-bf16"),
]


def fault_on_rank_1(rank: int, world_size: int, root: str) -> list[tuple[int, list[bool]]]:
    results = []
    for number, (fault, options) in enumerate(RUNS):
        with FaultyLoss({1} if rank == 1 else set(), FAULTS[fault]) as faulty:
            code = run("--out", f"{root}/{number}", "--steps 3 --eval-every 3", options)
        results.append((code, faulty.moved))
    return results


def test_nonfinite_loss_on_one_rank_is_skipped_on_all(tmp_path):
    """If the gradients are finite, only the mean of all ranks' losses shows the fault."""
    for results in distributed.run_ranks(2, fault_on_rank_1, str(tmp_path)):
        assert results == [(0, [True, False, True])] * len(RUNS)
    for number, case in enumerate(RUNS):
        assert nonfinite_counts(tmp_path / str(number)) == [0, 1, 1], case


def diverge_on_rank_1(rank: int, world_size: int, root: str) -> list[int]:
    codes = []
    with FaultyLoss({1, 2} if rank == 1 else set(), FAULTS["NaN"]):
        codes.append(run("--out", f"{root}/loss", "--steps 4 --max-nonfinite 2"))
    with corrupting_update(1, "weight", rank == 1):
        codes.append(run("--out", f"{root}/weight", "--steps 2 --save-every 1 --keep 1"))
    return codes


def test_all_ranks_end_if_one_has_diverged(tmp_path):
    assert distributed.run_ranks(2, diverge_on_rank_1, str(tmp_path)) == [[1, 1], [1, 1]]
    assert saved_steps(tmp_path / "weight") == [1]


def flip_bit_on_rank_1(rank: int, world_size: int, out_dir: str) -> int:
    real = train.update

    def update(run: Run, loss: float) -> float:
        norm = real(run, loss)
        if rank == 1 and run.step == 1:  # 0-based: the second step
            next(run.model.parameters()).data.view(-1)[:1].view(torch.int16).bitwise_xor_(1)
        return norm

    options = "--strategy ddp --check-replicas 2 --save-every 1 --steps 6"
    with mock.patch.object(train, "update", update):
        return run("--out", out_dir, options)


def test_replicas_that_differ_end_the_run_before_it_is_saved(tmp_path):
    assert distributed.run_ranks(2, flip_bit_on_rank_1, str(tmp_path)) == [1, 1]
    assert saved_steps(tmp_path) == [1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", [None, "exp_avg", "exp_avg_sq", "correction"])
def test_state_is_finite_checks_every_weight_and_state(value, part):
    params = [
        torch.nn.Parameter(torch.ones(shape, dtype=dtype))
        for shape, dtype in (((0,), torch.bfloat16), ((5, 3), torch.bfloat16))
    ]
    params.append(torch.nn.Parameter(torch.ones(2)))
    optimizer = AdamW_BF16(params, lr=0.1)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.state[params[1]]["counts"] = torch.ones(3, dtype=torch.int64)  # as FlashAdamW
    assert state_is_finite(optimizer)
    with torch.no_grad():
        (params[1] if part is None else optimizer.state[params[1]][part])[4, 1] = value
    assert not state_is_finite(optimizer)


def test_metrics_rewrites_nonfinite_values_of_an_old_file_as_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": NaN, "lr": 0.1}\n{"step": 1, "held_out_loss": Infinity}\n')
    metrics = MetricsFile(path, start=1)
    metrics.log(2, {"held_out_loss": -math.inf})
    metrics.close(failed=False)
    assert strict_lines(tmp_path) == read_metrics(path)
    assert read_metrics(path) == [
        {"step": 1, "loss": None, "lr": 0.1},
        {"step": 1, "held_out_loss": None},
        {"step": 2, "held_out_loss": None},
    ]
