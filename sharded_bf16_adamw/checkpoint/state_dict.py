"""The tensors and plain values of model and optimizer that go to disk, by key.

Keys: ``model.<fqn>``, ``optimizer.state.<fqn>.exp_avg`` and ``rng.<rank>.cpu`` (see
:func:`get_rng_state`).
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

from ..names import clean_fqn, has_fsdp1, named_tensors, unwrap
from ..sharding.dtensor import to_local
from ..sharding.model_parallel import ModelParallel
from ..sharding.zero.config import ZeRO
from .extra_state import (
    ENTRY,
    MODEL,
    PART,
    STATE,
    drop_subclass,
    entry_key,
    flatten_subclass,
    is_extra_state,
    is_wrapper_subclass,
    set_extra_states,
)
from .manifest import ParamGroup
from .object_collectives import Group, rank
from .optimizer_state import non_param_entries, ungrouped_params
from .rank_names import RankNames
from .torch_state_dict import (
    set_sharded_model_state,
    set_sharded_optimizer_state,
    sharded_model_state,
    sharded_optimizer_state,
)

# ------------------------------------------------------------------------- model and optimizer


@dataclass
class CheckpointState:
    """The part of a checkpoint that this rank saves or loads.

    Attributes:
        tensors: by key; full tensors, or the DTensor or ShardedTensor that holds this rank's shard.
        plain: other values, by key.
        groups: the optimizer's parameter groups. Their options are not in ``tensors``, even if one
            (``lr``) is a tensor.
    """

    tensors: dict[str, Any]
    plain: dict[str, Any]
    groups: list[ParamGroup]


def get_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, names: RankNames
) -> CheckpointState:
    """Return the state of model and optimizer. Create optimizer states if there are none at all.

    The tensors are live. Under FSDP1 they are copies, and the call is collective. Keys contain
    checkpoint names, to which ``names`` maps the FQNs.
    """
    own = {clean_fqn(model, name): tensor for name, tensor in named_tensors(unwrap(model))}
    tensors: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    for name, value in sharded_model_state(model).items():
        live = own[name] if is_wrapper_subclass(value) and name in own else value
        _split(flatten_subclass(MODEL + names.to_saved(name), live), tensors, plain)
    optimizer_part = get_optimizer_state(model, optimizer, names, ungrouped=True)
    for name, entry in non_param_entries(optimizer).items():
        plain[entry_key(name, entry)] = entry
    return CheckpointState(
        {**tensors, **optimizer_part.tensors},
        {**plain, **optimizer_part.plain},
        optimizer_part.groups,
    )


def get_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, names: RankNames, ungrouped: bool = False
) -> CheckpointState:
    """Return the optimizer's part of :func:`get_state`, without entries that have no parameter.

    For ``ungrouped`` see :func:`.torch_state_dict.sharded_optimizer_state`.
    """
    state_dict = sharded_optimizer_state(model, optimizer, ungrouped)
    tensors: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    for fqn, state in state_dict["state"].items():
        flat = _flatten(f"{STATE}{names.to_saved(fqn)}", state)
        _split({key: drop_subclass(value) for key, value in flat.items()}, tensors, plain)
    groups = [
        ParamGroup(list(map(names.to_saved, group.pop("params"))), group)
        for group in state_dict["param_groups"]
    ]
    return CheckpointState(tensors, plain, groups)


def _split(values: dict[str, Any], tensors: dict[str, Any], plain: dict[str, Any]) -> None:
    """Add values to ``tensors`` or to ``plain``."""
    for key, value in values.items():
        (tensors if isinstance(value, (Tensor, ShardedTensor)) else plain)[key] = value


def set_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: CheckpointState, names: RankNames
) -> None:
    """Inverse of :func:`get_state`. Live tensors already hold the loaded values."""
    flat = {
        _with_fqn(key, names.to_fqn): value
        for key, value in {**state.tensors, **state.plain}.items()
    }
    own = _section(MODEL, flat)
    if _are_live(model, optimizer, state):
        set_extra_states(
            model, {name: value for name, value in own.items() if is_extra_state(name)}
        )
        _set_options(optimizer, state.groups)
    else:
        set_sharded_model_state(
            model, {name: value for name, value in own.items() if PART not in name}
        )
        groups = [
            {"params": list(map(names.to_fqn, params)), **options}
            for params, options in state.groups
        ]
        known = {*own, *chain(*(group["params"] for group in groups))}
        set_sharded_optimizer_state(
            model,
            optimizer,
            {"state": _unflatten(_section(STATE, flat), known), "param_groups": groups},
            ungrouped=True,
        )
    entries: dict[Any, Any] = optimizer.state
    entries.update(_section(ENTRY, state.plain))


def _are_live(model: nn.Module, optimizer: torch.optim.Optimizer, state: CheckpointState) -> bool:
    """Return True if the tensors of ``state`` are exactly those of the model and the optimizer.

    Under FSDP1 they are always copies.
    """
    if any(key.startswith(STATE) for key in state.plain) or has_fsdp1(model):
        return False
    params = [
        param for group in optimizer.param_groups for param in group["params"]
    ] + ungrouped_params(model, optimizer)
    states = [value for param in params for value in optimizer.state.get(param, {}).values()]
    of_model = {
        _address(part)
        for tensor in chain(model.parameters(), model.buffers())
        for part in flatten_subclass("", tensor).values()
    }
    given = [_address(value) for key, value in state.tensors.items() if key.startswith(STATE)]
    return (
        all(
            _address(value) in of_model
            for key, value in state.tensors.items()
            if key.startswith(MODEL) and not is_extra_state(key)
        )
        and set(given) == {_address(value) for value in states}
        and len(states) == len(given)
    )


def _address(value: Any) -> tuple[int, int]:
    """Return address and numel of this rank's shard, ``(0, 0)`` if it is empty."""
    local = to_local(value) if isinstance(value, Tensor) else torch.empty(0, device="cpu")
    return (local.data_ptr(), local.numel()) if local.numel() else (0, 0)


