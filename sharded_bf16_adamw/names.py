"""Fully qualified names (FQNs) of the plain model, under every nesting of wrappers.

Wrappers add segments to names: DDP ``module``, ``torch.compile`` ``_orig_mod``, activation
checkpointing ``_checkpoint_wrapped_module``, FSDP1 ``_fsdp_wrapped_module``. A walk over the
modules removes them. A segment is only removed where the module is such a wrapper, so a user's own
submodule may be called ``module``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.nn.parallel import DistributedDataParallel

from .torch_types import is_compiled, is_fsdp1

DDP = "module"
COMPILE = "_orig_mod"
CHECKPOINT = "_checkpoint_wrapped_module"
FSDP1 = "_fsdp_wrapped_module"
FABRIC = "_forward_module"
_FABRIC_ORIGINAL = "_original_module"


def clean_fqn(model: nn.Module, name: str) -> str:
    """Return the FQN that a parameter, buffer or state dict key has in the plain model.

    Args:
        model: the module, wrapped or not.
        name: from ``model.named_parameters()``, ``model.state_dict()`` or FSDP1. Segments of
            wrappers may be missing already.

    Examples:
        >>> model = torch.compile(checkpoint_wrapper(model))
        >>> clean_fqn(model, "_orig_mod._checkpoint_wrapped_module.layer.weight")
        'layer.weight'
    """
    kept = []
    module: nn.Module | None = model
    for segment in name.split("."):
        while module is not None and (wrapper := _wrapper_segment(module)) is not None:
            is_original = wrapper == FABRIC and segment == _FABRIC_ORIGINAL
            module = module._modules[segment if is_original else wrapper]
            if segment == wrapper or is_original:
                break
        else:
            kept.append(segment)
            module = None if module is None else module._modules.get(segment)
    return ".".join(kept)


def state_dict_key(model: nn.Module, name: str) -> str:
    """Return the key in ``unwrap(model).state_dict()`` of an FQN. Inverse of :func:`clean_fqn`.

    Hooks of activation checkpointing and of FSDP1 remove their segments from these keys. FSDP1 also
    removes its segment from the names in optimizer states. Segments of other wrappers stay.
    """
    kept = []
    module: nn.Module | None = unwrap(model)
    for segment in name.split("."):
        while module is not None and (wrapper := _wrapper_segment(module)) is not None:
            module = module._modules[wrapper]
            if wrapper in (DDP, COMPILE):
                kept.append(wrapper)
        kept.append(segment)
        module = None if module is None else module._modules.get(segment)
    return ".".join(kept)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield each parameter and buffer under each of its names, tied ones several times."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def flat_params(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield each flat parameter of FSDP1, after the name prefix of its original parameters."""
    for prefix, module in model.named_modules():
        if is_fsdp1(module) and module._handle is not None:
            yield f"{prefix}." if prefix else "", module._handle.flat_param


def unwrap(model: nn.Module) -> nn.Module:
    """Remove the outermost wrappers of Lightning Fabric, activation checkpointing and compilation.

    Fabric's wrapper lists each parameter under two names. The ``named_parameters()`` of activation
    checkpointing makes FSDP1 also drop the segment of a user's submodule called ``module``.
    """
    while (wrapper := _wrapper_segment(model)) in (FABRIC, CHECKPOINT, COMPILE):
        model = model._modules[wrapper]  # type: ignore[assignment]
    return model


def has_fsdp1(model: nn.Module) -> bool:
    """Return True if FSDP1 wraps any part of the model: its states are then copies, not live."""
    return any(is_fsdp1(module) for module in model.modules())


def _wrapper_segment(module: nn.Module) -> str | None:
    """Return the segment that a wrapper adds to names, or None if the module is not a wrapper."""
    for segment, is_wrapper in (
        (DDP, isinstance(module, DistributedDataParallel)),
        (FSDP1, is_fsdp1(module)),
        (CHECKPOINT, isinstance(module, ActivationWrapper)),
        (COMPILE, is_compiled(module)),
    ):
        if is_wrapper and segment in module._modules:
            return segment
    return FABRIC if _is_fabric_wrapper(module) else None


def _is_fabric_wrapper(module: nn.Module) -> bool:
    """Return True if the module holds only a wrapped and an original module, as Fabric's does."""
    if module._modules.get(FABRIC) is None:
        return False
    return {*module._modules, *module._parameters, *module._buffers} <= {FABRIC, _FABRIC_ORIGINAL}
