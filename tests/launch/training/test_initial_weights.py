"""``train.py --init-from``: a new run from the weights, and the moments, of another."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from training.initial_weights import clear_moments

from sharded_bf16_adamw import convert_fp32, export_fp32, latest
from sharded_bf16_adamw.checkpoint.export import join
from sharded_bf16_adamw.checkpoint.reader import CheckpointReader

from ..train_runs import curve, held_out, run

pytestmark = pytest.mark.usefixtures("one_thread")

NANO = "--preset nano --eval-every 9 --save-every 0"


@pytest.fixture
def first(tmp_path):
    """Return the folder of a run of three steps."""
    assert run("--out", tmp_path / "first", NANO, "--steps 3") == 0
    return tmp_path / "first"


def read(out, suffix):
    reader = CheckpointReader(out)
    return {key: reader.read(key) for key in reader.infos if key.endswith(suffix)}


def true_weights(out):
    weights, corrections = read(out, ".weight"), read(out, ".correction")
    assert len(weights) == len(corrections) > 10
    pairs = zip(weights.values(), corrections.values(), strict=True)  # in the order of names
    return dict(zip(weights, itertools.starmap(join, pairs), strict=True))


def test_checkpoint_gives_weights_and_corrections_to_a_new_run(tmp_path, first, capsys):
    assert run("--out", tmp_path / "new", NANO, "--steps 1 --lr 0 --init-from", first) == 0
    assert "steps 0 to 1" in capsys.readouterr().out
    assert held_out(curve(tmp_path / "new"))[0] == held_out(curve(first))[-1]
    # A step with lr 0 keeps p + correction but for rounding; without corrections p is off by 2**-9.
    old, new = true_weights(first), true_weights(tmp_path / "new")
    for name, weight in old.items():
        torch.testing.assert_close(new[name], weight, rtol=2.0**-14, atol=1e-6)
    assert {int(step) for step in read(tmp_path / "new", ".step").values()} == {1}


@pytest.mark.parametrize(("option", "steps"), [("", 1), ("--init-moments", 4)])
def test_moments_are_taken_if_asked_for_and_the_schedule_starts_anew(
    tmp_path, first, option, steps
):
    options = f"--steps 1 --warmup 4 --lr 1e-3 --init-from {first} {option}"
    assert run("--out", tmp_path / "new", NANO, options) == 0
    assert {int(step) for step in read(tmp_path / "new", ".step").values()} == {steps}
    (line,) = [line for line in curve(tmp_path / "new") if "lr" in line]
    assert line["lr"] == pytest.approx(1e-3 / 4), "the warm-up of the new run"
    moments = read(tmp_path / "new", ".exp_avg_sq")
    old = read(first, ".exp_avg_sq")
    grown = sum(float(m.float().sum()) for m in moments.values())
    before = sum(float(m.float().sum()) for m in old.values())
    assert (grown > before) == (steps == 4)


@pytest.mark.parametrize("optimizer", ["torch-bf16", "torch-fp32"])
def test_moments_of_any_optimizer_are_cleared(tmp_path, optimizer):
    options = f"{NANO} --optimizer {optimizer} --steps 1 --lr 0"
    assert run("--out", tmp_path / "first", options) == 0
    assert run("--out", tmp_path / "new", options, "--init-from", tmp_path / "first") == 0
    first, new = (read(tmp_path / name, ".exp_avg_sq") for name in ("first", "new"))
    assert first.keys() == new.keys() and len(new) > 10
    assert all(torch.equal(first[key], new[key]) for key in new), "one step on the same batch"
    assert {int(step) for step in read(tmp_path / "new", ".step").values()} == {1}


def test_moments_of_optimizers_with_other_states_are_cleared():
    """optimi keeps the step in the group."""
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([param], lr=0.1)
    optimizer.state[param] = {"exp_avg": torch.ones(3), "kahan_comp": torch.ones(3)}
    clear_moments(optimizer)
    assert optimizer.state[param]["exp_avg"].tolist() == [0.0, 0.0, 0.0]
    assert optimizer.state[param]["kahan_comp"].tolist() == [1.0, 1.0, 1.0]


def test_imported_and_exported_weights_start_a_run(tmp_path, first):
    export_fp32(first, tmp_path / "exported")
    convert_fp32(tmp_path / "exported", tmp_path / "imported")
    expected = held_out(curve(first))[-1]
    cases = {
        "folder": "exported",
        "imported": "imported",
        "fp32": "exported --optimizer torch-fp32",
    }
    for name, source in cases.items():
        options = f"--steps 1 --init-from {tmp_path}/{source}"
        assert run("--out", tmp_path / name, NANO, options) == 0
        assert held_out(curve(tmp_path / name))[0] == pytest.approx(expected, rel=1e-3), name


def test_resume_continues_the_run_and_does_not_start_again(tmp_path, first):
    options = f"{NANO} --init-from {first} --resume auto"
    assert run("--out", tmp_path / "new", options, "--steps 2") == 0
    assert run("--out", tmp_path / "new", options, "--steps 4") == 0
    assert [line["step"] for line in curve(tmp_path / "new") if "loss" in line] == [1, 2, 3, 4]
    assert latest(tmp_path / "new/checkpoints").name == "step-00000004"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none", "--init-from .*/none does not exist: give a checkpoint, a run, or a folder"),
        ("other/hf", "there is no .*/other/hf/model.safetensors"),
        ("other", "is of another model or optimizer: "),
    ],
)
def test_unusable_weights_are_one_sentence(tmp_path, capsys, source, message):
    assert run("--out", tmp_path / "other", "--preset nano --vocab-size 300 --steps 1") == 0
    (tmp_path / "other/hf").mkdir()
    capsys.readouterr()
    arguments = (NANO, "--steps 1 --init-from", tmp_path / source)
    assert run("--out", tmp_path / "new", *arguments) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(rf"error: [^\n]*({message})[^\n]*\n", err), err


def test_large_models_say_what_they_do_while_they_are_built(tmp_path, capsys, monkeypatch):
    from training import build

    monkeypatch.setattr(build, "ANNOUNCED", 1000)
    assert run("--out", tmp_path, NANO, "--steps 1") == 0
    out = capsys.readouterr().out
    assert re.match(r"building nano: [\d,]+ parameters, .*\ninitializing the weights on cpu\n", out)
