"""Recognise an optimizer whose parameters the model no longer uses, which torch would let pass in silence."""

from __future__ import annotations

import gc
from collections.abc import Iterable

import torch
from torch import Tensor

from .dtensor import DTensor
from .fsdp1 import is_flattened


def sharded_after_construction(params: list[Tensor]) -> bool:
    """Whether sharding the model replaced some of ``params`` after they were given to the optimizer.

    ``fully_shard`` and ``parallelize_module`` put new DTensor parameters into the module, ``FullyShardedDataParallel`` (unless with
    ``use_orig_params=True``) new flat ones. They leave no trace on the old ones, which then never receive a gradient. So it is
    recognised from the other side: a live module has such a parameter with a gradient, which the optimizer does not hold, and which
    stands for a parameter whose global shape is that of one of ``params`` that has no gradient and is in no module any more.
    """
    if not _seem_replaced(params):
        return False
    gc.collect()  # was it a module that is gone, but for the collector?
    return _seem_replaced(params)


def _seem_replaced(params: list[Tensor]) -> bool:
    held = {id(param) for param in params}
    in_modules: set[int] = set()
    replaced: set[tuple[int, ...]] = set()  # shapes
    for module in gc.get_objects():
        if not issubclass(
            type(module), torch.nn.Module
        ):  # isinstance would run code of proxies and lazy modules
            continue
        for param in module.__dict__.get("_parameters", {}).values():
            if param is None:
                continue
            in_modules.add(id(param))
            if id(param) not in held and param.grad is not None:
                replaced.update(map(tuple, _shapes_replaced_by(param)))
    return any(
        isinstance(param, torch.nn.Parameter)  # others were in no module before either
        and param.grad is None
        and param.requires_grad
        and id(param) not in in_modules
        and not isinstance(param, DTensor)
        and not is_flattened(param)
        and tuple(param.shape) in replaced
        for param in params
    )


def _shapes_replaced_by(param: Tensor) -> Iterable[tuple[int, ...]]:
    """The shapes of the parameters in whose place ``param`` came when the model was sharded."""
    if isinstance(param, DTensor):
        return (tuple(param.shape),)
    if is_flattened(param):
        return getattr(
            param, "_shapes", ()
        )  # of a flat parameter; the original parameters in it, where they live on, have none
    return ()
