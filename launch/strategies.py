"""How a model is spread over ranks. To add a strategy, write its functions and name them in ``STRATEGIES``; nothing else changes.

A model passes through a strategy in this order, on every rank::

    model on the meta device -> shard -> memory is allocated, weights are initialised -> wrap -> optimizer
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from data import UsageError
from model import GPT, Block
from tensor_parallel import parallelize
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sharded_bf16_adamw import AdamW_BF16, ZeRO


@dataclass(frozen=True)
class Strategy:
    """The places where strategies differ.

    Attributes:
        shard: replaces parameters by shards, before they have memory.
        wrap: returns the module to call, once there are weights; its parameters are the optimizer's.
        no_sync: from the wrapped module and its optimizer to a context in which gradients are accumulated and not reduced over ranks, for
            all micro-batches of a step but the last.
        sharding: what AdamW_BF16 is to shard by itself, of a model that is whole on every rank.
        mesh_shape: from the number of ranks to the size of each mesh dimension by its name. The ranks along "tensor" see the same rows
            of a batch, all others have rows of their own.
    """

    shard: Callable[[GPT, DeviceMesh], None]
    wrap: Callable[[GPT, DeviceMesh], nn.Module]
    no_sync: Callable[[nn.Module, torch.optim.Optimizer], AbstractContextManager[None]]
    sharding: Callable[[DeviceMesh], ZeRO | None] = lambda mesh: None
    mesh_shape: Callable[[int], dict[str, int]] = lambda ranks: {"data": ranks}


def _no_shard(model: GPT, mesh: DeviceMesh) -> None:
    """Every rank holds all parameters."""


def _no_wrap(model: GPT, mesh: DeviceMesh) -> nn.Module:
    return model


def _never_syncs(
    module: nn.Module, optimizer: torch.optim.Optimizer
) -> AbstractContextManager[None]:
    """There is nobody to reduce with."""
    return nullcontext()


def _wrappers_no_sync(
    module: nn.Module, optimizer: torch.optim.Optimizer
) -> AbstractContextManager[None]:
    """DDP and FSDP1 have one: gradients accumulate in the dtype of the weights."""
    return module.no_sync()  # type: ignore[operator]


def _ddp_wrap(model: GPT, mesh: DeviceMesh) -> nn.Module:
    return nn.parallel.DistributedDataParallel(
        model, device_mesh=mesh, gradient_as_bucket_view=True
    )


def _fsdp2_shard(model: GPT, mesh: DeviceMesh) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(
        reduce_dtype=torch.float32
    )  # bf16 sums over many ranks and micro-batches would lose bits
    for module in (*model.blocks, model):
        # By default the root would stay gathered after an evaluation, and torch's checkpoint code would not know its parameters.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


@contextmanager
def _fsdp2_no_sync(module: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Gradients accumulate whole, in the policy's ``reduce_dtype``."""
    module.set_requires_gradient_sync(False)  # type: ignore[operator]
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)  # type: ignore[operator]


def _zero1(mesh: DeviceMesh) -> ZeRO:
    return ZeRO(mesh, stage=1)


def _zero2(mesh: DeviceMesh) -> ZeRO:
    return ZeRO(
        mesh, stage=2, reduce_dtype=torch.float32, accumulate_dtype=torch.float32
    )  # for the reason given for FSDP


def _zero2_no_sync(
    module: nn.Module, optimizer: torch.optim.Optimizer
) -> AbstractContextManager[None]:
    """Gradients accumulate whole, in ``accumulate_dtype``."""
    assert isinstance(optimizer, AdamW_BF16)
    return optimizer.no_sync()


def _fsdp1_wrap(model: GPT, mesh: DeviceMesh) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it is deprecated, and used all the same
        warnings.filterwarnings("ignore", "FSDP is switching to use `NO_SHARD`")  # on one process
        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({Block}),
            mixed_precision=MixedPrecision(
                reduce_dtype=torch.float32
            ),  # for the reason given for FSDP2
            device_mesh=mesh,
            device_id=torch.device(mesh.device_type, torch.cuda.current_device())
            if mesh.device_type == "cuda"
            else torch.device("cpu"),
            use_orig_params=True,
        )


def _tensor_parallel_shard(model: GPT, mesh: DeviceMesh) -> None:
    parallelize(model, mesh)


def _fsdp2_tensor_parallel_shard(model: GPT, mesh: DeviceMesh) -> None:
    parallelize(model, mesh["tensor"])
    _fsdp2_shard(model, mesh["data"])


def _in_pairs(first: str, first_is_two: bool, second: str) -> Callable[[int], dict[str, int]]:
    """A mesh of two dimensions, one of which has two ranks."""

    def shape(ranks: int) -> dict[str, int]:
        if ranks % 2:
            raise UsageError(
                f"this --strategy arranges the processes in pairs, which {ranks} cannot be: start an even number of them."
            )
        return {first: 2 if first_is_two else ranks // 2, second: ranks // 2 if first_is_two else 2}

    return shape


STRATEGIES = {
    "single": Strategy(_no_shard, _no_wrap, _never_syncs),
    "ddp": Strategy(_no_shard, _ddp_wrap, _wrappers_no_sync),
    "fsdp1": Strategy(_no_shard, _fsdp1_wrap, _wrappers_no_sync),
    "fsdp2": Strategy(_fsdp2_shard, _no_wrap, _fsdp2_no_sync),
    "hsdp": Strategy(
        _fsdp2_shard, _no_wrap, _fsdp2_no_sync, mesh_shape=_in_pairs("replicate", True, "shard")
    ),
    "tp": Strategy(
        _tensor_parallel_shard, _no_wrap, _never_syncs, mesh_shape=lambda ranks: {"tensor": ranks}
    ),
    "fsdp2+tp": Strategy(
        _fsdp2_tensor_parallel_shard,
        _no_wrap,
        _fsdp2_no_sync,
        mesh_shape=_in_pairs("data", False, "tensor"),
    ),
    "zero1": Strategy(_no_shard, _ddp_wrap, _wrappers_no_sync, _zero1),
    "zero2": Strategy(_no_shard, _no_wrap, _zero2_no_sync, _zero2),
}


@dataclass(frozen=True)
class World:
    """The processes that train together. ``ranks`` of them share each batch evenly, in sets of ``same_rows`` that have the same rows."""

    rank: int
    ranks: int
    device: torch.device
    same_rows: int = 1

    def mesh(self, shape: dict[str, int] | None = None) -> DeviceMesh:
        """All ranks in the dimensions of a strategy's ``mesh_shape``, or in one."""
        shape = shape or {"data": self.ranks}
        return init_device_mesh(
            self.device.type, tuple(shape.values()), mesh_dim_names=tuple(shape)
        )

    @property
    def rows(self) -> slice:
        """This rank's rows of a batch."""
        return slice(self.rank // self.same_rows, None, self.ranks // self.same_rows)


def init_world(device: str) -> World:
    """Join the processes that torchrun started, or be a world of one; NCCL between GPUs, gloo between CPUs.

    Args:
        device: "cpu", "cuda", or "auto" for CUDA where there is a GPU for every process of this machine.

    Raises:
        UsageError: "cuda" was asked for and there are too few GPUs.
    """
    local_rank, local_ranks = (
        int(os.environ.get("LOCAL_RANK", 0)),
        int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
    )
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
