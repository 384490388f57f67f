"""What of a model and an optimizer goes to disk, by key: tensors, and plain data beside them.

Keys: ``model.<fqn>``, ``optimizer.state.<fqn>.exp_avg`` and ``rng.<rank>.cpu``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ..sharding.local import to_local
from .agreement import rank
from .manifest import ParamGroup

MODEL, OPTIMIZER, STATE, GROUPS = "model.", "optimizer.", "optimizer.state.", "optimizer.param_groups."
_ORDER = {"step": 0, "exp_avg": 1, "exp_avg_sq": 2, "correction": 3}
FLATTENED = StateDictOptions(flatten_optimizer_state_dict=True)  # the form that reshards between every pair of strategies


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


def model_contents(model: nn.Module) -> dict[str, Any]:
    """The model's part; the tensors are the live ones where they are not FSDP1's."""
    with _quiet():
        return _prefixed(MODEL, get_model_state_dict(model))


def contents(model: nn.Module, optimizer: torch.optim.Optimizer) -> Contents:
    """The parts of model and optimizer, which gets its states if it has none at all. Collective under FSDP1."""
    values = model_contents(model)  # first: it reshards what an evaluation left gathered, which the optimizer's part relies on
    if not optimizer.state:
        init_state(optimizer)
    with _quiet():
        state_dict: dict[str, Any] = get_optimizer_state_dict(model, optimizer)
    for fqn, state in state_dict["state"].items():
        values.update(_flat(f"{STATE}{fqn}", state))
    tensors = {key: value for key, value in values.items() if isinstance(value, (Tensor, ShardedTensor))}
    plain = {key: value for key, value in values.items() if key not in tensors}
    groups = [ParamGroup(list(group.pop("params")), group) for group in state_dict["param_groups"]]
    return Contents(tensors, plain, groups)


def set_contents(model: nn.Module, optimizer: torch.optim.Optimizer, values: Contents) -> None:
    """Inverse of :func:`contents`. Tensors that are the model's and optimizer's own are there already."""
    if _are_live(model, optimizer, values):
        _set_options(optimizer, values.groups)
        return
    groups = {f"{GROUPS}{fqn}.{name}": value for group in values.groups for fqn in group.params for name, value in group.options.items()}
    flat = {**values.tensors, **values.plain, **groups}
    _put_in_one_order(optimizer)
    with _quiet():
        set_model_state_dict(model, _section(MODEL, flat))
        set_optimizer_state_dict(model, optimizer, _section(OPTIMIZER, flat), options=FLATTENED)
    _put_in_one_order(optimizer)


def _are_live(model: nn.Module, optimizer: torch.optim.Optimizer, values: Contents) -> bool:
    """Whether all values are tensors in the memory of the model and optimizer, of which each has as many; not so under FSDP1."""
    if values.plain or any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return False
    states = [value for state in optimizer.state.values() for value in state.values()]
    of_model = {_address(value) for value in chain(model.parameters(), model.buffers())}
    given = {_address(value) for key, value in values.tensors.items() if key.startswith(STATE)}
    return (
        all(_address(value) in of_model for key, value in values.tensors.items() if key.startswith(MODEL))
        and given == {_address(value) for value in states}
        and len(states) == sum(key.startswith(STATE) for key in values.tensors)
    )


def _address(value: Any) -> tuple[int, int]:
    """Where this rank's part of a tensor lies; nothing distinguishes empty ones."""
    local = to_local(value) if isinstance(value, Tensor) else torch.empty(0)
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


def _put_in_one_order(optimizer: torch.optim.Optimizer) -> None:
    """Sort the states of each parameter as an optimizer makes them.

    torch's FSDP1 code gathers them one after the other in the order of each rank's own dict, and builds those dicts in the order of a
    set, which differs between ranks: one moment would end up in the place of another.
    """
    for state in optimizer.state.values():
        ordered = sorted(state.items(), key=lambda item: (_ORDER.get(item[0], len(_ORDER)), str(item[0])))
        state.clear()
        state.update(ordered)


def init_state(optimizer: torch.optim.Optimizer) -> None:
    """Let ours make its state at step 0; for others torch takes a step with zero gradients, which counts."""
    make = getattr(optimizer, "init_state", None)
    if make is not None:
        make()


def rng_contents() -> dict[str, Tensor]:
    """torch's random state on this rank."""
    state = {f"rng.{rank()}.cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state[f"rng.{rank()}.cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_contents(state: dict[str, Tensor]) -> None:
    """Inverse of :func:`rng_contents`."""
    for key, value in state.items():
        (torch.cuda.set_rng_state if key.endswith(".cuda") else torch.set_rng_state)(value)


def param_of_state(key: str) -> str | None:
    """``optimizer.state.<fqn>.exp_avg`` -> ``<fqn>``; None for other keys."""
    return key.removeprefix(STATE).rpartition(".")[0] if key.startswith(STATE) else None


def describe_strategy(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """How the model is sharded, in words for people: ``"fully_shard, mesh (2, 2) ('data', 'tensor') (Shard(0), Shard(1))"``."""
    words = []
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            words.append("DistributedDataParallel")
        elif isinstance(module, FullyShardedDataParallel):
            words.append(f"FullyShardedDataParallel {module.sharding_strategy.name} use_orig_params={module._use_orig_params}")
        elif isinstance(module, FSDPModule):
            words.append("fully_shard")
    for param in model.parameters():
        if isinstance(param, DTensor):
            mesh = param.device_mesh
            words.append(f"mesh {tuple(mesh.shape)} {mesh.mesh_dim_names or ''} {param.placements}".replace("  ", " "))
    sharding = getattr(optimizer, "sharding", None)
    words += [] if sharding is None else [type(sharding).__name__]
    return ", ".join(dict.fromkeys(words)) or "not sharded"


def _prefixed(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {prefix + key: value for key, value in state.items()}


def _section(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    """Inverse of :func:`_prefixed`, of the keys that have the prefix."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _flat(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"<prefix>.a.b": 1}``."""
    result = {}
    for key, value in state.items():
        result.update(_flat(f"{prefix}.{key}", value) if isinstance(value, dict) else {f"{prefix}.{key}": value})
    return result


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that torch's FSDP1 gives of its own functions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message=".*_get_pg_default_device|Multiple backends are registered with this ProcessGroup")
        yield
