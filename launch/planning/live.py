"""Peak bytes of live tensors, and bytes sent to other ranks, in a region of code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

# Operator: (function of torch.distributed, passes over the ring, index of the tensor argument). In
# each pass, each of n ranks sends (n - 1) / n of the tensor. The argument of the functional
# all-gather is its input, 1 / n of the tensor.
COLLECTIVES = {
    "c10d.allreduce_": ("all_reduce", 2, 0),
    "c10d.broadcast_": ("broadcast", 1, 0),
    "c10d.allgather_": ("all_gather", 1, 0),
    "c10d._allgather_base_": ("all_gather_single", 1, 0),
    "c10d._reduce_scatter_base_": ("reduce_scatter_single", 1, 1),
    "c10d.alltoall_base_": ("all_to_all_single", 1, 1),
    "_c10d_functional.all_reduce": ("all_reduce", 2, 0),
    "_c10d_functional.all_gather_into_tensor": ("all_gather_single", 1, 0),
    "_c10d_functional.reduce_scatter_tensor": ("reduce_scatter_single", 1, 0),
    "_c10d_functional.all_to_all_single": ("all_to_all_single", 1, 0),
}


class Collective(NamedTuple):
    """A collective that this rank has called.

    Attributes:
        name: function of torch.distributed, by its name since torch 2.13.
        nbytes: bytes of its tensor.
        sent: bytes that this rank sends with a ring algorithm, which sends least; for a broadcast
            the mean over ranks.
        dtype: of its tensor.
    """

    name: str
    nbytes: int
    sent: float
    dtype: torch.dtype


class LiveBytes(TorchDispatchMode):
    """Counter of live storages, also on the meta device, and of collectives.

    A storage that was allocated before the context counts from its first use on.

    Attributes:
        peak: most live bytes after an operation since :meth:`reset_peak`.
        collectives: collectives called so far.

    Examples:
        >>> with LiveBytes() as live:
        ...     x = torch.ones(1024, device="meta")
        ...     y = x * 2
        >>> live.peak
        8192
    """

    def __init__(self) -> None:
        super().__init__()
        self._storages: Any = WeakIdKeyDictionary()  # bytes at the last sum
        self.peak = 0
        self.collectives: list[Collective] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(each, (DTensor, AsyncCollectiveTensor)) for each in types):
            return NotImplemented  # their operations on the wrapped tensors are counted
        name = str(function).rpartition(".")[0]
        if name in COLLECTIVES:
            self.on_collective(_collective(name, args))
        result = function(*args, **(kwargs or {}))
        has_grown = False
        for tensor in _tensors((args, kwargs, result)):
            storage = tensor.untyped_storage()
            has_grown |= storage.nbytes() > self._storages.setdefault(storage, 0)
        # The sum takes longer than most operations. Without growth it cannot exceed the last one.
        if has_grown:
            self.peak = max(self.peak, self.live_bytes)
        return result

    def on_collective(self, call: Collective) -> None:
        """Record a collective before it runs."""
        self.collectives.append(call)

    @property
    def sent_bytes(self) -> float:
        """Bytes that this rank has sent."""
        return sum(call.sent for call in self.collectives)

    @property
    def live_bytes(self) -> int:
        """Bytes of the storages that exist now."""
        for storage in list(self._storages):
            self._storages[storage] = storage.nbytes()
        return sum(self._storages.values())

    def reset_peak(self) -> None:
        self.peak = self.live_bytes


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_iter(tree) if type(leaf) in (Tensor, Parameter))


def _collective(operator: str, args: tuple[Any, ...]) -> Collective:
    name, passes, position = COLLECTIVES[operator]
    tensors = list(_tensors(args[position]))
    nbytes, ranks = sum(tensor.nbytes for tensor in tensors), _group_size(args)
    if operator == "_c10d_functional.all_gather_into_tensor":
        nbytes *= ranks
    return Collective(name, nbytes, passes * (ranks - 1) / ranks * nbytes, tensors[0].dtype)


def _group_size(args: tuple[Any, ...]) -> int:
    """Return the size of the process group among the arguments of a collective."""
    reduce_ops = ("sum", "avg", "max", "min", "product")  # strings, as names of groups are
    for arg in reversed(args):
        if isinstance(arg, str) and arg.lower() not in reduce_ops:
            name: Any = arg
            return dist.distributed_c10d._resolve_process_group(name).size()
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return dist.ProcessGroup.unbox(arg).size()
    raise AssertionError(f"no process group among {args}")
