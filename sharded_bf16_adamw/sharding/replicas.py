"""Compare the replicas of weights and states: detection of silent data corruption.

The update rule gives replicas the same bits as long as their gradients have the same bits, which a collective sees to. So a difference is
a fault of the hardware, or of a program that changes one replica alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .checksum import POSITIVE, checksums
from .collectives import device_for, exchange

COMPARING = "comparing replicas"  # for messages


@dataclass(frozen=True)
class Replica:
    """A tensor of this rank and the groups whose ranks hold the same."""

    name: str
    tensor: Tensor
    groups: tuple[dist.ProcessGroup, ...]


class Difference(NamedTuple):
    """A tensor whose replicas differ, and the sentence that says so."""

    name: str
    message: str


def check_replicas(replicas: Sequence[Replica], others: Iterable[dist.ProcessGroup]) -> None:
    """Compare 64-bit checksums over each group. Collective over all groups named.

    Args:
        replicas: the same names in the same order on every rank of a group.
        others: groups whose ranks compare nothing with each other but are to learn of a difference too.

    Raises:
        RuntimeError: on every rank, where a replica differs; names the first tensor and the ranks.
    """
    difference = find_difference(replicas)
    message = None if difference is None else difference.message
    for group in in_shared_order({*(group for replica in replicas for group in replica.groups), *others}):
        message = _first_of(group, message)
    if message is not None:
        raise RuntimeError(message)


def find_difference(replicas: Sequence[Replica]) -> Difference | None:
    """Return the first difference that this rank takes part in. Collective over the groups of the replicas."""
    numbers = [number & POSITIVE for number in checksums([replica.tensor for replica in replicas])]
    found: list[Difference] = []
    for group in in_shared_order({group for replica in replicas for group in replica.groups}):
        indices = [index for index, replica in enumerate(replicas) if group in replica.groups]
        found += _compare(group, [replicas[i].name for i in indices], [numbers[i] for i in indices])
    return found[0] if found else None


def _compare(group: dist.ProcessGroup, names: list[str], numbers: list[int]) -> list[Difference]:
    extremes = _all_reduce_max(group, [*numbers, *[-number for number in numbers]])
    count = len(numbers)
    differing = [i for i, (highest, lowest) in enumerate(zip(extremes[:count], extremes[count:], strict=True)) if highest != -lowest]
    if not differing:
        return []
    of_ranks: list[Any] = [None] * dist.get_world_size(group)
    with exchange(COMPARING, dist.get_process_group_ranks(group)):
        dist.all_gather_object(of_ranks, numbers[differing[0]], group=group)
    common, times = Counter(of_ranks).most_common(1)[0]
    ranks = dist.get_process_group_ranks(group)
    odd = [str(rank) for rank, number in zip(ranks, of_ranks, strict=True) if number != common]
    whose = f"on rank {', '.join(odd)} from {times} others" if times > len(odd) else f"between ranks {', '.join(map(str, ranks))}"
    more = f" (and {len(differing) - 1} more tensors)" if differing[1:] else ""
    message = (
        f"replicas of {names[differing[0]]} differ {whose}{more}: equal gradients give equal bits, so suspect the hardware of that rank, "
        "or code that changes weights on one rank alone; go back to a checkpoint from before"
    )
    return [Difference(names[differing[0]], message)]


def _first_of(group: dist.ProcessGroup, finding: str | None) -> str | None:
    """Return what the first rank of the group that has a finding found."""
    if not any(_all_reduce_max(group, [finding is not None])):
        return None
    of_ranks: list[Any] = [None] * dist.get_world_size(group)
    with exchange(COMPARING, dist.get_process_group_ranks(group)):
        dist.all_gather_object(of_ranks, finding, group=group)
    return next(text for text in of_ranks if text is not None)


def _all_reduce_max(group: dist.ProcessGroup, values: Sequence[int]) -> list[int]:
    row = torch.tensor(values, dtype=torch.int64, device=device_for(group, torch.device("cpu")))
    with exchange(COMPARING, dist.get_process_group_ranks(group)):
        dist.all_reduce(row, op=dist.ReduceOp.MAX, group=group)
    return row.tolist()


def in_shared_order(groups: Iterable[dist.ProcessGroup]) -> list[dist.ProcessGroup]:
    """Sort groups the same way on every rank, so that no two ranks wait for each other in different ones."""
    return sorted(groups, key=lambda group: (dist.get_process_group_ranks(group), group.group_name))
