"""The state of one parameter and the checks of what users hand in: made, loaded and named in messages."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parameter import is_lazy

from .sharding.base import Sharding
from .sharding.dtensor import DTensor, to_local, zeros_like_shard
from .sharding.replicas import Replica

STATE_KEYS = ("step", "exp_avg", "exp_avg_sq", "correction")  # in the order of a new state
DTYPES = frozenset({torch.bfloat16, torch.float32})  # of parameters and of gradients

logger = logging.getLogger("sharded_bf16_adamw")


def check_param(param: Tensor, name: str) -> None:
    """Raise TypeError or ValueError, naming the parameter, unless it can be optimized."""
    if is_lazy(param):
        raise ValueError(
            f"parameter {name} has no shape yet; run one forward pass before you build the optimizer"
        )
    if param.dtype not in DTYPES:
        raise TypeError(
            f"parameter {name} is {param.dtype}; AdamW_BF16 takes bfloat16 and float32, "
            "so convert it with .to(torch.bfloat16) or leave it out"
        )
    if param.is_meta:
        raise ValueError(
            f"parameter {name} is on the meta device; call model.to_empty(device=...) and initialise, then build the optimizer"
        )
    if param.layout != torch.strided:
        raise TypeError(
            f"parameter {name} has layout {param.layout}; AdamW_BF16 takes dense parameters, so call .to_dense() or leave it out"
        )


def check_grads(group: dict[str, Any]) -> None:
    """Raise RuntimeError or TypeError, naming the parameter, where a gradient of the group cannot be used."""
    for index, param in enumerate(group["params"]):
        if param.grad is None:
            continue
        if param.grad.layout != torch.strided:
            raise RuntimeError(
                f"AdamW_BF16 does not support sparse gradients, which parameter {param_name(group, index)} has; "
                "build its layer with sparse=False"
            )
        if param.grad.dtype not in DTYPES:
            raise TypeError(
                f"the gradient of parameter {param_name(group, index)} is {param.grad.dtype}; it must be bfloat16 or float32"
            )


def new_state(param: Tensor, sharding: Sharding) -> dict[str, Tensor]:
    """The state of a parameter before its first step, sharded as its shard is.

    On an accelerator ``step`` lives there too, so that reading it costs no sync.
    """
    device = "cpu" if param.device.type == "cpu" else param.device
    shard = sharding.shard(param)
    state = {
        "step": torch.zeros((), dtype=torch.float32, device=device),
        "exp_avg": zeros_like_shard(shard, param.dtype),
        "exp_avg_sq": zeros_like_shard(shard, param.dtype),
    }
    if param.dtype == torch.bfloat16:
        state["correction"] = zeros_like_shard(shard, torch.bfloat16)
    return state


def log_params(params: list[Tensor], sharding: Sharding) -> None:
    """Log the dtypes and bytes of new parameters as INFO.

    The counts are of parameters, each once whatever its sharding; the bytes are of this rank's shards.
    """
    if not logger.isEnabledFor(logging.INFO):
        return
    bf16 = sum(param.dtype == torch.bfloat16 for param in params)
    weights = sum(to_local(param).nbytes for param in params)
    states = sum(
        _state_bytes(to_local(sharding.shard(param))) for param in params if param.requires_grad
    )
    logger.info(
        "AdamW_BF16 takes %d bfloat16 and %d float32 parameters; this rank holds %s bytes of their weights, and %s bytes of their states "
        "once each trainable one has had a gradient",
        bf16,
        len(params) - bf16,
        f"{weights:,}",
        f"{states:,}",
    )


def warn_if_all_float32(params: list[Tensor]) -> None:
    """Log a warning if no parameter is bfloat16: the model may not have been converted, which nothing else would show."""
    if params and all(param.dtype == torch.float32 for param in params):
        logger.warning(
            "none of the %d parameters of AdamW_BF16 is bfloat16, so it trains in float32; convert the model with "
            "model.to(torch.bfloat16) before the optimizer is built, or use torch.optim.AdamW if float32 is meant",
            len(params),
        )


def _state_bytes(shard: Tensor) -> int:
    """Return the bytes of the moments, of the correction and of ``step``, as :func:`new_state` makes them."""
    return (3 if shard.dtype == torch.bfloat16 else 2) * shard.nbytes + 4


def check_state(state: dict[str, Any], param: Tensor, name: str, sharding: Sharding) -> None:
    """Raise RuntimeError, naming the parameter, where its state no longer fits it: kernels go by addresses, and would not notice."""
    shard = to_local(sharding.shard(param))
    dtypes = {"step": torch.float32, "exp_avg": param.dtype, "exp_avg_sq": param.dtype}
    if param.dtype == torch.bfloat16:
        dtypes["correction"] = torch.bfloat16
    for key, dtype in dtypes.items():
        value = state.get(key)
        if not isinstance(value, Tensor):
            raise RuntimeError(
                f"the state {key!r} of parameter {name} is {value!r} where a tensor must be; somebody has changed optimizer.state, so load "
                "it anew or drop it with optimizer.state.clear()"
            )
        local = to_local(value)
        if local.dtype != dtype:
            raise RuntimeError(
                f"parameter {name} is {param.dtype} but its {key} {local.dtype}: the model was converted after the optimizer's first step; "
                "convert it before, or drop the states with optimizer.state.clear()"
            )
        if local.device != shard.device:
            raise RuntimeError(
                f"parameter {name} is on {shard.device} but its {key} on {local.device}; move the model before the optimizer's first step, "
                "or move the states too"
            )
        if key != "step" and local.shape != shard.shape:
            raise RuntimeError(
                f"parameter {name} has local shape {tuple(shard.shape)} but its {key} {tuple(local.shape)}: the model was sharded, or the "
                "parameter resized, after the optimizer's first step; build AdamW_BF16(model.parameters()) afterwards"
            )
        if key == "step" and local.numel() != 1:
            raise RuntimeError(
                f"the step of parameter {name} has shape {tuple(local.shape)}; it must be a 0-dim float32 tensor"
            )


def complete_state(state: dict[str, Any], param: Tensor, name: str, sharding: Sharding) -> None:
    """Check a loaded state against its parameter and shard it; add what a torch.optim.AdamW state lacks and drop what only that one has."""
    for key in ("step", "exp_avg", "exp_avg_sq"):
        if key not in state:
            raise ValueError(
                f"the loaded state of parameter {name} has no {key!r}; it must be a state of AdamW_BF16 or torch.optim.AdamW"
            )
    for key in ("exp_avg", "exp_avg_sq", "correction"):
        if key in state and state[key].shape != param.shape:
            raise ValueError(
                f"the loaded {key} of parameter {name} has shape {tuple(state[key].shape)} but the parameter has {tuple(param.shape)}; "
                "it is the state of another model or of another sharding"
            )
        if key in state:
            state[key] = sharding.shard_state(
                param, state[key], f"the loaded {key} of parameter {name}"
            )
    step = torch.as_tensor(state["step"], dtype=torch.float32)
    state["step"] = step.to("cpu" if param.device.type == "cpu" else param.device)
    state.pop("max_exp_avg_sq", None)  # amsgrad, which this rule does not have
    if param.dtype == torch.bfloat16:
        state.setdefault("correction", zeros_like_shard(sharding.shard(param), torch.bfloat16))
    else:
        state.pop("correction", None)
    # One order on every rank: torch's FSDP1 code gathers a state's tensors in the order in which each rank's dict happens to hold them.
    for key in (key for key in STATE_KEYS if key in state):
        state[key] = state.pop(key)


def replicas_of(
    param: Tensor,
    state: dict[str, Any],
    name: str,
    sharding: Sharding,
    dp: dist.ProcessGroup | None,
) -> Iterator[Replica]:
    """Yield a parameter's weight and states with the ranks that hold them too. A state that is not made yet counts as zeros.

    Args:
        dp: the ranks that hold replicas of plain parameters; None where nobody does.
    """
    of_weight, of_state = sharding.weight_replica_groups(param), sharding.replica_groups(param)
    is_plain = not isinstance(sharding.shard(param), DTensor) and not sharding.shard_groups(param)
    if is_plain and not of_weight and dp is not None and dist.get_world_size(dp) > 1:
        of_weight = of_state = (dp,)
    if of_weight:
        yield Replica(f"parameter {name}", to_local(param), of_weight)
    if of_state:
        for key in STATE_KEYS:  # the same on every rank, whatever order its dict has
            yield Replica(
                f"{key} of parameter {name}",
                to_local(state.get(key, torch.empty(0, device=param.device))),
                of_state,
            )


@contextmanager
def numbered_states_only(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Take the states of tensors that are in no group out of ``optimizer.state`` while the body runs.

    Layer freezing (a parameter taken out of its group) and code that swaps parameters leave them behind, and torch's
    ``state_dict()`` fails on them.
    """
    numbered = {param for group in optimizer.param_groups for param in group["params"]}
    if all(key in numbered for key in optimizer.state if isinstance(key, Tensor)):
        yield
        return
    holder, states = optimizer.state, dict(optimizer.state)
    leftover = {
        key: state
        for key, state in states.items()
        if isinstance(key, Tensor) and key not in numbered
    }
    for key in leftover:
        del optimizer.state[key]
    try:
        yield
    finally:
        if optimizer.state is holder:
            holder.clear()  # rather than put back at the end: a changed order makes step() plan anew
            holder.update(states)
        else:  # the body has loaded others
            optimizer.state.update(leftover)


