"""Detection of an optimizer whose parameters the model no longer uses."""

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
    ``FullyShardedDataParallel(use_orig_params=False)`` puts flat parameters. The old ones carry no
    trace of that, and never get a gradient again. One of ``params`` counts as replaced if it is in
    no module and has no gradient, and if a sharded parameter of the same global shape, which the
    optimizer does not hold, is in a module and has a gradient.
    """
    if not (seem_replaced := _seem_replaced(params)):
        return seem_replaced
    gc.collect()  # the sharded parameter may be in a dead module
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
        # Only flat parameters have _shapes; use_orig_params=True replaces no parameter.
        return getattr(param, "_shapes", ())
    return ()
