"""Recognise an optimizer whose parameters the model no longer uses, which torch would let pass in silence."""

from __future__ import annotations

import gc
from collections.abc import Iterable

import torch
from torch import Tensor

from .fsdp1 import is_flattened
from .local import DTensor


def sharded_after_construction(params: list[Tensor]) -> bool:
    """Whether sharding the model replaced some of ``params`` after they were given to the optimizer.

    ``fully_shard`` and ``parallelize_module`` put new DTensor parameters into the module, ``FullyShardedDataParallel`` (unless with
    ``use_orig_params=True``) new flat ones. They leave no trace on the old ones, which then never receive a gradient. So it is
    recognised from the other side: a live module has such a parameter with a gradient, which the optimizer does not hold, and which
    stands for a parameter whose global shape is that of one of ``params`` without a gradient. A hook may have taken a gradient away, as
    ZeRO's do: of such parameters it tells nothing.
    """
    held = {id(param) for param in params}
    starved = {
        tuple(param.shape)
        for param in params
        if param.grad is None
        and param.requires_grad
        and not param._post_accumulate_grad_hooks
        and not isinstance(param, DTensor)
        and not is_flattened(param)
    }
    return any(
        tuple(shape) in starved
        for module in gc.get_objects()
        if issubclass(type(module), torch.nn.Module)  # isinstance would run code of proxies and lazy modules
        for param in module.__dict__.get("_parameters", {}).values()
        if param is not None and id(param) not in held and param.grad is not None
        for shape in _shapes_replaced_by(param)
    )


def _shapes_replaced_by(param: Tensor) -> Iterable[tuple[int, ...]]:
    """The shapes of the parameters in whose place ``param`` came when the model was sharded."""
    if isinstance(param, DTensor):
        return (tuple(param.shape),)
    if is_flattened(param):
        return getattr(param, "_shapes", ())  # of a flat parameter; the original parameters in it, where they live on, have none
    return ()
