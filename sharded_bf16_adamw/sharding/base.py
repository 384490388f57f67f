"""What the optimizer asks of a sharding strategy, and the strategy that leaves all communication to torch.

A step reads *reduce, update, gather*: the strategy gives each rank the gradients of what it updates, the optimizer updates that, and
the strategy gives the new weights to whoever else needs them. There are two strategies: :class:`TorchManaged` here, and the stages of ZeRO.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor


class Sharding(Protocol):
    """How one optimizer's parameters are spread over ranks.

    A parameter's *shard* is the tensor whose elements this rank updates: the parameter itself or a DTensor over its memory. States are
    sharded as the shard is.
    """

    def add_params(self, params: list[Tensor], names: list[str]) -> None:
        """Take over the parameters of a new group. ``names`` are for messages."""

    def reduce_grads(self) -> None:
        """Have the gradients of this rank's shards ready. Repeated calls before :meth:`all_gather_params` do nothing more."""

    def grads(self, params: list[Tensor]) -> list[Any]:
        """For each parameter a gradient, as far as it is here, or None where it has none (on any rank, with ZeRO)."""

    def local_grads(self, params: list[Tensor]) -> list[Tensor]:
        """The gradient of this rank's part of each parameter, all of which have one."""

    def all_gather_params(self) -> None:
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

    def check_picklable(self) -> None:
        """Raise TypeError where an optimizer with this strategy cannot be pickled or deep-copied."""
