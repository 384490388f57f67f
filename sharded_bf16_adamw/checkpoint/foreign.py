"""Weights and AdamW states of other trainings, split and rounded into ours, on a live model or as a new checkpoint."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..kernels.reference import lowbias32, stochastic_round
from ..optimizer import AdamW_BF16
from .blocks import local_blocks
from .directory import latest
from .export import Progress, split
from .foreign_formats import Source, open_optimizer_state, open_weights
from .groups import match_groups
from .manifest import as_tensor
from .names import has_fsdp1
from .odd_values import is_wrapper
from .optimizer_state import (
    check_model_and_optimizer,
    init_frozen_states,
    init_state,
    rollback_new_state,
)
from .rank_errors import (
    call_on_rank_0_via_store,
    check_group,
    join_problems,
    known_on_other_ranks,
    raise_on_all_ranks,
)
from .rank_names import RankNames
from .saving import save
from .ties import same_bits, ties_of
from .torch_state_dict import (
    set_sharded_model_state,
    set_sharded_optimizer_state,
    sharded_model_state,
    sharded_optimizer_state,
)

MOMENTS = ("exp_avg", "exp_avg_sq")
HYPERPARAMETERS = (
    "lr",
    "betas",
    "eps",
    "weight_decay",
    "maximize",
)  # of torch.optim.AdamW's that mean the same here
_Path = str | os.PathLike[str]


def round_moment(x: Tensor) -> Tensor:
    """Round a float32 moment to bfloat16 stochastically, by the rule of the kernels.

    The random bits are a hash of the value's own bits: the result is the same on every run and for every sharding, and over many values
    the mean error is zero. A value that bfloat16 holds stays as it is.
    """
    return stochastic_round(x, lowbias32(x.view(torch.int32)) & 0xFFFF)


@torch.no_grad()
def import_fp32(
    source: _Path | Mapping[str, Tensor],
    model: nn.Module,
    optimizer: AdamW_BF16,
    optimizer_state: _Path | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    *,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Replace the weights of a model, and the states of its optimizer, by those of a training in another precision. Collective: every
    rank of ``group`` calls it, and reads its own part of each tensor from ``source``, one tensor at a time.

    A bfloat16 parameter becomes ``p``, the weight rounded to nearest, and ``correction``, what is then missing (see
    :mod:`sharded_bf16_adamw.checkpoint.export` for the bound); one that is frozen has a correction only if ``optimizer_state`` has
    a state of it. Moments are rounded stochastically, with bits that depend on the values
    alone. So every number of ranks and every strategy gets the same bits.

    Args:
        source: a safetensors file, a folder of them with an index (the Hugging Face layout), a torch file, or a state dict; floating
            dtypes are converted. It has every tensor of the model's state dict by name (one of several tied ones will do), and no other
            than other ranks have (pipeline stages, experts).
        model: the module, wrapped or not, with its optimizer built.
        optimizer: the optimizer of its parameters.
        optimizer_state: of a ``torch.optim.AdamW`` in any floating dtype: a torch file or a dict, keyed by integers (then in the order of
            this optimizer's groups and parameters) or a full one keyed by names, as FSDP and ``get_optimizer_state_dict`` return. Its
            lr, betas, eps, weight_decay and maximize are taken over; an optimizer with a schedule keeps that and continues it at the
            state's step. None: moments and steps start at zero, hyper-parameters stay.
        progress: called with the number of bytes whenever a tensor was filled.
        group: the ranks that hold the model, where several models share a job; None for all ranks.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape, names that are tied here have different values, or a file is
            damaged or of another kind. Nothing is changed.
        RuntimeError: a rank cannot find or read a file, and nothing is changed; or it could not in the midst of reading, and the model is
            then part old, part new, as the message says.
    """
    check_group(group)
    with raise_on_all_ranks("cannot import", group):
        check_model_and_optimizer("import_fp32(source, model, optimizer)", model, optimizer)
        if not isinstance(optimizer, AdamW_BF16):
            raise ValueError(
                f"optimizer must be an AdamW_BF16, but it is of type {type(optimizer).__name__}; build one"
            )
        weights = open_weights(source)
        opened = None if optimizer_state is None else open_optimizer_state(optimizer_state)
        rank_names = RankNames(model, optimizer)
    rank_names.number_experts()
    rank_names.add_stage_as_in(weights.infos)
    with rollback_new_state(optimizer):
        with raise_on_all_ranks("cannot import", group):
            init_state(optimizer)
            optimizer_part = sharded_optimizer_state(model, optimizer)
            imported = (
                None
                if opened is None
                else _by_name(opened, optimizer_part["param_groups"], rank_names)
            )
            ties = ties_of(model, rank_names)
            known = {
                rank_names.stored(name)
                for group_ in optimizer_part["param_groups"]
                for name in group_["params"]
            }
            imported = None if imported is None else _with_ties(imported, ties, weights.ties, known)
        with raise_on_all_ranks("cannot import", group):
            if imported is not None and not imported["state"].keys() <= set(
                map(rank_names.stored, optimizer_part["state"])
            ):
                init_frozen_states(
                    model, optimizer, imported["state"], imported["state"], rank_names.stored
                )
                optimizer_part = sharded_optimizer_state(model, optimizer)
            model_part = sharded_model_state(model)
            stored_weights = {
                rank_names.stored(name): tensor for name, tensor in model_part.items()
            }
            stored_states = {
                rank_names.stored(name): state for name, state in optimizer_part["state"].items()
            }
        unknown = known_on_other_ranks(set(weights.infos) - stored_weights.keys(), group)
        unknown_states = known_on_other_ranks(
            set(() if imported is None else imported["state"]) - stored_states.keys(), group
        )
        with raise_on_all_ranks("cannot import", group):
            names = _names_in_source(weights, ties, stored_weights, unknown)
            if imported is not None:
                imported["state"] = {
                    name: state
                    for name, state in imported["state"].items()
                    if name not in unknown_states
                }
                _check_states(imported["state"], stored_states)
                own_groups = [
                    _stored_group(shown, rank_names) for shown in optimizer_part["param_groups"]
                ]
                groups = _matching_groups(own_groups, imported["param_groups"])
    with raise_on_all_ranks("cannot import, and the model is now part old, part new", group):
        for key, tensor in stored_weights.items():
            if isinstance(tensor, Tensor):
                _fill_weight(tensor, weights, names[key])
                _report(progress, tensor)
        for fqn, state in stored_states.items():
            for kind, tensor in state.items():
                if kind == "correction":
                    _fill_correction(tensor, weights, names[fqn])
                else:
                    _fill_state(
                        tensor,
                        None if imported is None else imported["state"].get(fqn, {}).get(kind),
                    )
                _report(progress, tensor)
        if imported is not None:
            for live, shown, own, matching in zip(
                optimizer.param_groups,
                optimizer_part["param_groups"],
                own_groups,
                groups,
                strict=True,
            ):
                _set_hyperparameters(
                    live, matching, _steps(imported["state"], own["params"] or [*imported["state"]])
                )
                shown.update(
                    {
                        key: value
                        for key, value in live.items()
                        if key not in ("params", "param_names")
                    }
                )
    if has_fsdp1(model):
        set_sharded_model_state(model, model_part)
        set_sharded_optimizer_state(model, optimizer, optimizer_part)


