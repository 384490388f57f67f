"""The sharding that leaves all communication to torch: one process, DDP, FSDP, HSDP, tensor parallelism."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from .dtensor import local_grad, replica_groups, shard_groups, to_local


class TorchManaged:
    """This rank updates what it holds, and torch does the communication: one process, DDP, FSDP, HSDP, tensor parallelism."""

    def add_params(self, params: list[Tensor], names: list[str]) -> None:
        """Nothing to prepare."""

    def reduce_grads(self) -> None:
        """The wrapper around the model has reduced the gradients in the backward pass."""

    def grads(self, params: list[Tensor]) -> list[Any]:
        return [param.grad for param in params]

    def local_grads(self, params: list[Tensor]) -> list[Tensor]:
        return [local_grad(param) for param in params]

    def all_gather_params(self) -> None:
        """The wrapper gathers weights when it needs them."""

    def clear_grads(self) -> None:
        """It holds none."""

    def shard(self, param: Tensor) -> Tensor:
        return param

    def shard_state(self, param: Tensor, value: Tensor, what: str) -> Tensor:
        if isinstance(param, DTensor) and not isinstance(
            value, DTensor
        ):  # whole on every rank, as a plain state_dict is
            return distribute_tensor(
                value, param.device_mesh, param.placements, src_data_rank=None
            ).to(param.device)
        if isinstance(value, DTensor) and not isinstance(param, DTensor):
            raise ValueError(
                f"{what} is a shard but the parameter is whole here; load what ZeRO or FSDP sharded with sharded_bf16_adamw.load or with "
                "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
            )
        if (
            isinstance(value, DTensor)
            and isinstance(param, DTensor)
            and not _sharded_alike(value, param)
        ):
            raise ValueError(
                f"{what} is sharded otherwise than the parameter ({value.placements} and {param.placements}); load it with "
                "sharded_bf16_adamw.load or with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
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
            "no_sync() of the optimizer is for ZeRO stage 2; without it the model's wrapper reduces gradients, so use its own: "
            "no_sync() of DDP and FSDP1, set_requires_gradient_sync(False) of FSDP2"
        )

    def check_picklable(self) -> None:
        """Nothing here belongs to one process alone."""


def _sharded_alike(a: DTensor, b: DTensor) -> bool:
    """Whether each rank has the same elements of both. Dimensions of meshes may have different names."""
    return (
        a.placements == b.placements
        and torch.equal(a.device_mesh.mesh, b.device_mesh.mesh)
        and to_local(a).shape == to_local(b).shape
    )
