"""Comparison of the replicas of weights and states, to detect silent data corruption.

Replicas get equal gradients from a collective, and the update of equal gradients gives equal bits.
So replicas differ only after a hardware fault, or if code changes a single replica.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import device_for
from .comm_errors import comm_errors
from .replica_checksum import checksums, text_checksum

OPERATION = "comparing replicas"  # for messages


@dataclass(frozen=True)
class Replica:
    """A tensor of this rank, and the groups whose ranks hold replicas of it."""

    name: str
    tensor: Tensor
    groups: tuple[dist.ProcessGroup, ...]


class Difference(NamedTuple):
    """A tensor whose replicas differ, and the ranks that hold it.

    ``odd`` lists the ranks that differ from the majority. It is empty if there is no majority.
    """

    name: str
    ranks: tuple[int, ...]
    odd: tuple[int, ...]


def check_replicas(
    replicas: Sequence[Replica], others: Iterable[dist.ProcessGroup], problem: str | None = None
) -> None:
    """Raise on every rank if 64-bit checksums of replicas differ. Collective over all groups given.

    Args:
        replicas: of this rank; every rank of a group passes the same names in the same order.
        others: groups over which nothing is compared, but whose ranks must raise too.
        problem: error message of this rank, to raise on every rank.

    Raises:
        RuntimeError: on every rank, if a replica differs; names the first tensor and its ranks.
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
            "the hardware of one of these ranks, or code that changes a single rank, and return to "
            "an earlier checkpoint; if ranks hold different parameters on purpose, declare their "
            "groups with AdamW_BF16(..., model_parallel=ModelParallel(...))"
        )
    groups = {group for replica in replicas for group in replica.groups}
    for group in in_shared_order({*groups, *others}):
        message = _first_message(group, message)
    if message is not None:
        raise RuntimeError(message)


def find_differences(replicas: Sequence[Replica], numbers: Sequence[int]) -> list[Difference]:
    """Return the replicas whose checksums ``numbers`` differ within one of this rank's groups.

    Collective over the groups of the replicas.
    """
    found: list[Difference] = []
    for group in in_shared_order({group for replica in replicas for group in replica.groups}):
        indices = [index for index, replica in enumerate(replicas) if group in replica.groups]
        found += _compare(group, [replicas[i].name for i in indices], [numbers[i] for i in indices])
    return found


def _compare(group: dist.ProcessGroup, names: list[str], numbers: list[int]) -> list[Difference]:
    ranks = tuple(dist.get_process_group_ranks(group))
    if _unequal(group, [len(names), text_checksum("\n".join(names))]):
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
    """Return the indices at which numbers differ. Every rank passes equally many numbers."""
    count = len(numbers)
    # The maximum of ~number gives the minimum. Unlike -number, it always fits into 64 bits.
    extremes = _all_reduce_max(group, [*numbers, *[~number for number in numbers]])
    pairs = enumerate(zip(extremes[:count], extremes[count:], strict=True))
    return [i for i, (highest, lowest) in pairs if highest != ~lowest]


def _format(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))


def _first_message(group: dist.ProcessGroup, message: str | None) -> str | None:
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
    """Sort groups the same way on every rank, by mesh dimension.

    Collectives in this order cannot deadlock. One pass carries a message of any rank to all ranks
    of a mesh.
    """

    def key(group: dist.ProcessGroup) -> tuple[int, list[int], str]:
        ranks = dist.get_process_group_ranks(group)
        stride = ranks[1] - ranks[0] if len(ranks) > 1 else 0  # identifies the mesh dimension
        return stride, ranks, group.group_name

    return sorted(groups, key=key)
