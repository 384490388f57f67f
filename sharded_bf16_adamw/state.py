"""The optimizer state of a parameter: created, checked, completed after a load, compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .sharding.base import Sharding
from .sharding.dtensor import to_local
from .sharding.fsdp1 import is_flattened
from .sharding.model_parallel import ModelParallel
from .sharding.replicas import Replica
from .torch_types import is_dtensor
from .validation import param_names

STATE_KEYS = ("step", "exp_avg", "exp_avg_sq", "correction")  # in the order of a new state
ALL_STATE_KEYS = (*STATE_KEYS, "ema")  # "ema" only with :class:`.ema.EMA`


def new_state(param: Tensor, sharding: Sharding) -> dict[str, Tensor]:
    """Return the state of a parameter before its first step, sharded as its shard is.

    On an accelerator ``step`` is on the device too, so that reading it costs no sync.
    """
    shard = sharding.shard(param)
    state = {
        "step": torch.zeros((), dtype=torch.float32, device=param.device),
        "exp_avg": torch.zeros_like(shard, dtype=param.dtype),
        "exp_avg_sq": torch.zeros_like(shard, dtype=param.dtype),
    }
    if param.dtype == torch.bfloat16:
        state["correction"] = torch.zeros_like(shard, dtype=torch.bfloat16)
    return state


def states_for(
    params: list[Tensor], names: list[str], states: dict[Tensor, Any], sharding: Sharding
) -> list[dict[str, Any]]:
    """Return each parameter's state. A missing one is created, but not stored in ``states``.

    Raises:
        RuntimeError: a state does not fit its parameter.
    """
    for param, name in zip(params, names, strict=True):
        if states.get(param):
            check_state(states[param], param, name, sharding)
    return [states.get(param) or new_state(param, sharding) for param in params]


def check_state(state: dict[str, Any], param: Tensor, name: str, sharding: Sharding) -> None:
    """Raise RuntimeError if a state no longer fits its parameter.

    Kernels work on addresses and would not notice.
    """
    shard = to_local(sharding.shard(param))
    dtypes = {"step": torch.float32, "exp_avg": param.dtype, "exp_avg_sq": param.dtype}
    if param.dtype == torch.bfloat16:
        dtypes["correction"] = torch.bfloat16
    if "ema" in state:
        dtypes["ema"] = param.dtype
    for key, dtype in dtypes.items():
        value = state.get(key)
        if not isinstance(value, Tensor):
            raise RuntimeError(
                f"the state {key!r} of parameter {name} is {value!r} instead of a tensor; other "
                "code has changed optimizer.state, so load it again or drop it with "
                "optimizer.state.clear()"
            )
        local = to_local(value)
        if local.dtype != dtype:
            raise RuntimeError(
                f"parameter {name} is {param.dtype} but its {key} is {local.dtype}: the model was "
                "converted after the optimizer's first step; convert it before, or drop the states "
                "with optimizer.state.clear()"
            )
        if local.device != shard.device:
            raise RuntimeError(
                f"parameter {name} is on {shard.device} but its {key} is on {local.device}; move "
                "the model before the optimizer's first step, or move the states too"
            )
        if key != "step" and local.shape != shard.shape:
            raise RuntimeError(
                f"parameter {name} has local shape {tuple(shard.shape)} but its {key} has "
                f"{tuple(local.shape)}: the model was sharded, or the parameter resized, after the "
                "optimizer's first step; build AdamW_BF16(model.parameters()) afterwards"
            )
        if key == "step" and local.numel() != 1:
            raise RuntimeError(
                f"the step of parameter {name} has shape {tuple(local.shape)}; it must be a 0-dim "
                "float32 tensor"
            )


def complete_state(state: dict[str, Any], param: Tensor, name: str, sharding: Sharding) -> None:
    """Check and shard a loaded state in place, and convert a state of torch.optim.AdamW.

    Raises:
        ValueError: the state lacks an entry, or has another shape or sharding than the parameter.
    """
    for key in ("step", "exp_avg", "exp_avg_sq"):
        if key not in state:
            raise ValueError(
                f"the loaded state of parameter {name} has no {key!r}; it must be a state of "
                "AdamW_BF16 or torch.optim.AdamW"
            )
    for key in ("exp_avg", "exp_avg_sq", "correction", "ema"):
        if key not in state:
            continue
        if state[key].shape != param.shape:
            raise ValueError(
                f"size mismatch: the loaded {key} of parameter {name} has shape "
                f"{tuple(state[key].shape)} but the parameter has {tuple(param.shape)}; load the "
                "state of the same model and sharding"
            )
        what = f"the loaded {key} of parameter {name}"
        state[key] = sharding.shard_state(param, state[key], what)
    state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).to(param.device)
    state.pop("max_exp_avg_sq", None)  # of amsgrad, which this update rule does not have
    if param.dtype == torch.bfloat16:
        state.setdefault(
            "correction", torch.zeros_like(sharding.shard(param), dtype=torch.bfloat16)
        )
    else:
        state.pop("correction", None)
    # The same order on every rank: torch's FSDP1 code gathers a state in the order of each dict.
    for key in (key for key in ALL_STATE_KEYS if key in state):
        state[key] = state.pop(key)


@contextmanager
def hide_ungrouped_states(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Hide the states of tensors in no parameter group while the body runs.

    Layer freezing (a parameter taken out of its group) and code that swaps parameters leave such
    states behind, and torch's ``state_dict()`` fails on them.
    """
    grouped = {param for group in optimizer.param_groups for param in group["params"]}
    if all(key in grouped for key in optimizer.state if isinstance(key, Tensor)):
        yield
        return
    original, states = optimizer.state, dict(optimizer.state)
    hidden = {
        key: state
        for key, state in states.items()
        if isinstance(key, Tensor) and key not in grouped
    }
    for key in hidden:
        del optimizer.state[key]
    try:
        yield
    finally:
        if optimizer.state is original:
            original.clear()  # a changed order would make step() rebuild its plan
            original.update(states)
        else:  # the body has loaded new states
            optimizer.state.update(hidden)


