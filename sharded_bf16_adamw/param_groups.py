"""Parameter groups by regular expression on fully qualified names (FQNs)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .names import clean_fqn, flat_params, unwrap

_REST = "(the rest)"
_DEFAULTS = "(defaults)"
_RESERVED = ("params", "param_names")


class ParamGroups(list[dict[str, Any]]):
    """Parameter groups for an optimizer. ``print(groups)`` shows the parameters of each group."""

    def __init__(self, groups: Iterable[dict[str, Any]], patterns: Iterable[str]) -> None:
        super().__init__(groups)
        self._patterns = list(patterns)
        # Format the options now: an optimizer adds its defaults to the dicts.
        self._options = [
            ", ".join(f"{key}={value!r}" for key, value in group.items() if key not in _RESERVED)
            for group in self
        ]

    def __str__(self) -> str:
        """Return the table. Names that differ only in indices share a row, with ``*`` as the index.

        Elements are counted in the full tensor, for FSDP1 in this rank's shard.
        """
        rows = [("group", "pattern", "options", "parameters", "elements", "names")]
        labels = zip(self, self._patterns, self._options, strict=True)
        for index, (group, pattern, options) in enumerate(labels):
            head = (str(index), pattern, options or _DEFAULTS)
            for name, params in _collapsed(group) or [("", [])]:
                numel = sum(0 if is_lazy(param) else param.numel() for param in params)
                rows.append((*head, str(len(params)), f"{numel:,}", name))
                head = ("", "", "")
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if column in (3, 4) else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )


def param_groups(
    model: nn.Module, options: Mapping[str, Mapping[str, Any]], *, allow_empty: bool = False
) -> ParamGroups:
    """Sort a model's parameters into groups by regular expressions on their names.

    The names are those of the plain model, under any nesting of DDP, FSDP1, FSDP2,
    ``torch.compile`` and activation checkpointing. A parameter belongs to the first pattern that
    :func:`re.search` finds in its name. All others form a last group with the optimizer's defaults.
    Frozen parameters are kept, as in ``model.parameters()``. A tied parameter is listed once, and a
    pattern may match any of its names.

    Args:
        model: the module, wrapped or not. Wrap and shard it first.
        options: maps each pattern to the options of its group, such as ``{"weight_decay": 0}``.
        allow_empty: keep groups without parameters instead of raising, so that pipeline stages with
            different layers have the same groups.

    Returns:
        A list of groups for :class:`AdamW_BF16` or an optimizer of torch, with ``param_names``.
        ``print()`` of it shows a table of the parameters in each group.

    Raises:
        ValueError: a pattern is not a regular expression, matches no parameter, or matches only
            parameters of earlier patterns; an option is ``params`` or ``param_names``; or FSDP1 has
            flattened several parameters into one.

    Examples:
        >>> import torch
        >>> from sharded_bf16_adamw import AdamW_BF16, param_groups
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)).bfloat16()
        >>> groups = param_groups(model, {"^1|bias": {"weight_decay": 0.0}})
        >>> print(groups)
        group  pattern     options           parameters  elements  names
        0      ^1|bias     weight_decay=0.0           2         8  *.bias
                                                      1         4  1.weight
        1      (the rest)  (defaults)                 1        16  0.weight
        >>> optimizer = AdamW_BF16(groups, lr=1e-3, weight_decay=0.1)
        >>> [group["weight_decay"] for group in optimizer.param_groups]
        [0.0, 0.1]
    """
    names = _names_of_params(model)
    patterns = [compile_pattern(pattern) for pattern in options]
    members: list[list[Tensor]] = [[] for _ in range(len(patterns) + 1)]
    for param, own in names.items():
        members[_first_match(patterns, own)].append(param)
    groups, labels = [], []
    for pattern, values, params in zip(
        [*options, _REST], [*options.values(), {}], members, strict=True
    ):
        _check_options(pattern, values)
        if not params and not allow_empty:
            if pattern is _REST:
                continue
            raise ValueError(_no_match(pattern, names))
        param_names = [names[param][0] for param in params]
        groups.append({"params": params, "param_names": param_names, **values})
        labels.append(pattern)
    return ParamGroups(groups, labels)


def _names_of_params(model: nn.Module) -> dict[Tensor, list[str]]:
    """Map each parameter to its FQNs in the plain model: several if it is tied."""
    names: dict[Tensor, list[str]] = {}
    plain = unwrap(model)
    for name, param in plain.named_parameters(remove_duplicate=False):
        names.setdefault(param, []).append(clean_fqn(plain, name))
    if any(flat_param in names for _, flat_param in flat_params(plain)):
        raise ValueError(
            "FullyShardedDataParallel has flattened several parameters into one, so they cannot be "
            "in different groups; pass use_orig_params=True, or use fully_shard (FSDP2)"
        )
    return names


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compile a regular expression. Raise ValueError if it is invalid."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"pattern {pattern!r} is not a regular expression: {error}; escape special characters "
            "with a backslash"
        ) from None


def _first_match(patterns: list[re.Pattern[str]], names: list[str]) -> int:
    """Return the index of the first pattern that matches a name, or the number of patterns."""
    for index, pattern in enumerate(patterns):
        if any(map(pattern.search, names)):
            return index
    return len(patterns)


def _check_options(pattern: str, options: Mapping[str, Any]) -> None:
    for key in _RESERVED:
        if key in options:
            raise ValueError(
                f"the options of pattern {pattern!r} contain {key!r}, which param_groups() sets "
                "itself; remove it"
            )


def _no_match(pattern: str, names: dict[Tensor, list[str]]) -> str:
    all_names = [name for own in names.values() for name in own]
    if any(re.search(pattern, name) for name in all_names):
        return (
            f"pattern {pattern!r} only matches parameters that patterns before it match; put it "
            "before them, or remove it"
        )
    known = ", ".join(map(repr, all_names[:4])) + (", ..." if len(all_names) > 4 else "")
    return (
        f"pattern {pattern!r} matches no parameter; the names are {known or 'none'}; correct it, "
        "or pass allow_empty=True if other pipeline stages have such parameters"
    )


def _collapsed(group: dict[str, Any]) -> list[tuple[str, list[Tensor]]]:
    """Join parameters whose names differ only in indices; such names have ``*`` for each index."""
    found: dict[str, list[tuple[str, Tensor]]] = {}
    for name, param in zip(group["param_names"], group["params"], strict=True):
        key = ".".join("*" if part.isdecimal() else part for part in name.split("."))
        found.setdefault(key, []).append((name, param))
    return [
        (key if len(items) > 1 else items[0][0], [param for _, param in items])
        for key, items in found.items()
    ]
