"""Fully qualified names (FQNs) of the plain model, whatever wraps it or its parts, in whatever order.

Wrappers put segments into names: DDP ``module``, ``torch.compile`` ``_orig_mod``, activation checkpointing
``_checkpoint_wrapped_module``, FSDP1 ``_fsdp_wrapped_module``. A name is cleaned by a walk over the modules: a segment is a
wrapper's only where that module *is* such a wrapper, so that a user's own submodule may be called ``module``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

DDP, COMPILE, CHECKPOINT, FSDP1 = (
    "module",
    "_orig_mod",
    "_checkpoint_wrapped_module",
    "_fsdp_wrapped_module",
)
FABRIC, _FABRIC_ORIGINAL = "_forward_module", "_original_module"


def plain_name(model: nn.Module, name: str) -> str:
    """Return the FQN that a parameter, buffer or state dict key has in the plain model.

    Args:
        model: the module, wrapped or not.
        name: from ``model.named_parameters()``, ``model.state_dict()`` or FSDP1; segments of wrappers may be missing already.

    Example::

        >>> plain_name(torch.compile(checkpoint_wrapper(model)), "_orig_mod._checkpoint_wrapped_module.layer.weight")
        'layer.weight'
    """
    kept = []
    module: nn.Module | None = model
    for segment in name.split("."):
        while module is not None and (wrapper := _segment_of_wrapper(module)) is not None:
            is_original = wrapper == FABRIC and segment == _FABRIC_ORIGINAL
            module = module._modules[segment if is_original else wrapper]
            if segment == wrapper or is_original:
                break
        else:
            kept.append(segment)
            module = None if module is None else module._modules.get(segment)
    return ".".join(kept)


def state_dict_key(model: nn.Module, name: str) -> str:
    """Return the key in ``unwrapped(model).state_dict()`` of a tensor of the plain model. Inverse of :func:`plain_name`.

    The hooks of activation checkpointing and of FSDP1 take their segments out of these keys, and FSDP1 out of the names in
    optimizer states; the segments of the other wrappers stay.
    """
    kept = []
    module: nn.Module | None = unwrapped(model)
    for segment in name.split("."):
        while module is not None and (wrapper := _segment_of_wrapper(module)) is not None:
            module = module._modules[wrapper]
            if wrapper in (DDP, COMPILE):
                kept.append(wrapper)
        kept.append(segment)
        module = None if module is None else module._modules.get(segment)
    return ".".join(kept)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield each parameter and buffer under each of its names, as modules hold it: tied ones several times."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def flat_params(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield each flat parameter of FSDP1, after what the names within it are prefixed by."""
    for prefix, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel) and module._handle is not None:
            yield f"{prefix}." if prefix else "", module._handle.flat_param


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module without the outermost wrappers of Lightning Fabric, of activation checkpointing and of compilation.

    Fabric's holds the same parameters under two names, and activation checkpointing's has a ``named_parameters()`` that leads
    FSDP1's code to drop the segment of a user's submodule that is called ``module``.
    """
    while (wrapper := _segment_of_wrapper(model)) in (FABRIC, CHECKPOINT, COMPILE):
        model = model._modules[wrapper]  # type: ignore[assignment]
    return model


def _is_fabrics(module: nn.Module) -> bool:
    """Return whether it is Lightning Fabric's wrapper, which has the module as its strategy wraps it, the plain one, and nothing else."""
    if module._modules.get(FABRIC) is None:
        return False
    return {*module._modules, *module._parameters, *module._buffers} <= {FABRIC, _FABRIC_ORIGINAL}


def _segment_of_wrapper(module: nn.Module) -> str | None:
    """Return the segment that a wrapper puts into names; None if the module is no wrapper."""
    dynamo: Any = sys.modules.get(
        "torch._dynamo.eval_frame"
    )  # slow to import, and unless it was, nothing is compiled
    for segment, kind in (
        (DDP, DistributedDataParallel),
        (FSDP1, FullyShardedDataParallel),
        (CHECKPOINT, ActivationWrapper),
        (COMPILE, None if dynamo is None else dynamo.OptimizedModule),
    ):
        if kind is not None and isinstance(module, kind) and segment in module._modules:
            return segment
    return FABRIC if _is_fabrics(module) else None


def has_fsdp1(model: nn.Module) -> bool:
    """Return whether FSDP1 wraps any of the model. What torch then gives as its state are copies, not the live tensors."""
    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
