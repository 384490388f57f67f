"""The processes that train together, their collectives, and errors that all of them raise."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from training.errors import UsageError
from training.rendezvous import join_process_group, local_rank


@dataclass(frozen=True)
class World:
    """The processes that train together.

    Each group of ``tp_size`` consecutive ranks gets the same sequences of a batch; the
    ``dp_size`` groups share the batch evenly.
    """

    rank: int
    size: int
    device: torch.device
    tp_size: int = 1

    @property
    def dp_size(self) -> int:
        return self.size // self.tp_size

    def mesh(self, shape: dict[str, int] | None = None) -> DeviceMesh:
        """Return a mesh of all ranks with the given ``mesh_shape``; by default one-dimensional."""
        shape = shape or {"data": self.size}
        names = tuple(shape)
        return init_device_mesh(self.device.type, tuple(shape.values()), mesh_dim_names=names)

    @property
    def batch_slice(self) -> slice:
        """The sequences of a batch that this rank trains on."""
        return slice(self.rank // self.tp_size, None, self.dp_size)


def init_world(device: str) -> World:
    """Join the processes that torchrun started, or initialize a world of this process alone.

    The backend is NCCL for GPUs and gloo for CPUs.

    Args:
        device: "cpu", "cuda", or "auto": CUDA if there is a GPU for each process of this machine,
            else the CPU.

    Raises:
        UsageError: ``device`` is "cuda" and there are too few GPUs.
    """
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    gpus = torch.cuda.device_count()
    if device == "cuda" and gpus < local_world_size:
        raise UsageError(
            f"--device cuda needs a GPU for each of the {local_world_size} processes, "
            f"but {gpus} were found: start fewer processes or use --device cpu."
        )
    if device == "auto":
        device = "cuda" if gpus >= local_world_size else "cpu"
    rank_device = torch.device(device, local_rank()) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(rank_device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        join_process_group(backend)
    return World(dist.get_rank(), dist.get_world_size(), rank_device)


def call_on_all_ranks(function: Callable[..., Any], *args: Any) -> Any:
    """Call ``function(*args)`` on every rank; raise a UsageError of one rank on all. Collective.

    A rank that raised alone would leave the others blocked in the next collective.
    """
    result, message = None, None
    try:
        result = function(*args)
    except UsageError as error:
        message = str(error)
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    for found in messages:
        if found is not None:
            raise UsageError(found)
    return result


def call_on_rank_0_only(function: Callable[..., Any], *args: Any) -> Any:
    """Call ``function(*args)`` on rank 0; return None on the others. Collective.

    Raise a UsageError of rank 0 on all ranks.
    """
    return call_on_all_ranks(*((function, *args) if dist.get_rank() == 0 else (lambda: None,)))


def call_on_rank_0(function: Callable[..., Any], *args: Any) -> Any:
    """Call ``function(*args)`` on rank 0, and return its result on every rank. Collective.

    Raise a UsageError of rank 0 on all ranks. Files are looked up this way, because other ranks
    may see an older state of a network file system.
    """
    result = [call_on_rank_0_only(function, *args)]
    dist.broadcast_object_list(result, src=0)
    return result[0]


def all_reduce_mean(world: World, *values: Tensor | float) -> list[float]:
    """Return the mean over the ranks of each 0-dim value. Collective."""
    stacked = torch.stack(
        [torch.as_tensor(v, dtype=torch.float64, device=world.device) for v in values]
    )
    dist.all_reduce(stacked)
    return (stacked / world.size).tolist()


def true_on_all_ranks(world: World, condition: bool) -> bool:
    """Return True if ``condition`` is true on every rank. Collective."""
    return all_reduce_mean(world, float(not condition)) == [0.0]


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a timer excludes earlier work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
