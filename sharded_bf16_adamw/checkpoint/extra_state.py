"""Extra states of modules, quantised tensors, and optimizer state that has no parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..names import clean_fqn, unwrap
from ..sharding.dtensor import to_local
from .chunk_table import ChunkTable
from .manifest import Manifest, decode

MODEL, STATE, ENTRY = "model.", "optimizer.state.", "optimizer.entry."  # prefixes of keys
PART = ":"  # between a quantised tensor's key and the name of a part: model.layer.weight:scale
EXTRA_STATE = "_extra_state"
_MAX_ENTRY_NUMEL = 1024  # elements of a tensor in the manifest

# ------------------------------------------------------------------ wrapper subclasses (quantised)


def is_wrapper_subclass(tensor: Any) -> bool:
    """Return True for a tensor made of other tensors, such as torchao's, but not for a DTensor."""
    return is_traceable_wrapper_subclass(tensor) and not isinstance(tensor, DTensor)


def flatten_subclass(key: str, tensor: Any) -> dict[str, Any]:
    """Flatten a wrapper subclass: ``{"model.w:data": ..., "model.w:scale": ...}``.

    The parts share the tensor's memory, so a load fills the tensor in place. Any other value is
    returned unchanged.

    Raises:
        ValueError: the tensor is a DTensor of a wrapper subclass, whose parts are not shards.
    """
    if isinstance(tensor, DTensor) and is_wrapper_subclass(to_local(tensor)):
        raise ValueError(
            f"{key.removeprefix(MODEL)} is a DTensor of {type(to_local(tensor)).__name__}, whose "
            "shards cannot be saved or loaded; leave the quantised module out of fully_shard"
        )
    if not is_wrapper_subclass(tensor):
        return {key: drop_subclass(tensor)}
    names, _ = tensor.__tensor_flatten__()
    parts: dict[str, Any] = {}
    for name in names:
        parts.update(flatten_subclass(f"{key}{PART}{name}", getattr(tensor, name)))
    return parts


def drop_subclass(tensor: Any) -> Any:
    """Return a plain tensor that shares the memory of ``tensor``.

    A file with a user's class in it could not be loaded without executing code.
    """
    if (
        not isinstance(tensor, Tensor)
        or type(tensor) in (Tensor, nn.Parameter, DTensor, ShardedTensor)
        or is_wrapper_subclass(tensor)
    ):
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach().as_subclass(Tensor)


# ------------------------------------------------------------------------------------ extra states


def is_extra_state(key: str) -> bool:
    """Return True if ``key`` holds a result of ``nn.Module.get_extra_state``."""
    # A checkpoint may add the rank: _extra_state@pp0.
    return key.rpartition(".")[2].partition("@")[0] == EXTRA_STATE


def set_extra_states(model: nn.Module, states: dict[str, Any]) -> None:
    """Call ``set_extra_state`` of each module that has a state in ``states``."""
    model = unwrap(model)
    for prefix, module in model.named_modules():
        key = clean_fqn(model, f"{prefix}.{EXTRA_STATE}" if prefix else EXTRA_STATE)
        if key in states and type(module).get_extra_state is not nn.Module.get_extra_state:
            module.set_extra_state(states[key])


# ------------------------------------------------ entries of optimizer.state without a parameter


def entry_key(name: Any, entry: Any) -> str:
    """Return the key of an entry of ``optimizer.state`` that belongs to no parameter.

    Raises:
        ValueError: a manifest cannot hold the entry.
    """
    if not isinstance(name, str):
        raise ValueError(
            f"optimizer.state has an entry under {name!r}, which cannot be saved; use a string as "
            "its key"
        )
    numel = _max_numel(entry)
    if numel > _MAX_ENTRY_NUMEL:
        raise ValueError(
            f"optimizer.state[{name!r}] belongs to no parameter and holds a tensor of {numel} "
            "elements, which cannot be saved; keep it in a buffer of the model"
        )
    return ENTRY + name


def _max_numel(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel()
    items = value.values() if isinstance(value, dict) else value
    return max(map(_max_numel, items if isinstance(value, (dict, list, tuple)) else ()), default=0)


# ----------------------------------------------------------------------------------------- loading


def adopt_saved_specs(
    tensors: dict[str, Any], plain: dict[str, Any], table: ChunkTable, manifest: Manifest
) -> None:
    """Adapt extra states, and entries without a parameter, to the kind and size that were saved.

    Args:
        tensors: the model's and optimizer's tensors by key; changed in place.
        plain: the model's and optimizer's other values by key; changed in place.
        table: the checkpoint's tensors.
        manifest: the checkpoint's manifest.
    """
    for key in [key for key in (*tensors, *plain) if key.startswith(MODEL) and is_extra_state(key)]:
        entry = table.tensors.get(key)
        if entry is not None:
            plain.pop(key, None)
            tensors[key] = torch.empty(entry.size, dtype=entry.properties.dtype, device="cpu")
        elif key in manifest.values:
            tensors.pop(key, None)
            plain[key] = decode(manifest.values[key])
    for key in [key for key in plain if key.startswith(ENTRY) and key not in manifest.values]:
        del plain[key]  # not saved, so the optimizer keeps its entry
    entries = {key: value for key, value in manifest.values.items() if key.startswith(ENTRY)}
    plain.update({key: decode(value) for key, value in entries.items()})
