"""The process groups of parameters of FSDP1 (``FullyShardedDataParallel``).

FSDP1 flattens the parameters of a module into one *flat parameter* and shards that. The optimizer
gets this rank's shard (``use_orig_params=False``), or the part of each original parameter in this
rank's shard, which may be empty (``use_orig_params=True``). These are plain tensors without
information about their sharding, so it is read from the *handle* inside the FSDP module.
"""

from __future__ import annotations

import gc
import weakref
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# Parameter -> weak reference to the handle that flattened it.
_handles: Any = WeakIdKeyDictionary()
# Handle -> weak reference to its FullyShardedDataParallel module.
_modules: Any = WeakIdKeyDictionary()


def is_flattened(param: Tensor) -> bool:
    """Return whether ``param`` is a flat parameter of FSDP1 or part of one."""
    return getattr(param, "_fsdp_flattened", False)


def shard_group(param: Tensor) -> dist.ProcessGroup | None:
    """Return the process group over which FSDP1 has sharded a flattened parameter.

    None with ``NO_SHARD``. With ``HYBRID_SHARD`` it is the sharding group, not the replicating one.

    Raises:
        RuntimeError: the FSDP module is gone, or it wraps tensor-parallel parameters.
    """
    handle = _find_handle(param)
    if handle is None:
        raise RuntimeError(
            f"a parameter of local shape {tuple(param.shape)} belongs to FullyShardedDataParallel, "
            "but no live FSDP module holds it, so the ranks that hold its other shards are "
            "unknown; keep the wrapped model alive and build AdamW_BF16 from its parameters()"
        )
    if any(extension is not None for extension in handle.flat_param._param_extensions):
        raise RuntimeError(
            "FullyShardedDataParallel over tensor-parallel parameters hides which of them are "
            "sharded over the tensor-parallel mesh, so the global gradient norm cannot be "
            "computed; use fully_shard (FSDP2) after parallelize_module instead"
        )
    return handle.process_group if handle.uses_sharded_strategy else None


def replica_group(param: Tensor) -> dist.ProcessGroup | None:
    """Return the group whose ranks hold replicas of this rank's shard, or None if none do.

    With ``HYBRID_SHARD`` it is the replicating group, with ``NO_SHARD`` all ranks of the module.
    """
    handle = _find_handle(param)
    if handle is None:
        return None
    if not handle.uses_sharded_strategy:
        return handle.process_group
    module = _modules.get(handle)
    return None if module is None else getattr(module(), "_inter_node_pg", None)


def unsharded_range(param: Tensor) -> tuple[torch.Size, int, int]:
    """Return where the local elements of a flattened parameter begin in the unsharded parameter.

    Returns:
        The shape and the number of elements of the unsharded parameter (a flat parameter includes
        its padding), and the flat index of the first local element.

    Raises:
        RuntimeError: see :func:`shard_group`.
    """
    group, handle = shard_group(param), _find_handle(param)
    flat = handle.flat_param
    if group is None:
        return param.shape, param.numel(), 0
    if param is flat:
        numel = group.size() * param.numel()
        return torch.Size([numel]), numel, group.rank() * param.numel()
    index = next(i for i, each in enumerate(flat._params) if each is param)
    shape = flat._shapes[index]
    return shape, shape.numel(), flat._shard_param_infos[index].intra_param_start_idx or 0


def _find_handle(param: Tensor) -> Any:
    """Return the live ``FlatParamHandle`` of a flattened parameter, or None."""
    handle = _handles[param]() if param in _handles else None
    if handle is None:
        _register_handles()
        handle = _handles[param]() if param in _handles else None
    return handle


def _register_handles() -> None:
    """Register every FSDP1 module of the process.

    Slow, because it scans all Python objects; call it only for a parameter of an unknown handle.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp._flat_param import FlatParamHandle

    for found in gc.get_objects():
        if type(found) is FlatParamHandle:
            flat = found.flat_param
            for param in chain((flat,), flat._params or (), flat._shared_params or ()):
                _handles[param] = weakref.ref(found)
        elif (
            issubclass(type(found), FullyShardedDataParallel)
            and found.__dict__.get("_handle") is not None
        ):
            _modules[found._handle] = weakref.ref(found)
