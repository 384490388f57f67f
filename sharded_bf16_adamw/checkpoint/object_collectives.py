"""Collectives on Python objects, over the ranks that save or load a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..sharding.collectives import device_for

Result = TypeVar("Result")
# None is the default group. Ranks in this module are group ranks.
Group = dist.ProcessGroup | None

CPU = torch.device("cpu")
_are_local: ContextVar[bool] = ContextVar("_are_local", default=False)


def rank(group: Group = None) -> int:
    """Return this process's rank in ``group``, 0 without a process group."""
    return 0 if _is_single_process(group) else dist.get_rank(group)


def world_size(group: Group = None) -> int:
    """Return the number of ranks in ``group``, 1 without a process group."""
    return 1 if _is_single_process(group) else dist.get_world_size(group)


def global_rank(group_rank: int, group: Group = None) -> int:
    """Convert a rank of ``group`` to the rank in the default group."""
    return group_rank if group is None else dist.get_global_rank(group, group_rank)


def all_gather_object(value: Result, group: Group = None) -> list[Result]:
    """Return the values of all ranks, in rank order. Collective."""
    if _is_single_process(group):
        return [value]
    values: list[Any] = [None] * world_size(group)
    with _explain_failed_collective(group):
        dist.all_gather_object(values, value, group=group)
    return values


def is_true_on_any_rank(value: bool, group: Group = None) -> bool:
    """Return True if any rank's ``value`` is true. Collective.

    All-reduces one integer, which is much cheaper than gathering an object from every rank.
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


def broadcast_object(value: Result, group: Group = None) -> Result:
    """Return rank 0's ``value``. Collective."""
    if _is_single_process(group):
        return value
    values = [value]
    with _explain_failed_collective(group):
        dist.broadcast_object_list(values, group_src=0, group=group)
    return values[0]


def known_on_other_ranks(unknown: set[str], group: Group = None) -> set[str]:
    """Return the names in this rank's ``unknown`` that another rank knows. Collective.

    For example, names of another pipeline stage or of experts on another rank.
    """
    return unknown - unknown.intersection(*all_gather_object(unknown, group))


@contextmanager
def local_collectives() -> Iterator[None]:
    """Make the collectives of this module act as in a single process while the body runs."""
    token = _are_local.set(True)
    try:
        yield
    finally:
        _are_local.reset(token)


def _is_single_process(group: Group) -> bool:
    """Return True if this process communicates with no other.

    Raise if ``group`` was destroyed: this rank must not publish its part of a checkpoint as the
    whole.
    """
    if group is not None and not dist.is_initialized():
        raise RuntimeError(
            "the process group was destroyed before the checkpoint was complete; "
            "call wait_for_save() before dist.destroy_process_group()"
        )
    return not dist.is_initialized() or _are_local.get()


class CollectiveError(RuntimeError):
    """A collective failed. Its process group cannot be used any more."""


@contextmanager
def _explain_failed_collective(group: Group) -> Iterator[None]:
    """Replace torch's error about a failed collective by one that names the likely causes."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise CollectiveError(
            f"a checkpoint collective of rank {dist.get_rank()} and {world_size(group) - 1} other "
            "ranks failed: a rank has died, hangs or has not called the same function; "
            "call save or load on every rank, or pass group= where only some ranks hold the model"
        ) from error