def convert_fp32(
    source: _Path | Mapping[str, Tensor],
    root: _Path,
    optimizer_state: _Path | Mapping[str, Any] | None = None,
    *,
    fp32: Iterable[str] = (),
    buffers: Iterable[str] = (),
    progress: Progress | None = None,
    **hyperparameters: Any,
) -> Path:
    """Write a new checkpoint from weights of another training, without the model's code. Holds the model in memory.

    In a distributed run every rank may call it, or rank 0 alone. Rank 0 reads and writes, and waits for no other rank; the
    others return once it is done, and raise if it failed.

    Args:
        source: as for :func:`import_fp32`.
        root: folder of the checkpoints of a run, which must not have one yet; the new one's step is that of ``optimizer_state``.
        optimizer_state: as for :func:`import_fp32`.
        fp32: a list of patterns (``["*norm*"]``) of names of parameters that are float32 in the model; all other parameters become
            bfloat16.
        buffers: a list of patterns of names that are buffers in the model; they keep their dtype, as does everything that is not floating.
        hyperparameters: lr, betas, eps, weight_decay, where ``optimizer_state`` does not bring them.

    Returns:
        The checkpoint's folder.

    Raises:
        FileExistsError: there is a checkpoint under ``root``.
        FileNotFoundError: there is nothing at ``source`` or ``optimizer_state``.
        ValueError: as :func:`import_fp32`, or a pattern matches no name.
        RuntimeError: as :func:`save`; on other ranks than 0 for every other error of rank 0 too.
    """

    def convert() -> str:
        return str(
            _convert(source, root, optimizer_state, fp32, buffers, progress, hyperparameters)
        )

    return Path(call_on_rank_0_via_store("convert_fp32", root, convert))


