"""The state of model and optimizer through torch's own functions: by parameter name, each tensor sharded as this rank holds it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.state_dict import _init_optim_state
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    ShardingStrategy,
    StateDictType,
)
from torch.nn.parameter import is_lazy

from ..state import numbered_states_only
from .names import flat_params, has_fsdp1, named_tensors, clean_fqn, state_dict_key, unwrap
from .extra_state import is_wrapper_subclass

HYBRID = (ShardingStrategy.HYBRID_SHARD, ShardingStrategy._HYBRID_SHARD_ZERO2)
_ORDER = {"step": 0, "exp_avg": 1, "exp_avg_sq": 2, "correction": 3}


def check_model_and_optimizer(call: str, model: Any, optimizer: Any) -> None:
    """Raise ValueError unless they are, belong together and have values; ``call`` shows the order of arguments.

    Not collective: call it within ``errors_on_every_rank`` before anything collective, or the other ranks wait in that.
    """
    for name, value, kind, what in (
        ("model", model, nn.Module, "a torch.nn.Module"),
        ("optimizer", optimizer, torch.optim.Optimizer, "a torch.optim.Optimizer"),
    ):
        if not isinstance(value, kind):
            raise ValueError(
                f"{name} must be {what}, but it is of type {type(value).__name__}; the order of arguments is {call}"
            )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # an evaluation leaves plain parameters in the place of those that the optimizer knows
    for name, tensor in named_tensors(model):
        if is_lazy(tensor):
            raise ValueError(
                f"{clean_fqn(model, name)} has no shape yet; run one forward pass first"
            )
        if tensor.is_meta:
            raise ValueError(
                f"{clean_fqn(model, name)} is on the meta device and has no values; "
                "call model.to_empty(device=...) and initialise it first"
            )
    _check_every_parameter_has_a_name(model, optimizer)


def sharded_model_state(model: nn.Module) -> dict[str, Any]:
    """The model's tensors by name: the live ones, except under FSDP1, where it is collective."""
    model = unwrap(model)
    with _sharded_by_fsdp1(model):
        return {clean_fqn(model, key): value for key, value in model.state_dict().items()}


def set_sharded_model_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Inverse of :func:`sharded_model_state`, where its tensors are copies. Tensors made of others may be missing."""
    model = unwrap(model)
    with _sharded_by_fsdp1(model):
        result = model.load_state_dict(
            {state_dict_key(model, name): value for name, value in state.items()}, strict=False
        )
    own = {clean_fqn(model, name): tensor for name, tensor in named_tensors(model)}
    missing = [
        key for key in result.missing_keys if not is_wrapper_subclass(own.get(clean_fqn(model, key)))
    ]
    assert not missing and not result.unexpected_keys, (missing, result.unexpected_keys)


def sharded_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, removed: bool = False
) -> dict[str, Any]:
    """``{"state": {"layer.weight": {"step": ..., "exp_avg": ...}}, "param_groups": [{"params": ["layer.weight"], "lr": ...}]}``: the live
    tensors, except under FSDP1, where it is collective. An optimizer that has no state yet gets it.

    Args:
        removed: include the states of the model's parameters that were taken out of their groups, which freezes them: their
            correction is still part of their weight.
    """
    init_state(optimizer, only_if_it_has_none=True)
    model = unwrap(model)
    with _named_states_only(model, optimizer, removed) as groups:
        _put_in_one_order(optimizer)
        state_dict = optimizer.state_dict()
        if has_fsdp1(model):
            with _sharded_by_fsdp1(model):
                state_dict = FullyShardedDataParallel.optim_state_dict(
                    model, optimizer, state_dict, group=_fsdp1_group(model)
                )
            result = _renamed(state_dict, lambda name: clean_fqn(model, name))
        else:
            result = _renamed(state_dict, _names_of_params(model, optimizer).__getitem__)
    result["param_groups"] = result["param_groups"][:groups]
    return result


def set_sharded_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], removed: bool = False
) -> None:
    """Inverse of :func:`sharded_optimizer_state`, where its tensors are copies."""
    model = unwrap(model)
    with _named_states_only(model, optimizer, removed) as groups:
        _put_in_one_order(optimizer)
        names = [] if has_fsdp1(model) else _names_of_params(model, optimizer)
        for group in optimizer.param_groups[groups:]:
            in_groups = {name for group in state["param_groups"] for name in group["params"]}
            params = [name for name in names or state["state"] if name not in in_groups]
            state = {**state, "param_groups": [*state["param_groups"], {**group, "params": params}]}
        if has_fsdp1(model):
            state_dict = _renamed(state, lambda name: state_dict_key(model, name))
            with _sharded_by_fsdp1(model):
                state_dict = FullyShardedDataParallel.optim_state_dict_to_load(
                    model, optimizer, state_dict, group=_fsdp1_group(model)
                )
        else:
            state_dict = _renamed(
                state, {name: index for index, name in enumerate(names)}.__getitem__
            )
        optimizer.load_state_dict(state_dict)
        _put_in_one_order(optimizer)


def other_entries(optimizer: torch.optim.Optimizer) -> dict[Any, Any]:
    """What ``optimizer.state`` holds that belongs to no parameter; torch's optimizers keep such entries too."""
    return {key: entry for key, entry in optimizer.state.items() if not isinstance(key, Tensor)}


