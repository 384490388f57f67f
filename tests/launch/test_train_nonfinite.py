"""launch/train.py where losses, gradients or weights are not finite: skipped, counted, and never saved over a good checkpoint."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import distributed
import pytest
import torch
import torch.distributed as dist
import train
from training.data import Text
from training.metrics import Metrics, read_metrics
from torch.distributed.tensor import DTensor

from sharded_bf16_adamw import latest, verify

from .train_runs import OPTIMIZERS, SHORT, curve, run

pytestmark = pytest.mark.usefixtures("one_thread")

DIVERGING = ("--lr", "1e6", "--clip", "0", "--schedule", "constant", "--warmup", "1")
BAD = {"NaN": lambda loss: loss * math.nan, "inf, gradients finite": lambda loss: loss + math.inf}


def strict_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``; NaN and Infinity, which are not JSON, fail."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        for line in lines
    ]


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in (folder / "checkpoints").glob("step-*"))


def local_weights(run: train.Run) -> list[torch.Tensor]:
    return [
        (p.to_local() if isinstance(p, DTensor) else p).detach().clone()
        for p in run.optimizer.param_groups[0]["params"]
    ]


class Trouble:
    """While active, this process sees the loss of some (0-based) steps changed, and records which steps changed a weight."""

    def __init__(self, bad: set[int], change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.moved: list[bool] = []
        self._bad, self._change, self._step = bad, change, -1
        self._patches = [
            mock.patch.object(Text, "batch", self._batch_of(Text.batch)),
            mock.patch.object(train, "loss_of", self._loss_of(train.loss_of)),
            mock.patch.object(train, "update", self._update_of(train.update)),
        ]

    def __enter__(self) -> Trouble:
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in self._patches:
            patch.stop()

    def _batch_of(self, batch):
        def recorded(text, seed, step, size):
            self._step = step
            return batch(text, seed, step, size)

        return recorded

    def _loss_of(self, loss_of):
        def changed(module, rows):
            loss = loss_of(module, rows)
            return (
                self._change(loss) if self._step in self._bad and torch.is_grad_enabled() else loss
            )

        return changed

    def _update_of(self, update):
        def recorded(run, loss):
            before = local_weights(run)
            norm = update(run, loss)
            self.moved.append(not all(map(torch.equal, before, local_weights(run))))
            return norm

        return recorded


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_diverged_run_ends_with_one_sentence_and_keeps_its_good_checkpoint(
    tmp_path, capsys, optimizer
):
    arguments = (
        *DIVERGING,
        "--optimizer",
        optimizer,
        "--steps",
        60,
        "--save-every",
        1,
        "--keep",
        1,
        "--max-nonfinite",
        4,
    )
    assert run("--out", tmp_path, *arguments) == 1
    err = capsys.readouterr().err
    sentence = r"error: the loss or gradient norm was not finite in 4 steps in a row, up to step 5: the last good checkpoint is"
    assert (
        len(
            re.findall(
                rf"^{sentence} {tmp_path}/checkpoints/step-00000001; continue with [^\n]*$",
                err,
                re.MULTILINE,
            )
        )
        == 1
    ), err
    assert err.count("error:") == 1 and "note: step 2 is not saved" in err
    assert saved_steps(tmp_path) == [1] and verify(tmp_path / "checkpoints") == []
    assert [line["nonfinite_steps"] for line in strict_lines(tmp_path) if "loss" in line] == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert strict_lines(tmp_path)[-1]["grad_norm"] is None
    assert not dist.is_initialized()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", BAD)
def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, capsys, optimizer, kind):
    arguments = ("--optimizer", optimizer, "--steps", 5, "--eval-every", 5)
    assert run("--out", tmp_path / "clean", *arguments) == 0
    with Trouble({2}, BAD[kind]) as trouble:
        assert run("--out", tmp_path / "bad", *arguments) == 0
    assert trouble.moved == [True, True, False, True, True]
    lines, clean = (
        [line for line in strict_lines(tmp_path / name) if "loss" in line]
        for name in ("bad", "clean")
    )
    assert [line["nonfinite_steps"] for line in lines] == [0, 0, 1, 1, 1]
    assert lines[2]["loss"] is None
    assert [line["lr"] for line in lines] == [line["lr"] for line in clean], "the schedule goes on"
    assert "non-finite steps      1, skipped" in capsys.readouterr().out


def test_skipping_can_be_turned_off(tmp_path, capsys):
    """Then the weights turn NaN, and are not saved."""
    with Trouble({1}, BAD["NaN"]) as trouble:
        assert (
            run(
                "--out",
                tmp_path,
                "--steps",
                4,
                "--save-every",
                1,
                "--no-skip-nonfinite",
                "--max-nonfinite",
                0,
            )
            == 1
        )
    assert trouble.moved[1]
    assert (
        "error: a weight or an optimizer state is not finite after step 4, which is not saved"
        in capsys.readouterr().err
    )
    assert saved_steps(tmp_path) == [1]


def test_steps_that_are_not_finite_end_the_run_only_in_a_row(tmp_path):
    with Trouble({1, 2, 4, 5}, BAD["NaN"]):
        assert run("--out", tmp_path, "--steps", 7, "--max-nonfinite", 3) == 0
    with Trouble({1, 2, 3}, BAD["NaN"]):
        assert run("--out", tmp_path / "row", "--steps", 7, "--max-nonfinite", 3) == 1
    assert latest(tmp_path / "row/checkpoints") is None


def test_the_last_step_is_saved_beside_the_good_checkpoints_where_its_loss_is_not_finite(tmp_path):
    with Trouble({3}, BAD["NaN"]):
        assert run("--out", tmp_path, "--steps", 4, "--save-every", 1, "--keep", 1) == 0
    assert saved_steps(tmp_path) == [3, 4]


def test_the_count_goes_on_in_a_resumed_run(tmp_path):
    with Trouble({1}, BAD["NaN"]):
        assert run("--out", tmp_path, "--steps", 3) == 0
    assert run("--out", tmp_path, "--steps", 5, "--resume", "auto") == 0
    assert [line["nonfinite_steps"] for line in curve(tmp_path) if "loss" in line] == [
        0,
        1,
        1,
        1,
        1,
    ]


POISONS = {
    "weight": lambda run: run.optimizer.param_groups[0]["params"][0],
    "second moment": lambda run: run.optimizer.state[run.optimizer.param_groups[0]["params"][0]][
        "exp_avg_sq"
    ],
}


def poisoned_update(step: int, part: str, on_this_rank: bool) -> Any:
    """A patch with which an element of this rank's weights or states turns inf in a (0-based) step whose loss is finite."""
    update = train.update

    def poisoned(run: train.Run, loss: float) -> float:
        norm = update(run, loss)
        if run.step == step and on_this_rank:
            tensor = POISONS[part](run)
            with torch.no_grad():
                (tensor.to_local() if isinstance(tensor, DTensor) else tensor).view(-1)[-1:] = (
                    math.inf
                )
        return norm

    return mock.patch.object(train, "update", poisoned)


