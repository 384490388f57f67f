"""The configuration of a run: read from a TOML file, stored in ``--out``, printed, and compared."""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from training.command_line import count, nonempty, positive, seed, vocab_size
from training.errors import UsageError

CONFIG_FILE = "config.toml"
WIDTH = 100
# Options that do not change the training: a resumed run only prints how they differ.
OPERATIONAL = {
    *("strategy", "device", "deterministic", "optimizer_backend", "grad_accum"),
    *("eval_every", "eval_batches", "save_every", "async_save", "keep", "export_hf"),
    *("check_replicas", "precision_stats", "precision_fraction", "max_nonfinite"),
    *("tensorboard", "wandb"),
}
# Options whose change a resumed run does not print. All others are the run's configuration.
UNMENTIONED = {"config", "out", "resume", "progress", "print_every", "grace", "step_timeout"}


# ------------------------------------------------------------------------------------- TOML files


def read_config(path: str, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Return the values of a TOML file, keyed by attribute of ``args``.

    The keys of the file are options without their leading dashes, such as ``batch-size = 64``,
    ``betas = [0.9, 0.95]`` and ``async-save = false``.

    Raises:
        UsageError: the file cannot be read, has an unknown key, or an invalid value.
    """
    toml = _toml()
    try:
        table = toml.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"--config {path} cannot be read ({error.strerror}): check the path."
        ) from error
    except ValueError as error:  # also raised for bytes that are not UTF-8
        raise UsageError(f"--config {path} is not TOML ({error}): correct it.") from error
    actions = {
        action.dest: action for action in parser._actions if action.dest not in ("help", "config")
    }
    values = {}
    for key, value in table.items():
        name = _attribute(key)
        if _key(name) != key or name not in actions:
            raise UsageError(
                f"--config {path} has the unknown key {json.dumps(key)}"
                f"{_suggestion(name, actions)}; see --help."
            )
        try:
            values[name] = _checked(actions[name], value)
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise UsageError(f'--config {path}: the key "{key}": {error}; see --help.') from None
    if {"preset", "model"} <= values.keys():
        raise UsageError(f'--config {path} has both "preset" and "model": remove one of them.')
    return values


def _toml() -> Any:
    """Return the standard library's TOML module, or on Python 3.10 the package tomli."""
    if sys.version_info >= (3, 11):
        import tomllib

        return tomllib
    try:
        return importlib.import_module("tomli")
    except ImportError:
        raise UsageError(
            "--config needs the package tomli on Python 3.10: install it with pip install tomli."
        ) from None


def _suggestion(name: str, actions: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, actions, 1)
    return f' (did you mean "{_key(close[0])}"?)' if close else ""


def _checked(action: argparse.Action, value: Any) -> Any:
    """Convert a TOML value as argparse converts the text of an option.

    Raises:
        ValueError: the value has the wrong type, or is not among the choices.
        argparse.ArgumentTypeError: the value is out of range.
    """
    if action.nargs == 0:
        return _typed(value, (bool,), "true or false")
    if action.nargs is not None:
        items = _typed(value, (list,), f"a list of {action.nargs} numbers")
        if len(items) != action.nargs:
            raise ValueError(f"expected {action.nargs} numbers, not {len(items)}")
        return [_checked_one(action.type, item) for item in items]
    value = _checked_one(action.type, value)
    if action.choices is not None and value not in action.choices:
        choices = ", ".join(map(repr, action.choices))
        raise ValueError(f"invalid choice: {value!r} (choose from {choices})")
    return value


def _checked_one(convert: Any, value: Any) -> Any:
    if convert in (None, nonempty):
        text = _typed(value, (str,), "a string")
        return text if convert is None else nonempty(text)
    is_whole = convert in (positive, count, seed, vocab_size)
    expected = "a whole number" if is_whole else "a number"
    return convert(repr(_typed(value, (int,) if is_whole else (int, float), expected)))


def _typed(value: Any, types: tuple[type, ...], expected: str) -> Any:
    if type(value) not in types:  # not isinstance, since a bool is an int
        raise ValueError(f"expected {expected}, not {value!r}")
    return value


def to_toml(args: argparse.Namespace) -> str:
    """Return the options that are not None, as TOML. Inverse of :func:`read_config`."""
    return "".join(f"{key} = {value}\n" for key, value in _items(args))


def shown(args: argparse.Namespace) -> str:
    """Return the options that are not None, as a paragraph for a terminal."""
    text = ", ".join(f"{key}={value}" for key, value in _items(args))
    indent = "  "
    return textwrap.fill(
        text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )


def _items(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    for name, value in vars(args).items():
        if value is not None and name != "config":
            yield _key(name), _toml_value(value)


def _toml_value(value: Any) -> str:
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml_value, value))}]"
    # JSON writes strings, integers and booleans as TOML does, except for DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", r"\u007f")


def _key(name: str) -> str:
    return name.replace("_", "-")


def _attribute(key: str) -> str:
    return key.replace("-", "_")


# --------------------------------------------------------------------------------------- changes


def changes(given: Mapping[str, Any], saved: Mapping[str, Any], operational: bool) -> list[str]:
    """Return the options that differ from a checkpoint's configuration, for a message.

    Args:
        given: configuration of this run.
        saved: configuration of the checkpoint.
        operational: also return options that do not change the training.
    """
    given = json.loads(json.dumps(dict(given)))  # tuples as lists, as in the manifest
    ignored = UNMENTIONED if operational else UNMENTIONED | OPERATIONAL
    return [
        f"--{_key(name)} was {_or_unset(saved[name])}, now {_or_unset(given[name])}"
        for name in sorted(given.keys() & saved.keys() - ignored)
        if saved[name] != given[name]
    ]


def _or_unset(value: Any) -> Any:
    return "not given" if value is None else value