def collect_replicas(
    optimizer: torch.optim.Optimizer, sharding: Sharding, parallel: ModelParallel | None
) -> tuple[list[Replica], set[dist.ProcessGroup], str | None]:
    """Return the arguments of :func:`.sharding.replicas.check_replicas` for one optimizer."""
    names = param_names(optimizer.param_groups)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    others = {group for param in params for group in sharding.shard_groups(param)}
    if parallel is None:
        experts: set[int] = set()
        dp, edp = dist.group.WORLD if dist.is_initialized() else None, None
    else:
        experts = {id(param) for param in parallel.expert_params()}
        dp, edp = parallel.group("dp"), parallel.group("edp")
        own_groups = (parallel.group("pp"), parallel.group("ep"))
        others |= {group for group in own_groups if group is not None}
    replicas: list[Replica] = []
    for param in params:
        group = edp if id(param) in experts else dp
        replicas += _replicas(param, optimizer.state.get(param, {}), names[param], sharding, group)
    problem = None
    has_plain = any(_is_plain(param, sharding) for param in params)
    if parallel is not None and dp is None and not replicas and has_plain:
        problem = (
            f"rank {dist.get_rank()} has no replicas to compare: it is unknown which ranks hold "
            "replicas of its plain parameters; declare them with ModelParallel(dp=...)"
        )
    return replicas, others, problem


def _replicas(
    param: Tensor,
    state: dict[str, Any],
    name: str,
    sharding: Sharding,
    dp: dist.ProcessGroup | None,
) -> Iterator[Replica]:
    """Yield a parameter's weight and states with the groups that hold replicas of them.

    ``dp`` is the group that holds replicas of a plain parameter, or None. A missing state counts as
    zeros.
    """
    weight_groups = sharding.weight_replica_groups(param)
    state_groups = sharding.replica_groups(param)
    is_plain = _is_plain(param, sharding)
    if is_plain and not weight_groups and dp is not None and dist.get_world_size(dp) > 1:
        weight_groups = state_groups = (dp,)
    if weight_groups:
        yield Replica(f"parameter {name}", to_local(param), weight_groups)
    if state_groups:
        for key in ALL_STATE_KEYS:  # one order on all ranks; those of the dicts may differ
            value = to_local(state.get(key, torch.empty(0, device=param.device)))
            yield Replica(f"{key} of parameter {name}", value, state_groups)


def _is_plain(param: Tensor, sharding: Sharding) -> bool:
    """Return True if no mesh and no FSDP1 module tells which ranks share the parameter."""
    return not is_dtensor(sharding.shard(param)) and not is_flattened(param)