def _set_options(optimizer: torch.optim.Optimizer, groups: list[ParamGroup]) -> None:
    """Load groups by ``load_state_dict()``, so that its hooks run, and keep the states."""
    states = dict(optimizer.state)
    indices = iter(range(sum(len(group["params"]) for group in optimizer.param_groups)))
    loaded = [
        {**saved.options, "params": [next(indices) for _ in group["params"]]}
        for saved, group in zip(groups, optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": {}, "param_groups": loaded})
    optimizer.state.update(states)


def with_stages(state: CheckpointState, names: RankNames) -> CheckpointState:
    """Return ``state`` with the stage appended to the names that are marked in ``names``."""

    def rename(values: dict[str, Any]) -> dict[str, Any]:
        return {_with_fqn(key, names.with_stage): value for key, value in values.items()}

    groups = [
        ParamGroup(list(map(names.with_stage, group.params)), group.options)
        for group in state.groups
    ]
    return CheckpointState(rename(state.tensors), rename(state.plain), groups)


def merge_param_groups(groups_of_ranks: list[list[ParamGroup]]) -> list[ParamGroup]:
    """Merge the groups of all ranks, each parameter once.

    Groups at the same index with the same options become one. Of the empty groups, only rank 0's
    are kept.
    """
    result: list[ParamGroup] = []
    indices: list[int] = []
    seen: set[str] = set()
    for rank_, groups in enumerate(groups_of_ranks):
        for index, (params, options) in enumerate(groups):
            new = [fqn for fqn in params if fqn not in seen]
            seen.update(new)
            same = (
                group
                for group, other in zip(result, indices, strict=True)
                if other == index and group.options == options
            )
            known = next(same, None)
            if known is not None:
                known.params.extend(new)
            elif new or (rank_ == 0 and not params):
                result.append(ParamGroup(new, options))
                indices.append(index)
    return result


# ---------------------------------------------------------------------------------- random state


def get_rng_state(group: Group = None, every_device: bool = False) -> dict[str, Tensor]:
    """Return torch's random state on this rank.

    Keys: ``rng.<rank>.cpu``; ``rng.<rank>.cuda`` of the current GPU, whichever index it has after a
    restart; and, if the process uses several GPUs, ``rng.<rank>.cuda.<index>`` of each.

    Args:
        group: process group that numbers the ranks.
        every_device: include all visible GPUs, as targets of a load, instead of the GPUs that the
            process uses.
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


def set_rng_state(state: dict[str, Tensor]) -> None:
    """Inverse of :func:`get_rng_state`."""
    # sorted: a state with a GPU's index comes later and overwrites that of the current GPU
    for key in sorted(state):
        kind, _, index = key.split(".", 2)[2].partition(".")
        if kind == "cpu":
            torch.set_rng_state(state[key])
        else:
            torch.cuda.set_rng_state(state[key], int(index) if index else "cuda")


def _is_used(gpu: int) -> bool:
    """Return True if this process has a context on the GPU, as drawing random numbers needs."""
    return torch._C._cuda_hasPrimaryContext(gpu)  # type: ignore[attr-defined]


# -------------------------------------------------------------------------------------- strategy


def describe_strategy(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Return a description of the model's sharding, for people to read.

    For example ``"fully_shard, mesh (2, 2) ('data', 'tensor') (Shard(0), Shard(1))"``.
    """
    words = []
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            words.append("DistributedDataParallel")
        elif isinstance(module, FullyShardedDataParallel):
            words.append(
                f"FullyShardedDataParallel {module.sharding_strategy.name} "
                f"use_orig_params={module._use_orig_params}"
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
        groups = {name: parallel.group(name) for name in ("pp", "ep")}
        words += [f"{name} {dist.get_world_size(group)}" for name, group in groups.items() if group]
    if isinstance(policy, ZeRO):
        words += [f"ZeRO stage {policy.stage}", _describe_mesh(policy.mesh)]
    return ", ".join(dict.fromkeys(words)) or "not sharded"


def _describe_mesh(mesh: DeviceMesh) -> str:
    return f"mesh {tuple(mesh.shape)} {mesh.mesh_dim_names or ''}".rstrip()


# ------------------------------------------------------------------------------------------ keys


def split_state_key(key: str) -> tuple[str, str]:
    """Split ``optimizer.state.layer.weight.exp_avg`` into ``("layer.weight", "exp_avg")``."""
    fqn, _, name = key.removeprefix(STATE).rpartition(".")
    return fqn, name


def param_of_state(key: str) -> str | None:
    """Return ``<fqn>`` of ``optimizer.state.<fqn>.exp_avg``, None for other keys."""
    return split_state_key(key)[0] if key.startswith(STATE) else None


def fqn_of(key: str) -> str:
    """Return ``<fqn>`` of ``model.<fqn>``, ``model.<fqn>:scale`` or ``optimizer.state.<fqn>.x``."""
    return param_of_state(key) or key.removeprefix(MODEL).partition(PART)[0]


def _with_fqn(key: str, rename: Callable[[str], str]) -> str:
    """Rename the FQN in a key: ``model.a`` -> ``model.<rename(a)>``."""
    fqn = param_of_state(key)
    if fqn is None:
        name, *parts = key.removeprefix(MODEL).split(PART)
        return PART.join([MODEL + rename(name), *parts]) if key.startswith(MODEL) else key
    return f"{STATE}{rename(fqn)}{key.removeprefix(STATE + fqn)}"


def _section(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    """Return the values whose keys have a prefix, without the prefix."""
    return {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }


def _flatten(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    """Flatten: ``{"a": {"b": 1}}`` becomes ``{"<prefix>.a.b": 1}``."""
    result = {}
    for key, value in state.items():
        name = f"{prefix}.{key}"
        result.update(_flatten(name, value) if isinstance(value, dict) else {name: value})
    return result


def _unflatten(flat: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """Inverse of :func:`_flatten` for states of parameters; ``known`` FQNs may contain dots."""
    result: dict[str, Any] = {}
    for key, value in flat.items():
        segments = key.split(".")
        split = next(i for i in range(len(segments) - 1, 0, -1) if ".".join(segments[:i]) in known)
        place = result.setdefault(".".join(segments[:split]), {})
        for segment in segments[split:-1]:
            place = place.setdefault(segment, {})
        place[segments[-1]] = value
    return result
