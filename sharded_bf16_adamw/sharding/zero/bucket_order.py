"""The order in which stage 2's gradients fill buckets, and in which buckets launch."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from enum import Enum, auto
from typing import TYPE_CHECKING

from .bucket import Bucket, ReplicatedBucket, split_by_size
from .closing_bucket import ClosingBucket, can_carry_flag
from .host_collectives import HostCollectives
from .param import ZeroParam

if TYPE_CHECKING:
    from .config import ZeRO

logger = logging.getLogger("sharded_bf16_adamw")


class OrderState(Enum):
    """The source of the order in which parameters fill buckets.

    - ``GUESSED``: the reverse order of construction. Hooks record the order of gradients.
    - ``RECORDED``: as before, and the ranks have agreed that at least one has recorded an order.
    - ``FIXED``: the order that the first rank recorded.
    """

    GUESSED = auto()
    RECORDED = auto()
    FIXED = auto()


class BucketOrder:
    """The buckets of all parameters, in an order that is the same on every rank.

    The first ``num_active`` buckets hold parameters that recently had gradients, and launch during
    the backward pass. The others launch only in ``reduce_grads()``. The smallest active bucket
    launches last of them: it is the *closing* bucket, see [Note: Closing bucket].

    Attributes:
        params: all parameters, in the order in which they fill buckets.
        buckets: all buckets, in launch order.
        num_active: number of active buckets.
        bucket_of: the bucket of each parameter. An empty parameter has none.
        built_for: the parameters whose buckets are active (0-dim ones excepted).
    """

    def __init__(self, policy: ZeRO) -> None:
        self._policy = policy
        self._carries_flag = not policy.static_graph and can_carry_flag(policy.mesh)
        self.params: list[ZeroParam] = []
        self.buckets: list[Bucket] = []
        self.num_active = 0
        self.bucket_of: dict[ZeroParam, Bucket] = {}
        self.built_for: list[ZeroParam] = []
        self._next = 0  # index of the active bucket to launch next
        self._state = OrderState.GUESSED
        self._recorded: dict[ZeroParam, None] = {}
        self._last_with_grad: list[ZeroParam] = []

    @property
    def has_recorded(self) -> bool:
        """Return True if this rank has recorded an order that is not in use yet."""
        return bool(self._recorded)

    @property
    def closing(self) -> Bucket | None:
        """The last active bucket; None if none is active."""
        return self.buckets[self.num_active - 1] if self.num_active else None

    def is_active(self, bucket: Bucket) -> bool:
        """Return whether the bucket launches during the backward pass."""
        return bucket in self.buckets[: self.num_active]

    def reset(self, zero_params: Iterable[ZeroParam]) -> None:
        """Build buckets for other parameters, in a guessed order."""
        # Gradients become ready in roughly the reverse order of construction.
        self.params = list(reversed(list(zero_params)))
        self._state, self._recorded = OrderState.GUESSED, {}
        self._assign(self.params)

    def record(self, zero_param: ZeroParam) -> None:
        """Record that the parameter's gradient is ready."""
        if self._state is not OrderState.FIXED:
            self._recorded.setdefault(zero_param)

    def agree_that_recorded(self) -> None:
        """Make the next :meth:`rebuild` use the recorded order. Every rank calls this."""
        self._state = OrderState.RECORDED

    def next_complete(self) -> tuple[int, Bucket] | None:
        """Return the next active bucket to launch and its index, or None if it is incomplete."""
        if self.num_active and self.buckets[self._next].is_complete:
            return self._next, self.buckets[self._next]
        return None

    def advance(self) -> None:
        """Move on to the next active bucket."""
        self._next = (self._next + 1) % self.num_active

    def restart(self) -> None:
        """Start over with the first bucket, after all reductions of a step."""
        for bucket in self.buckets:
            bucket.launches = 0
        self._next = 0

    def rebuild(
        self, zero_params: list[ZeroParam], with_grad: list[ZeroParam], collectives: HostCollectives
    ) -> bool:
        """Rebuild the buckets if the ranks have recorded an order, or if gradients have changed.

        In the first case, broadcast the order of the first rank. In the second, wait until two
        steps have had gradients of the same parameters.

        Returns:
            True if there are new buckets.
        """
        last, self._last_with_grad = self._last_with_grad, with_grad
        if self._state is OrderState.RECORDED:
            index_of = {zero_param: index for index, zero_param in enumerate(zero_params)}
            order = [*self._recorded]
            order += [each for each in self.params if each not in self._recorded]
            indices = collectives.broadcast_from_first([index_of[each] for each in order])
            self.params = [zero_params[index] for index in indices]
            self._state, self._recorded = OrderState.FIXED, {}
        elif with_grad != last or with_grad == self.built_for:
            return False
        self._assign(with_grad)
        return True

    def _assign(self, active: list[ZeroParam]) -> None:
        """Assign parameters to buckets, those in ``active`` to the first ones.

        0-dim parameters are never active, since their all-reduce would block the backward pass.
        """
        assert not any(bucket.is_pending for bucket in self.buckets)
        size = self._policy.bucket_bytes
        chosen = {zero_param for zero_param in active if not zero_param.is_replicated}
        nonempty = [zero_param for zero_param in self.params if zero_param.param.numel()]
        first = split_by_size([each for each in nonempty if each in chosen], size)
        rest = split_by_size([each for each in nonempty if each not in chosen], size)
        if first:
            smallest = min(reversed(range(len(first))), key=lambda index: _numbytes(first[index]))
            first.append(first.pop(smallest))
        self.buckets = [self._new_bucket(zero_params) for zero_params in (*first, *rest)]
        if first and self._carries_flag:
            self.buckets[len(first) - 1] = self._new_bucket(first[-1], ClosingBucket)
        self.bucket_of = {each: bucket for bucket in self.buckets for each in bucket.zero_params}
        self.num_active, self._next = len(first), 0
        self.built_for = active
        logger.debug(
            "ZeRO stage 2 rebuilt its buckets: %d launched during the backward pass, %d in step()",
            len(first),
            len(rest),
        )

    def _new_bucket(self, zero_params: list[ZeroParam], cls: type[Bucket] | None = None) -> Bucket:
        policy = self._policy
        dtype = policy.reduce_dtype or zero_params[0].spec.dtype
        cls = cls or (ReplicatedBucket if zero_params[0].is_replicated else Bucket)
        result_dtype = policy.accumulate_dtype or dtype
        return cls(zero_params, policy.mesh, dtype, result_dtype, policy.fp32_sum)


def _numbytes(zero_params: list[ZeroParam]) -> int:
    return sum(each.param.numel() * each.param.element_size() for each in zero_params)
