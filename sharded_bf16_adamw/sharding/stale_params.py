"""Detection of an optimizer whose parameters the model no longer uses; torch has no such check."""

from __future__ import annotations

import gc
from collections.abc import Iterable

import torch
from torch import Tensor

from ..torch_types import is_dtensor
from .fsdp1 import is_flattened


def sharded_after_construction(params: list[Tensor]) -> bool | None:
    """Return whether sharding the model replaced some of the optimizer's ``params``.

    None if that is unknown, because no module has a gradient yet.

    ``fully_shard`` and ``parallelize_module`` put new DTensor parameters into the module,
    ``FullyShardedDataParallel`` (unless with ``use_orig_params=True``) new flat parameters. The old
    parameters have no trace of that, and never receive a gradient again. So the search starts from
    new parameters: in a live module, with a gradient, not the optimizer's. One of these must have
    the global shape of one of ``params`` that has no gradient and is in no module any more.
    """
    if not (seem_replaced := _seem_replaced(params)):
        return seem_replaced
    gc.collect()  # the parameter may be in a dead module that is not yet collected
    return _seem_replaced(params)


def _seem_replaced(params: list[Tensor]) -> bool | None:
    held = {id(param) for param in params}
    in_modules: set[int] = set()
    replaced_shapes: set[tuple[int, ...]] = set()
    any_grad = False
    for module in gc.get_objects():
        # isinstance would run code of proxies and lazy modules
        if not issubclass(type(module), torch.nn.Module):
            continue
        for param in module.__dict__.get("_parameters", {}).values():
            if param is None:
                continue
            in_modules.add(id(param))
            if param.grad is None:
                continue
            any_grad = True
            if id(param) not in held:
                replaced_shapes.update(map(tuple, _shapes_replaced_by(param)))
    return (
        None
        if not any_grad
        else any(
            isinstance(param, torch.nn.Parameter)  # other tensors were never in a module
            and param.grad is None
            and param.requires_grad
            and id(param) not in in_modules
            and not is_dtensor(param)
            and not is_flattened(param)
            and tuple(param.shape) in replaced_shapes
            for param in params
        )
    )


def _shapes_replaced_by(param: Tensor) -> Iterable[tuple[int, ...]]:
    """Return the shapes of the parameters that ``param`` replaced when the model was sharded."""
    if is_dtensor(param):
        return (tuple(param.shape),)
    if is_flattened(param):
        # A flat parameter has this; original parameters that stay in the module do not.
        return getattr(param, "_shapes", ())
    return ()
