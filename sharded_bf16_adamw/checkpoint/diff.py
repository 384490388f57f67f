"""Compare the keys, shapes and dtypes of a checkpoint with those of a model and an optimizer."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .chunk_table import ChunkTable
from .groups import match_groups
from .manifest import Manifest, ParamGroup, decode
from .object_collectives import Group, known_on_other_ranks
from .rank_errors import join_problems
from .safetensors_io import TensorInfo
from .state_dict import MODEL, STATE, CheckpointState, param_of_state


@dataclass
class Comparison:
    """The result of :func:`compare`.

    Attributes:
        loadable: keys of tensors that the checkpoint has with the same shape and dtype.
        missing_states: keys of states that the checkpoint lacks although it has the weight. Their
            tensors become zero.
        plain: values to load that are not tensors, by key; the current one if none was saved.
        groups: the optimizer's groups, with the saved options.
        mismatches: a sentence without a full stop for each key that does not fit.
    """

    loadable: list[str] = field(default_factory=list)
    missing_states: list[str] = field(default_factory=list)
    plain: dict[str, Any] = field(default_factory=dict)
    groups: list[ParamGroup] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)


def keys_on_other_ranks(
    table: ChunkTable, manifest: Manifest, current: CheckpointState, group: Group
) -> set[str]:
    """Return the saved keys that only other ranks have (stages, experts). Collective."""
    saved: set[str] = {
        key for key in (*table.tensors, *manifest.values) if key.startswith((MODEL, STATE))
    }
    return known_on_other_ranks(saved.difference(current.tensors, current.plain), group)


def compare(
    table: ChunkTable,
    manifest: Manifest,
    current: CheckpointState,
    on_other_ranks: Collection[str] = (),
) -> Comparison:
    """Compare names, global shapes and dtypes.

    A parameter without any saved state never had a gradient, which is not a mismatch.

    Args:
        table: the checkpoint's tensors.
        manifest: its manifest.
        current: the model and optimizer on this rank.
        on_other_ranks: keys that only other ranks have.
    """
    result = Comparison()
    saved, saved_plain = table.tensors, manifest.values
    with_state = params_with_state(table.tensors, manifest)
    for key, value in current.tensors.items():
        param = param_of_state(key)
        mismatch = _find_tensor_mismatch(key, saved, value)
        if mismatch is None:
            result.loadable.append(key)
            continue
        if param is None or param in with_state:
            result.mismatches.append(mismatch)
        if param is not None:
            weight = current.tensors.get(MODEL + param)  # None if it is a wrapper subclass
            if weight is not None and not _find_tensor_mismatch(MODEL + param, saved, weight):
                result.missing_states.append(key)
    for key, value in current.plain.items():
        result.plain[key] = decode(saved_plain[key]) if key in saved_plain else value
        param = param_of_state(key)
        if key not in saved_plain and (param is None or param in with_state):
            result.mismatches.append(f"missing key {key}")
    current_with_state = {param_of_state(key) for key in [*current.tensors, *current.plain]}
    unused = {
        param
        for param in with_state
        if param not in current_with_state and MODEL + param in current.tensors
    }
    for param in sorted(unused):
        result.mismatches.append(
            f"unexpected state of {param}: this optimizer has no state for it; add the parameter "
            "to a group"
        )
    for key in [*saved, *saved_plain]:
        is_known = key in current.tensors or key in current.plain or key in on_other_ranks
        if key.startswith((MODEL, STATE)) and not is_known and param_of_state(key) not in unused:
            result.mismatches.append(f"unexpected key {key}")
    _compare_groups(manifest.groups, current.groups, result)
    return result


def params_with_state(keys: Iterable[str], manifest: Manifest) -> set[str]:
    """Return the parameters with a saved state: in ``keys`` of tensors or in the manifest."""
    return {fqn for key in chain(keys, manifest.values) if (fqn := param_of_state(key)) is not None}


def merge_loaded(
    current: CheckpointState, comparison: Comparison, loaded: dict[str, Any]
) -> CheckpointState:
    """Return the loaded tensors and values, and the current ones where nothing was loaded."""
    return CheckpointState(
        {**current.tensors, **{key: loaded[key] for key in comparison.loadable}},
        comparison.plain,
        comparison.groups,
    )


def find_mismatch(
    key: str, saved: Any, shape: tuple[int, ...], dtype: torch.dtype | None
) -> str | None:
    """Return a sentence if ``saved`` does not fit a tensor, else None.

    Args:
        key: the name in the sentence.
        saved: anything with ``shape`` and ``dtype``; None if the key is missing.
        shape: the tensor's global shape.
        dtype: the tensor's dtype; None to accept every dtype.
    """
    if saved is None:
        return f"missing key {key}"
    if tuple(saved.shape) != shape:
        return f"size mismatch for {key}: saved as {tuple(saved.shape)}, but {shape} in the model"
    if dtype not in (None, saved.dtype):
        return f"dtype mismatch for {key}: saved as {saved.dtype}, but {dtype} in the model"
    return None


def raise_mismatches(problem: str, mismatches: list[str]) -> None:
    """Raise ValueError with the first mismatches, if there are any."""
    if mismatches:
        raise ValueError(
            f"{problem}: {join_problems(mismatches)}; build this model and optimizer like those "
            "that were saved"
        )


def _find_tensor_mismatch(key: str, entries: dict[str, Any], value: Any) -> str | None:
    entry = entries.get(key)
    saved = None if entry is None else TensorInfo(tuple(entry.size), entry.properties.dtype)
    return find_mismatch(key, saved, tuple(value.size()), value.dtype)


def _compare_groups(saved: list[ParamGroup], current: list[ParamGroup], result: Comparison) -> None:
    """Compare options by parameter name, and give each current group its saved options.

    Which options exist depends on versions and on other code (a scheduler's ``initial_lr``), so an
    option that only one side has is not a mismatch. An option is loaded if it was saved with the
    same value for all parameters of a current group. The groups may have been divided differently
    if that holds for every option. :func:`match_groups` matches groups without parameters.
    """
    options_of = {fqn: group.options for group in saved for fqn in group.params}
    matches = match_groups([group.params for group in current], [group.params for group in saved])
    for group, match in zip(current, matches, strict=True):
        options = dict(group.options)
        # An unmatched empty group continues at the last position of any saved schedule.
        if not group.params and match is None and "schedule_step" in options:
            options["schedule_step"] = max(
                (decode(other.options.get("schedule_step", 0)) for other in saved), default=0
            )
        if not group.params and match is not None:
            for name, value in saved[match].options.items():
                if name != "param_names":
                    options[name] = _like(options.get(name), decode(value))
        saved_names = chain(*(options_of.get(fqn, {}) for fqn in group.params))
        for name in dict.fromkeys(chain(options, saved_names)):
            values = {
                fqn: options_of[fqn][name]
                for fqn in group.params
                if name in options_of.get(fqn, {})
            }
            # "param_names" is not an option: it has the names that the caller gave the parameters.
            if not values or name == "param_names":
                continue
            first = next(iter(values))
            other = next((fqn for fqn in values if values[fqn] != values[first]), None)
            if other is None:
                options[name] = _like(options.get(name), decode(values[first]))
            elif name in group.options:
                result.mismatches.append(
                    f"{name} was saved as {values[first]} for {first} and as {values[other]} for "
                    f"{other}, but one group of this optimizer has both"
                )
        result.groups.append(ParamGroup(group.params, options))


def _like(current: Any, saved: Any) -> Any:
    """Return ``saved`` as a tensor like ``current``, or as a number if that is not a tensor."""
    if isinstance(current, Tensor):
        return torch.as_tensor(saved, dtype=current.dtype, device=current.device).reshape(
            current.shape
        )
    return saved.item() if isinstance(saved, Tensor) else saved
