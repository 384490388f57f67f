"""Exchange of gradient reports in stage 2. If reports repeat, ranks exchange only a flag."""

from __future__ import annotations

from typing import NamedTuple

from ...profiling import profiler_range
from .bucket_order import BucketOrder
from .calls import find_difference
from .closing_bucket import ClosingBucket
from .grad_report import GradReport
from .host_collectives import HostCollectives
from .reduce_scatter import PendingReduce


class Exchange(NamedTuple):
    """This rank's report, and the maximum over ranks, on which all ranks agreed."""

    own: GradReport
    agreed: GradReport


class Agreement(NamedTuple):
    """The result of :meth:`GradConsensus.agree`.

    Attributes:
        agreed: the report on which all ranks agreed.
        problems: all ranks' problems in one sentence, or None.
        closing_reduce: the completed last reduction of the closing bucket, if it has carried the
            flag and every rank's report is the expected one; else None.
    """

    agreed: GradReport
    problems: str | None
    closing_reduce: PendingReduce | None


class GradConsensus:
    """The exchanges of one optimizer. See [Note: Closing bucket].

    Attributes:
        expected: the exchange that the next steps are expected to repeat, or None. All ranks set
            and clear it at the same points.
    """

    def __init__(self, collectives: HostCollectives, static_graph: bool) -> None:
        self._collectives = collectives
        self._static_graph = static_graph
        self.expected: Exchange | None = None
        self._last: Exchange | None = None  # with the current buckets
        self._last_two_differ = False  # whether the last two exchanges agreed on different reports

    def reset(self) -> None:
        """Drop all exchanges, because the buckets were rebuilt."""
        self.expected = self._last = None

    def expect_repetition(self) -> None:
        """Set ``expected``, after a step, if the next one is likely to repeat the last exchange.

        All ranks decide alike, since the decision depends only on agreed reports.
        """
        last = self._last
        if (
            self.expected is None
            and last is not None
            and not last.agreed.discards
            # If calls differed, all ranks raised, and a retry without launches completed the step.
            and find_difference(last.agreed.call) is None
            and (self._static_graph or not self._last_two_differ)
        ):
            self.expected = last

    def flag_carrier(self, order: BucketOrder) -> ClosingBucket | None:
        """Return the closing bucket if it carries the flag of this step, else None.

        It carries the flag if no active bucket launches more often. If a hook launches it because
        of an unexpected gradient, this rank's report differs, so :meth:`agree` sets the flag.
        """
        closing = order.closing
        if self.expected is None or not isinstance(closing, ClosingBucket):
            return None
        launches = self.expected.agreed.launches[: order.num_active]
        return closing if launches[-1] == max(launches) else None

    def agree(self, report: GradReport, problem: str | None, order: BucketOrder) -> Agreement:
        """Agree on the gradients of a reduction. Collective.

        Args:
            report: this rank's report.
            problem: this rank's problem, or None.
            order: the buckets.
        """
        expected = self.expected
        if expected is not None and not self._static_graph:
            differs = problem is not None or report != expected.own
            any_differs, closing_reduce = self._find_any(differs, self.flag_carrier(order))
            if not any_differs:
                return Agreement(expected.agreed, None, closing_reduce)
        values, problems = self._collectives.all_reduce_max_and_problems(report.flatten(), problem)
        agreed = report.unflatten(values)
        if any(agreed.launches):  # else it is a retry, which does not predict the next steps
            if not self._static_graph:
                self.expected = None
            last, self._last = self._last, Exchange(report, agreed)
            self._last_two_differ = last is not None and last.agreed != agreed
        return Agreement(agreed, problems, None)

    def _find_any(
        self, differs: bool, closing: ClosingBucket | None
    ) -> tuple[bool, PendingReduce | None]:
        """Return whether ``differs`` is True on any rank, and the closing bucket's reduction.

        The reduction is None if the flag was sent alone, or if it was set on any rank.
        """
        if closing is None:
            return self._collectives.any_rank(differs), None
        with profiler_range("ZeRO::reduce_scatter"):
            closing_reduce = closing.reduce_unless(differs, self._collectives.group)
        return closing_reduce is None, closing_reduce
