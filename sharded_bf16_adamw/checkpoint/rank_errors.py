"""Collectives on Python objects, and errors that are raised on all ranks instead of one.

A rank that raises alone leaves the others blocked in the next collective.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from ..sharding.collectives import device_for

Result = TypeVar("Result")
# None is the default group. Ranks in this module are group ranks.
Group = dist.ProcessGroup | None

CPU = torch.device("cpu")
_POLL_S = 0.05  # interval at which the store is polled
_SHOWN = 3  # problems listed in one error message
_calls: Counter[str] = Counter()  # of call_on_rank_0_via_store(), by operation, path and ranks
_on_this_rank_alone: ContextVar[bool] = ContextVar("_on_this_rank_alone", default=False)

# ---------------------------------------------------------------------------------------- errors


@contextmanager
def raise_on_all_ranks(message: str, group: Group = None) -> Iterator[None]:
    """Raise on every rank if the body failed on any rank. Collective.

    Args:
        message: prefix of a RuntimeError, such as ``"cannot save the checkpoint ..."``.
        group: process group; None for all ranks.

    Raises:
        ValueError: the lowest rank that failed raised a ValueError; with its message.
        RuntimeError: the lowest rank that failed raised another error; names the rank and the
            error.
    """
    error: BaseException | None = None
    try:
        yield
    except (Exception, CheckpointException) as caught:  # DCP's is a BaseException
        error = caught
    if not _is_true_on_any_rank(error is not None, group):
        return
    packed = None if error is None else _pack_error(error, (ValueError,))
    for failed_rank, outcome in enumerate(all_gather_object(packed, group)):
        if outcome is not None:
            raise _unpack_error(f"{message}: on rank {failed_rank}, ", *outcome) from error


def call_on_rank_0(message: str, function: Callable[[], Result], group: Group = None) -> Result:
    """Call ``function`` on the group's first rank and return its result on every rank.

    Collective. Errors are raised on every rank as by :func:`raise_on_all_ranks`.
    """
    result: list[Any] = [None]
    with raise_on_all_ranks(message, group):
        if rank(group) == 0:
            result[0] = function()
    if not _is_single_process(group):
        with _explain_failed_collective(group):
            dist.broadcast_object_list(result, group_src=0, group=group)
    return result[0]


def call_on_rank_0_via_store(
    what: str, path: str | os.PathLike[str], function: Callable[[], str], group: Group = None
) -> str:
    """Call ``function`` on the group's first rank; any other rank that calls waits for its result.

    Not collective: the first rank does not wait, so it may also call alone. The result travels
    through the store of the default process group, which needs no receiver.

    Args:
        what: the operation's name in messages.
        path: what the operation writes. Each rank counts its calls for the same path.
        function: must need no other rank. Collectives of this module are local within it.
        group: process group; None for all ranks.

    Returns:
        The result of ``function``.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: ``function`` raised one; on every rank that
            calls.
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
        token = _on_this_rank_alone.set(True)
        try:
            result = function()
        except BaseException as error:
            kept = (FileExistsError, FileNotFoundError, ValueError)
            store.set("outcome", json.dumps(_pack_error(error, kept)))
            raise
        finally:
            _on_this_rank_alone.reset(token)
        store.set("outcome", json.dumps([None, result]))
        return result
    if not _is_set(store, "started", _timeout(store)):
        raise RuntimeError(
            f"rank {ranks[0]} has not called {what} for {path} within {_timeout(store)}; "
            f"call it on every rank, or on rank {ranks[0]} alone"
        )
    _is_set(store, "outcome", None)  # no timeout: an export may take hours
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
    """Return an error as the name of its type in ``kept``, or "", and one line of text."""
    kind = next((known.__name__ for known in kept if isinstance(error, known)), "")
    return kind, str(error) if kind and not isinstance(error, ValueError) else _one_line(error)


