"""How a model is spread over ranks. To add a strategy, write its functions and name them in ``STRATEGIES``; nothing else changes.

A model passes through a strategy in this order, on every rank::

    model on the meta device -> shard -> memory is allocated, weights are initialised -> wrap -> optimizer
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from data import UsageError
from model import GPT
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class Strategy:
    """The three places where strategies differ.

    Attributes:
        shard: replaces parameters by shards, before they have memory.
        wrap: returns the module to call, once there are weights; its parameters are the optimizer's.
        set_gradient_sync: whether the next backward reduces gradients over ranks (off for all but the last micro-batch).
    """

    shard: Callable[[GPT, DeviceMesh], None]
    wrap: Callable[[GPT, DeviceMesh], nn.Module]
    set_gradient_sync: Callable[[nn.Module, bool], None]


def _no_shard(model: GPT, mesh: DeviceMesh) -> None:
    """Every rank holds all parameters."""


def _no_wrap(model: GPT, mesh: DeviceMesh) -> nn.Module:
    return model


def _no_gradient_sync(module: nn.Module, on: bool) -> None:
    """There is nobody to reduce with."""


def _ddp_wrap(model: GPT, mesh: DeviceMesh) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, device_mesh=mesh, gradient_as_bucket_view=True)


def _ddp_gradient_sync(module: nn.Module, on: bool) -> None:
    module.require_backward_grad_sync = on  # type: ignore[assignment]  # what DDP's no_sync() does


def _fsdp2_shard(model: GPT, mesh: DeviceMesh) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)  # bf16 sums over many ranks and micro-batches would lose bits
    for module in (*model.blocks, model):
        # By default the root would stay gathered after an evaluation, and torch's checkpoint code would not know its parameters.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def _fsdp2_gradient_sync(module: nn.Module, on: bool) -> None:
    module.set_requires_gradient_sync(on)  # type: ignore[operator]


STRATEGIES = {
    "single": Strategy(_no_shard, _no_wrap, _no_gradient_sync),
    "ddp": Strategy(_no_shard, _ddp_wrap, _ddp_gradient_sync),
    "fsdp2": Strategy(_fsdp2_shard, _no_wrap, _fsdp2_gradient_sync),
}


@dataclass(frozen=True)
class World:
    """The processes that train together. ``ranks`` of them share each batch evenly."""

    rank: int
    ranks: int
    device: torch.device

    def mesh(self) -> DeviceMesh:
        """All ranks in one dimension."""
        return init_device_mesh(self.device.type, (self.ranks,), mesh_dim_names=("data",))


def init_world(device: str) -> World:
    """Join the processes that torchrun started, or be a world of one; NCCL between GPUs, gloo between CPUs.

    Args:
        device: "cpu", "cuda", or "auto" for CUDA where there is a GPU for every process of this machine.

    Raises:
        UsageError: "cuda" was asked for and there are too few GPUs.
    """
    local_rank, local_ranks = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device == "cuda" and torch.cuda.device_count() < local_ranks:
        raise UsageError(
            f"--device cuda needs a GPU for each of the {local_ranks} processes, but {torch.cuda.device_count()} were found: "
            "start fewer processes or use --device cpu."
        )
    if device == "auto":
        device = "cuda" if torch.cuda.device_count() >= local_ranks else "cpu"
    place = torch.device(device, local_rank) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(place)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return World(dist.get_rank(), dist.get_world_size(), place)


def on_all_ranks(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` on every rank; where it raises a UsageError on any of them, raise it on all, so that none is left waiting."""
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
