"""Types of arguments, which all commands of launch/ share."""

from __future__ import annotations

import argparse
import os

import pytest
from training import command_line
from training.command_line import Parser, output_file
from training.errors import UsageError


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