def init_state(optimizer: torch.optim.Optimizer, only_if_it_has_none: bool = False) -> None:
    """Let ours make its state at step 0; for others torch takes a step with zero gradients, which counts."""
    has_some = any(isinstance(key, Tensor) for key in optimizer.state)
    make = getattr(optimizer, "init_state", None)
    if make is None and not has_some:
        entries = other_entries(optimizer)
        optimizer.state.clear()  # with anything in it, torch takes it for initialized
        _init_optim_state(optimizer)
        optimizer.state.update(entries)
    elif make is not None and not (only_if_it_has_none and has_some):
        make()


def init_frozen_states(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    saved: Iterable[str],
    saved_in_groups: Iterable[str],
    stored: Callable[[str], str] = str,
) -> None:
    """Let our optimizer make the states that are to be loaded for parameters that are frozen.

    A frozen parameter's correction is part of its weight, and its moments are needed where training thaws it later.

    Args:
        saved: the names of parameters of which a state is to be loaded.
        saved_in_groups: the names of those that were in a group. A parameter that is in no group has a state only if it was in
            none when it was saved too: elsewhere it would cost memory that nobody asked for.
        stored: gives the name there for a name here.
    """
    make = getattr(optimizer, "init_state", None)
    if make is None:
        return
    saved, saved_in_groups = set(saved), set(saved_in_groups)
    in_groups = {param for group in optimizer.param_groups for param in group["params"]}
    names: dict[Any, list[str]] = {}
    for name, param in unwrap(model).named_parameters(remove_duplicate=False):
        names.setdefault(param, []).append(stored(clean_fqn(model, name)))
    for dot, flat_param in flat_params(unwrap(model)):
        if flat_param in names:
            names[flat_param] = [stored(clean_fqn(model, dot + name)) for name in flat_param._fqns]
    make(
        param
        for param, own in names.items()
        if not saved.isdisjoint(own) and (param in in_groups or saved_in_groups.isdisjoint(own))
    )


@contextmanager
def new_states_only_if_it_succeeds(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Where the body fails, forget the states that it made: filling states needs states, and a call that fails changes nothing."""
    had_state = {
        key for key, state in optimizer.state.items() if state or not isinstance(key, Tensor)
    }
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
        names.setdefault(param, clean_fqn(model, name))
    return [names[param] for group in optimizer.param_groups for param in group["params"]]


def _renamed(state_dict: dict[str, Any], rename: Callable[[Any], Any]) -> dict[str, Any]:
    """A copy of an optimizer's state dict with other keys for the parameters."""
    groups = [
        {**group, "params": [rename(key) for key in group["params"]]}
        for group in state_dict["param_groups"]
    ]
    return {
        "state": {rename(key): dict(state) for key, state in state_dict["state"].items()},
        "param_groups": groups,
    }


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
        configs = (
            ShardedStateDictConfig(offload_to_cpu=False),
            ShardedOptimStateDictConfig(offload_to_cpu=False),
        )
        with FullyShardedDataParallel.state_dict_type(
            model, StateDictType.SHARDED_STATE_DICT, *configs
        ):
            yield


def _check_every_parameter_has_a_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    known = set(model.parameters())
    for _, flat_param in flat_params(
        model
    ):  # between a forward pass and its backward pass some are hidden
        known |= {flat_param, *(flat_param._params or ()), *(flat_param._shared_params or ())}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    foreign = [(index, param) for index, param in enumerate(params) if param not in known]
    if foreign:
        index, param = foreign[0]
        more = f" (nor are {len(foreign) - 1} more)" if foreign[1:] else ""
        raise ValueError(
            f"the optimizer holds parameter {index} (shape {tuple(param.shape)}), which is no parameter of this model{more}; "
            "pass the model and the optimizer of its parameters, and make every tensor that is optimized an nn.Parameter of the model"
        )


@contextmanager
def _named_states_only(
    model: nn.Module, optimizer: torch.optim.Optimizer, removed: bool
) -> Iterator[int]:
    """Keep from torch's code what it has no name for: states of tensors in no group, and entries of no parameter.

    With ``removed``, those of the model's own parameters stand in one more group meanwhile, the last.

    Yields:
        The number of groups without that one.
    """
    groups = len(optimizer.param_groups)
    entries = other_entries(optimizer)
    for key in entries:
        del optimizer.state[key]
    params = removed_params(model, optimizer) if removed else []
    if params:
        optimizer.param_groups.append({**optimizer.param_groups[0], "params": params})
    try:
        with numbered_states_only(optimizer):
            yield groups
    finally:
        del optimizer.param_groups[groups:]
        optimizer.state.update(entries)


def removed_params(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The model's parameters that have a state but are in no group."""
    in_groups = {param for group in optimizer.param_groups for param in group["params"]}
    return [
        param
        for param in model.parameters()
        if param not in in_groups and optimizer.state.get(param)
    ]


def _put_in_one_order(optimizer: torch.optim.Optimizer) -> None:
    """Sort the states of each parameter as an optimizer makes them.

    torch's FSDP1 code gathers them one after the other in the order of each rank's own dict, and builds those dicts in the order of a
    set, which differs between ranks: one moment would end up in the place of another.
    """
    for key, state in optimizer.state.items():
        if not isinstance(key, Tensor):
            continue
        ordered = sorted(
            state.items(), key=lambda item: (_ORDER.get(item[0], len(_ORDER)), str(item[0]))
        )
        state.clear()
        state.update(ordered)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that torch's FSDP1 gives of its own functions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings(
            "ignore",
            message=".*_get_pg_default_device|Multiple backends are registered with this ProcessGroup",
        )
        yield