@pytest.mark.parametrize("part", POISONS)
@pytest.mark.parametrize("option", ["--async-save", "--no-async-save"])
def test_weights_and_states_that_are_not_finite_are_not_saved(tmp_path, capsys, part, option):
    with poisoned_update(1, part, True):
        assert run("--out", tmp_path, "--steps", 4, "--save-every", 1, "--keep", 1, option) == 1
    err = capsys.readouterr().err
    assert re.fullmatch(
        r"error: a weight or an optimizer state is not finite after step 2, which is not saved: [^\n]*\n",
        err,
    ), err
    assert saved_steps(tmp_path) == [1] and verify(tmp_path / "checkpoints") == []


RUNS = [
    ("NaN", "--strategy zero2 --grad-accum 2"),
    ("NaN", "--strategy fsdp2 --optimizer torch-fp32"),
    ("inf, gradients finite", "--strategy zero1"),
    ("inf, gradients finite", "--strategy fsdp1"),
    ("inf, gradients finite", "--strategy ddp --optimizer torch-bf16"),
]


def one_rank_has_trouble(rank: int, world_size: int, folder: str) -> list[tuple[int, list[bool]]]:
    results = []
    for number, (kind, arguments) in enumerate(RUNS):
        with Trouble({1} if rank == 1 else set(), BAD[kind]) as trouble:
            code = train.main(
                [
                    *SHORT,
                    "--out",
                    f"{folder}/{number}",
                    "--steps",
                    "3",
                    "--eval-every",
                    "3",
                    *arguments.split(),
                ]
            )
        results.append((code, trouble.moved))
    return results


