"""Comparison of the replicas of weights and states, to detect silent data corruption.

Equal gradients give replicas equal bits, and a collective makes gradients equal. So a difference is
a fault of the hardware, or of a program that changes one replica alone.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .checksum import checksums
from .collectives import device_for
from .comm_errors import comm_errors

OPERATION = "comparing replicas"  # for messages


@dataclass(frozen=True)
class Replica:
    """A tensor of this rank and the groups whose ranks hold the same."""

    name: str
    tensor: Tensor
    groups: tuple[dist.ProcessGroup, ...]


class Difference(NamedTuple):
    """A tensor whose replicas differ, and the ranks that hold it.

    ``odd`` are the ranks that differ from the majority; none if there is no majority.
    """

    name: str
    ranks: tuple[int, ...]
    odd: tuple[int, ...]


def check_replicas(
    replicas: Sequence[Replica], others: Iterable[dist.ProcessGroup], problem: str | None = None
) -> None:
    """Compare 64-bit checksums over each group. Collective over all groups named.

    Args:
        replicas: the same names in the same order on every rank of a group.
        others: groups whose ranks compare nothing with each other, but must learn of a difference.
        problem: an error of this rank, to be raised on all.

    Raises:
        RuntimeError: on every rank, if a replica differs; names the first tensor and the ranks.
    """
    differences = find_differences(replicas, checksums([replica.tensor for replica in replicas]))
    message = problem
    if differences:
        name, ranks, odd = differences[0]
        where = (
            f"on rank {_format(odd)} from those on rank {_format(set(ranks) - set(odd))}"
            if odd
            else f"between ranks {_format(ranks)}"
        )
        more = f" (and {len(differences) - 1} more tensors)" if differences[1:] else ""
        message = (
            f"replicas of {name} differ {where}{more}: equal gradients give equal bits, so suspect "
            "the hardware of one of these ranks, or code that changes one rank alone, and go back "
            "to an earlier checkpoint; if ranks hold different parameters on purpose, name their "
            "groups by AdamW_BF16(..., model_parallel=ModelParallel(...))"
        )
    groups = {group for replica in replicas for group in replica.groups}
    for group in in_shared_order({*groups, *others}):
        message = _first_of(group, message)
    if message is not None:
        raise RuntimeError(message)


def find_differences(replicas: Sequence[Replica], numbers: Sequence[int]) -> list[Difference]:
    """Compare the replicas' checksums, and return the differences in this rank's groups.

    Collective over the replicas' groups.
    """
    found: list[Difference] = []
    for group in in_shared_order({group for replica in replicas for group in replica.groups}):
        indices = [index for index, replica in enumerate(replicas) if group in replica.groups]
        found += _compare(group, [replicas[i].name for i in indices], [numbers[i] for i in indices])
    return found


def _compare(group: dist.ProcessGroup, names: list[str], numbers: list[int]) -> list[Difference]:
    ranks = tuple(dist.get_process_group_ranks(group))
    digest = hashlib.blake2b("\n".join(names).encode(), digest_size=7).digest()
    if _unequal(group, [len(names), int.from_bytes(digest, "big")]):
        return [Difference("the list of parameters", ranks, ())]
    differing = _unequal(group, numbers)
    if not differing:
        return []
    result = []
    of_ranks = _all_gather_object(group, [numbers[i] for i in differing])
    for index, values in zip(differing, zip(*of_ranks, strict=True), strict=True):
        common, count = Counter(values).most_common(1)[0]
        odd = tuple(rank for rank, value in zip(ranks, values, strict=True) if value != common)
        result.append(Difference(names[index], ranks, odd if count > len(odd) else ()))
    return result


def _unequal(group: dist.ProcessGroup, numbers: Sequence[int]) -> list[int]:
    """Return the indices of the numbers that differ between ranks; all pass as many."""
    count = len(numbers)
    # Unlike -number, ~number always fits into 64 bits.
    extremes = _all_reduce_max(group, [*numbers, *[~number for number in numbers]])
    pairs = enumerate(zip(extremes[:count], extremes[count:], strict=True))
    return [i for i, (highest, lowest) in pairs if highest != ~lowest]


def _format(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))


def _first_of(group: dist.ProcessGroup, message: str | None) -> str | None:
    """Return the message of the first rank of the group that has one."""
    if not any(_all_reduce_max(group, [message is not None])):
        return None
    return next(text for text in _all_gather_object(group, message) if text is not None)


def _all_gather_object(group: dist.ProcessGroup, value: Any) -> list[Any]:
    of_ranks: list[Any] = [None] * dist.get_world_size(group)
    with comm_errors(OPERATION, dist.get_process_group_ranks(group)):
        dist.all_gather_object(of_ranks, value, group=group)
    return of_ranks


def _all_reduce_max(group: dist.ProcessGroup, values: Sequence[int]) -> list[int]:
    tensor = torch.tensor(values, dtype=torch.int64, device=device_for(group, torch.device("cpu")))
    with comm_errors(OPERATION, dist.get_process_group_ranks(group)):
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return tensor.tolist()


def in_shared_order(groups: Iterable[dist.ProcessGroup]) -> list[dist.ProcessGroup]:
    """Sort groups the same way on every rank, mesh dimension by mesh dimension.

    No two ranks then wait for each other in different groups, and what one rank knows reaches every
    rank of a mesh in one pass.
    """

    def key(group: dist.ProcessGroup) -> tuple[int, list[int], str]:
        ranks = dist.get_process_group_ranks(group)
        stride = ranks[1] - ranks[0] if len(ranks) > 1 else 0  # one for each mesh dimension
        return stride, ranks, group.group_name

    return sorted(groups, key=key)
