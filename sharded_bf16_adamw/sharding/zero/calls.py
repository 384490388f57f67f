"""The calls of the optimizer's methods, which all ranks have to make in the same order.

Each exchange of ZeRO's stages carries every rank's :class:`Call`, except for the single flag of a
gradient report that has not changed. If the calls differ, every rank
raises the same error before anything changes.

One difference is not found in time. A ``step()`` after ``clip_grad_norm_()`` exchanges nothing
before it updates weights. If another rank makes a different call at that point, for example after
one more backward pass, that rank waits in an exchange while the others wait in the all-gather of
weights. All of them time out, and the message names the call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from ..base import Caller
from ..comm_errors import comm_errors

CALLERS = list(Caller)
DISCARDED_ON_SOME_RANKS_ERROR = (
    "some ranks called zero_grad() between a backward pass and its step, and others did not; run "
    "the backward pass on every rank, and call zero_grad() on every rank or on none"
)
STEPPED_ON_SOME_RANKS_ERROR = (
    "some ranks called step() after clip_grad_norm_() or precision_stats(), and others did not, so "
    "their weights differ; load a checkpoint, and make the same calls in the same order on every "
    "rank"
)


class Call(NamedTuple):
    """A call of a method on one rank.

    Attributes:
        caller: the method.
        is_agreed: whether the ranks have already agreed on the gradients of this step.
    """

    caller: Caller
    is_agreed: bool

    def flatten(self) -> list[int]:
        """Return one flag for each possible value of each attribute, for a maximum over ranks."""
        return [
            *(self.caller is each for each in CALLERS),
            *(self.is_agreed is each for each in (False, True)),
        ]


def find_difference(flags: Sequence[int]) -> str | None:
    """Return the error if ranks made different calls, else None.

    Args:
        flags: the maximum over ranks of :meth:`Call.flatten`.
    """
    callers = [each for each, is_used in zip(CALLERS, flags, strict=False) if is_used]
    if all(flags[len(CALLERS) :]):
        return STEPPED_ON_SOME_RANKS_ERROR
    if len(callers) == 1:
        return None
    if Caller.ZERO_GRAD in callers and Caller.ADD_PARAM_GROUP not in callers:
        return DISCARDED_ON_SOME_RANKS_ERROR
    names = " and others ".join(each.value for each in callers)
    return f"some ranks called {names} at the same point; make the same calls on every rank"


@contextmanager
def timeout_errors(call: Call, ranks: Sequence[int]) -> Iterator[None]:
    """Reword a timeout of the exchange in this context if other ranks possibly never join it.

    Args:
        call: this rank's call.
        ranks: the global ranks that should take part.
    """
    if not call.is_agreed:
        yield
        return
    # After an agreement, a step exchanges only because of new gradients.
    what = call.caller.value + (" with new gradients" if call.caller is Caller.STEP else "")
    when = "after clip_grad_norm_(), precision_stats() or a failed step()"
    with comm_errors(f"calling {what} {when}, which must happen on every rank or on none,", ranks):
        yield
