"""TOML configuration of train.py: reading, storing, and differences from a stored one."""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest
from training import config
from training.config import changes, shown, to_toml
from training.errors import UsageError
from training.options import parse_args


def parse(tmp_path: Path, text: str, *flags: str) -> argparse.Namespace:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return parse_args(["--config", str(path), *flags])


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    text = 'steps = 50\nlr = 1\nbetas = [0.5, 0.75]\nasync-save = false\nschedule = "power"\n'
    args = parse(tmp_path, text, "--steps", "70", "--async-save")
    assert (args.steps, args.lr, args.betas) == (70, 1.0, [0.5, 0.75])
    assert (args.async_save, args.schedule) == (True, "power")
    assert (args.batch_size, args.warmup) == (24, 3), "defaults, also those that follow from others"


@pytest.mark.parametrize(
    ("text", "flags", "expected"),
    [
        ('preset = "small"', [], ("small", None)),
        ('preset = "small"', ["--preset", "nano"], ("nano", None)),
        ('preset = "small"', ["--model", "folder"], (None, "folder")),
        ('model = "folder"', ["--preset", "nano"], ("nano", None)),
        ('model = "folder"', [], (None, "folder")),
        ("", [], ("tiny", None)),
    ],
)
def test_a_flag_replaces_the_model_of_the_file(tmp_path, text, flags, expected):
    args = parse(tmp_path, text, *flags)
    assert (args.preset, args.model) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stpes = 4", 'has the unknown key "stpes" (did you mean "steps"?)'),
        ("batch_size = 4", 'has the unknown key "batch_size" (did you mean "batch-size"?)'),
        ("zzz = 4", 'has the unknown key "zzz"; see --help.'),
        ("no-progress = true", 'has the unknown key "no-progress" (did you mean "progress"?)'),
        ("help = true", 'has the unknown key "help"'),
        ('config = "other.toml"', 'has the unknown key "config"'),
        ('"a\\nb" = 1', r'has the unknown key "a\nb"'),
        ("[optimizer]\nlr = 1", "the key \"optimizer\": expected a string, not {'lr': 1}"),
        ("vocab-size = 1.5", 'the key "vocab-size": expected a whole number, not 1.5'),
        ('steps = "4"', "the key \"steps\": expected a whole number, not '4'"),
        ("steps = true", 'the key "steps": expected a whole number, not True'),
        ("steps = 4.0", 'the key "steps": expected a whole number, not 4.0'),
        ("steps = 0", 'the key "steps": 0 is not a positive number'),
        ("lr = true", 'the key "lr": expected a number, not True'),
        ("lr = -1", 'the key "lr": -1 is not a number of at least 0'),
        ("lr = nan", 'the key "lr": nan is not a number of at least 0'),
        ("betas = 0.9", 'the key "betas": expected a list of 2 numbers, not 0.9'),
        ("betas = [0.9]", 'the key "betas": expected 2 numbers, not 1'),
        ('betas = [0.9, "x"]', "the key \"betas\": expected a number, not 'x'"),
        ("async-save = 1", 'the key "async-save": expected true or false, not 1'),
        ("data = 3", 'the key "data": expected a string, not 3'),
        ('preset = "huge"', "the key \"preset\": invalid choice: 'huge' (choose from 'nano', "),
        ('preset = "nano"\nmodel = "m"', 'has both "preset" and "model": remove one of them.'),
        ("steps = ", "is not TOML (Invalid value (at "),
        ("steps = 1\nsteps = 2", "is not TOML (Cannot overwrite a value"),
    ],
)
def test_errors_name_the_file_and_the_key(tmp_path, text, message):
    with pytest.raises(UsageError) as caught:
        parse(tmp_path, text)
    assert re.fullmatch(
        rf"--config {tmp_path}/run.toml:? {re.escape(message)}.*", str(caught.value)
    )


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(UsageError, match=r"--config .*/none cannot be read \(No such file"):
        parse_args(["--config", str(tmp_path / "none")])
    (tmp_path / "latin.toml").write_bytes(b'data = "\xe4"')
    with pytest.raises(UsageError, match=r"latin.toml is not TOML \('utf-8' codec"):
        parse_args(["--config", str(tmp_path / "latin.toml")])


