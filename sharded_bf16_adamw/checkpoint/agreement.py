"""Ranks that act together: an error on one is raised on all, so that none goes on, or waits, alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

Result = TypeVar("Result")
Group = dist.ProcessGroup | None  # None: all ranks of the default group


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def errors_on_every_rank(doing: str, group: Group = None) -> Iterator[None]:
    """Raise on every rank if the body failed on any. Collective.

    Raises:
        ValueError: where the first rank that failed did with one; the message is its own.
        RuntimeError: for all other errors, with ``doing``, the rank and its error.
    """
    error: BaseException | None = None
    try:
        yield
    except (Exception, CheckpointException) as caught:  # DCP's is a BaseException
        error = caught
    outcomes = gather_everywhere(None if error is None else (isinstance(error, ValueError), _one_line(error)), group)
    for failed_rank, outcome in enumerate(outcomes):
        if outcome is not None:
            raise _as_raised_everywhere(doing, failed_rank, *outcome) from error


def on_rank_0(doing: str, function: Callable[[], Result], group: Group = None) -> Result:
    """What ``function`` returns on rank 0, on every rank; its errors too. Collective."""
    outcome: list[Any] = [None, None, None]
    error: Exception | None = None
    if rank() == 0:
        try:
            outcome[2] = function()
        except Exception as caught:
            error = caught
            outcome = [isinstance(error, ValueError), _one_line(error), None]
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0, group=group)
    is_value_error, message, result = outcome
    if message is not None:
        raise _as_raised_everywhere(doing, 0, is_value_error, message) from error
    return result


def gather_everywhere(value: Result, group: Group = None) -> list[Result]:
    """What each rank gave, in the order of ranks. Collective."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def gather_on_rank_0(value: Result, group: Group = None) -> list[Result]:
    """What each rank gave, on rank 0; elsewhere an empty list. Collective."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values, dst=0, group=group)
    return values or []


def scatter_from_rank_0(values: list[Result], group: Group = None) -> Result:
    """Inverse of :func:`gather_on_rank_0`."""
    if not dist.is_initialized():
        return values[0]
    received: list[Any] = [None]
    dist.scatter_object_list(received, values if rank() == 0 else None, src=0, group=group)
    return received[0]


def _as_raised_everywhere(doing: str, rank: int, is_value_error: bool, message: str) -> Exception:
    return ValueError(message) if is_value_error else RuntimeError(f"{doing}: on rank {rank}, {message}")


def _one_line(error: BaseException) -> str:
    """The type and first line of an error; of DCP's, which collects those of all ranks, the first of them."""
    if isinstance(error, CheckpointException):
        failures = error.failures
        if failures:
            error = failures[min(failures)][0]
    text = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
    return (text.splitlines() or [type(error).__name__])[0]
