"""The protocol between the optimizer and a sharding strategy.

In a step, the strategy reduces the gradients, the optimizer updates this rank's shards, and the
strategy all-gathers the new weights. The strategies are :class:`.torch_managed.TorchManaged`, the
stages of ZeRO, and :class:`.experts.RankLocalExperts`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from enum import Enum
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor


class Caller(Enum):
    """An optimizer method that reduces or discards gradients, collectively."""

    STEP = "step()"
    CLIP = "clip_grad_norm_()"
    STATS = "precision_stats()"
    ZERO_GRAD = "zero_grad()"
    ADD_PARAM_GROUP = "add_param_group()"


class Sharding(Protocol):
    """The sharding of one optimizer's parameters over ranks.

    A parameter's *shard* is the tensor whose elements this rank updates: the parameter itself, or a
    DTensor that shares its memory. The optimizer states have the sharding of the shard.
    """

    def add_params(self, params: list[Tensor], names: list[str]) -> None:
        """Add the parameters of a new group. ``names`` are for messages."""

    def reduce_grads(self, caller: Caller = Caller.STEP) -> None:
        """Reduce the gradients, so that :meth:`local_grads` can return this rank's shards.

        Calling it again before :meth:`all_gather_params` has no effect without new gradients.

        Args:
            caller: the same on every rank.
        """

    def grads(self, params: list[Tensor]) -> list[Any]:
        """Return each parameter's gradient, or this rank's shard of it.

        The entry is None if the parameter has no gradient (ZeRO stage 2: if no rank has one).
        """

    def local_grads(self, params: list[Tensor]) -> list[Tensor]:
        """Return the local shard of each parameter's gradient. Every parameter must have one."""

    def all_gather_params(self) -> None:
        """End a step: send the updated weights to the ranks that need them.

        They may arrive later, but before the forward pass reads them.
        """

    def wait_for_params(self) -> None:
        """Wait until the updated weights have arrived. Collective."""

    def clear_grads(self) -> None:
        """Discard the gradients that the strategy holds outside ``param.grad``."""

    def shard(self, param: Tensor) -> Tensor:
        """Return the tensor whose elements this rank updates; it shares the parameter's memory."""

    def shard_state(self, param: Tensor, value: Tensor, what: str) -> Tensor:
        """Shard a loaded state of ``param`` like the parameter; ``what`` names it in messages."""

    def shard_groups(self, param: Tensor) -> tuple[dist.ProcessGroup, ...]:
        """Return the process groups over which the parameter's elements are sharded."""

    def replica_groups(self, param: Tensor) -> tuple[dist.ProcessGroup, ...]:
        """Return the known process groups whose ranks hold replicas of this rank's shard."""

    def weight_replica_groups(self, param: Tensor) -> tuple[dist.ProcessGroup, ...]:
        """Return the known process groups whose ranks hold replicas of this rank's weights.

        With ZeRO a rank holds all weights, not only its shard.
        """

    def no_sync(self) -> AbstractContextManager[None]:
        """Return a context in which backward passes accumulate gradients without reducing them."""

    def check_picklable(self) -> None:
        """Raise TypeError if an optimizer with this strategy cannot be pickled or deep-copied."""