def _convert(
    source: _Path | Mapping[str, Tensor],
    root: _Path,
    optimizer_state: _Path | Mapping[str, Any] | None,
    fp32: Iterable[str],
    buffers: Iterable[str],
    progress: Progress | None,
    hyperparameters: dict[str, Any],
) -> Path:
    if latest(root) is not None:
        raise FileExistsError(f"{root} has a checkpoint already; give another folder")
    weights = open_weights(source)
    fp32, buffers = (
        _checked_patterns("fp32", fp32, weights),
        _checked_patterns("buffers", buffers, weights),
    )
    state = None if optimizer_state is None else open_optimizer_state(optimizer_state)
    model = nn.Module()
    made: dict[str, nn.Parameter] = {}
    first_of = {name: tied[0] for tied in weights.ties for name in tied}
    for name, info in weights.infos.items():
        holder = model
        *parents, leaf = name.split(".")
        for parent in parents:
            if parent not in dict(holder.named_children()):
                holder.add_module(parent, nn.Module())
            holder = holder.get_submodule(parent)
        if not info.dtype.is_floating_point or _matches(name, buffers):
            holder.register_buffer(leaf, torch.empty(info.shape, dtype=info.dtype, device="cpu"))
        else:
            dtype = torch.float32 if _matches(name, fp32) else torch.bfloat16
            param = made.get(first_of.get(name, name))  # of a name that is tied to this one
            if param is None or param.dtype != dtype:
                param = nn.Parameter(torch.empty(info.shape, dtype=dtype, device="cpu"))
            made.setdefault(first_of.get(name, name), param)
            holder.register_parameter(leaf, param)
    optimizer = AdamW_BF16(_like_groups(model, state), **{"lr": 1e-3, **hyperparameters})
    import_fp32(source, model, optimizer, state, progress)
    step = max((int(values["step"]) for values in optimizer.state.values()), default=0)
    return save(root, step, model, optimizer)


# ------------------------------------------------------------------------------------------------------------------ filling


def _fill_weight(tensor: Tensor, weights: Source, name: str) -> None:
    for block, local in local_blocks(tensor):
        x = weights.read(name, block)
        local.copy_(split(x.float())[0] if local.dtype == torch.bfloat16 else x)


def _fill_correction(tensor: Tensor, weights: Source, name: str) -> None:
    for block, local in local_blocks(tensor):
        local.copy_(split(weights.read(name, block).float())[1])


def _fill_state(tensor: Tensor, value: Any) -> None:
    for block, local in local_blocks(tensor):
        if value is None:
            local.zero_()
            continue
        x = block.of(as_tensor(value)).detach().float()
        local.copy_(round_moment(x) if local.dtype == torch.bfloat16 else x)


def _set_hyperparameters(live: dict[str, Any], group: dict[str, Any], step: int) -> None:
    for key in HYPERPARAMETERS:
        if key in group:
            if isinstance(live[key], Tensor):
                live[key].copy_(as_tensor(group[key]))  # a captured graph reads lr from this memory
            else:
                live[key] = float(group[key]) if isinstance(group[key], Tensor) else group[key]
    live["schedule_step"] = step
    if live["scheduled_lr"] is not None:
        live["scheduled_lr"] = live["lr"]


