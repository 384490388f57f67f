"""Check model and optimizer before a save or load, and create or remove optimizer states."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import _init_optim_state
from torch.distributed.fsdp import FSDPModule
from torch.nn.parameter import is_lazy

from ..names import clean_fqn, flat_params, named_tensors, unwrap


def check_model_and_optimizer(call: str, model: Any, optimizer: Any) -> None:
    """Raise ValueError unless both are of the right type, belong together and have values.

    Also reshard FSDP2 modules. Not collective: call it within ``raise_on_all_ranks``, before the
    first collective.

    Args:
        call: signature of the public function, to show the order of arguments in a message.
        model: the caller's model.
        optimizer: the caller's optimizer.
    """
    for name, value, kind, what in (
        ("model", model, nn.Module, "a torch.nn.Module"),
        ("optimizer", optimizer, torch.optim.Optimizer, "a torch.optim.Optimizer"),
    ):
        if not isinstance(value, kind):
            raise ValueError(
                f"{name} must be {what}, but it is of type {type(value).__name__}; "
                f"the order of arguments is {call}"
            )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after an evaluation the root holds unsharded parameters
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
    _check_params_are_of_model(model, optimizer)


def _check_params_are_of_model(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    known = set(model.parameters())
    for _, flat_param in flat_params(model):
        # Between forward and backward, model.parameters() lacks some of these tensors.
        known |= {flat_param, *(flat_param._params or ()), *(flat_param._shared_params or ())}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    foreign = [(index, param) for index, param in enumerate(params) if param not in known]
    if foreign:
        index, param = foreign[0]
        more = f" (nor are {len(foreign) - 1} more)" if foreign[1:] else ""
        raise ValueError(
            f"the optimizer holds parameter {index} (shape {tuple(param.shape)}), which is not a "
            f"parameter of this model{more}; pass the model and the optimizer of its parameters, "
            "built after fully_shard or any other wrapper that replaces parameters, and make every "
            "optimized tensor an nn.Parameter of the model"
        )


def init_state(optimizer: torch.optim.Optimizer, only_if_empty: bool = False) -> None:
    """Create the optimizer's states.

    ``AdamW_BF16`` creates them at step 0. For other optimizers torch takes a step with zero
    gradients, which counts as a step. Torch does nothing if a parameter has a gradient.

    Args:
        optimizer: any optimizer of torch.
        only_if_empty: do nothing if any parameter has a state, as always for other optimizers.
    """
    has_some = any(isinstance(key, Tensor) for key in optimizer.state)
    init = getattr(optimizer, "init_state", None)
    if init is None and not has_some:
        entries = non_param_entries(optimizer)
        optimizer.state.clear()  # torch regards an optimizer with any entry as initialized
        try:
            _init_optim_state(optimizer)
        finally:
            optimizer.state.update(entries)
    elif init is not None and not (only_if_empty and has_some):
        init()


def init_frozen_states(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    saved: Iterable[str],
    saved_in_groups: Iterable[str],
    to_saved: Callable[[str], str] = str,
) -> None:
    """Create states of frozen parameters for which the checkpoint has states. AdamW_BF16 only.

    A frozen parameter's correction is part of the weight, and the moments are needed if training
    unfreezes the parameter later.

    Args:
        model: the module, wrapped or not.
        optimizer: its optimizer.
        saved: names of the parameters whose states were saved.
        saved_in_groups: names of the parameters that were in a group when saved. A parameter that
            was in a group then but is in none now gets no state, because nothing would use it.
        to_saved: maps an FQN to its name in ``saved``.
    """
    init = getattr(optimizer, "init_state", None)
    if init is None:
        return
    saved, saved_in_groups = set(saved), set(saved_in_groups)
    in_groups = {param for group in optimizer.param_groups for param in group["params"]}
    init(
        param
        for param, names in _saved_names(model, to_saved).items()
        if not saved.isdisjoint(names) and (param in in_groups or saved_in_groups.isdisjoint(names))
    )


def drop_averages(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    missing: Collection[str | None],
    to_saved: Callable[[str], str],
) -> None:
    """Drop averages that a checkpoint lacks, so that :class:`EMA` starts them at the new weights.

    Args:
        model: the module, wrapped or not.
        optimizer: its optimizer.
        missing: names of the parameters whose average was not saved.
        to_saved: maps an FQN to its name in ``missing``.
    """
    if missing:
        for param, names in _saved_names(model, to_saved).items():
            if not set(missing).isdisjoint(names) and param in optimizer.state:
                optimizer.state[param].pop("ema", None)


def _saved_names(model: nn.Module, to_saved: Callable[[str], str]) -> dict[Any, list[str]]:
    """Map each parameter to its names in a checkpoint: several if it is tied or flat."""
    names: dict[Any, list[str]] = {}
    for name, param in unwrap(model).named_parameters(remove_duplicate=False):
        names.setdefault(param, []).append(to_saved(clean_fqn(model, name)))
    for prefix, flat_param in flat_params(unwrap(model)):
        if flat_param in names:
            names[flat_param] = [
                to_saved(clean_fqn(model, prefix + name)) for name in flat_param._fqns
            ]
    return names


@contextmanager
def rollback_new_state(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Remove the states that the body created if it raises: a failed load changes nothing."""
    had_state = {
        key for key, state in optimizer.state.items() if state or not isinstance(key, Tensor)
    }
    try:
        yield
    except BaseException:
        for param in [param for param in optimizer.state if param not in had_state]:
            del optimizer.state[param]
        raise


def non_param_entries(optimizer: torch.optim.Optimizer) -> dict[Any, Any]:
    """Return the entries of ``optimizer.state`` that belong to no parameter.

    ``torch.optim.Optimizer.state_dict`` supports such entries.
    """
    return {key: entry for key, entry in optimizer.state.items() if not isinstance(key, Tensor)}


def ungrouped_params(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the model's parameters that have a state but are in no group."""
    in_groups = {param for group in optimizer.param_groups for param in group["params"]}
    return [
        param
        for param in model.parameters()
        if param not in in_groups and optimizer.state.get(param)
    ]