EVERY_OPTION = """--preset small --init-from a --init-moments --data b --token-dtype uint32
    --vocab-size 300 --seq-len 7 --batch-size 6 --grad-accum 3 --seed 5 --strategy ddp --device cpu
    --deterministic --optimizer torch-fp32 --optimizer-backend native --lr 1e-05 --schedule cosine
    --warmup 4 --final-lr 1e-22 --betas 0.1 0.30000000000000004 --weight-decay 0 --clip 2
    --no-skip-nonfinite --max-nonfinite 9 --skip-spikes 6 --steps 11 --eval-every 8 --eval-batches 2
    --out c --save-every 0 --no-async-save --check-replicas 12 --precision-stats 13
    --precision-fraction 0.3 --keep 14 --resume auto --grace 15.5 --step-timeout 16 --print-every 17
    --no-progress --no-tensorboard"""
ODD = 'a "quoted" \\ back\tslash \x7f \x01 ü 🙂 = # [x]'


def test_the_stored_file_gives_the_same_configuration(tmp_path, capsys):
    args = parse_args([*EVERY_OPTION.split(), "--data", ODD])
    unset = {name for name, value in vars(args).items() if value is None}
    assert unset == {"config", "model", "export_hf", "wandb"}
    notes = capsys.readouterr().err
    again = parse(tmp_path, to_toml(args))
    assert {**vars(again), "config": None} == {**vars(args), "betas": [0.1, 0.30000000000000004]}
    assert capsys.readouterr().err == notes
    small = parse_args(["--schedule", "constant"])
    capsys.readouterr()
    assert {**vars(parse(tmp_path, to_toml(small))), "config": None} == {
        **vars(small),
        "betas": [0.9, 0.999],
    }
    assert capsys.readouterr().err == "", "no note: the file has no option that is unused"


def test_all_options_are_printed_in_short():
    args = parse_args(EVERY_OPTION.split())
    text = shown(args)
    assert max(map(len, text.splitlines())) <= 100 and len(text.splitlines()) < 10
    words = dict(word.split("=") for word in re.split(r",\s+(?=[a-z])", text.strip()))
    assert (words["final-lr"], words["betas"]) == ("1e-22", "[0.1, 0.30000000000000004]")
    assert (words["progress"], words["preset"]) == ("false", '"small"')
    assert len(words) == sum(value is not None for value in vars(args).values())


def test_changes_name_options_once_and_leave_out_what_does_not_matter():
    saved = {"lr": 1.0, "betas": [0.9, 0.99], "keep": 2, "data": None, "out": "a", "gone": 1}
    given = {"lr": 2.0, "betas": (0.9, 0.99), "keep": 3, "data": "x", "out": "b", "new": 1}
    trained = ["--data was not given, now x", "--lr was 1.0, now 2.0"]
    assert changes(given, saved, operational=False) == trained
    assert changes(given, saved, operational=True) == [
        trained[0],
        "--keep was 2, now 3",
        trained[1],
    ]


@pytest.mark.parametrize("has_tomli", [True, False])
def test_python_3_10_reads_it_with_tomli(tmp_path, monkeypatch, has_tomli):
    tomli = types.ModuleType("tomli")
    tomli.loads = lambda text: {"steps": 4}
    monkeypatch.setitem(sys.modules, "tomli", tomli if has_tomli else None)
    monkeypatch.setattr(sys, "version_info", (3, 10, 0))
    spec = importlib.util.spec_from_file_location("old_config", config.__file__)
    old_config = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(old_config)
    path = tmp_path / "run.toml"
    path.write_text("steps = 4")
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=config.positive)
    if has_tomli:
        assert old_config.read_config(str(path), parser) == {"steps": 4}
    else:
        with pytest.raises(UsageError, match=r"^--config needs the package tomli on "):
            old_config.read_config(str(path), parser)
