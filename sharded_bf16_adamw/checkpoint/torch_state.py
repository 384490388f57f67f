"""The state of model and optimizer through torch's own functions: by parameter name, each tensor sharded as this rank holds it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

_ORDER = {"step": 0, "exp_avg": 1, "exp_avg_sq": 2, "correction": 3}
# What Lightning Fabric's wrapper has: the module as wrapped by its strategy, and the plain one.
_FABRIC = {"_forward_module", "_original_module"}


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
    with _quiet():
        return get_model_state_dict(_unwrapped(model))


def set_sharded_model_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Inverse of :func:`sharded_model_state`, where its tensors are copies."""
    with _quiet():
        set_model_state_dict(_unwrapped(model), state)


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
    with _quiet():
        return get_optimizer_state_dict(_unwrapped(model), optimizer)


def set_sharded_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], flattened: bool = False) -> None:
    """Inverse of :func:`sharded_optimizer_state`, where its tensors are copies. A ``flattened`` state has keys such as
    ``state.layer.weight.exp_avg``."""
    _put_in_one_order(optimizer)
    with _quiet():
        set_optimizer_state_dict(_unwrapped(model), optimizer, state, options=StateDictOptions(flatten_optimizer_state_dict=flattened))
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


def _unwrapped(model: nn.Module) -> nn.Module:
    """Without Lightning Fabric's wrapper. torch leaves out those of its own in names, but not that one."""
    own = [*model.named_children(), *model.named_parameters(recurse=False), *model.named_buffers(recurse=False)]
    inner = getattr(model, "_forward_module", None)
    return inner if isinstance(inner, nn.Module) and _FABRIC.issuperset(name for name, _ in own) else model


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
