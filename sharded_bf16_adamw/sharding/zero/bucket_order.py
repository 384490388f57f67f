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

    - ``GUESSED``: reverse order of construction. Hooks record the order of gradients meanwhile.
    - ``RECORDED``: still the guess, but ranks have agreed that some rank has recorded an order.
    - ``FIXED``: the order that the first rank has recorded.
    """

    GUESSED = auto()
    RECORDED = auto()
    FIXED = auto()


class BucketOrder:
    """The buckets of all parameters, in an order that is the same on every rank.

    The first ``num_active`` buckets hold parameters that recently had gradients, and launch during
    the backward pass. The others launch only in ``reduce_grads()``. The last active bucket is the
    *closing* one, the smallest of them; see [Note: Closing bucket].

    Attributes:
        buckets: in the order in which they launch.
        num_active: number of active buckets.
        bucket_of: the bucket of each parameter. An empty parameter has none.
        built_for: the parameters for whose gradients the buckets were built.
    """

    def __init__(self, policy: ZeRO) -> None:
        self._policy = policy
        self._carries_flag = not policy.static_graph and can_carry_flag(policy.mesh)
        self.buckets: list[Bucket] = []
        self.num_active = 0
        self.bucket_of: dict[ZeroParam, Bucket] = {}
        self.built_for: list[ZeroParam] = []
        self._next = 0  # index of the active bucket to launch next
        self._order: list[ZeroParam] = []
        self._state = OrderState.GUESSED
        self._recorded: dict[ZeroParam, None] = {}
        self._last_with_grad: list[ZeroParam] = []

    @property
    def params(self) -> list[ZeroParam]:
        """All parameters, in the order in which they fill buckets."""
        return self._order

    @property
    def has_recorded(self) -> bool:
        """Return True if this rank has recorded an order that is not yet in use."""
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
        self._order = list(reversed(list(zero_params)))
        self._state, self._recorded = OrderState.GUESSED, {}
        self._assign(self._order)

    def record(self, zero_param: ZeroParam) -> None:
        """Record that the parameter's gradient has become ready."""
        if self._state is not OrderState.FIXED:
            self._recorded.setdefault(zero_param)

    def agree_that_recorded(self) -> None:
        """Use the recorded order in the next :meth:`rebuild`. Every rank does."""
        self._state = OrderState.RECORDED

    def next_complete(self) -> tuple[int, Bucket] | None:
        """Return the active bucket to launch next and its index, or None if it is incomplete."""
        if self.num_active and self.buckets[self._next].is_complete:
            return self._next, self.buckets[self._next]
        return None

    def advance(self) -> None:
        """Go on to the next active bucket."""
        self._next = (self._next + 1) % self.num_active

    def restart(self) -> None:
        """Start over with the first bucket: all have been launched."""
        for bucket in self.buckets:
            bucket.launches = 0
        self._next = 0

    def rebuild(
        self, zero_params: list[ZeroParam], with_grad: list[ZeroParam], collectives: HostCollectives
    ) -> bool:
        """Rebuild buckets for the first rank's order of gradients, or for other active parameters.

        The latter only if the same parameters had gradients in the last two steps. Collective if an
        order was recorded.

        Returns:
            True if there are new buckets.
        """
        last, self._last_with_grad = self._last_with_grad, with_grad
        if self._state is OrderState.RECORDED:
            index_of = {zero_param: index for index, zero_param in enumerate(zero_params)}
            order = [*self._recorded]
            order += [each for each in self._order if each not in self._recorded]
            indices = collectives.broadcast_from_first([index_of[each] for each in order])
            self._order = [zero_params[index] for index in indices]
            self._state, self._recorded = OrderState.FIXED, {}
        elif not with_grad == last != self.built_for:
            return False
        self._assign(with_grad)
        return True

    def _assign(self, active: list[ZeroParam]) -> None:
        """Assign parameters to buckets, with those in ``active`` in the first ones.

        0-dim parameters are never active: their all-reduce would block the backward pass.
        """
        assert not any(bucket.is_pending for bucket in self.buckets)
        size = self._policy.bucket_bytes
        chosen = {zero_param for zero_param in active if not zero_param.is_replicated}
        nonempty = [zero_param for zero_param in self._order if zero_param.param.numel()]
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

    def _new_bucket(self, zero_params: list[ZeroParam], kind: type[Bucket] | None = None) -> Bucket:
        policy = self._policy
        dtype = policy.reduce_dtype or zero_params[0].spec.dtype
        kind = kind or (ReplicatedBucket if zero_params[0].is_replicated else Bucket)
        result_dtype = policy.accumulate_dtype or dtype
        return kind(zero_params, policy.mesh, dtype, result_dtype, policy.fp32_sum)


def _numbytes(zero_params: list[ZeroParam]) -> int:
    return sum(each.param.numel() * each.param.element_size() for each in zero_params)