def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_on_all(tmp_path):
    """On rank 1, with either kind of loss: where the gradients are finite, only the ranks' common loss tells."""
    for results in distributed.run_ranks(2, one_rank_has_trouble, str(tmp_path)):
        assert results == [(0, [True, False, True])] * len(RUNS)
    for number, run_ in enumerate(RUNS):
        assert [
            line["nonfinite_steps"]
            for line in strict_lines(tmp_path / str(number))
            if "loss" in line
        ] == [0, 1, 1], run_


def one_rank_diverges(rank: int, world_size: int, folder: str) -> list[int]:
    codes = []
    with Trouble({1, 2} if rank == 1 else set(), BAD["NaN"]):
        codes.append(
            train.main([*SHORT, "--out", f"{folder}/loss", "--steps", "4", "--max-nonfinite", "2"])
        )
    with poisoned_update(1, "weight", rank == 1):
        codes.append(
            train.main(
                [
                    *SHORT,
                    "--out",
                    f"{folder}/weight",
                    "--steps",
                    "2",
                    "--save-every",
                    "1",
                    "--keep",
                    "1",
                ]
            )
        )
    return codes


def test_all_ranks_end_where_one_has_diverged(tmp_path):
    assert distributed.run_ranks(2, one_rank_diverges, str(tmp_path)) == [[1, 1], [1, 1]]
    assert saved_steps(tmp_path / "weight") == [1]


def one_replica_is_corrupted(rank: int, world_size: int, folder: str) -> int:
    real = train.update

    def corrupted(run: train.Run, loss: float) -> float:
        norm = real(run, loss)
        if rank == 1 and run.step == 1:  # 0-based: the second step
            next(run.model.parameters()).data.view(-1)[:1].view(torch.int16).bitwise_xor_(1)
        return norm

    options = [
        "--strategy",
        "ddp",
        "--check-replicas",
        "2",
        "--save-every",
        "1",
        "--steps",
        "6",
        "--out",
        folder,
    ]
    with mock.patch.object(train, "update", corrupted):
        return train.main([*SHORT, *options])


def test_a_flipped_bit_on_one_replica_ends_the_run_before_it_is_saved(tmp_path):
    assert distributed.run_ranks(2, one_replica_is_corrupted, str(tmp_path)) == [1, 1]
    assert saved_steps(tmp_path) == [1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", [None, "exp_avg", "exp_avg_sq", "correction"])
def test_every_weight_and_state_is_looked_at(value, part):
    params = [
        torch.nn.Parameter(torch.ones(shape, dtype=dtype))
        for shape, dtype in (((0,), torch.bfloat16), ((5, 3), torch.bfloat16))
    ]
    params.append(torch.nn.Parameter(torch.ones(2)))
    optimizer = train.AdamW_BF16(params, lr=0.1)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert train.state_is_finite(optimizer)
    with torch.no_grad():
        (params[1] if part is None else optimizer.state[params[1]][part])[4, 1] = value
    assert not train.state_is_finite(optimizer)


def test_metrics_of_an_older_run_become_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": NaN, "lr": 0.1}\n{"step": 1, "held_out_loss": Infinity}\n')
    metrics = Metrics(path, start=1, steps=5, bar=False)
    metrics.evaluation(2, -math.inf)
    metrics.close()
    assert strict_lines(tmp_path) == read_metrics(path)
    assert read_metrics(path) == [
        {"step": 1, "loss": None, "lr": 0.1},
        {"step": 1, "held_out_loss": None},
        {"step": 2, "held_out_loss": None},
    ]
