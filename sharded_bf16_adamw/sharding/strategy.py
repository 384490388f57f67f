"""What the optimizer asks of a sharding strategy, and the strategy that leaves all communication to torch.

A step reads *reduce, update, gather*: the strategy gives each rank the gradients of what it updates, the optimizer updates that, and
the strategy gives the new weights to whoever else needs them. There are two strategies: :class:`Local` here, and the stages of ZeRO.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from .local import local_grad, replica_groups, shard_groups, to_local


class Sharding(Protocol):
    """How one optimizer's parameters are spread over ranks.

    A parameter's *shard* is the tensor whose elements this rank updates: the parameter itself or a DTensor over its memory. States are
    sharded as the shard is.
    """

    def attach(self, params: list[Tensor], names: list[str]) -> None:
        """Take over the parameters of a new group. ``names`` are for messages."""

    def reduce(self) -> None:
        """Have the gradients of this rank's shards ready. Repeated calls before :meth:`gather` do nothing more."""

    def grads(self, params: list[Tensor]) -> list[Any]:
        """For each parameter a gradient, as far as it is here, or None where it has none (on any rank, with ZeRO)."""

    def local_grads(self, params: list[Tensor]) -> list[Tensor]:
        """The gradient of this rank's part of each parameter, all of which have one."""

    def gather(self) -> None:
        """Make the updated weights known wherever they are needed. Ends a step."""

    def clear_grads(self) -> None:
        """Forget the gradients that the strategy holds itself."""

    def shard(self, param: Tensor) -> Tensor:
        """The tensor whose elements this rank updates; it shares the parameter's memory."""

    def shard_state(self, param: Tensor, value: Tensor, what: str) -> Tensor:
        """A loaded state of ``param`` as this strategy holds it; ``what`` names it in messages."""

    def shard_groups(self, param: Tensor) -> tuple[dist.ProcessGroup, ...]:
        """The process groups over which the elements of the shards are spread."""

    def replica_groups(self, param: Tensor) -> tuple[dist.ProcessGroup, ...]:
        """Return the process groups whose ranks hold replicas of this rank's shard, as far as they are known."""

    def weight_replica_groups(self, param: Tensor) -> tuple[dist.ProcessGroup, ...]:
        """Return the process groups whose ranks hold replicas of all that this rank has of the weight, as far as they are known."""

    def no_sync(self) -> AbstractContextManager[None]:
        """A context in which backward passes accumulate gradients without reducing them."""

    def check_copyable(self) -> None:
        """Raise TypeError where an optimizer with this strategy cannot be pickled or deep-copied."""


class Local:
    """This rank updates what it holds, and torch does the communication: one process, DDP, FSDP, HSDP, tensor parallelism."""

    def attach(self, params: list[Tensor], names: list[str]) -> None:
        """Nothing to prepare."""

    def reduce(self) -> None:
        """The wrapper around the model has reduced the gradients in the backward pass."""

    def grads(self, params: list[Tensor]) -> list[Any]:
        return [param.grad for param in params]

    def local_grads(self, params: list[Tensor]) -> list[Tensor]:
        return [local_grad(param) for param in params]

    def gather(self) -> None:
        """The wrapper gathers weights when it needs them."""

    def clear_grads(self) -> None:
        """It holds none."""

    def shard(self, param: Tensor) -> Tensor:
        return param

    def shard_state(self, param: Tensor, value: Tensor, what: str) -> Tensor:
        if isinstance(param, DTensor) and not isinstance(value, DTensor):  # whole on every rank, as a plain state_dict is
            return distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None).to(param.device)
        if isinstance(value, DTensor) and not isinstance(param, DTensor):
            raise ValueError(
                f"{what} is a shard but the parameter is whole here; load what ZeRO or FSDP sharded with sharded_bf16_adamw.load or with "
                "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
            )
        if isinstance(value, DTensor) and isinstance(param, DTensor) and not _sharded_alike(value, param):
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

    def check_copyable(self) -> None:
        """Nothing here belongs to one process alone."""


def _sharded_alike(a: DTensor, b: DTensor) -> bool:
    """Whether each rank has the same elements of both. Dimensions of meshes may have different names."""
    return a.placements == b.placements and torch.equal(a.device_mesh.mesh, b.device_mesh.mesh) and to_local(a).shape == to_local(b).shape
