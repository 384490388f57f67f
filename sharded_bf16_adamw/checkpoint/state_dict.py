"""What of a model and an optimizer goes to disk, by key: tensors, and plain data beside them.

Keys: ``model.<fqn>``, ``optimizer.state.<fqn>.exp_avg`` and ``rng.<rank>.cpu`` (see :func:`rng_contents`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ..sharding.dtensor import to_local
from ..sharding.model_parallel import ModelParallel
from ..sharding.zero.config import ZeRO
from .manifest import ParamGroup
from .names import named_tensors, clean_fqn, unwrap
from .extra_state import (
    ENTRY,
    MODEL,
    PART,
    entry_key,
    is_extra_state,
    is_wrapper_subclass,
    flatten_subclass,
    set_extra_states,
    drop_subclass,
)
from .rank_errors import Group, rank
from .rank_names import RankNames
from .torch_state import (
    has_fsdp1,
    other_entries,
    removed_params,
    set_sharded_model_state,
    set_sharded_optimizer_state,
    sharded_model_state,
    sharded_optimizer_state,
)

STATE = "optimizer.state."


@dataclass
class Contents:
    """Of a model and an optimizer.

    Attributes:
        tensors: by key; whole, or a DTensor or ShardedTensor of which this rank holds a part.
        plain: other values, by key.
        groups: the optimizer's parameter groups, whose options do not count as tensors even where one (``lr``) is.
    """

    tensors: dict[str, Any]
    plain: dict[str, Any]
    groups: list[ParamGroup]


def contents(model: nn.Module, optimizer: torch.optim.Optimizer, names: RankNames) -> Contents:
    """Return the parts of model and optimizer, which gets its states if it has none at all: the live tensors, except under FSDP1,
    where it is collective. Keys hold the names that ``names`` gives."""
    own = {clean_fqn(model, name): tensor for name, tensor in named_tensors(unwrap(model))}
    model_part: dict[str, Any] = {}
    for name, value in sharded_model_state(model).items():
        model_part.update(
            flatten_subclass(
                MODEL + names.to_saved(name),
                own[name] if is_wrapper_subclass(value) and name in own else value,
            )
        )
    optimizer_part = optimizer_contents(model, optimizer, names, removed=True)
    tensors = {key: value for key, value in model_part.items() if _is_tensor(value)}
    plain = {key: value for key, value in model_part.items() if key not in tensors}
    plain.update(
        {entry_key(name, entry): entry for name, entry in other_entries(optimizer).items()}
    )
    return Contents(
        {**tensors, **optimizer_part.tensors},
        {**plain, **optimizer_part.plain},
        optimizer_part.groups,
    )


def optimizer_contents(
    model: nn.Module, optimizer: torch.optim.Optimizer, names: RankNames, removed: bool = False
) -> Contents:
    """Return the optimizer's part of :func:`contents`, without entries of no parameter; ``removed`` as for
    :func:`.torch_state.sharded_optimizer_state`."""
    state_dict = sharded_optimizer_state(model, optimizer, removed)
    values: dict[str, Any] = {}
    for fqn, state in state_dict["state"].items():
        flat = _flat(f"{STATE}{names.to_saved(fqn)}", state)
        values.update({key: drop_subclass(value) for key, value in flat.items()})
    tensors = {key: value for key, value in values.items() if _is_tensor(value)}
    plain = {key: value for key, value in values.items() if key not in tensors}
    groups = [
        ParamGroup(list(map(names.to_saved, group.pop("params"))), group)
        for group in state_dict["param_groups"]
    ]
    return Contents(tensors, plain, groups)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, (Tensor, ShardedTensor))


def with_stages(found: Contents, names: RankNames) -> Contents:
    """Return the same with the names that :meth:`RankNames.mark_stage_names` has changed since."""

    def renamed(values: dict[str, Any]) -> dict[str, Any]:
        return {_with_fqn(key, names.with_stage): value for key, value in values.items()}

    groups = [
        ParamGroup(list(map(names.with_stage, group.params)), group.options) for group in found.groups
    ]
    return Contents(renamed(found.tensors), renamed(found.plain), groups)


def merged(groups_of_ranks: list[list[ParamGroup]]) -> list[ParamGroup]:
    """Merge the groups of all ranks, each parameter once: groups at the same place with the same options become one. Those
    without parameters are rank 0's."""
    result: list[ParamGroup] = []
    places: list[int] = []
    seen: set[str] = set()
    for holder, groups in enumerate(groups_of_ranks):
        for place, (params, options) in enumerate(groups):
            new = [fqn for fqn in params if fqn not in seen]
            seen.update(new)
            known = next(
                (
                    group
                    for group, at in zip(result, places, strict=True)
                    if at == place and group.options == options
                ),
                None,
            )
            if known is not None:
                known.params.extend(new)
            elif new or (holder == 0 and not params):
                result.append(ParamGroup(new, options))
                places.append(place)
    return result


