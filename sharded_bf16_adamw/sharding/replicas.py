"""Compare the replicas of weights and states: detection of silent data corruption.

The update rule gives replicas the same bits as long as their gradients have the same bits, which a collective sees to. So a difference is
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

COMPARING = "comparing replicas"  # for messages


@dataclass(frozen=True)
class Replica:
    """A tensor of this rank and the groups whose ranks hold the same."""

    name: str
    tensor: Tensor
    groups: tuple[dist.ProcessGroup, ...]


class Difference(NamedTuple):
    """A tensor whose replicas differ: its name, the ranks that hold it, and those that differ from most; none without a majority."""

    name: str
    ranks: tuple[int, ...]
    odd: tuple[int, ...]


def check_replicas(
    replicas: Sequence[Replica], others: Iterable[dist.ProcessGroup], problem: str | None = None
) -> None:
    """Compare 64-bit checksums over each group. Collective over all groups named.

    Args:
        replicas: the same names in the same order on every rank of a group.
        others: groups whose ranks compare nothing with each other but are to learn of a difference too.
        problem: what is wrong on this rank, to be raised on all.

    Raises:
        RuntimeError: on every rank, where a replica differs; names the first tensor and the ranks.
    """
    differences = find_differences(replicas, checksums([replica.tensor for replica in replicas]))
    message = problem
    if differences:
        name, ranks, odd = differences[0]
        whose = (
            f"on rank {_listed(odd)} from those on rank {_listed(set(ranks) - set(odd))}"
            if odd
            else f"between ranks {_listed(ranks)}"
        )
        more = f" (and {len(differences) - 1} more tensors)" if differences[1:] else ""
        message = (
            f"replicas of {name} differ {whose}{more}: equal gradients give equal bits, so suspect the hardware of one of these ranks, or "
            "code that changes one rank alone, and go back to a checkpoint from before; parameters that each rank has of its own are named "
            "by AdamW_BF16(..., model_parallel=ModelParallel(...))"
        )
    for group in in_shared_order(
        {*(group for replica in replicas for group in replica.groups), *others}
    ):
        message = _first_of(group, message)
    if message is not None:
        raise RuntimeError(message)


def find_differences(replicas: Sequence[Replica], numbers: Sequence[int]) -> list[Difference]:
    """Return the differences that this rank takes part in, by the replicas' checksums. Collective over their groups."""
    found: list[Difference] = []
    for group in in_shared_order({group for replica in replicas for group in replica.groups}):
        indices = [index for index, replica in enumerate(replicas) if group in replica.groups]
        found += _compare(group, [replicas[i].name for i in indices], [numbers[i] for i in indices])
    return found


def _compare(group: dist.ProcessGroup, names: list[str], numbers: list[int]) -> list[Difference]:
    ranks = tuple(dist.get_process_group_ranks(group))
    digest = int.from_bytes(
        hashlib.blake2b("\n".join(names).encode(), digest_size=7).digest(), "big"
    )
    if _unequal(group, [len(names), digest]):
        return [Difference("the list of parameters", ranks, ())]
    differing = _unequal(group, numbers)
    if not differing:
        return []
    of_ranks: list[Any] = [None] * dist.get_world_size(group)
    with comm_errors(COMPARING, ranks):
        dist.all_gather_object(of_ranks, [numbers[i] for i in differing], group=group)
    result = []
    for place, index in enumerate(differing):
        common, times = Counter(row[place] for row in of_ranks).most_common(1)[0]
        odd = tuple(rank for rank, row in zip(ranks, of_ranks, strict=True) if row[place] != common)
        result.append(Difference(names[index], ranks, odd if times > len(odd) else ()))
    return result


def _unequal(group: dist.ProcessGroup, numbers: Sequence[int]) -> list[int]:
    """Return the indices of the numbers, as many on every rank, that are not the same on all."""
    count = len(numbers)
    extremes = _all_reduce_max(
        group, [*numbers, *[~number for number in numbers]]
    )  # which, unlike -number, always fits
    return [
        i
        for i, (highest, lowest) in enumerate(zip(extremes[:count], extremes[count:], strict=True))
        if highest != ~lowest
    ]


def _listed(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))


def _first_of(group: dist.ProcessGroup, finding: str | None) -> str | None:
    """Return what the first rank of the group that has a finding found."""
    if not any(_all_reduce_max(group, [finding is not None])):
        return None
    of_ranks: list[Any] = [None] * dist.get_world_size(group)
    with comm_errors(COMPARING, dist.get_process_group_ranks(group)):
        dist.all_gather_object(of_ranks, finding, group=group)
    return next(text for text in of_ranks if text is not None)


def _all_reduce_max(group: dist.ProcessGroup, values: Sequence[int]) -> list[int]:
    row = torch.tensor(values, dtype=torch.int64, device=device_for(group, torch.device("cpu")))
    with comm_errors(COMPARING, dist.get_process_group_ranks(group)):
        dist.all_reduce(row, op=dist.ReduceOp.MAX, group=group)
    return row.tolist()


def in_shared_order(groups: Iterable[dist.ProcessGroup]) -> list[dist.ProcessGroup]:
    """Sort groups the same way on every rank, mesh dimension by mesh dimension.

    No two ranks then wait for each other in different groups, and what one rank knows reaches every rank of a mesh in one pass.
    """

    def key(group: dist.ProcessGroup) -> tuple[int, list[int], str]:
        ranks = dist.get_process_group_ranks(group)
        return (
            ranks[1] - ranks[0] if len(ranks) > 1 else 0,
            ranks,
            group.group_name,
        )  # the ranks of a mesh dimension have one stride

    return sorted(groups, key=key)
