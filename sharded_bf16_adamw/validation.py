"""Checks of the user's arguments. Each raises before anything changes."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

DTYPES = frozenset({torch.bfloat16, torch.float32})  # of parameters and of gradients
LARGE_DECAY = 1e-3  # per step; weights would halve in 700 steps


def param_name(group: dict[str, Any], index: int) -> str:
    """Return a parameter's name for messages: its FQN if known, else its index and shape.

    The names are unknown once other code has added to ``group["params"]`` or taken from it.
    """
    names, params = group.get("param_names", []), group["params"]
    if len(names) == len(params):
        return f"{names[index]!r}"
    param = params[index]
    return f"{index} ({'of a lazy module' if is_lazy(param) else f'shape {tuple(param.shape)}'})"


def name_in_group(group: dict[str, Any], param: Tensor) -> str:
    """Return the name for messages of a parameter in ``group``."""
    index = next(index for index, other in enumerate(group["params"]) if other is param)
    return param_name(group, index)


def param_names(groups: list[dict[str, Any]]) -> dict[Tensor, str]:
    """Map each parameter to its name for messages."""
    return {
        param: param_name(group, index)
        for group in groups
        for index, param in enumerate(group["params"])
    }


def check_param(param: Tensor, name: str) -> None:
    """Raise TypeError or ValueError if the parameter cannot be optimized."""
    if is_lazy(param):
        raise ValueError(
            f"parameter {name} has no shape yet; run one forward pass before you build the "
            "optimizer"
        )
    if param.dtype not in DTYPES:
        raise TypeError(
            f"parameter {name} is {param.dtype}; AdamW_BF16 takes bfloat16 and float32, so convert "
            "it with .to(torch.bfloat16) or leave it out"
        )
    if param.is_meta:
        raise ValueError(
            f"parameter {name} is on the meta device; call model.to_empty(device=...) and "
            "initialize it, then build the optimizer"
        )
    if param.layout != torch.strided:
        raise TypeError(
            f"parameter {name} has layout {param.layout}; AdamW_BF16 takes dense parameters, so "
            "call .to_dense() or leave it out"
        )


def check_hyperparams(
    lr: float | Tensor, betas: tuple[float, float], eps: float, weight_decay: float
) -> None:
    """Raise ValueError, mostly with torch.optim's messages, if a hyperparameter is out of range."""
    if callable(lr) or isinstance(lr, str):
        raise ValueError(
            f"Invalid learning rate: {lr!r}; it must be a number or a tensor; pass a schedule as "
            "lr_function="
        )
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not 0.0 <= lr:
        raise ValueError(f"Invalid learning rate: {lr}")
    if not 0.0 <= eps:
        raise ValueError(f"Invalid epsilon value: {eps}")
    for index, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
    if not 0.0 <= weight_decay or math.isinf(weight_decay):
        raise ValueError(f"Invalid weight_decay value: {weight_decay}")


def to_betas(betas: Any) -> tuple[float, float]:
    """Return ``betas`` as a pair of floats. Raise ValueError if they are not two numbers."""
    try:
        beta1, beta2 = map(float, betas)
    except (TypeError, ValueError):
        raise ValueError(f"Invalid betas: {betas!r}; it must be two numbers") from None
    return beta1, beta2


def check_capturable_lr(lr: float | Tensor, device: torch.device) -> None:
    """Raise ValueError if a CUDA graph on ``device`` would freeze ``lr`` at its captured value."""
    if device.type != "cuda":
        return
    if not isinstance(lr, Tensor):
        found = "a number"
    elif lr.device != device or lr.dtype not in (torch.float32, torch.float64):
        found = f"{lr.dtype} on {lr.device}"
    else:
        return
    raise ValueError(
        f"capturable=True needs lr as a float32 or float64 tensor on {device}, from which the "
        f"captured graph reads it, but lr is {found}; pass lr=torch.tensor(..., "
        f"device={str(device)!r})"
    )


def check_max_lr(max_lr: float, weight_decay: float) -> None:
    """Raise ValueError if ``max_lr`` cannot scale the weight decay; warn if the decay is large."""
    if not 0.0 < max_lr < math.inf:
        raise ValueError(
            f"Invalid max_lr: {max_lr}; with decouple_lr=True it must be the peak of the learning "
            "rate, positive and finite"
        )
    if weight_decay > LARGE_DECAY:
        warnings.warn(
            f"weight_decay={weight_decay} with decouple_lr=True shrinks each weight by "
            f"{weight_decay:.2%} in every step at max_lr; usual values are a coupled weight_decay "
            "times max_lr, such as 1e-5",
            stacklevel=5,  # the caller of the constructor
        )


def check_group(group: dict[str, Any]) -> None:
    """Raise ValueError or TypeError if a parameter group cannot be optimized."""
    group["betas"] = to_betas(group["betas"])
    check_hyperparams(group["lr"], group["betas"], group["eps"], group["weight_decay"])
    for index, param in enumerate(group["params"]):
        check_param(param, param_name(group, index))
        if group["capturable"]:
            check_capturable_lr(group["lr"], param.device)
