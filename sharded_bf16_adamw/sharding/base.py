"""The protocol between the optimizer and a sharding strategy.

A step is *reduce, update, all-gather*: the strategy provides the gradients of the shards that this
rank updates, the optimizer updates them, and the strategy makes the new weights known to the other
ranks. The strategies are :class:`.torch_managed.TorchManaged` and the stages of ZeRO.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from enum import Enum
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor


class Caller(Enum):
    """A method of the optimizer that reduces gradients, or drops them, on all ranks together."""

    STEP = "step()"
    CLIP = "clip_grad_norm_()"
    STATS = "precision_stats()"
    ZERO_GRAD = "zero_grad()"
    ADD_PARAM_GROUP = "add_param_group()"


class Sharding(Protocol):
    """The sharding of one optimizer's parameters over ranks.

    A parameter's *shard* is the tensor whose elements this rank updates: the parameter itself or a
    DTensor over its memory. States are sharded as the shard is.
    """

    def add_params(self, params: list[Tensor], names: list[str]) -> None:
        """Add the parameters of a new group. ``names`` are for messages."""

    def reduce_grads(self, caller: Caller = Caller.STEP) -> None:
        """Make the gradients of this rank's shards available.

        Repeated calls before :meth:`all_gather_params` have no further effect.

        Args:
            caller: the same on every rank.
        """

    def grads(self, params: list[Tensor]) -> list[Any]:
        """Return each parameter's gradient, or this rank's shard of it.

        None if the parameter has no gradient; with ZeRO if it has none on any rank.
        """

    def local_grads(self, params: list[Tensor]) -> list[Tensor]:
        """Return the local shard of each parameter's gradient; every parameter has one."""

    def all_gather_params(self) -> None:
        """Make the updated weights known to the ranks that need them. Ends a step.

        They may arrive later, but before the forward pass uses them.
        """

    def wait_for_params(self) -> None:
        """Wait until the updated weights have arrived. Collective."""

    def clear_grads(self) -> None:
        """Discard the gradients that the strategy itself holds."""

    def shard(self, param: Tensor) -> Tensor:
        """Return the tensor whose elements this rank updates; it shares the parameter's memory."""

    def shard_state(self, param: Tensor, value: Tensor, what: str) -> Tensor:
        """Shard a loaded state of ``param`` like its shard; ``what`` names it in messages."""

    def shard_groups(self, param: Tensor) -> tuple[dist.ProcessGroup, ...]:
        """Return the process groups over which the parameter's elements are sharded."""

    def replica_groups(self, param: Tensor) -> tuple[dist.ProcessGroup, ...]:
        """Return the known process groups whose ranks hold replicas of this rank's shard."""

    def weight_replica_groups(self, param: Tensor) -> tuple[dist.ProcessGroup, ...]:
        """Return the known process groups whose ranks hold replicas of this rank's weights.

        With ZeRO a rank holds more weights than its shard.
        """

    def no_sync(self) -> AbstractContextManager[None]:
        """Return a context in which backward passes accumulate gradients without reducing them."""

    def check_picklable(self) -> None:
        """Raise TypeError if an optimizer with this strategy cannot be pickled or deep-copied."""