def set_contents(
    model: nn.Module, optimizer: torch.optim.Optimizer, values: Contents, names: RankNames
) -> None:
    """Inverse of :func:`contents`. Tensors that are the model's and optimizer's own are there already."""
    flat = {
        _with_fqn(key, names.to_local): value
        for key, value in {**values.tensors, **values.plain}.items()
    }
    own = _section(MODEL, flat)
    if _are_live(model, optimizer, values):
        set_extra_states(
            model, {name: value for name, value in own.items() if is_extra_state(name)}
        )
        _set_options(optimizer, values.groups)
    else:
        set_sharded_model_state(
            model, {name: value for name, value in own.items() if PART not in name}
        )
        groups = [
            {"params": list(map(names.to_local, params)), **options}
            for params, options in values.groups
        ]
        state = _nested(
            _section(STATE, flat), {*own, *chain(*(group["params"] for group in groups))}
        )
        set_sharded_optimizer_state(
            model, optimizer, {"state": state, "param_groups": groups}, removed=True
        )
        for live, group in zip(optimizer.param_groups, values.groups, strict=True):
            for name, value in group.options.items():
                live.setdefault(name, value)  # of the options torch loads those that are here
    entries: dict[Any, Any] = optimizer.state
    entries.update(_section(ENTRY, values.plain))


def _are_live(model: nn.Module, optimizer: torch.optim.Optimizer, values: Contents) -> bool:
    """Whether all values are tensors in the memory of the model and optimizer, of which each has as many; not so under FSDP1."""
    if any(key.startswith(STATE) for key in values.plain) or has_fsdp1(model):
        return False
    params = [
        param for group in optimizer.param_groups for param in group["params"]
    ] + removed_params(model, optimizer)
    states = [value for param in params for value in optimizer.state.get(param, {}).values()]
    of_model = {
        _address(part)
        for tensor in chain(model.parameters(), model.buffers())
        for part in flatten_subclass("", tensor).values()
    }
    given = {_address(value) for key, value in values.tensors.items() if key.startswith(STATE)}
    return (
        all(
            _address(value) in of_model
            for key, value in values.tensors.items()
            if key.startswith(MODEL) and not is_extra_state(key)
        )
        and given == {_address(value) for value in states}
        and len(states) == sum(key.startswith(STATE) for key in values.tensors)
    )


def _address(value: Any) -> tuple[int, int]:
    """Where this rank's part of a tensor lies; nothing distinguishes empty ones."""
    local = to_local(value) if isinstance(value, Tensor) else torch.empty(0, device="cpu")
    return (local.data_ptr(), local.numel()) if local.numel() else (0, 0)


