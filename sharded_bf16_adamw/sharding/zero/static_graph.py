"""The promise of ``static_graph``: on each rank, every step repeats the one before."""

from __future__ import annotations

from collections.abc import Iterable

from .bucket import Bucket
from .grad_report import GradReport
from .param import ZeroParam

STATIC_GRAPH_ADVICE = (
    "with ZeRO(static_graph=True) every step must repeat the one before, on every rank, and the "
    "other ranks now wait for this one: restart all ranks from the last checkpoint, without "
    "static_graph if the model needs it"
)


def promise_problem(
    expected: GradReport,
    report: GradReport,
    zero_params: Iterable[ZeroParam],
    buckets: Iterable[Bucket],
) -> str | None:
    """Return how this rank's report differs from the one that it promised, or None."""
    if report == expected:
        return None
    problem = changed_grads_problem(zero_params, expected.has_grad, report.has_grad)
    if problem is not None:
        return problem
    counts = zip(buckets, expected.launches, report.launches, strict=True)
    for bucket, before, now in counts:
        if now != before:
            return (
                f"the backward passes gave parameter {bucket.zero_params[0].name} {now} "
                f"gradients to reduce, but {before} in the step before"
            )
    return "optimizer.zero_grad() was not called after the step before"


def changed_grads_problem(
    zero_params: Iterable[ZeroParam], before: list[bool], now: list[bool]
) -> str | None:
    """Return the first parameter that has a gradient only now or only before, or None."""
    for zero_param, had, has in zip(zero_params, before, now, strict=True):
        if has and not had:
            return f"parameter {zero_param.name} has a gradient, but had none in the step before"
        if had and not has:
            return f"parameter {zero_param.name} has no gradient, but had one in the step before"
    return None