def _unpack_error(prefix: str, kind: str, text: str) -> Exception:
    """Inverse of :func:`_pack_error`; errors of other types become a RuntimeError."""
    kinds = {known.__name__: known for known in (FileExistsError, FileNotFoundError, ValueError)}
    return kinds[kind](text) if kind else RuntimeError(f"{prefix}{text}")


def _one_line(error: BaseException) -> str:
    """Return type and first line of an error; of a ValueError the line alone."""
    if isinstance(error, CheckpointException):  # collects the errors of all ranks
        failures = error.failures
        if failures:
            error = failures[min(failures)][0]
    text = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
    return (text.splitlines() or [type(error).__name__])[0]


@contextmanager
def _explain_failed_collective(group: Group) -> Iterator[None]:
    """Replace torch's error about a failed collective by one that gives its likely causes."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"a checkpoint collective of rank {dist.get_rank()} and {world_size(group) - 1} other "
            "ranks failed: a rank has died, hangs or has not called the same function; "
            "call it on every rank, or pass group= where only some ranks hold the model"
        ) from error


# ----------------------------------------------------------------------------------- collectives


def rank(group: Group = None) -> int:
    """Return this process's rank in ``group``, 0 without a process group."""
    return 0 if _is_single_process(group) else dist.get_rank(group)


def world_size(group: Group = None) -> int:
    """Return the number of ranks in ``group``, 1 without a process group."""
    return 1 if _is_single_process(group) else dist.get_world_size(group)


def global_rank(group_rank: int, group: Group = None) -> int:
    """Return the rank in the default group of a rank of ``group``."""
    return group_rank if group is None else dist.get_global_rank(group, group_rank)


def all_gather_object(value: Result, group: Group = None) -> list[Result]:
    """Return the values of all ranks, in rank order. Collective."""
    if _is_single_process(group):
        return [value]
    values: list[Any] = [None] * world_size(group)
    with _explain_failed_collective(group):
        dist.all_gather_object(values, value, group=group)
    return values


def _is_true_on_any_rank(value: bool, group: Group = None) -> bool:
    """Return whether any rank's ``value`` is true. Collective.

    With many ranks, one integer costs much less than an object of each rank.
    """
    if _is_single_process(group):
        return value
    with _explain_failed_collective(group):
        flag = torch.tensor([value], dtype=torch.int32, device=device_for(group, CPU))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=group)
        return bool(flag.item())


def gather_object(value: Result, group: Group = None) -> list[Result]:
    """Return the values of all ranks on rank 0, an empty list on the others. Collective."""
    if _is_single_process(group):
        return [value]
    values: list[Any] | None = [None] * world_size(group) if rank(group) == 0 else None
    with _explain_failed_collective(group):
        dist.gather_object(value, values, group_dst=0, group=group)
    return values or []


def scatter_object(values: list[Result], group: Group = None) -> Result:
    """Return this rank's element of rank 0's ``values``. Collective."""
    if _is_single_process(group):
        return values[0]
    received: list[Any] = [None]
    with _explain_failed_collective(group):
        dist.scatter_object_list(
            received, values if rank(group) == 0 else None, group_src=0, group=group
        )
    return received[0]


def known_on_other_ranks(unknown: set[str], group: Group = None) -> set[str]:
    """Return the names unknown to this rank that another rank knows. Collective.

    Pipeline stages and experts have such names.
    """
    return unknown - unknown.intersection(*all_gather_object(unknown, group))


def _is_single_process(group: Group) -> bool:
    """Return whether this process communicates with no other.

    Raise if its process group was destroyed: the process must not publish its part of a checkpoint
    as the whole.
    """
    if group is not None and not dist.is_initialized():
        raise RuntimeError(
            "the process group was destroyed before the checkpoint was complete; "
            "call wait_for_save() before dist.destroy_process_group()"
        )
    return not dist.is_initialized() or _on_this_rank_alone.get()


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
    rows = all_gather_object(list(arguments.values()), group)
    for index, row in enumerate(rows):
        for name, first, other in zip(arguments, rows[0], row, strict=True):
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