def _set_options(optimizer: torch.optim.Optimizer, groups: list[ParamGroup]) -> None:
    """Load groups as the optimizer loads a state dict, with its checks and hooks, but leave the states where they are."""
    states = dict(optimizer.state)
    places = iter(range(sum(len(group["params"]) for group in optimizer.param_groups)))
    loaded = [
        {**here.options, "params": [next(places) for _ in group["params"]]}
        for here, group in zip(groups, optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": {}, "param_groups": loaded})
    optimizer.state.update(states)


def rng_contents(group: Group = None, every_device: bool = False) -> dict[str, Tensor]:
    """Return torch's random state on this rank.

    Keys: ``rng.<rank>.cpu``; ``rng.<rank>.cuda`` of the current GPU, whichever index it has after a restart; and, where the
    process uses several GPUs, ``rng.<rank>.cuda.<index>`` of each.

    Args:
        group: in which ranks are counted.
        every_device: all GPUs that the process sees, to load whatever a checkpoint has; else those that it uses.
    """
    state = {f"rng.{rank(group)}.cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state[f"rng.{rank(group)}.cuda"] = torch.cuda.get_rng_state()
        gpus = [gpu for gpu in range(torch.cuda.device_count()) if every_device or _is_used(gpu)]
        if len(gpus) > 1:
            state.update(
                {f"rng.{rank(group)}.cuda.{gpu}": torch.cuda.get_rng_state(gpu) for gpu in gpus}
            )
    return state


def set_rng_contents(state: dict[str, Tensor]) -> None:
    """Inverse of :func:`rng_contents`."""
    for key in sorted(
        state
    ):  # the current GPU's before those by index, which know better where both are there
        kind, _, index = key.split(".", 2)[2].partition(".")
        if kind == "cpu":
            torch.set_rng_state(state[key])
        else:
            torch.cuda.set_rng_state(state[key], int(index) if index else "cuda")


def _is_used(gpu: int) -> bool:
    """Return whether this process has a context on the GPU, without which nothing has drawn random numbers there."""
    return torch._C._cuda_hasPrimaryContext(gpu)  # type: ignore[attr-defined]


def param_of_state(key: str) -> str | None:
    """``optimizer.state.<fqn>.exp_avg`` -> ``<fqn>``; None for other keys."""
    return key.removeprefix(STATE).rpartition(".")[0] if key.startswith(STATE) else None


def fqn_of(key: str) -> str:
    """``model.<fqn>``, ``model.<fqn>:scale`` and ``optimizer.state.<fqn>.exp_avg`` -> ``<fqn>``."""
    return param_of_state(key) or key.removeprefix(MODEL).partition(PART)[0]


def _with_fqn(key: str, rename: Callable[[str], str]) -> str:
    """Return the key of another name: ``model.a`` or ``optimizer.state.a.step`` -> ``model.<rename(a)>``..."""
    fqn = param_of_state(key)
    if fqn is None:
        name, *parts = key.removeprefix(MODEL).split(PART)
        return PART.join([MODEL + rename(name), *parts]) if key.startswith(MODEL) else key
    return f"{STATE}{rename(fqn)}{key.removeprefix(STATE + fqn)}"


def describe_strategy(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """How the model is sharded, in words for people: ``"fully_shard, mesh (2, 2) ('data', 'tensor') (Shard(0), Shard(1))"``."""
    words = []
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            words.append("DistributedDataParallel")
        elif isinstance(module, FullyShardedDataParallel):
            words.append(
                f"FullyShardedDataParallel {module.sharding_strategy.name} use_orig_params={module._use_orig_params}"
            )
        elif isinstance(module, FSDPModule):
            words.append("fully_shard")
    for param in model.parameters():
        if isinstance(param, DTensor):
            words.append(f"{_describe_mesh(param.device_mesh)} {param.placements}")
    sharding = getattr(optimizer, "_sharding", None)
    policy = getattr(getattr(sharding, "dense", sharding), "_policy", None)
    parallel = getattr(optimizer, "model_parallel", None)
    if isinstance(parallel, ModelParallel):
        words += [
            f"{name} {dist.get_world_size(group)}"
            for name, group in (("pp", parallel.pp_group), ("ep", parallel.ep_group))
            if group
        ]
    words += (
        [f"ZeRO stage {policy.stage}", _describe_mesh(policy.mesh)]
        if isinstance(policy, ZeRO)
        else []
    )
    return ", ".join(dict.fromkeys(words)) or "not sharded"


def _describe_mesh(mesh: DeviceMesh) -> str:
    return f"mesh {tuple(mesh.shape)} {mesh.mesh_dim_names or ''}".rstrip()


def _section(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    """The values whose keys have a prefix, without it."""
    return {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }


def _flat(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"<prefix>.a.b": 1}``."""
    result = {}
    for key, value in state.items():
        result.update(
            _flat(f"{prefix}.{key}", value)
            if isinstance(value, dict)
            else {f"{prefix}.{key}": value}
        )
    return result


def _nested(flat: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """Inverse of :func:`_flat` for the states of parameters whose names are ``known``: names have dots too."""
    result: dict[str, Any] = {}
    for key, value in flat.items():
        segments = key.split(".")
        split = next(i for i in range(len(segments) - 1, 0, -1) if ".".join(segments[:i]) in known)
        place = result.setdefault(".".join(segments[:split]), {})
        for segment in segments[split:-1]:
            place = place.setdefault(segment, {})
        place[segments[-1]] = value
    return result
