"""The all-gather of updated weights, one collective per bucket."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ..comm_errors import CheckedWork
from .bucket import split_by_size
from .param import ZeroParam

if TYPE_CHECKING:
    from .config import ZeRO


class PendingAllGather:
    """An all-gather of the updated local shards of one bucket, in flight.

    Args:
        zero_params: the parameters of the bucket, none of them replicated.
        group: the process group over which they are sharded.
        operation: names the collective in messages.
        in_place: if the bucket has one parameter, evenly sharded, gather into its own memory.
            Otherwise parameters do not change before :meth:`finish`.
    """

    def __init__(
        self,
        zero_params: list[ZeroParam],
        group: dist.ProcessGroup,
        operation: str,
        in_place: bool,
    ) -> None:
        self._zero_params = zero_params
        first = zero_params[0].param.detach()
        numel = sum(zero_param.padded_shard_numel for zero_param in zero_params)
        is_even = len(zero_params) == 1 and zero_params[0].is_even
        if is_even:
            shard = zero_params[0].local_shard(first).reshape(-1)
        else:
            shard = torch.empty(numel, dtype=first.dtype, device=first.device)
            _copy_in_shards(zero_params, shard)
        self._output: Tensor | None = None
        if is_even and in_place:
            output = first.view(-1)
        else:
            self._output = torch.empty(group.size(), numel, dtype=first.dtype, device=first.device)
            output = self._output.view(-1)
        self._shard = shard  # not to be freed while in flight
        # Named all_gather_into_tensor before torch 2.13.
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        self._work = CheckedWork(operation, all_gather, output, shard, group=group)

    @property
    def is_completed(self) -> bool:
        """Return True if :meth:`finish` would not block on other ranks."""
        return self._work.is_completed()

    def finish(self) -> None:
        """Wait for the all-gather, and copy the weights into the parameters."""
        self._work.wait()
        output = self._output
        if output is None:  # gathered in place
            torch.autograd.graph.increment_version([each.param for each in self._zero_params])
            return
        if output.is_cuda:  # it may have been allocated on another stream
            output.record_stream(torch.cuda.current_stream(output.device))
        numels = [zero_param.padded_shard_numel for zero_param in self._zero_params]
        for zero_param, padded in zip(self._zero_params, output.split(numels, 1), strict=True):
            zero_param.copy_out(padded, zero_param.param.detach())


def _copy_in_shards(zero_params: list[ZeroParam], shard: Tensor) -> None:
    """Copy the local shards into this rank's shard of the bucket, in a few kernel launches."""
    shards = shard.split([zero_param.padded_shard_numel for zero_param in zero_params])
    pairs = list(zip(zero_params, shards, strict=True))
    torch._foreach_copy_(
        [zero_param.unpack_shard(part) for zero_param, part in pairs],
        [zero_param.local_shard(zero_param.param.detach()) for zero_param, _ in pairs],
    )
    padding = [zero_param.padding(part) for zero_param, part in pairs]
    if padding := [part for part in padding if part.numel()]:
        torch._foreach_zero_(padding)


class AllGather:
    """The all-gather at the end of a step. It has completed when :meth:`start` returns."""

    def __init__(self, policy: ZeRO) -> None:
        axis = policy.mesh.ndim - 1
        self._group = policy.mesh.get_group(axis)
        self._ranks = policy.mesh.size(axis)
        self._policy = policy
        self._buckets: list[list[ZeroParam]] = []
        self._buckets_of: list[ZeroParam] = []  # the parameters that the buckets were built for

    def add_params(self, zero_params: list[ZeroParam]) -> None:
        """Add parameters of the optimizer. Every rank adds the same ones."""

    def start(self, zero_params: list[ZeroParam]) -> None:
        """All-gather these parameters, which a step has updated. Collective."""
        if self._ranks == 1:
            return
        if self._buckets_of is not zero_params:
            if self._buckets_of != zero_params:
                sharded = [each for each in zero_params if not each.is_replicated]
                self._buckets = split_by_size(sharded, self._policy.bucket_bytes)
            self._buckets_of = zero_params
        in_flight: list[PendingAllGather] = []
        for bucket in self._buckets:
            if len(in_flight) == self._policy.max_in_flight:
                in_flight.pop(0).finish()
            in_flight.append(
                PendingAllGather(bucket, self._group, "gathering the updated weights", True)
            )
        for pending in in_flight:
            pending.finish()

    def wait(self) -> None:
        """Do nothing: :meth:`start` has waited."""