def check_hyperparameters(
    lr: float | Tensor, betas: tuple[float, float], eps: float, weight_decay: float
) -> None:
    """Raise torch's own ``ValueError`` messages."""
    if callable(lr) or isinstance(lr, str):
        raise ValueError(
            f"Invalid learning rate: {lr!r}; it must be a number or a tensor, and a schedule is given as lr_function="
        )
    if not 0.0 <= lr:
        raise ValueError(f"Invalid learning rate: {lr}")
    if not 0.0 <= eps:
        raise ValueError(f"Invalid epsilon value: {eps}")
    for index, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
    if not 0.0 <= weight_decay or math.isinf(weight_decay):
        raise ValueError(f"Invalid weight_decay value: {weight_decay}")


def check_capturable_lr(lr: float | Tensor, device: torch.device) -> None:
    """Raise ValueError where a CUDA graph of a step on ``device`` would keep the value that ``lr`` has during the capture."""
    if device.type != "cuda":
        return
    if not isinstance(lr, Tensor):
        found = "a number"
    elif lr.device != device or lr.dtype not in (torch.float32, torch.float64):
        found = f"{lr.dtype} on {lr.device}"
    else:
        return
    raise ValueError(
        f"capturable=True needs lr as a float32 or float64 tensor on {device}, where a graph reads it, but it is {found}; pass "
        f"lr=torch.tensor(..., device={str(device)!r})"
    )


def param_name(group: dict[str, Any], index: int) -> str:
    """A parameter's name for a message: its FQN where the optimizer was given named parameters, else its place in its group."""
    if "param_names" in group:
        return f"{group['param_names'][index]!r}"
    param = group["params"][index]
    return (
        f"{index} (of a lazy module)" if is_lazy(param) else f"{index} (shape {tuple(param.shape)})"
    )
