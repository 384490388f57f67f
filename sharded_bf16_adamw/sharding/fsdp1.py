"""FSDP1 (``FullyShardedDataParallel``): which ranks share a parameter, and optimizer state in full.

FSDP1 flattens the parameters of a module into one *flat parameter* and gives each rank a piece of it. The optimizer sees that piece
(``use_orig_params=False``) or the parts of the original parameters that lie in it (``use_orig_params=True``), often none. Either way it
sees plain tensors, which do not say over which ranks the rest lies; only the *handle* inside the FSDP module knows.
"""

from __future__ import annotations

import gc
import weakref
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

_handles: Any = WeakIdKeyDictionary()  # parameter -> weak reference to the handle that flattened it
_modules: Any = (
    WeakIdKeyDictionary()
)  # handle -> weak reference to its FullyShardedDataParallel module


def is_flattened(param: Tensor) -> bool:
    """Whether FSDP1 has made ``param``, or taken it over, as (a part of) a flat parameter."""
    return getattr(param, "_fsdp_flattened", False)


def shard_group(param: Tensor) -> dist.ProcessGroup | None:
    """The process group over which FSDP1 has spread a flattened parameter; None where every rank holds all of it (``NO_SHARD``).

    With ``HYBRID_SHARD`` it is the group that shards, not the one that replicates.

    Raises:
        RuntimeError: the module that flattened it is gone, or it was sharded by tensor parallelism before.
    """
    handle = _find_handle(param)
    if handle is None:
        raise RuntimeError(
            f"a parameter of local shape {tuple(param.shape)} belongs to FullyShardedDataParallel, but no live FSDP module holds it, so "
            "the ranks that hold its other parts are unknown; keep the wrapped model alive and build AdamW_BF16 from its parameters()"
        )
    if any(extension is not None for extension in handle.flat_param._param_extensions):
        raise RuntimeError(
            "FullyShardedDataParallel over tensor-parallel parameters hides which of them are sharded over the tensor-parallel mesh, so "
            "no global gradient norm can be had; use fully_shard (FSDP2) after parallelize_module instead"
        )
    return handle.process_group if handle.uses_sharded_strategy else None


def replica_group(param: Tensor) -> dist.ProcessGroup | None:
    """Return the group of the ranks that hold the same part of a flattened parameter; None where no other rank does.

    With ``HYBRID_SHARD`` it is the group that replicates, with ``NO_SHARD`` that of all ranks of the FSDP module.
    """
    handle = _find_handle(param)
    if handle is None:
        return None
    if not handle.uses_sharded_strategy:
        return handle.process_group
    module = _modules.get(handle)
    return None if module is None else getattr(module(), "_inter_node_pg", None)


def full_optimizer_state_dict(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, cpu_offload: bool = False
) -> dict[str, Any]:
    """The whole optimizer state by parameter name, unsharded, whatever the strategy. Collective: every rank calls it.

    What ``get_optimizer_state_dict`` returns with ``StateDictOptions(full_state_dict=True)``. Its own ``cpu_offload=True`` must not be
    used with FSDP1 on CPU and ``use_orig_params=True``: all states of a parameter then share the memory of the last one gathered
    (``exp_avg`` equals ``correction``), in silence. Here everything is gathered first, into memory of its own, and moved afterwards.

    Args:
        cpu_offload: move the tensors to CPU memory and keep them on rank 0 alone; other ranks get an empty dict.

    Returns:
        ``{"state": {fqn: {"step", "exp_avg", "exp_avg_sq", "correction"}}, "param_groups": [...]}``.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    state_dict: dict[str, Any] = get_optimizer_state_dict(
        model, optimizer, options=StateDictOptions(full_state_dict=True)
    )
    if not cpu_offload:
        return state_dict
    if dist.is_initialized() and dist.get_rank() != 0:
        return {}
    for state in state_dict["state"].values():
        state.update(
            {key: value.cpu() for key, value in state.items() if isinstance(value, Tensor)}
        )
    return state_dict


def _find_handle(param: Tensor) -> Any:
    """The live ``FlatParamHandle`` of a flattened parameter, or None."""
    known = _handles.get(param)
    handle = None if known is None else known()
    if handle is None:
        _register_handles()
        known = _handles.get(param)
        handle = None if known is None else known()
    return handle


def _register_handles() -> None:
    """Look up every FSDP1 module of the process: a walk over all objects, needed once after a model was wrapped."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp._flat_param import FlatParamHandle

    for found in gc.get_objects():
        if type(found) is FlatParamHandle:
            flat_param = found.flat_param
            for param in chain(
                (flat_param,), flat_param._params or (), flat_param._shared_params or ()
            ):
                _handles[param] = weakref.ref(found)
        elif (
            issubclass(type(found), FullyShardedDataParallel)
            and found.__dict__.get("_handle") is not None
        ):
            _modules[found._handle] = weakref.ref(found)
