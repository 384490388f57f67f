"""Parallelism strategies. To add one, write its functions and register it in ``STRATEGIES``.

Every rank applies the steps of a strategy in this order::

    model on the meta device -> shard -> allocate, initialize weights -> wrap -> optimizer
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from sharded_bf16_adamw import AdamW_BF16, ZeRO
from training.errors import UsageError
from training.model import GPT
from training.tensor_parallel import parallelize


@dataclass(frozen=True)
class Strategy:
    """The functions in which strategies differ.

    Attributes:
        shard: replaces parameters by shards, before memory is allocated.
        wrap: takes the initialized model; returns the wrapped model, which is the one to call.
        no_sync: takes the wrapped model and its optimizer; returns a context for all micro-batches
            but the last, in which gradients accumulate without being reduced.
        sharding: takes the mesh; returns AdamW_BF16's ``sharding`` argument, None except for ZeRO.
        mesh_shape: takes the world size; returns the size of each mesh dimension by name. Ranks
            that differ only along "tensor" get the same sequences, other ranks different ones.
    """

    shard: Callable[[Any, DeviceMesh], None]
    wrap: Callable[[nn.Module, DeviceMesh], nn.Module]
    no_sync: Callable[[nn.Module, torch.optim.Optimizer], AbstractContextManager[None]]
    sharding: Callable[[DeviceMesh], ZeRO | None] = lambda mesh: None
    mesh_shape: Callable[[int], dict[str, int]] = lambda world_size: {"data": world_size}


def _layers(model: nn.Module) -> Iterable[nn.Module]:
    """Return the model's layers, the FSDP units: the modules of its first ModuleList."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return next(lists, ())


def _no_shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Leave all parameters replicated."""


def _no_wrap(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return model


def _nothing_to_sync(
    wrapped_model: nn.Module, optimizer: torch.optim.Optimizer
) -> AbstractContextManager[None]:
    return nullcontext()


def _module_no_sync(
    wrapped_model: nn.Module, optimizer: torch.optim.Optimizer
) -> AbstractContextManager[None]:
    """Return the no_sync() of DDP or FSDP1, which accumulates in the dtype of the weights."""
    return wrapped_model.no_sync()  # type: ignore[operator]


def _ddp_wrap(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    ddp = nn.parallel.DistributedDataParallel
    return ddp(model, device_mesh=mesh, gradient_as_bucket_view=True)


def _fsdp2_shard(model: nn.Module, mesh: DeviceMesh) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # bf16 sums over many ranks and micro-batches would lose bits.
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for module in (*_layers(model), model):
        # By default the root stays unsharded after an evaluation, and torch's checkpoint code
        # does not recognize its parameters.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


@contextmanager
def _fsdp2_no_sync(wrapped_model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Accumulate unsharded gradients, in the policy's ``reduce_dtype``."""
    wrapped_model.set_requires_gradient_sync(False)  # type: ignore[operator]
    try:
        yield
    finally:
        wrapped_model.set_requires_gradient_sync(True)  # type: ignore[operator]


def _zero1(mesh: DeviceMesh) -> ZeRO:
    return ZeRO(mesh, stage=1)


def _zero2(mesh: DeviceMesh) -> ZeRO:
    # float32 for the same reason as in _fsdp2_shard
    return ZeRO(mesh, stage=2, reduce_dtype=torch.float32, accumulate_dtype=torch.float32)


def _zero2_no_sync(
    wrapped_model: nn.Module, optimizer: torch.optim.Optimizer
) -> AbstractContextManager[None]:
    """Accumulate unsharded gradients, in ``accumulate_dtype``."""
    assert isinstance(optimizer, AdamW_BF16)
    return optimizer.no_sync()


def _fsdp1_wrap(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    device = torch.device("cpu")
    if mesh.device_type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # FSDP1 is deprecated, but still in use
        warnings.filterwarnings("ignore", "FSDP is switching to use `NO_SHARD`")  # one rank
        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({type(layer) for layer in _layers(model)}),
            mixed_precision=MixedPrecision(reduce_dtype=torch.float32),  # as in _fsdp2_shard
            device_mesh=mesh,
            device_id=device,
            use_orig_params=True,
        )


def _tensor_parallel_shard(model: GPT, mesh: DeviceMesh) -> None:
    parallelize(model, mesh)


def _fsdp2_tensor_parallel_shard(model: GPT, mesh: DeviceMesh) -> None:
    parallelize(model, mesh["tensor"])
    _fsdp2_shard(model, mesh["data"])


def _half(world_size: int) -> int:
    if world_size % 2:
        raise UsageError(
            f"this --strategy needs an even number of processes, not {world_size}: start an even "
            "number of them."
        )
    return world_size // 2


STRATEGIES = {
    "single": Strategy(_no_shard, _no_wrap, _nothing_to_sync),
    "ddp": Strategy(_no_shard, _ddp_wrap, _module_no_sync),
    "fsdp1": Strategy(_no_shard, _fsdp1_wrap, _module_no_sync),
    "fsdp2": Strategy(_fsdp2_shard, _no_wrap, _fsdp2_no_sync),
    "hsdp": Strategy(
        _fsdp2_shard,
        _no_wrap,
        _fsdp2_no_sync,
        mesh_shape=lambda world_size: {"replicate": 2, "shard": _half(world_size)},
    ),
    "tp": Strategy(
        _tensor_parallel_shard,
        _no_wrap,
        _nothing_to_sync,
        mesh_shape=lambda world_size: {"tensor": world_size},
    ),
    "fsdp2+tp": Strategy(
        _fsdp2_tensor_parallel_shard,
        _no_wrap,
        _fsdp2_no_sync,
        mesh_shape=lambda world_size: {"data": _half(world_size), "tensor": 2},
    ),
    "zero1": Strategy(_no_shard, _ddp_wrap, _module_no_sync, _zero1),
    "zero2": Strategy(_no_shard, _no_wrap, _zero2_no_sync, _zero2),
}
