"""Recognise an optimizer whose parameters the model no longer uses, which torch would let pass in silence."""

from __future__ import annotations

import gc

import torch
from torch import Tensor

from .local import DTensor


def sharded_after_construction(params: list[Tensor]) -> bool:
    """Whether ``fully_shard`` or ``parallelize_module`` replaced some of ``params`` after they were given to the optimizer.

    Both put new DTensor parameters into the module and leave no trace on the old ones, which then never receive a gradient. So it is
    recognised from the other side: a live module has a DTensor parameter with a gradient, which the optimizer does not hold, and whose
    global shape is that of one of ``params`` without a gradient.
    """
    held = {id(param) for param in params}
    starved = {tuple(param.shape) for param in params if param.grad is None and param.requires_grad and not isinstance(param, DTensor)}
    return any(
        isinstance(param, DTensor) and id(param) not in held and param.grad is not None and tuple(param.shape) in starved
        for module in gc.get_objects()
        if issubclass(type(module), torch.nn.Module)  # isinstance would run code of proxies and lazy modules
        for param in module.__dict__.get("_parameters", {}).values()
    )
