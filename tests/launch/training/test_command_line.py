"""Types of arguments and errors printed once, which all commands of launch/ share."""

from __future__ import annotations

import argparse
import os

import pytest
import torch.distributed as dist
from training import command_line
from training.command_line import Parser, exit_code, output_file
from training.errors import RunError, UsageError


def fail(error: Exception) -> int:
    raise error


@pytest.mark.parametrize(
    ("rank", "local_rank", "has_joined", "prints"),
    [
        ("0", "0", False, True),
        ("1", "1", False, False),
        ("0", "0", True, True),
        ("8", "0", False, True),  # of another machine, which may lack what the first one has
        ("8", "0", True, False),
        ("9", "1", False, False),  # torchrun stops it
    ],
)
def test_error_is_printed_once(monkeypatch, capsys, rank, local_rank, has_joined, prints):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(dist, "is_initialized", lambda: has_joined)
    assert exit_code(lambda: fail(UsageError("no such thing.")), lambda: True) == 2
    assert exit_code(lambda: fail(RunError("a full disk.")), lambda: True) == 1
    expected = "error: no such thing.\nerror: a full disk.\n" if prints else ""
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("ends", [True, False])
def test_rank_waits_for_the_first_one_of_its_machine_to_print(monkeypatch, capsys, ends):
    """torchrun stops it once that one has ended; if not, only this rank has an error."""
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", "1")
    slept = []
    monkeypatch.setattr(command_line.time, "sleep", slept.append)
    monkeypatch.setattr(command_line.time, "monotonic", lambda: sum(slept))
    is_stopped = lambda: ends and len(slept) == 3  # noqa: E731
    assert exit_code(lambda: fail(UsageError("no such thing.")), is_stopped) == 2
    assert capsys.readouterr().err == ("" if ends else "error: no such thing.\n")
    assert len(slept) == 3 if ends else sum(slept) >= command_line.REPORT_S


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("positive", {"3": 3}, {"0": "not a positive number", "x": "not a whole number"}),
        ("count", {"0": 0}, {"-1": "negative", "1.5": "not a whole number"}),
        ("seed", {str(2**32 - 1): 2**32 - 1}, {str(2**32): "not below", "-1": "negative"}),
        ("nonnegative", {"0": 0.0}, dict.fromkeys(("-1", "nan", "inf", "x"), "at least 0")),
        ("positive_float", {"1e-3": 1e-3}, dict.fromkeys(("0", "nan", "inf", "x"), "positive")),
        ("share", {"1": 1.0, "0.125": 0.125}, dict.fromkeys(("0", "1.1", "nan", "x"), "at most 1")),
        ("finite", {"-2": -2.0}, dict.fromkeys(("nan", "-inf", "x"), "not a finite number")),
        ("nonempty", {"a": "a"}, {"": "empty", "a\0b": "NUL"}),
    ],
)
def test_types_take_what_they_say(name, good, bad):
    convert = getattr(command_line, name)
    for text, value in good.items():
        assert convert(text) == value
    for text, message in bad.items():
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            convert(text)


def test_output_file_makes_its_folder_and_is_checked_before_a_long_run(tmp_path):
    path = tmp_path / "new/folder/figures.json"
    assert output_file(str(path)) == path and path.parent.is_dir() and not path.exists()
    for bad, message in (
        (tmp_path, "is a folder, not a file"),
        ("/dev/null/x/y.json", r"the folder /dev/null/x cannot be made \(Not a directory\)"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            output_file(str(bad))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_file_in_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(argparse.ArgumentTypeError, match="cannot be written to"):
        output_file(str(tmp_path / "figures.json"))


def test_abbreviations_are_unknown():
    parser = Parser("test", None)
    parser.add_argument("--warmup")
    with pytest.raises(UsageError, match="unrecognized arguments: --warm=5; see --help"):
        parser.parse_args(["--warm=5"])
