"""Sums of squares over all ranks, in which every element counts once.

A *key* is the tuple of process groups over which parameters are sharded, as
:func:`.dtensor.shard_groups` returns it. Plain tensors have the empty key, and count as replicas on
every rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import all_reduce
from .comm_errors import comm_errors
from .model_parallel import ModelParallel

Key = tuple[dist.ProcessGroup, ...]
# Largest relative variance of equal sums over ranks, whose kernels may round differently.
_TOLERANCE = 1e-6


def all_reduce_sums(
    sums: dict[Key, Tensor],
    expert_sums: dict[Key, Tensor],
    replicas: Sequence[dist.ProcessGroup],
    parallel: ModelParallel | None,
) -> tuple[Tensor, Tensor]:
    """Add up the ranks' sums of squares. Collective over every group given.

    Every rank of a group passes the same keys in the same order, even if this rank has no element
    or no gradient of their parameters.

    Args:
        sums: for each key, a float64 tensor; all of one shape, 0-dim for one sum of squares.
        expert_sums: the same for the parameters that differ over ``parallel.ep``.
        replicas: groups whose ranks hold replicas. Their totals are compared instead of summed, and
            are finite on all of their ranks or on none.
        parallel: the optimizer's process groups over which parameters differ, or None.

    Returns:
        ``(total, mismatch)``, float64 of that shape, the same on every rank. The total is not
        finite where any rank's sum is not. ``mismatch`` is positive where replicas (plain tensors
        included) have different sums; the total is then meaningless.

    Raises:
        RuntimeError: another rank has died or hangs.
    """
    own = [*sums.values(), *expert_sums.values()]
    # NaN if any sum is not finite, else 0; added to every sum, so that it reaches all ranks.
    poison = torch.zeros_like(own[0] if own else torch.empty((), dtype=torch.float64, device="cpu"))
    for value in own:
        poison += (value - value).to(poison.device)
    total, mismatch = _sum_over_shards(sums, poison)
    experts, experts_mismatch = _sum_over_shards(expert_sums, poison)
    mismatch = mismatch + experts_mismatch
    if parallel is not None and (group := parallel.group("ep")) is not None:
        experts, mismatch, first, second = _all_reduce(
            group, experts, mismatch, total, total.square()
        )
        total, mismatch = _compare(total, mismatch, first, second, dist.get_world_size(group))
    total = total + experts
    for group in replicas:
        not_finite, mismatch, first, second = _all_reduce(
            group, (~total.isfinite()).double(), mismatch, total, total.square()
        )
        total, mismatch = _compare(total, mismatch, first, second, dist.get_world_size(group))
        total = torch.where(not_finite > 0, torch.nan, total)
    if parallel is not None and (group := parallel.group("pp")) is not None:
        total, mismatch = _all_reduce(group, total, mismatch)
    return total, mismatch


def _sum_over_shards(sums: dict[Key, Tensor], poison: Tensor) -> tuple[Tensor, Tensor]:
    """Add up the sums of shards, and compare those of plain tensors in the same all-reduces."""
    total, mismatch = poison, torch.zeros_like(poison)
    plain = sums.get((), torch.zeros_like(poison)).to(poison.device)
    for key, value in sums.items():
        if key:
            value, mismatch, first, second = _all_reduce(
                key, value.to(poison.device) + poison, mismatch, plain, plain.square()
            )
            ranks = math.prod(map(dist.get_world_size, key))
            plain, mismatch = _compare(plain, mismatch, first, second, ranks)
            total = total + value
    return total + plain, mismatch


def _compare(
    own: Tensor, mismatch: Tensor, first: Tensor, second: Tensor, ranks: int
) -> tuple[Tensor, Tensor]:
    """Return one value for all ranks, and ``mismatch``, increased by one if their values differ.

    ``own`` is this rank's value; ``first`` and ``second`` are the sums over ranks of the values and
    of their squares.
    """
    differ = ranks * second - first.square() > _TOLERANCE * first.square()
    return torch.where(first == ranks * own, own, first / ranks), mismatch + differ.double()


def _all_reduce(groups: dist.ProcessGroup | Key, *values: Tensor) -> Tensor:
    """Sum values of one shape over each group in turn, and return them stacked."""
    stacked = torch.stack(values)
    for group in (groups,) if isinstance(groups, dist.ProcessGroup) else groups:
        with comm_errors("summing the gradient norm", dist.get_process_group_ranks(group)):
            all_reduce(stacked, group)
    return stacked