def _report(progress: Progress | None, tensor: Tensor) -> None:
    if progress is not None:
        progress(sum(local.nbytes for _, local in local_blocks(tensor)))


# ----------------------------------------------------------------------------------------------------------- names and checks


def _names_in_source(
    weights: Source, ties: list[list[str]], model_part: dict[str, Any], elsewhere: set[str]
) -> dict[str, str]:
    """Map each of the model's names to its name in the source; they differ only for tied parameters.

    Raises:
        ValueError: they do not fit. ``elsewhere`` are names that only other ranks have.
    """
    names = {name: name for name in model_part}
    problems = []
    for tied in ties:
        own = [name for name in tied if name in model_part]
        present = [name for name in own if name in weights.infos]
        names.update({name: present[0] for name in own if present})
        problems += [
            f"{present[0]} and {other} are one tensor here but differ there"
            for other in present[1:]
            if not _same_block(weights, present[0], other, model_part[own[0]])
        ]
    for name, tensor in model_part.items():
        info = weights.infos.get(names[name])
        if not isinstance(tensor, Tensor):
            continue
        if info is None:
            problems.append(f"it has no {name}")
        elif info.shape != tuple(tensor.shape):
            problems.append(f"{name} has shape {info.shape} there but {tuple(tensor.shape)} here")
        elif is_wrapper(tensor):
            problems.append(
                f"{name} is a {type(tensor).__name__} here, into which nothing can be imported; quantise it afterwards"
            )
        elif info.dtype != tensor.dtype and not (
            info.dtype.is_floating_point and tensor.dtype.is_floating_point
        ):
            problems.append(f"{name} is {info.dtype} there but {tensor.dtype} here")
    problems += [
        f"it has {name}, which is not here"
        for name in weights.infos
        if name not in model_part and name not in elsewhere
    ]
    _raise("the weights to import are of another model", problems)
    return names


def _same_block(weights: Source, first: str, other: str, tensor: Tensor) -> bool:
    """Return whether this rank's part of a tensor is the same under two names."""
    fits = weights.infos[first].shape == tuple(tensor.shape)  # else that is what is wrong
    return weights.infos[first] == weights.infos[other] and all(
        not fits or same_bits(weights.read(first, block), weights.read(other, block))
        for block, _ in local_blocks(tensor)
    )


def _with_ties(
    state_dict: dict[str, Any], here: list[list[str]], there: list[list[str]], known: set[str]
) -> dict[str, Any]:
    """File the states of tied parameters under the names that the model, whose parameters are ``known``, has them by.

    Raises:
        ValueError: names that are one tensor here have different states.
    """
    states: dict[str, Any] = dict(state_dict["state"])
    groups = [set(group["params"]) for group in state_dict["param_groups"]]
    for tied in there:  # one state for all of them
        holder = next((name for name in tied if name in states), None)
        for name in known.intersection(tied):
            if holder is None:
                break
            states.setdefault(name, states[holder])
            for group in groups:
                group.update([name] if holder in group else [])
    for first, *others in here:
        for name in [name for name in others if name in states]:
            state = states.pop(name)
            if not _same_state(states.setdefault(first, state), state):
                raise ValueError(
                    f"{first} and {name} are one tensor here but have different states in the one to import"
                )
            for group in groups:
                group.update([first] if name in group else [])
                group.discard(name)
    renamed = [
        {**group, "params": sorted(names)}
        for group, names in zip(state_dict["param_groups"], groups, strict=True)
    ]
    return {"state": states, "param_groups": renamed}


