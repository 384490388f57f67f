"""State dicts of model and optimizer from torch's own functions: by FQN, with sharded tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    ShardingStrategy,
    StateDictType,
)

from ..names import clean_fqn, has_fsdp1, named_tensors, state_dict_key, unwrap
from ..state import hide_ungrouped_states
from .extra_state import is_wrapper_subclass
from .optimizer_state import init_state, non_param_entries, ungrouped_params

_HYBRID = (ShardingStrategy.HYBRID_SHARD, ShardingStrategy._HYBRID_SHARD_ZERO2)
_ORDER = {"step": 0, "exp_avg": 1, "exp_avg_sq": 2, "correction": 3}


def sharded_model_state(model: nn.Module) -> dict[str, Any]:
    """Return the model's tensors by FQN.

    The tensors are live. Under FSDP1 they are copies, and the call is collective.
    """
    model = unwrap(model)
    with _sharded_by_fsdp1(model):
        return {clean_fqn(model, key): value for key, value in model.state_dict().items()}


def set_sharded_model_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Inverse of :func:`sharded_model_state` for copies. Wrapper subclasses may be missing."""
    model = unwrap(model)
    with _sharded_by_fsdp1(model):
        result = model.load_state_dict(
            {state_dict_key(model, name): value for name, value in state.items()}, strict=False
        )
    own = {clean_fqn(model, name): tensor for name, tensor in named_tensors(model)}
    missing = [
        key
        for key in result.missing_keys
        if not is_wrapper_subclass(own.get(clean_fqn(model, key)))
    ]
    assert not missing and not result.unexpected_keys, (missing, result.unexpected_keys)


def sharded_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, ungrouped: bool = False
) -> dict[str, Any]:
    """Return the optimizer's state dict by FQN. Create the states if there are none.

    The tensors are live. Under FSDP1 they are copies, and the call is collective.

    Args:
        model: the module, wrapped or not.
        optimizer: its optimizer.
        ungrouped: include states of model parameters that are in no group (frozen by removal from
            it), because the correction is still part of the weight.

    Returns:
        For example ``{"state": {"layer.weight": {"step": ..., "exp_avg": ...}},
        "param_groups": [{"params": ["layer.weight"], "lr": ...}]}``.
    """
    init_state(optimizer, only_if_empty=True)
    model = unwrap(model)
    with _named_states_only(model, optimizer, ungrouped) as num_groups:
        _sort_states(optimizer)
        state_dict = optimizer.state_dict()
        if has_fsdp1(model):
            with _sharded_by_fsdp1(model):
                state_dict = FullyShardedDataParallel.optim_state_dict(
                    model, optimizer, state_dict, group=_fsdp1_group(model)
                )
            result = _rename_params(state_dict, lambda name: clean_fqn(model, name))
        else:
            result = _rename_params(state_dict, _param_names(model, optimizer).__getitem__)
    result["param_groups"] = result["param_groups"][:num_groups]
    return result


def set_sharded_optimizer_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    ungrouped: bool = False,
) -> None:
    """Inverse of :func:`sharded_optimizer_state` for copies."""
    model = unwrap(model)
    with _named_states_only(model, optimizer, ungrouped) as num_groups:
        _sort_states(optimizer)
        names = [] if has_fsdp1(model) else _param_names(model, optimizer)
        for group in optimizer.param_groups[num_groups:]:
            in_groups = {name for group in state["param_groups"] for name in group["params"]}
            params = [name for name in names or state["state"] if name not in in_groups]
            state = {**state, "param_groups": [*state["param_groups"], {**group, "params": params}]}
        if has_fsdp1(model):
            state_dict = _rename_params(state, lambda name: state_dict_key(model, name))
            with _sharded_by_fsdp1(model):
                state_dict = FullyShardedDataParallel.optim_state_dict_to_load(
                    model, optimizer, state_dict, group=_fsdp1_group(model)
                )
        else:
            indices = {name: index for index, name in enumerate(names)}
            state_dict = _rename_params(state, indices.__getitem__)
        optimizer.load_state_dict(state_dict)
        _sort_states(optimizer)


def _param_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the first FQN of each parameter, in the order of groups."""
    names: dict[Any, str] = {}
    for name, param in named_tensors(model):
        names.setdefault(param, clean_fqn(model, name))
    return [names[param] for group in optimizer.param_groups for param in group["params"]]


def _rename_params(state_dict: dict[str, Any], rename: Callable[[Any], Any]) -> dict[str, Any]:
    """Return a copy of an optimizer's state dict with the parameters' keys renamed."""
    groups = [
        {**group, "params": [rename(key) for key in group["params"]]}
        for group in state_dict["param_groups"]
    ]
    return {
        "state": {rename(key): dict(state) for key, state in state_dict["state"].items()},
        "param_groups": groups,
    }


def _fsdp1_group(model: nn.Module) -> ProcessGroup | None:
    """Return the group over which FSDP1 gathers states, None for a hybrid sharding strategy."""
    module = FullyShardedDataParallel.fsdp_modules(model)[0]
    return None if module.sharding_strategy in _HYBRID else module.process_group


@contextmanager
def _sharded_by_fsdp1(model: nn.Module) -> Iterator[None]:
    """Make FSDP1's state dicts hold sharded tensors, and silence torch's warnings about itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings(
            "ignore", ".*_get_pg_default_device|Multiple backends are registered with this Process"
        )
        if not has_fsdp1(model):
            yield
            return
        configs = (
            ShardedStateDictConfig(offload_to_cpu=False),
            ShardedOptimStateDictConfig(offload_to_cpu=False),
        )
        with FullyShardedDataParallel.state_dict_type(
            model, StateDictType.SHARDED_STATE_DICT, *configs
        ):
            yield


@contextmanager
def _named_states_only(
    model: nn.Module, optimizer: torch.optim.Optimizer, ungrouped: bool
) -> Iterator[int]:
    """Hide states of tensors in no group, and entries of no parameter, from torch's functions.

    With ``ungrouped``, a temporary last group holds the model's parameters that have a state but
    are in no group.

    Yields:
        The number of groups without the temporary one.
    """
    num_groups = len(optimizer.param_groups)
    entries = non_param_entries(optimizer)
    for key in entries:
        del optimizer.state[key]
    params = ungrouped_params(model, optimizer) if ungrouped else []
    if params:
        optimizer.param_groups.append({**optimizer.param_groups[0], "params": params})
    try:
        with hide_ungrouped_states(optimizer):
            yield num_groups
    finally:
        del optimizer.param_groups[num_groups:]
        optimizer.state.update(entries)


def _sort_states(optimizer: torch.optim.Optimizer) -> None:
    """Sort each parameter's states in the order in which an optimizer creates them.

    FSDP1 gathers states one by one, in the order of each rank's dict. It also builds these dicts in
    the order of a set, which differs between ranks. Without the sort, it could mix ``exp_avg`` of
    one rank with ``exp_avg_sq`` of another.
    """
    for key, state in optimizer.state.items():
        if not isinstance(key, Tensor):
            continue
        ordered = sorted(
            state.items(), key=lambda item: (_ORDER.get(item[0], len(_ORDER)), str(item[0]))
        )
        state.clear()
        state.update(ordered)
