"""Ranks that act together: an error on one is raised on all, so that none goes on, or waits, alone."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

Result = TypeVar("Result")
Group = (
    dist.ProcessGroup | None
)  # None: all ranks of the default group. Ranks below are those in the group, from 0 on

_POLL_S = 0.05  # seconds between two looks at the store
_ERRORS = {error.__name__: error for error in (FileExistsError, FileNotFoundError, ValueError)}
_calls: Counter[str] = Counter()  # of by_first_rank(), by what it was called for
_on_this_rank_alone: ContextVar[bool] = ContextVar("_on_this_rank_alone", default=False)


def rank(group: Group = None) -> int:
    return 0 if _alone(group) else dist.get_rank(group)


def world_size(group: Group = None) -> int:
    return 1 if _alone(group) else dist.get_world_size(group)


@contextmanager
def raise_on_all_ranks(doing: str, group: Group = None) -> Iterator[None]:
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
    outcomes = gather_everywhere(
        None if error is None else (isinstance(error, ValueError), _one_line(error)), group
    )
    for failed_rank, outcome in enumerate(outcomes):
        if outcome is not None:
            raise _as_raised_everywhere(doing, failed_rank, *outcome) from error


def on_rank_0(doing: str, function: Callable[[], Result], group: Group = None) -> Result:
    """Call ``function`` on the group's first rank and return its result on every rank; its errors too. Collective."""
    outcome: list[Any] = [None, None, None]
    error: Exception | None = None
    if rank(group) == 0:
        try:
            outcome[2] = function()
        except Exception as caught:
            error = caught
            outcome = [isinstance(error, ValueError), _one_line(error), None]
    if not _alone(group):
        with _talking(group):
            dist.broadcast_object_list(outcome, group_src=0, group=group)
    is_value_error, message, result = outcome
    if message is not None:
        raise _as_raised_everywhere(doing, 0, is_value_error, message) from error
    return result


def by_first_rank(
    what: str, path: str | os.PathLike[str], function: Callable[[], str], group: Group = None
) -> str:
    """Call ``function`` on the group's first rank, without the other ranks' help, and wait for it on every rank that calls.

    Not collective: the first rank waits for nobody, so a call on that rank alone is complete as well. The outcome travels
    through the store of the default process group, which needs no receiver.

    Args:
        what: names the operation in messages.
        path: what it writes to; calls for the same path are counted on each rank.
        function: must need no other rank; within it, collectives of this module are of one rank.
        group: process group; None for all ranks.

    Returns:
        What ``function`` returned.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: ``function`` raised one; on every rank that calls.
        RuntimeError: it raised another error (which the first rank raises as it is), or the first rank has not called within
            the timeout of the process group.
    """
    if world_size(group) == 1:
        return function()
    ranks = [global_rank(index, group) for index in range(world_size(group))]
    key = json.dumps([what, os.path.abspath(path), ranks])
    _calls[key] += 1
    store = dist.PrefixStore(
        f"sharded_bf16_adamw/{key}/{_calls[key]}", dist.distributed_c10d._get_default_store()
    )
    if rank(group) == 0:
        store.set("started", "")
        token = _on_this_rank_alone.set(True)
        try:
            result = function()
        except BaseException as error:
            kind = next((name for name, known in _ERRORS.items() if isinstance(error, known)), "")
            store.set("outcome", json.dumps([kind, str(error) if kind else _one_line(error)]))
            raise
        finally:
            _on_this_rank_alone.reset(token)
        store.set("outcome", json.dumps([None, result]))
        return result
    if not _is_set(store, "started", _timeout(store)):
        raise RuntimeError(
            f"rank {ranks[0]} has not called {what} for {path} within {_timeout(store)}; call it on every rank, or on rank {ranks[0]} alone"
        )
    _is_set(store, "outcome", None)  # an export may take hours
    kind, text = json.loads(store.get("outcome"))
    if kind is not None:
        raise (
            _ERRORS[kind](text)
            if kind
            else RuntimeError(f"{what} failed on rank {ranks[0]}: {text}")
        )
    return str(text)


