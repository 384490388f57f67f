"""Sums of squares that ranks hold in parts, added up so that every element counts once and every rank gets one result.

Vocabulary: a *key* is the tuple of process groups over which parameters are spread, as :func:`.local.shard_groups` gives it. The
empty key stands for plain tensors, which every rank is taken to hold as a replica.
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
_TOLERANCE = 1e-6  # of the relative variance of replicas' sums: other kernels may round a gradient differently, no more


def all_reduce_sums(
    sums: dict[Key, Tensor],
    expert_sums: dict[Key, Tensor],
    replicas: Sequence[dist.ProcessGroup],
    parallel: ModelParallel | None,
) -> tuple[Tensor, Tensor]:
    """Add up this rank's sums of squares over all ranks that share the model. Collective over every group named.

    Every rank of a group passes the same keys in the same order, also those of parameters of which it holds no element or no gradient.

    Args:
        sums: by key, 0-dim float64.
        expert_sums: likewise, of the parameters that differ over ``parallel.ep``.
        replicas: groups whose ranks hold replicas, over which nothing is added: their ranks compare, and agree whether all is finite.
        parallel: groups over which parameters differ; None where there are none.

    Returns:
        ``(total, mismatch)``, 0-dim float64, the same on every rank. The total is not finite where any rank's sum is not.
        ``mismatch`` is positive where ranks that should have equal gradients (of plain tensors beside shards or experts, of replicas)
        have not: the total is then meaningless.

    Raises:
        RuntimeError: another rank has died or hangs.
    """
    own = [*sums.values(), *expert_sums.values()]
    device = own[0].device if own else torch.device("cpu")
    poison = torch.zeros((), dtype=torch.float64, device=device)
    for value in own:
        poison += (value - value).to(
            device
        )  # NaN where it is not finite: reaches all ranks with whatever is added up
    total, mismatch = _sum_over_shards(sums, poison)
    experts, mismatch_of_experts = _sum_over_shards(expert_sums, poison)
    mismatch = mismatch + mismatch_of_experts
    if parallel is not None and (group := parallel.ep_group) is not None:
        experts, mismatch, first, second = _all_reduce(
            group, experts, mismatch, total, total.square()
        )
        total, mismatch = _agreed(total, mismatch, first, second, dist.get_world_size(group))
    total = total + experts
    for group in replicas:
        not_finite, mismatch, first, second = _all_reduce(
            group, (~total.isfinite()).double(), mismatch, total, total.square()
        )
        total, mismatch = _agreed(total, mismatch, first, second, dist.get_world_size(group))
        total = torch.where(not_finite > 0, torch.nan, total)
    if parallel is not None and (group := parallel.pp_group) is not None:
        total, mismatch = _all_reduce(group, total, mismatch)
    return total, mismatch


def _sum_over_shards(sums: dict[Key, Tensor], poison: Tensor) -> tuple[Tensor, Tensor]:
    """Add up one set of sums. Each exchange carries the sum of plain tensors and its square, to compare replicas."""
    total, mismatch = poison, torch.zeros_like(poison)
    plain = sums.get((), torch.zeros_like(poison)).to(poison.device)
    for key, value in sums.items():
        if key:
            value, mismatch, first, second = _all_reduce(
                key, value.to(poison.device) + poison, mismatch, plain, plain.square()
            )
            plain, mismatch = _agreed(
                plain, mismatch, first, second, math.prod(map(dist.get_world_size, key))
            )
            total = total + value
    return total + plain, mismatch


def _agreed(
    own: Tensor, mismatch: Tensor, first: Tensor, second: Tensor, ranks: int
) -> tuple[Tensor, Tensor]:
    """Return one value for what ``ranks`` ranks should have alike, from the sums of their values and squares, and count a mismatch."""
    differ = ranks * second - first.square() > _TOLERANCE * first.square()
    return torch.where(first == ranks * own, own, first / ranks), mismatch + differ.double()


def _all_reduce(groups: dist.ProcessGroup | Key, *values: Tensor) -> Tensor:
    """Add up 0-dim values over each group in turn; returns them stacked."""
    stacked = torch.stack(values)
    for group in (groups,) if isinstance(groups, dist.ProcessGroup) else groups:
        with comm_errors("summing the gradient norm", dist.get_process_group_ranks(group)):
            all_reduce(stacked, group)
    return stacked
