"""Values in models and optimizers that are no plain tensors: extra states, quantised tensors, entries of no parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..sharding.dtensor import to_local
from .manifest import Manifest, decode
from .names import plain_name, unwrapped

MODEL, ENTRY = "model.", "optimizer.entry."
PART = ":"  # model.layer.weight:scale
EXTRA_STATE = "_extra_state"
_LARGEST_ENTRY = 1024  # elements of a tensor that goes into the manifest

# ------------------------------------------------------------------------------------------- wrapper subclasses (quantised)


def is_wrapper(tensor: Any) -> bool:
    """Return whether it is a tensor made of others, as torchao's quantised ones are; DTensors are not meant."""
    return is_traceable_wrapper_subclass(tensor) and not isinstance(tensor, DTensor)


def parts_of(key: str, tensor: Any) -> dict[str, Any]:
    """Take a tensor made of others apart: ``{"model.w": Quantised(...)}`` -> ``{"model.w:data": ..., "model.w:scale": ...}``.

    The parts are the tensor's own memory, so that a load fills it in place. Any other value stays as it is.

    Raises:
        ValueError: it is a shard of such a tensor, whose parts are no shards.
    """
    if isinstance(tensor, DTensor) and is_wrapper(to_local(tensor)):
        raise ValueError(
            f"{key.removeprefix(MODEL)} is a DTensor of {type(to_local(tensor)).__name__}, whose shards cannot be saved or loaded; "
            "leave the quantised module out of fully_shard"
        )
    if not is_wrapper(tensor):
        return {key: without_subclass(tensor)}
    names, _ = tensor.__tensor_flatten__()
    parts: dict[str, Any] = {}
    for name in names:
        parts.update(parts_of(f"{key}{PART}{name}", getattr(tensor, name)))
    return parts


def without_subclass(tensor: Any) -> Any:
    """Return the same memory as a plain tensor: a file with a user's class in it could not be loaded without executing code."""
    if (
        not isinstance(tensor, Tensor)
        or type(tensor) in (Tensor, nn.Parameter, DTensor, ShardedTensor)
        or is_wrapper(tensor)
    ):
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach().as_subclass(Tensor)


# ------------------------------------------------------------------------------------------------------------- extra states


def is_extra_state(key: str) -> bool:
    """Return whether a key of a model's state dict, or of a checkpoint, holds what ``nn.Module.get_extra_state`` returned."""
    return (
        key.rpartition(".")[2].partition("@")[0] == EXTRA_STATE
    )  # a checkpoint may add the rank: _extra_state@pp0


def set_extra_states(model: nn.Module, states: dict[str, Any]) -> None:
    """Call ``set_extra_state`` of the modules that have the given keys."""
    model = unwrapped(model)
    for prefix, module in model.named_modules():
        key = plain_name(model, f"{prefix}.{EXTRA_STATE}" if prefix else EXTRA_STATE)
        if key in states and type(module).get_extra_state is not nn.Module.get_extra_state:
            module.set_extra_state(states[key])


# -------------------------------------------------------------------------------- entries of optimizer.state of no parameter


def entry_key(name: Any, entry: Any) -> str:
    """Return the key of an entry of ``optimizer.state`` that is no parameter's.

    Raises:
        ValueError: a manifest cannot hold it.
    """
    if not isinstance(name, str):
        raise ValueError(
            f"optimizer.state has an entry under {name!r}, which cannot be saved; use a string as its key"
        )
    large = _largest(entry)
    if large > _LARGEST_ENTRY:
        raise ValueError(
            f"optimizer.state[{name!r}] belongs to no parameter and holds a tensor of {large} elements, which cannot be saved; "
            "keep it in a buffer of the model"
        )
    return ENTRY + name


def _largest(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel()
    items = (
        value.values()
        if isinstance(value, dict)
        else value
        if isinstance(value, (list, tuple))
        else ()
    )
    return max(map(_largest, items), default=0)


# -------------------------------------------------------------------------------------------------------------------- loading


def adopt_saved(
    tensors: dict[str, Any], plain: dict[str, Any], metadata: Metadata, manifest: Manifest
) -> None:
    """Let a checkpoint decide on the kind and size of what it alone defines: extra states, and entries of no parameter.

    Args:
        tensors: of the model and optimizer here, by key; changed in place.
        plain: their values that are no tensors; changed in place.
    """
    for key in [key for key in (*tensors, *plain) if key.startswith(MODEL) and is_extra_state(key)]:
        entry = metadata.state_dict_metadata.get(key)
        if isinstance(entry, TensorStorageMetadata):
            plain.pop(key, None)
            tensors[key] = torch.empty(entry.size, dtype=entry.properties.dtype, device="cpu")
        elif key in manifest.values:
            tensors.pop(key, None)
            plain[key] = decode(manifest.values[key])
    for key in [key for key in plain if key.startswith(ENTRY) and key not in manifest.values]:
        del plain[key]  # stays as it is
    plain.update(
        {key: decode(value) for key, value in manifest.values.items() if key.startswith(ENTRY)}
    )
