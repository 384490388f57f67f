"""The strategy that leaves all communication to torch."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..torch_types import is_dtensor
from .base import Caller
from .dtensor import local_grad, replica_groups, shard_groups, to_local

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class TorchManaged:
    """The strategy for one process, DDP, FSDP, HSDP and tensor parallelism."""

    def add_params(self, params: list[Tensor], names: list[str]) -> None:
        """Do nothing."""

    def reduce_grads(self, caller: Caller = Caller.STEP) -> None:
        """Do nothing: the model's wrapper reduces gradients in the backward pass."""

    def grads(self, params: list[Tensor]) -> list[Any]:
        return [param.grad for param in params]

    def local_grads(self, params: list[Tensor]) -> list[Tensor]:
        return [local_grad(param) for param in params]

    def all_gather_params(self) -> None:
        """Do nothing: the model's wrapper all-gathers weights when it needs them."""

    def wait_for_params(self) -> None:
        """Do nothing: the model's wrapper waits for its weights."""

    def clear_grads(self) -> None:
        """Do nothing: all gradients are in ``param.grad``."""

    def shard(self, param: Tensor) -> Tensor:
        return param

    def shard_state(self, param: Tensor, value: Tensor, what: str) -> Tensor:
        if not is_dtensor(value):
            if not is_dtensor(param):
                return value
            # A plain state_dict: every rank holds the full tensor.
            from torch.distributed.tensor import distribute_tensor

            mesh, placements = param.device_mesh, param.placements
            return distribute_tensor(value, mesh, placements, src_data_rank=None).to(param.device)
        if not is_dtensor(param):
            raise ValueError(
                f"{what} is a shard but the parameter is not sharded; load what ZeRO or FSDP "
                "sharded with sharded_bf16_adamw.load or with "
                "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
            )
        if not _have_same_sharding(value, param):
            raise ValueError(
                f"{what} is sharded differently from the parameter ({value.placements} and "
                f"{param.placements}); load it with sharded_bf16_adamw.load or with "
                "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
            )
        return value

    def shard_groups(self, param: Tensor) -> tuple[dist.ProcessGroup, ...]:
        return shard_groups(param)

    def replica_groups(self, param: Tensor) -> tuple[dist.ProcessGroup, ...]:
        return replica_groups(param)

    def weight_replica_groups(self, param: Tensor) -> tuple[dist.ProcessGroup, ...]:
        return replica_groups(param)

    def no_sync(self) -> AbstractContextManager[None]:
        raise RuntimeError(
            "no_sync() of the optimizer is for ZeRO stage 2; otherwise the model's wrapper reduces "
            "gradients, so use no_sync() of DDP and FSDP1, or set_requires_gradient_sync(False) of "
            "FSDP2"
        )

    def check_picklable(self) -> None:
        """Do nothing: this strategy holds no process group."""


def _have_same_sharding(a: DTensor, b: DTensor) -> bool:
    """Return whether each rank holds the same elements of both, whatever their meshes' names."""
    return (
        a.placements == b.placements
        and torch.equal(a.device_mesh.mesh, b.device_mesh.mesh)
        and to_local(a).shape == to_local(b).shape
    )