@contextmanager
def _talking(group: Group) -> Iterator[None]:
    """Say what a failed exchange means, which torch does not."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {dist.get_rank()} and {world_size(group) - 1} others could not talk to each other about a checkpoint: one has died or "
            "hangs, or has not called the same function; call it on every rank, or give group= where only some ranks hold the model"
        ) from error


def _is_set(store: dist.Store, key: str, timeout: timedelta | None) -> bool:
    """Wait until ``key`` is set, and return whether it is."""
    deadline = None if timeout is None else time.monotonic() + timeout.total_seconds()
    while not store.check([key]):
        if deadline is not None and time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _timeout(store: dist.Store) -> timedelta:
    return store.timeout  # type: ignore[attr-defined]  # missing in torch's stub


def gather_everywhere(value: Result, group: Group = None) -> list[Result]:
    """What each rank gave, in the order of ranks. Collective."""
    if _alone(group):
        return [value]
    values: list[Any] = [None] * world_size(group)
    with _talking(group):
        dist.all_gather_object(values, value, group=group)
    return values


def gather_on_rank_0(value: Result, group: Group = None) -> list[Result]:
    """What each rank gave, on rank 0; elsewhere an empty list. Collective."""
    if _alone(group):
        return [value]
    values: list[Any] | None = [None] * world_size(group) if rank(group) == 0 else None
    with _talking(group):
        dist.gather_object(value, values, group_dst=0, group=group)
    return values or []


def scatter_from_rank_0(values: list[Result], group: Group = None) -> Result:
    """Inverse of :func:`gather_on_rank_0`."""
    if _alone(group):
        return values[0]
    received: list[Any] = [None]
    with _talking(group):
        dist.scatter_object_list(
            received, values if rank(group) == 0 else None, group_src=0, group=group
        )
    return received[0]


def check_group(group: Any) -> None:
    """Raise ValueError unless ``group`` is a process group that this rank is in, or None for all ranks."""
    if group is None:
        return
    is_member = (
        group != dist.GroupMember.NON_GROUP_MEMBER
    )  # what new_group() returns on the ranks that are not in it
    if is_member and not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"group must be a process group or None, but it is of type {type(group).__name__}; use mesh.get_group() of a DeviceMesh"
        )
    if not is_member or dist.get_rank(group) < 0:
        raise ValueError(
            "this rank is not in the process group given as group; call it on the ranks of the group alone"
        )


def same_on_every_rank(arguments: dict[str, Any], group: Group = None) -> None:
    """Raise ValueError on every rank unless all pass the same values, by what messages call them. Collective."""
    rows = gather_everywhere(list(arguments.values()), group)
    for index, row in enumerate(rows):
        for what, first, other in zip(arguments, rows[0], row, strict=True):
            if other != first:
                raise ValueError(
                    f"ranks give different values of {what}: {first!r} on rank {global_rank(0, group)} and {other!r} on rank "
                    f"{global_rank(index, group)}; give the same on all ranks, and with models on parts of the job each part's group="
                )


def as_path(what: str, value: Any) -> Path:
    """Return a path from what a caller gave, or raise ValueError."""
    try:
        return Path(value)
    except TypeError:
        raise ValueError(
            f"{what} must be a path, but it is of type {type(value).__name__}; give a str or a pathlib.Path"
        ) from None


def known_elsewhere(unknown: set[str], group: Group = None) -> set[str]:
    """Return those of the names unknown to this rank that another rank knows (pipeline stages, experts). Collective."""
    return unknown - unknown.intersection(*gather_everywhere(unknown, group))


def global_rank(rank_in_group: int, group: Group = None) -> int:
    """Return the rank in the default group of a rank of ``group``."""
    return rank_in_group if group is None else dist.get_global_rank(group, rank_in_group)


def _alone(group: Group) -> bool:
    """Whether this process has nobody to agree with. One whose group was destroyed must not take itself for that: it would publish its
    part of a checkpoint as the whole."""
    if group is not None and not dist.is_initialized():
        raise RuntimeError(
            "the process group was destroyed before this was done; call wait_for_save() before dist.destroy_process_group()"
        )
    return not dist.is_initialized() or _on_this_rank_alone.get()


def _as_raised_everywhere(
    doing: str, failed_rank: int, is_value_error: bool, message: str
) -> Exception:
    return (
        ValueError(message)
        if is_value_error
        else RuntimeError(f"{doing}: on rank {failed_rank}, {message}")
    )


def _one_line(error: BaseException) -> str:
    """The type and first line of an error; of DCP's, which collects those of all ranks, the first of them."""
    if isinstance(error, CheckpointException):
        failures = error.failures
        if failures:
            error = failures[min(failures)][0]
    text = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
    return (text.splitlines() or [type(error).__name__])[0]
