"""The global gradient norm over all ranks, and the clip coefficient that the next step applies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter, is_
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .gradients import GroupGrads
from .kernels import (
    NormScratch,
    clip_coefficient,
    double_device,
    grad_sum_sq,
    is_capturing,
    norm_and_clip_coefficient,
)
from .sharding.base import Sharding
from .sharding.dtensor import group_by
from .sharding.global_norm import Key, all_reduce_sums
from .sharding.model_parallel import ModelParallel
from .sharding.replicas import in_shared_order
from .torch_types import is_dtensor

SumKey = tuple[bool, Key]
"""Key of gradients that are summed together: whether their parameters are experts, shard groups."""

_device_of = attrgetter("device")


@dataclass
class PendingClip:
    """The results of ``clip_grad_norm_`` for the next step.

    This object is changed in place, never replaced. A wrapper around the optimizer, such as
    Lightning Fabric's, may forward attribute reads but keep attribute writes to itself, so a new
    object would not reach the optimizer.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    captured: bool = False  # a CUDA graph captured the call

    def set(self, grad_scale: Tensor, found_inf: Tensor) -> None:
        """Store the results until the next step, and whether a CUDA graph captures this call."""
        self.grad_scale, self.found_inf = grad_scale, found_inf
        self.captured = is_capturing(grad_scale.device)

    def check_capture(self) -> None:
        """Raise RuntimeError if a CUDA graph captures only one of the clipping and its step."""
        if self.grad_scale is not None and is_capturing(self.grad_scale.device) != self.captured:
            raise RuntimeError(
                "a CUDA graph captures only one of clip_grad_norm_() and the step() that it "
                "belongs to; capture both or neither"
            )

    def clear(self) -> None:
        """Drop the results: the step has used them, or the gradients are gone."""
        self.grad_scale = self.found_inf = None


