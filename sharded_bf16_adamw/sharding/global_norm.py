"""Sums over all ranks: every element counts once, and every rank gets one result.

A *key* is the tuple of process groups over which parameters are sharded, as
:func:`.dtensor.shard_groups` returns it. The empty key stands for plain tensors, which count as
replicas on every rank.
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
# Bound on the relative variance of replicas' sums: ranks may use kernels that round differently.
_TOLERANCE = 1e-6


def all_reduce_sums(
    sums: dict[Key, Tensor],
    expert_sums: dict[Key, Tensor],
    replicas: Sequence[dist.ProcessGroup],
    parallel: ModelParallel | None,
) -> tuple[Tensor, Tensor]:
    """Add up the ranks' sums of squares. Collective over every group given.

    Every rank of a group passes the same keys in the same order, including those of parameters for
    which it has no element or no gradient.

    Args:
        sums: by key, float64, all of one shape; 0-dim for a sum of squares.
        expert_sums: the same for the parameters that differ over ``parallel.ep``.
        replicas: groups whose ranks hold replicas. Nothing is added up over them; their ranks
            compare their totals, and agree on whether all are finite.
        parallel: groups over which parameters differ, or None.

    Returns:
        ``(total, mismatch)``, float64 of that shape, the same on every rank. The total is not
        finite where any rank's sum is not. ``mismatch`` is positive where sums differ that must be
        equal (of plain tensors beside shards or experts, of replicas); the total is then
        meaningless.

    Raises:
        RuntimeError: another rank has died or hangs.
    """
    own = [*sums.values(), *expert_sums.values()]
    # NaN if any sum is not finite, else 0. Added to every sum, it reaches all ranks.
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
    """Add up one set of sums, and compare the sums of plain tensors in the same all-reduces."""
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
    """Return one value for all ranks, and the mismatch, increased by one if the values differ.

    ``first`` and ``second`` are the sums over ranks of the value and of its square.
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
