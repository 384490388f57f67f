"""The state of model and optimizer through torch's own functions: by parameter name, each tensor sharded as this rank holds it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    ShardingStrategy,
    StateDictType,
)

from .names import named_tensors, plain_name, state_dict_key, unwrapped

HYBRID = (ShardingStrategy.HYBRID_SHARD, ShardingStrategy._HYBRID_SHARD_ZERO2)
_ORDER = {"step": 0, "exp_avg": 1, "exp_avg_sq": 2, "correction": 3}


def check_model_and_optimizer(call: str, model: Any, optimizer: Any) -> None:
    """Raise ValueError unless they are; ``call`` shows the order of arguments."""
    for name, value, kind, what in (
        ("model", model, nn.Module, "a torch.nn.Module"),
        ("optimizer", optimizer, torch.optim.Optimizer, "a torch.optim.Optimizer"),
    ):
        if not isinstance(value, kind):
            raise ValueError(f"{name} must be {what}, but it is of type {type(value).__name__}; the order of arguments is {call}")


def has_fsdp1(model: nn.Module) -> bool:
    """Whether FSDP1 wraps any of the model. What torch then gives as its state are copies, not the live tensors."""
    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules())


def sharded_model_state(model: nn.Module) -> dict[str, Any]:
    """The model's tensors by name: the live ones, except under FSDP1, where it is collective."""
    model = unwrapped(model)
    with _sharded_by_fsdp1(model):
        return {plain_name(model, key): value for key, value in model.state_dict().items()}


def set_sharded_model_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Inverse of :func:`sharded_model_state`, where its tensors are copies."""
    model = unwrapped(model)
    with _sharded_by_fsdp1(model):
        model.load_state_dict({state_dict_key(model, name): value for name, value in state.items()})


def sharded_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``{"state": {"layer.weight": {"step": ..., "exp_avg": ...}}, "param_groups": [{"params": ["layer.weight"], "lr": ...}]}``: the live
    tensors, except under FSDP1, where it is collective. An optimizer that has no state yet gets it.

    Raises:
        ValueError: the optimizer has a parameter that is none of the model's.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # an evaluation leaves plain parameters in the place of those that the optimizer knows
    _check_every_parameter_has_a_name(model, optimizer)
    if not optimizer.state:
        init_state(optimizer)
    _put_in_one_order(optimizer)
    model = unwrapped(model)
    state_dict = optimizer.state_dict()
    if has_fsdp1(model):
        with _sharded_by_fsdp1(model):
            state_dict = FullyShardedDataParallel.optim_state_dict(model, optimizer, state_dict, group=_fsdp1_group(model))
        return _renamed(state_dict, lambda name: plain_name(model, name))
    return _renamed(state_dict, _names_of_params(model, optimizer).__getitem__)


def set_sharded_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Inverse of :func:`sharded_optimizer_state`, where its tensors are copies."""
    model = unwrapped(model)
    _put_in_one_order(optimizer)
    if has_fsdp1(model):
        state_dict = _renamed(state, lambda name: state_dict_key(model, name))
        with _sharded_by_fsdp1(model):
            state_dict = FullyShardedDataParallel.optim_state_dict_to_load(model, optimizer, state_dict, group=_fsdp1_group(model))
    else:
        state_dict = _renamed(state, {name: index for index, name in enumerate(_names_of_params(model, optimizer))}.__getitem__)
    optimizer.load_state_dict(state_dict)
    _put_in_one_order(optimizer)


def init_state(optimizer: torch.optim.Optimizer) -> None:
    """Let ours make its state at step 0; for others torch takes a step with zero gradients, which counts."""
    make = getattr(optimizer, "init_state", None)
    if make is not None:
        make()


@contextmanager
def new_states_only_if_it_succeeds(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Where the body fails, forget the states that it made: filling states needs states, and a call that fails changes nothing."""
    had_state = {param for param, state in optimizer.state.items() if state}
    try:
        yield
    except BaseException:
        for param in [param for param in optimizer.state if param not in had_state]:
            del optimizer.state[param]
        raise


def _names_of_params(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The first name of each parameter, group after group."""
    names: dict[Any, str] = {}
    for name, param in named_tensors(model):
        names.setdefault(param, plain_name(model, name))
    return [names[param] for group in optimizer.param_groups for param in group["params"]]


def _renamed(state_dict: dict[str, Any], rename: Callable[[Any], Any]) -> dict[str, Any]:
    """A copy of an optimizer's state dict with other keys for the parameters."""
    groups = [{**group, "params": [rename(key) for key in group["params"]]} for group in state_dict["param_groups"]]
    return {"state": {rename(key): dict(state) for key, state in state_dict["state"].items()}, "param_groups": groups}


def _fsdp1_group(model: nn.Module) -> ProcessGroup | None:
    """The group over which FSDP1 gathers states; None where it shards over one group and replicates over another."""
    module = FullyShardedDataParallel.fsdp_modules(model)[0]
    return None if module.sharding_strategy in HYBRID else module.process_group


@contextmanager
def _sharded_by_fsdp1(model: nn.Module) -> Iterator[None]:
    """Let FSDP1 give out and take sharded tensors, without the warnings that it gives of its own functions."""
    with _quiet():
        if not has_fsdp1(model):
            yield
            return
        configs = ShardedStateDictConfig(offload_to_cpu=False), ShardedOptimStateDictConfig(offload_to_cpu=False)
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT, *configs):
            yield


def _check_every_parameter_has_a_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if has_fsdp1(model):
        return  # which can hide its parameters between a forward pass and its backward pass
    known = set(model.parameters())
    params = [param for group in optimizer.param_groups for param in group["params"]]
    foreign = [(index, param) for index, param in enumerate(params) if param not in known]
    if foreign:
        index, param = foreign[0]
        more = f" (nor are {len(foreign) - 1} more)" if foreign[1:] else ""
        raise ValueError(
            f"the optimizer holds parameter {index} (shape {tuple(param.shape)}), which is no parameter of this model{more}; "
            "pass the model and the optimizer of its parameters, and make every tensor that is optimized an nn.Parameter of the model"
        )


def _put_in_one_order(optimizer: torch.optim.Optimizer) -> None:
    """Sort the states of each parameter as an optimizer makes them.

    torch's FSDP1 code gathers them one after the other in the order of each rank's own dict, and builds those dicts in the order of a
    set, which differs between ranks: one moment would end up in the place of another.
    """
    for state in optimizer.state.values():
        ordered = sorted(state.items(), key=lambda item: (_ORDER.get(item[0], len(_ORDER)), str(item[0])))
        state.clear()
        state.update(ordered)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that torch's FSDP1 gives of its own functions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message=".*_get_pg_default_device|Multiple backends are registered with this ProcessGroup")
        yield