class ReplicaGradCheck:
    """A check that replicas have equal gradients.

    On the CPU the call that finds a mismatch raises. On CUDA the next call raises, so that no step
    waits for its own result. Every rank raises in both cases.
    """

    def __init__(self) -> None:
        self._mismatch: Tensor | None = None  # recorded, not raised yet
        self._copied: Any = None  # CUDA event recorded after the copy to the CPU

    def record(self, mismatch: Tensor) -> None:
        """Record a 0-dim ``mismatch``, positive if gradients differ. Raise now unless on CUDA."""
        if is_capturing(mismatch.device):
            return
        if not mismatch.is_cuda:
            self._mismatch, self._copied = mismatch, None
            self.raise_if_mismatch()
            return
        self._mismatch = torch.empty((), dtype=mismatch.dtype, device="cpu", pin_memory=True)
        self._mismatch.copy_(mismatch, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record(torch.cuda.current_stream(mismatch.device))

    def raise_if_mismatch(self) -> None:
        """Raise RuntimeError, on every rank, if the last recorded mismatch is positive."""
        if self._mismatch is None:
            return
        if self._copied is not None:
            if torch.cuda.is_current_stream_capturing():
                return  # the first call after the capture raises
            # The device does not idle during this wait: the copy belongs to the previous step, and
            # a forward and backward pass has been queued since.
            self._copied.synchronize()
        mismatch, self._mismatch = float(self._mismatch), None
        if mismatch > 0:
            raise RuntimeError(
                "ranks that should have equal gradients have different ones, so there is no global "
                "gradient norm; average the gradients of plain (unsharded) parameters over ranks "
                "(DistributedDataParallel, all_reduce), or declare parameters that differ between "
                "ranks with AdamW_BF16(..., model_parallel=ModelParallel(ep=..., experts=...)); if "
                "neither applies, suspect the hardware"
            )


@dataclass
class GroupInfo:
    """The sharding of one parameter group, valid while the group has the same parameters."""

    params: list[Tensor]
    keys: list[SumKey]  # per parameter
    param_of_key: dict[SumKey, Tensor]  # the key's sum is on this parameter's device
    replica_groups: set[dist.ProcessGroup]
    is_plain: bool  # no shard is a DTensor, so gradients need no unwrapping

    @cached_property
    def key_of(self) -> dict[int, SumKey]:
        """Keys by ``id(parameter)``."""
        return dict(zip(map(id, self.params), self.keys, strict=True))

    def matches(self, params: list[Tensor]) -> bool:
        """Return True if ``params`` are the parameters that this was built for."""
        return len(params) == len(self.params) and all(map(is_, params, self.params))


class GradNorm:
    """The global gradient norm of one optimizer.

    Args:
        sharding: the optimizer's sharding strategy.
        parallel: the groups over which plain parameters differ.

    Attributes:
        replica_check: records the mismatch that :meth:`all_reduce` returns.
    """

    def __init__(self, sharding: Sharding, parallel: ModelParallel | None = None) -> None:
        self._sharding = sharding
        self._parallel = parallel
        self._plain_are_replicas = parallel is None or (
            parallel.group("pp") is None and parallel.group("ep") is None
        )
        self._infos: dict[int, GroupInfo] = {}  # by the group's index
        self.replica_check = ReplicaGradCheck()
        # Kernel scratch memory for each set of gradients that is summed separately.
        self._scratch: defaultdict[Any, NormScratch] = defaultdict(NormScratch)

    def compute(
        self, group_grads: list[GroupGrads], max_norm: float, backend: str | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return 0-dim float32 norm, clip coefficient and ``found_inf``; see ``clip_coefficient``.

        Collective if parameters are sharded, replicated on a mesh, or differ over
        :class:`ModelParallel` groups. Every rank then takes part in every sum, even if it has no
        gradient (FSDP1 may leave a rank without a shard).

        Raises:
            RuntimeError: replicas have different gradients; see :class:`ReplicaGradCheck`.
        """
        self.replica_check.raise_if_mismatch()
        infos = self.group_infos(group_grads)
        local_grads = [
            grads if info.is_plain else self._sharding.local_grads(params)
            for info, (_, params, grads) in zip(infos, group_grads, strict=True)
        ]
        replica_groups = shared_replica_groups(infos)
        all_grads = [grad for grads in local_grads for grad in grads]
        is_sharded = any(shard_groups for info in infos for _, shard_groups in info.param_of_key)
        is_local = self._plain_are_replicas and not replica_groups and not is_sharded
        if all_grads and is_local and len(set(map(_device_of, all_grads))) == 1:
            return norm_and_clip_coefficient(all_grads, max_norm, backend, self._scratch[()])
        sums = zero_sums(infos)
        for index, (_, params, _) in enumerate(group_grads):
            for key, total in self.sums_by_key(index, params, local_grads[index], backend):
                sums[key] += total.to(sums[key].device)
        total, mismatch = self.all_reduce(sums, replica_groups)
        if not is_local:
            self.replica_check.record(mismatch)
        return clip_coefficient(total, max_norm, backend)

    def sums_by_key(
        self,
        index: int,
        params: list[Tensor],
        local_grads: list[Tensor],
        backend: str | None,
        scratch: Any = None,
    ) -> Iterator[tuple[SumKey, Tensor]]:
        """Yield this rank's sums of squares of some gradients of one parameter group.

        Args:
            index: the group's index; :meth:`group_infos` has built its info.
            params: some of its parameters.
            local_grads: the local shards of their gradients.
            backend: the optimizer's backend.
            scratch: key of the scratch memory, if several calls sum gradients of one group.
        """
        key_of = self._infos[index].key_of
        keyed_grads = [
            (key_of[id(param)], grad) for param, grad in zip(params, local_grads, strict=True)
        ]
        by_key_and_device = group_by(keyed_grads, lambda item: (item[0], item[1].device))
        for (key, _), items in by_key_and_device.items():
            grads = [grad for _, grad in items]
            yield key, grad_sum_sq(grads, backend, self._scratch[index, key, scratch])

    def all_reduce(
        self, sums: dict[SumKey, Tensor], replica_groups: list[dist.ProcessGroup]
    ) -> tuple[Tensor, Tensor]:
        """Add up sums over all ranks; see :func:`.sharding.global_norm.all_reduce_sums`.

        Args:
            sums: one for each key of :func:`zero_sums`.
            replica_groups: see :func:`shared_replica_groups`.
        """
        dense = {groups: value for (is_expert, groups), value in sums.items() if not is_expert}
        experts = {groups: value for (is_expert, groups), value in sums.items() if is_expert}
        return all_reduce_sums(dense, experts, replica_groups, self._parallel)

    def group_infos(self, group_grads: list[GroupGrads]) -> list[GroupInfo]:
        """Return the sharding of each parameter group."""
        return [self._info(i, group["params"]) for i, (group, _, _) in enumerate(group_grads)]

    def _info(self, index: int, params: list[Tensor]) -> GroupInfo:
        """Return the cached info of a group, or build it."""
        info = self._infos.get(index)
        if info is None or not info.matches(params):
            parallel, sharding = self._parallel, self._sharding
            experts = set() if parallel is None else {id(p) for p in parallel.expert_params()}
            replica_groups = {group for p in params for group in sharding.replica_groups(p)}
            if parallel is not None:
                own_groups = (parallel.group("dp"), parallel.group("edp"))
                replica_groups |= {group for group in own_groups if group is not None}
            keys = [(id(p) in experts, sharding.shard_groups(p)) for p in params]
            is_plain = not any(is_dtensor(sharding.shard(p)) for p in params)
            param_of_key = dict(zip(keys, params, strict=True))
            info = GroupInfo(list(params), keys, param_of_key, replica_groups, is_plain)
            self._infos[index] = info
        return info


def zero_sums(infos: list[GroupInfo]) -> dict[SumKey, Tensor]:
    """Return a zero for each key, so that ranks without gradients take part in each all-reduce."""
    devices = {key: p.device for info in infos for key, p in info.param_of_key.items()}
    return {
        key: torch.zeros((), dtype=torch.float64, device=double_device(device))
        for key, device in devices.items()
    }


def shared_replica_groups(infos: list[GroupInfo]) -> list[dist.ProcessGroup]:
    """Return the groups whose ranks hold replicas, in the same order on every rank."""
    return in_shared_order({group for info in infos for group in info.replica_groups})
