"""Raise one rank's error on all ranks, and check arguments on all ranks.

A rank that raises alone leaves the others blocked in the next collective.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from .object_collectives import (
    Group,
    Result,
    all_gather_object,
    broadcast_object,
    global_rank,
    is_true_on_any_rank,
    local_collectives,
    rank,
    world_size,
)

_POLL_S = 0.05  # interval at which the store is polled
_SHOWN = 3  # problems listed in one error message
_calls: Counter[str] = Counter()  # of call_on_rank_0_via_store, by operation, path and ranks


@contextmanager
def raise_on_all_ranks(message: str, group: Group = None) -> Iterator[None]:
    """Raise on every rank if the body failed on any rank. Collective.

    Args:
        message: prefix of a RuntimeError, such as ``"cannot save the checkpoint ..."``.
        group: process group; None for all ranks.

    Raises:
        ValueError: the lowest rank that failed raised one; has the first line of its message.
        RuntimeError: the lowest rank that failed raised another error; names rank and error.
    """
    error: BaseException | None = None
    try:
        yield
    except (Exception, CheckpointException) as caught:  # the latter is a BaseException
        error = caught
    if not is_true_on_any_rank(error is not None, group):
        return
    packed = None if error is None else _pack_error(error, (ValueError,))
    for failed_rank, outcome in enumerate(all_gather_object(packed, group)):
        if outcome is not None:
            raise _unpack_error(f"{message}: on rank {failed_rank}, ", *outcome) from error


def call_on_rank_0(message: str, function: Callable[[], Result], group: Group = None) -> Result:
    """Call ``function`` on the group's first rank and return its result on every rank.

    Collective. Errors are raised on every rank as by :func:`raise_on_all_ranks`.
    """
    result: Any = None
    with raise_on_all_ranks(message, group):
        if rank(group) == 0:
            result = function()
    return broadcast_object(result, group)


def call_on_rank_0_via_store(
    what: str, path: str | os.PathLike[str], function: Callable[[], str], group: Group = None
) -> str:
    """Call ``function`` on the group's first rank; any other rank that calls waits for its result.

    Not collective: the first rank does not wait, so it may also call alone. The result travels
    through the store of the default process group, which needs no receiver.

    Args:
        what: the operation's name in messages.
        path: path that the operation writes. A rank's n-th call for a path gets the result of the
            first rank's n-th call for it. So one path must not be written by the first rank alone
            in some calls and by all ranks in others: the numbers would differ.
        function: must need no other rank. :mod:`.object_collectives` are local while it runs.
        group: process group; None for all ranks.

    Returns:
        The result of ``function``.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: ``function`` raised it on the first rank.
        RuntimeError: ``function`` raised another error (which the first rank raises unchanged), or
            the first rank did not call within the timeout of the process group.
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
        try:
            with local_collectives():
                result = function()
        except BaseException as error:
            kept = (FileExistsError, FileNotFoundError, ValueError)
            store.set("outcome", json.dumps(_pack_error(error, kept)))
            raise
        store.set("outcome", json.dumps([None, result]))
        return result
    if not _wait_for_key(store, "started", _timeout(store)):
        raise RuntimeError(
            f"rank {ranks[0]} has not called {what} for {path} within {_timeout(store)}; "
            f"call it on every rank, or on rank {ranks[0]} alone"
        )
    _wait_for_key(store, "outcome", None)  # no timeout: an export may take hours
    kind, text = json.loads(store.get("outcome"))
    if kind is not None:
        raise _unpack_error(f"{what} failed on rank {ranks[0]}: ", kind, text)
    return str(text)


def join_problems(problems: Sequence[str], noun: str = "differences") -> str:
    """Join the first problems of a list for an error message, and count the others.

    Examples:
        >>> join_problems(["a", "b", "c", "d", "e"])
        'a; b; c (and 2 more differences)'
    """
    more = f" (and {len(problems) - _SHOWN} more {noun})" if len(problems) > _SHOWN else ""
    return "; ".join(problems[:_SHOWN]) + more


def _pack_error(error: BaseException, kept: tuple[type[Exception], ...]) -> tuple[str, str]:
    """Return the error's type in ``kept`` by name, or "" for another type, and its text."""
    kind = next((known.__name__ for known in kept if isinstance(error, known)), "")
    return kind, str(error) if kind and not isinstance(error, ValueError) else _one_line(error)


def _unpack_error(prefix: str, kind: str, text: str) -> Exception:
    """Inverse of :func:`_pack_error`; errors of other types become a RuntimeError."""
    kinds = {known.__name__: known for known in (FileExistsError, FileNotFoundError, ValueError)}
    return kinds[kind](text) if kind else RuntimeError(f"{prefix}{text}")


def _one_line(error: BaseException) -> str:
    """Return type and first line of an error; for a ValueError, only the line."""
    if isinstance(error, CheckpointException):  # holds the errors of all ranks
        failures = error.failures
        if failures:
            error = failures[min(failures)][0]
    text = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
    return (text.splitlines() or [type(error).__name__])[0]


def _wait_for_key(store: dist.Store, key: str, timeout: timedelta | None) -> bool:
    """Wait until ``key`` is set, and return True. Return False after ``timeout``, if given."""
    deadline = None if timeout is None else time.monotonic() + timeout.total_seconds()
    while not store.check([key]):
        if deadline is not None and time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _timeout(store: dist.Store) -> timedelta:
    return store.timeout  # type: ignore[attr-defined]  # missing in torch's stub


# ------------------------------------------------------------------------------ argument checks


def check_group(group: Any) -> None:
    """Raise ValueError unless ``group`` is None or a process group that has this rank."""
    if group is None:
        return
    # new_group() returns NON_GROUP_MEMBER on ranks outside the group
    is_member = group != dist.GroupMember.NON_GROUP_MEMBER
    if is_member and not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"group must be a process group or None, but it is of type {type(group).__name__}; "
            "use mesh.get_group() of a DeviceMesh"
        )
    if not is_member or dist.get_rank(group) < 0:
        raise ValueError(
            "this rank is not in the process group given as group; "
            "call the function only on the ranks of the group"
        )


def check_same_on_all_ranks(arguments: dict[str, Any], group: Group = None) -> None:
    """Raise ValueError on every rank unless all ranks pass equal values. Collective.

    Args:
        arguments: values by their names in messages.
        group: process group; None for all ranks.
    """
    values_of_ranks = all_gather_object(list(arguments.values()), group)
    for index, values in enumerate(values_of_ranks):
        for name, first, other in zip(arguments, values_of_ranks[0], values, strict=True):
            if other != first:
                raise ValueError(
                    f"ranks give different values of {name}: {first!r} on rank "
                    f"{global_rank(0, group)} and {other!r} on rank {global_rank(index, group)}; "
                    "pass the same value on all ranks, and group= if each part of the job has a "
                    "model of its own"
                )


def as_path(name: str, value: Any) -> Path:
    """Return the argument ``name`` as a path, or raise ValueError."""
    try:
        return Path(value)
    except TypeError:
        raise ValueError(
            f"{name} must be a path, but it is of type {type(value).__name__}; "
            "pass a str or a pathlib.Path"
        ) from None
