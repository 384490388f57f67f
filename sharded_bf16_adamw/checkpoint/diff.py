"""Which entries of a checkpoint fit a model and an optimizer, and in what they differ."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from .groups import match_groups
from .manifest import Manifest, ParamGroup, decode
from .rank_errors import Group, known_on_other_ranks
from .state_dict import MODEL, STATE, CheckpointState, param_of_state


@dataclass
class Comparison:
    """Attributes:
    loadable: keys of tensors that the checkpoint has in the same shape and dtype.
    unsaved_states: keys of states that it lacks although it has the parameter's weight; they start at zero.
    plain: values that are no tensors, by key.
    groups: the groups here with the saved options, also those that are not here.
    differences: a sentence without a full stop for each entry that does not fit.
    """

    loadable: list[str] = field(default_factory=list)
    unsaved_states: list[str] = field(default_factory=list)
    plain: dict[str, Any] = field(default_factory=dict)
    groups: list[ParamGroup] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)


def keys_elsewhere(
    metadata: Metadata, manifest: Manifest, here: CheckpointState, group: Group
) -> set[str]:
    """Return the keys of the checkpoint that other ranks alone have (pipeline stages, experts). Collective."""
    saved: set[str] = {
        key
        for key in (*metadata.state_dict_metadata, *manifest.values)
        if key.startswith((MODEL, STATE))
    }
    return known_on_other_ranks(saved.difference(here.tensors, here.plain), group)


def compare(
    metadata: Metadata, manifest: Manifest, here: CheckpointState, elsewhere: Collection[str] = ()
) -> Comparison:
    """Compare names, global shapes and dtypes. A parameter of which there is no state at all never had a gradient: no difference.
    ``elsewhere`` are keys that other ranks have."""
    result = Comparison()
    saved = metadata.state_dict_metadata
    saved_plain = manifest.values
    with_state = params_with_state(metadata, manifest)
    for key, value in here.tensors.items():
        entry, param = saved.get(key), param_of_state(key)
        problem = f"it has no {key}" if entry is None else _difference(key, entry, value)
        if problem is None:
            result.loadable.append(key)
            continue
        if param is None or param in with_state:
            result.differences.append(problem)
        if (
            param is not None
            and MODEL + param in saved
            and _difference("", saved[MODEL + param], here.tensors[MODEL + param]) is None
        ):
            result.unsaved_states.append(key)
    for key, value in here.plain.items():
        if key in saved_plain:
            result.plain[key] = decode(saved_plain[key])
        else:
            result.plain[key] = value
            if param_of_state(key) is None or param_of_state(key) in with_state:
                result.differences.append(f"it has no {key}")
    with_state_here = {param_of_state(key) for key in [*here.tensors, *here.plain]}
    unused = {
        param
        for param in with_state
        if param not in with_state_here and MODEL + param in here.tensors
    }
    for param in sorted(unused):
        result.differences.append(
            f"it has a state of {param}, which has none here, as where it is not in the optimizer"
        )
    for key in [*saved, *saved_plain]:
        is_here = key in here.tensors or key in here.plain or key in elsewhere
        if key.startswith((MODEL, STATE)) and not is_here and param_of_state(key) not in unused:
            result.differences.append(f"it has {key}, which is not here")
    _compare_groups(manifest.groups, here.groups, result)
    return result


def params_with_state(metadata: Metadata, manifest: Manifest) -> set[str]:
    """The names of the parameters of which the checkpoint has a state."""
    return {
        fqn
        for key in chain(metadata.state_dict_metadata, manifest.values)
        if (fqn := param_of_state(key)) is not None
    }


def restored(
    here: CheckpointState, comparison: Comparison, loaded: dict[str, Any]
) -> CheckpointState:
    """What the model and optimizer are to hold: loaded tensors and values, and of the rest what they hold now."""
    return CheckpointState(
        {**here.tensors, **{key: loaded[key] for key in comparison.loadable}},
        comparison.plain,
        comparison.groups,
    )


def _difference(key: str, entry: Any, value: Any) -> str | None:
    shape = value.size()
    if entry.size != shape:
        return f"{key} has shape {tuple(entry.size)} there but {tuple(shape)} here"
    if entry.properties.dtype != value.dtype:
        return f"{key} is {entry.properties.dtype} there but {value.dtype} here"
    return None


def _compare_groups(saved: list[ParamGroup], here: list[ParamGroup], result: Comparison) -> None:
    """Options by name: which there are depends on versions, and on what others (a scheduler's ``initial_lr``) wrote there, so one that
    either lacks is no difference; where it was the same for all parameters of a group here, it is kept. Groups may have been divided
    otherwise, as long as the parameters of one group here were saved with the same options. A group without parameters is known by
    its place."""
    options_of = {fqn: group.options for group in saved for fqn in group.params}
    matches = match_groups([group.params for group in here], [group.params for group in saved])
    for group, match in zip(here, matches, strict=True):
        options = dict(group.options)
        if not group.params and match is None and "schedule_step" in options:
            options["schedule_step"] = max(
                (decode(other.options.get("schedule_step", 0)) for other in saved), default=0
            )
        if not group.params and match is not None:
            found = {
                name: decode(value)
                for name, value in saved[match].options.items()
                if name != "param_names"
            }
            options.update({name: _like(options.get(name), value) for name, value in found.items()})
        for name in dict.fromkeys(
            chain(options, *(options_of.get(fqn, {}) for fqn in group.params))
        ):
            found = {
                fqn: options_of[fqn][name]
                for fqn in group.params
                if name in options_of.get(fqn, {})
            }
            if (
                not found or name == "param_names"
            ):  # which is no option but what the caller called them
                continue
            first = next(iter(found))
            other = next((fqn for fqn in found if found[fqn] != found[first]), None)
            if other is None:
                options[name] = _like(options.get(name), decode(found[first]))
            elif name in group.options:
                result.differences.append(
                    f"{name} of {first} is {found[first]} there and of {other} {found[other]}, but here they are in one group"
                )
        result.groups.append(ParamGroup(group.params, options))


def _like(here: Any, saved: Any) -> Any:
    """A learning rate that is a tensor here stays one, on its device, and a number stays a number."""
    if isinstance(here, Tensor):
        return torch.as_tensor(saved, dtype=here.dtype, device=here.device).reshape(here.shape)
    return saved.item() if isinstance(saved, Tensor) else saved
