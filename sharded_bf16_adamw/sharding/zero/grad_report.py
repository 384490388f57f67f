"""The report about gradients that ranks exchange in stage 2."""

from __future__ import annotations

from enum import IntEnum
from itertools import islice
from typing import NamedTuple

from ..base import Caller
from .calls import CALLERS


class GradState(IntEnum):
    """The state of the gradients that stage 2 holds. Ranks agree on the maximum.

    - ``UNUSED``: no step has used them yet. New gradients are accumulated onto them.
    - ``USED``: a step has used them. The next step may use them again if there are no new ones.
    - ``STALE``: some rank has accumulated new gradients onto used ones. Only ``clear_grads()``
      ends this state.
    """

    UNUSED = 0
    USED = 1
    STALE = 2


class Keeps(IntEnum):
    """The gradients that a rank keeps in this call: none in ``zero_grad()``.

    The maximum over ranks shows, together with that of :class:`GradState`, whether only some ranks
    have called ``zero_grad()`` since the last step.
    """

    NONE = 0
    USED_OR_STALE = 1
    UNUSED = 2


class GradReport(NamedTuple):
    """One rank's report about its gradients, or the element-wise maximum over all ranks."""

    launches: list[int]  # per bucket, since the last consensus, plus one if it is pending
    has_grad: list[bool]  # per parameter
    lacks_grad: list[bool]  # not has_grad; in the maximum, both are True if ranks differ
    call: list[int]  # see :meth:`.calls.Call.flatten`
    has_recorded_order: bool
    keeps: Keeps
    grad_state: GradState

    @property
    def discards(self) -> bool:
        """Return True if some rank has called ``zero_grad()``."""
        return bool(self.call[CALLERS.index(Caller.ZERO_GRAD)])

    @property
    def is_stale(self) -> bool:
        """Return True if some rank has accumulated gradients onto used ones."""
        return self.grad_state is GradState.STALE or (
            self.grad_state is GradState.USED and any(self.launches)
        )

    @property
    def is_cleared_on_some_ranks(self) -> bool:
        """Return True if only some ranks have cleared the gradients used by the last step."""
        return self.grad_state is not GradState.UNUSED and self.keeps is Keeps.UNUSED

    def flatten(self) -> list[int]:
        """Concatenate the fields, for an all-reduce."""
        return [*self.launches, *self.has_grad, *self.lacks_grad, *self.call, *self[4:]]

    def unflatten(self, values: list[int]) -> GradReport:
        """Invert :meth:`flatten`, with the lengths of this report's lists."""
        rest = iter(values)
        launches = list(islice(rest, len(self.launches)))
        has_grad = list(map(bool, islice(rest, len(self.has_grad))))
        lacks_grad = list(map(bool, islice(rest, len(self.lacks_grad))))
        call = list(islice(rest, len(self.call)))
        has_recorded_order, keeps, grad_state = rest
        return GradReport(
            launches,
            has_grad,
            lacks_grad,
            call,
            bool(has_recorded_order),
            Keeps(keeps),
            GradState(grad_state),
        )