def _same_state(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return a is b or all(
        same_bits(as_tensor(a[key]), as_tensor(b[key]))
        for key in ("step", *MOMENTS)
        if key in a and key in b
    )


def _by_name(
    state_dict: dict[str, Any], own: list[dict[str, Any]], rank_names: RankNames
) -> dict[str, Any]:
    """An optimizer's state dict keyed by parameter names, from one keyed by integers or by names."""
    if all(isinstance(key, str) for key in state_dict["state"]) and state_dict["state"]:
        return state_dict
    theirs = [group["params"] for group in state_dict["param_groups"]]
    if [len(params) for params in theirs] != [len(group["params"]) for group in own]:
        raise ValueError(
            f"the optimizer state to import has groups of {[len(params) for params in theirs]} parameters but this optimizer has "
            f"{[len(group['params']) for group in own]}; build it with the same groups, or export the state keyed by parameter names"
        )
    own = [_stored_group(group, rank_names) for group in own]
    name_of = {
        key: name
        for keys, group in zip(theirs, own, strict=True)
        for key, name in zip(keys, group["params"], strict=True)
    }
    unknown = [key for key in state_dict["state"] if key not in name_of]
    if unknown:
        raise ValueError(
            f"the optimizer state to import has a state of {unknown[0]}, which is in none of its groups"
        )
    groups = [
        {**group, "params": [name_of[key] for key in group["params"]]}
        for group in state_dict["param_groups"]
    ]
    return {
        "state": {name_of[key]: values for key, values in state_dict["state"].items()},
        "param_groups": groups,
    }


def _stored_group(group: dict[str, Any], rank_names: RankNames) -> dict[str, Any]:
    """Return a group with the names that its parameters have in files."""
    return {**group, "params": list(map(rank_names.stored, group["params"]))}


def _check_states(imported: dict[str, Any], own: dict[str, Any]) -> None:
    problems = [
        f"it has a state of {fqn}, which is no parameter here" for fqn in imported if fqn not in own
    ]
    for fqn in imported.keys() & own.keys():
        for kind in ("step", *MOMENTS):
            value = imported[fqn].get(kind)
            expected = () if kind == "step" else tuple(own[fqn][kind].shape)
            if value is None:
                problems.append(f"it has no {kind} of {fqn}")
            elif tuple(as_tensor(value).shape) != expected:
                problems.append(
                    f"{kind} of {fqn} has shape {tuple(as_tensor(value).shape)} there but {expected} here"
                )
    _raise("the optimizer state to import is of another model, or not of AdamW", problems)


def _raise(what: str, problems: list[str]) -> None:
    if problems:
        raise ValueError(
            f"{what}: {join_problems(problems)}; build the model and optimizer as they were"
        )


def _matching_groups(
    own: list[dict[str, Any]], theirs: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """For each own group the imported one that it takes its hyper-parameters from."""
    matches = match_groups(
        [group["params"] for group in own], [group["params"] for group in theirs]
    )
    for group, match in zip(own, matches, strict=True):
        if group["params"] and match is None:
            names = ", ".join(group["params"][:3])
            raise ValueError(
                f"no group of the optimizer state to import has all of {names}...; build the same groups"
            )
    return [{} if match is None else theirs[match] for match in matches]


def _steps(state: dict[str, Any], names: list[str]) -> int:
    return max((int(state[name]["step"]) for name in names if name in state), default=0)


def _checked_patterns(argument: str, patterns: Iterable[str], weights: Source) -> list[str]:
    if isinstance(patterns, str):
        raise ValueError(
            f"{argument} must be a list of patterns, but it is the string {patterns!r}; write [{patterns!r}]"
        )
    patterns = list(patterns)
    for pattern in patterns:
        if not any(_matches(name, [pattern]) for name in weights.infos):
            raise ValueError(
                f"{argument}: the pattern {pattern!r} matches none of the names, which are such as {', '.join([*weights.infos][:2])}"
            )
    return patterns


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _like_groups(model: nn.Module, state: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The model's parameters in groups as the optimizer state has them; one that it does not name stands with the first group."""
    named = dict(model.named_parameters())
    if state is None or not all(
        isinstance(name, str) for group in state["param_groups"] for name in group["params"]
    ):
        sizes = (
            [len(named)]
            if state is None
            else [len(group["params"]) for group in state["param_groups"]]
        )
        if state is not None and sum(sizes) != len(named):
            raise ValueError(
                f"the optimizer state is of {sum(sizes)} parameters but the weights have {len(named)}; name the buffers among them"
            )
        remaining = iter(named.values())
        return [{"params": [next(remaining) for _ in range(size)]} for size in sizes]
    groups = [
        {"params": [named.pop(name) for name in group["params"] if name in named]}
        for group in state["param_groups"]
    ]
    groups[0]["params"] += named.values()
    return groups
