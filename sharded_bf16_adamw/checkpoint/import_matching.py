"""Match the weights, states and groups of an import with those of the model, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .blocks import local_blocks
from .diff import find_mismatch, raise_mismatches
from .extra_state import is_wrapper_subclass
from .groups import match_groups
from .import_formats import WeightsSource
from .manifest import as_tensor
from .ties import bitwise_equal

_STATE_KEYS = ("step", "exp_avg", "exp_avg_sq")


def match_weights(
    source: WeightsSource,
    ties: list[list[str]],
    current: dict[str, Any],
    on_other_ranks: set[str],
) -> dict[str, str]:
    """Map each name of the model to its name in the source; they differ only for tied parameters.

    Args:
        source: the weights to import.
        ties: sets of names that are tied in the model.
        current: this rank's entries of the model's state dict.
        on_other_ranks: names that only other ranks have.

    Raises:
        ValueError: source and model do not fit.
    """
    source_name = {name: name for name in current}
    mismatches = []
    for tied in ties:
        tied_here = [name for name in tied if name in current]
        present = [name for name in tied_here if name in source.infos]
        source_name.update({name: present[0] for name in tied_here if present})
        mismatches += [
            f"{present[0]} and {other} are tied in the model but differ in the source"
            for other in present[1:]
            if not _equal_in_source(source, present[0], other, current[tied_here[0]])
        ]
    for name, tensor in current.items():
        if isinstance(tensor, Tensor):
            mismatch = _find_weight_mismatch(name, source, source_name[name], tensor)
            mismatches += [] if mismatch is None else [mismatch]
    mismatches += [
        f"unexpected key {name}"
        for name in source.infos
        if name not in current and name not in on_other_ranks
    ]
    raise_mismatches("the weights to import are of another model", mismatches)
    return source_name


def _find_weight_mismatch(
    name: str, source: WeightsSource, source_name: str, tensor: Tensor
) -> str | None:
    info = source.infos.get(source_name)
    mismatch = find_mismatch(name, info, tuple(tensor.shape), None)
    if info is None or mismatch is not None:
        return mismatch
    if is_wrapper_subclass(tensor):
        return (
            f"{name} is a {type(tensor).__name__}; import first, and quantise the model afterwards"
        )
    if info.dtype.is_floating_point and tensor.dtype.is_floating_point:
        return None
    return find_mismatch(name, info, info.shape, tensor.dtype)


def _equal_in_source(source: WeightsSource, first: str, other: str, tensor: Tensor) -> bool:
    """Return True if this rank's part of a tensor is the same under two names of the source."""
    if source.infos[first] != source.infos[other]:
        return False
    if source.infos[first].shape != tuple(tensor.shape):
        return True  # the size mismatch is reported instead
    return all(
        bitwise_equal(source.read(first, block), source.read(other, block))
        for block, _ in local_blocks(tensor)
    )


def is_keyed_by_names(groups: list[dict[str, Any]]) -> bool:
    """Return True if an optimizer's state dict with these groups is keyed by parameter names."""
    return all(isinstance(key, str) for group in groups for key in group["params"])


def key_states_by_name(
    state_dict: dict[str, Any], current_groups: list[dict[str, Any]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the states and groups of an optimizer's state dict, keyed by parameter names.

    Args:
        state_dict: keyed by integers in the order of its groups, or by names already.
        current_groups: this optimizer's groups, with the names of their parameters.

    Raises:
        ValueError: the groups of a state keyed by integers do not fit this optimizer or the states.
    """
    states, groups = state_dict["state"], state_dict["param_groups"]
    if is_keyed_by_names(groups):
        return states, groups
    sizes = [len(group["params"]) for group in groups]
    current_sizes = [len(group["params"]) for group in current_groups]
    if sizes != current_sizes:
        raise ValueError(
            f"the optimizer state to import has parameter groups of sizes {sizes}, but this "
            f"optimizer has {current_sizes}; build it with the same groups, or export the state "
            "keyed by parameter names"
        )
    name_of = {
        key: name
        for group, current in zip(groups, current_groups, strict=True)
        for key, name in zip(group["params"], current["params"], strict=True)
    }
    unknown = [key for key in states if key not in name_of]
    if unknown:
        raise ValueError(
            f"the optimizer state to import has a state of parameter {unknown[0]}, which is in "
            "none of its groups; export it again with optimizer.state_dict()"
        )
    return (
        {name_of[key]: state for key, state in states.items()},
        [{**group, "params": [name_of[key] for key in group["params"]]} for group in groups],
    )


def merge_tied_states(
    states: dict[str, Any],
    groups: list[dict[str, Any]],
    ties: list[list[str]],
    source_ties: list[list[str]],
    current_params: set[str],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Rename imported states and groups of tied parameters to this optimizer's names.

    Args:
        states: imported states by name.
        groups: imported groups.
        ties: sets of names that are tied in the model.
        source_ties: sets of names that are tied in the source.
        current_params: names of this optimizer's parameters.

    Raises:
        ValueError: names that are tied in the model have different states.
    """
    states = dict(states)
    params_of_groups = [set(group["params"]) for group in groups]
    for tied in source_ties:  # tied names share one state
        holder = next((name for name in tied if name in states), None)
        if holder is None:
            continue
        for name in current_params.intersection(tied):
            states.setdefault(name, states[holder])
            for params in params_of_groups:
                params.update([name] if holder in params else [])
    for first, *others in ties:
        for name in [name for name in others if name in states]:
            state = states.pop(name)
            if not _equal_states(states.setdefault(first, state), state):
                raise ValueError(
                    f"{first} and {name} are tied in the model, but the optimizer states to import "
                    "for them differ; untie them in the model"
                )
            for params in params_of_groups:
                params.update([first] if name in params else [])
                params.discard(name)
    return states, [
        {**group, "params": sorted(params)}
        for group, params in zip(groups, params_of_groups, strict=True)
    ]


def _equal_states(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return a is b or all(
        bitwise_equal(as_tensor(a[key]), as_tensor(b[key]))
        for key in _STATE_KEYS
        if key in a and key in b
    )


def check_states(imported: dict[str, Any], current: dict[str, Any]) -> None:
    """Raise ValueError if imported states, by name, do not fit those of this optimizer."""
    mismatches = [f"unexpected parameter {name}" for name in imported if name not in current]
    for name in imported.keys() & current.keys():
        for key in _STATE_KEYS:
            value = imported[name].get(key)
            saved = None if value is None else as_tensor(value)
            shape = () if key == "step" else tuple(current[name][key].shape)
            mismatch = find_mismatch(f"{name}.{key}", saved, shape, None)
            mismatches += [] if mismatch is None else [mismatch]
    raise_mismatches(
        "the optimizer state to import is of another model, or not of AdamW", mismatches
    )


def match_imported_groups(
    current: list[dict[str, Any]], imported: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the imported group whose hyperparameters each current group takes, or {}.

    Raises:
        ValueError: no imported group has all parameters of a current one.
    """
    matches = match_groups(
        [group["params"] for group in current], [group["params"] for group in imported]
    )
    for group, match in zip(current, matches, strict=True):
        if group["params"] and match is None:
            raise ValueError(
                "no parameter group of the optimizer state to import has all of "
                f"{', '.join(group['params'][:3])}..., which are one group of this optimizer; "
                "build it with the same groups"
            )
    return [{} if match is None else imported[match] for match in matches]
