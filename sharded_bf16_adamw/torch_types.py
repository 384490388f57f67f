"""Type checks for classes whose modules are slow to import: DTensor's takes a second.

An object cannot be of a class that nobody has imported, so these functions import nothing.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

_dtensor: Any = None  # the class, cached because each step checks each tensor


def is_dtensor(x: object) -> TypeGuard[DTensor]:
    """Return whether ``x`` is a DTensor."""
    return isinstance(x, _dtensor or _find_dtensor())


def is_fsdp1(x: object) -> TypeGuard[FullyShardedDataParallel]:
    """Return whether ``x`` is a module wrapped by ``FullyShardedDataParallel``."""
    return isinstance(x, _find("torch.distributed.fsdp", "FullyShardedDataParallel"))


def is_fsdp2(x: object) -> TypeGuard[FSDPModule]:
    """Return whether ``x`` is a module sharded by ``fully_shard``."""
    return isinstance(x, _find("torch.distributed.fsdp", "FSDPModule"))


def is_compiled(x: object) -> bool:
    """Return whether ``x`` is a module that ``torch.compile`` returned."""
    return isinstance(x, _find("torch._dynamo.eval_frame", "OptimizedModule"))


def _find_dtensor() -> Any:
    global _dtensor
    found = _find("torch.distributed.tensor", "DTensor")
    _dtensor = found or None
    return found


def _find(module_name: str, class_name: str) -> Any:
    """Return the class, or an empty tuple if it is not imported."""
    # A module that another thread is importing lacks the class.
    return getattr(sys.modules.get(module_name), class_name, ())
