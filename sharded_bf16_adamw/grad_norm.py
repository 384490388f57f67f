"""The norm of all gradients of all ranks, and what a clipped and guarded step needs of it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .kernels import (
    NormScratch,
    clip_coefficient,
    double_device,
    grad_norm_clip,
    grad_sum_sq,
    is_capturing,
)
from .sharding.base import Sharding
from .sharding.dtensor import DTensor, group_by
from .sharding.global_norm import Key, all_reduce_sums
from .sharding.model_parallel import ModelParallel
from .sharding.replicas import in_shared_order

Gradients = tuple[
    dict[str, Any], list[Tensor], list[Any]
]  # a group, its parameters that have a gradient, and these
_device_of = attrgetter("device")


@dataclass
class PendingClip:
    """What ``clip_grad_norm_`` leaves for the next step.

    In an object of its own, which is never replaced: a wrapper around the optimizer, such as Lightning Fabric's, may pass reads of
    attributes on and keep what is set to itself, but it comes to the same object.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    captured: bool = False  # whether a CUDA graph captured that call

    def set(self, grad_scale: Tensor, found_inf: Tensor) -> None:
        self.grad_scale, self.found_inf, self.captured = (
            grad_scale,
            found_inf,
            is_capturing(grad_scale.device),
        )

    def check_capture(self) -> None:
        """Raise RuntimeError where a CUDA graph captures the clipping and not the step, or the step alone."""
        if self.grad_scale is not None and is_capturing(self.grad_scale.device) != self.captured:
            raise RuntimeError(
                "a CUDA graph captures only one of clip_grad_norm_() and the step() that it belongs to; capture both or neither"
            )

    def clear(self) -> None:
        self.grad_scale = self.found_inf = None


class Mismatch:
    """The check that ranks have equal gradients where they should, read without waiting for the step that it belongs to.

    On the CPU a mismatch is raised by the call that finds it, on an accelerator by the next one, which all ranks reach.
    """

    def __init__(self) -> None:
        self._found: Tensor | None = None  # on the CPU
        self._event: Any = None

    def put(self, mismatch: Tensor) -> None:
        """Take the result of a norm, 0-dim, and raise what :meth:`raise_if_found` would if it is there already."""
        if is_capturing(mismatch.device):
            return
        if not mismatch.is_cuda:
            self._found, self._event = mismatch, None
            self.raise_if_found()
            return
        self._found = torch.empty((), dtype=mismatch.dtype, device="cpu", pin_memory=True)
        self._found.copy_(mismatch, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(mismatch.device))

    def raise_if_found(self) -> None:
        """Raise RuntimeError, on every rank, where ranks were found to have unlike gradients."""
        if self._found is None:
            return
        if self._event is not None:
            if torch.cuda.is_current_stream_capturing():
                return  # after the capture
            self._event.synchronize()  # of the step before, behind which a whole forward and backward pass is queued
        found, self._found = float(self._found), None
        if found > 0:
            raise RuntimeError(
                "ranks that should have equal gradients have unlike ones, so there is no common gradient norm; average the gradients of "
                "plain (unsharded) parameters over ranks (DistributedDataParallel, all_reduce), or name parameters that belong to one rank "
                "alone as AdamW_BF16(..., model_parallel=ModelParallel(ep=..., experts=...)); else suspect the hardware"
            )


@dataclass
class _Group:
    """What is known of a parameter group for as long as its parameters are the same."""

    params: list[Tensor]
    keys: list[
        tuple[bool, Key]
    ]  # of each parameter: whether it is an expert's, and the groups over which it is spread
    one_of: dict[
        tuple[bool, Key], Tensor
    ]  # a parameter for each of ``keys``: its device is where their sum is
    replicas: set[dist.ProcessGroup]
    plain: bool  # whether all gradients lie here as they are

    def is_of(self, params: list[Tensor]) -> bool:
        return len(params) == len(self.params) and all(map(is_, params, self.params))


class GradNorm:
    """Of the groups of one optimizer."""

    def __init__(self, sharding: Sharding, parallel: ModelParallel | None = None) -> None:
        self._sharding = sharding
        self._parallel = parallel
        self._is_local = parallel is None or (
            parallel.pp_group is None and parallel.ep_group is None
        )
        self._groups: dict[int, _Group] = {}  # by the group's index
        self._mismatch = Mismatch()
        self._scratch: defaultdict[Any, NormScratch] = defaultdict(
            NormScratch
        )  # by what is summed apart

    def compute(
        self, gradients: list[Gradients], max_norm: float, backend: str | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Norm, clip coefficient and whether any gradient is not finite; see :func:`.kernels.clip_coefficient`.

        Collective where parameters are sharded, replicated on a mesh, or differ over :class:`ModelParallel` groups: every rank takes
        part in every sum, also where it has no gradient itself (FSDP1 may leave it no part).
        """
        self._mismatch.raise_if_found()
        groups = [
            self._group(index, group["params"]) for index, (group, _, _) in enumerate(gradients)
        ]
        local = [
            grads if known.plain else self._sharding.local_grads(params)
            for known, (_, params, grads) in zip(groups, gradients, strict=True)
        ]
        devices = {key: param.device for known in groups for key, param in known.one_of.items()}
        replicas = in_shared_order({group for known in groups for group in known.replicas})
        together = [grad for grads in local for grad in grads]
        is_whole = self._is_local and not replicas and all(key == () for _, key in devices)
        if together and is_whole and len(set(map(_device_of, together))) == 1:
            return grad_norm_clip(together, max_norm, backend, self._scratch[()])
        sums = {
            key: torch.zeros((), dtype=torch.float64, device=double_device(device))
            for key, device in devices.items()
        }
        for index, (known, (_, params, _), grads) in enumerate(
            zip(groups, gradients, local, strict=True)
        ):
            key_of = dict(zip(map(id, known.params), known.keys, strict=True))
            placed = [(key_of[id(param)], grad) for param, grad in zip(params, grads, strict=True)]
            for (key, _), members in group_by(
                placed, lambda item: (item[0], item[1].device)
            ).items():
                total = grad_sum_sq(
                    [grad for _, grad in members], backend, self._scratch[index, key]
                )
                sums[key] += total.to(sums[key].device)
        dense = {key: value for (is_expert, key), value in sums.items() if not is_expert}
        experts = {key: value for (is_expert, key), value in sums.items() if is_expert}
        total, mismatch = all_reduce_sums(dense, experts, replicas, self._parallel)
        if not self._is_local or replicas or any(key for _, key in devices):
            self._mismatch.put(mismatch)
        return clip_coefficient(total, max_norm, backend)

    def _group(self, index: int, params: list[Tensor]) -> _Group:
        known = self._groups.get(index)
        if known is None or not known.is_of(params):
            experts = (
                set()
                if self._parallel is None
                else {id(param) for param in self._parallel.expert_params()}
            )
            keys = [(id(param) in experts, self._sharding.shard_groups(param)) for param in params]
            replicas = {group for param in params for group in self._sharding.replica_groups(param)}
            if self._parallel is not None:
                replicas |= {
                    group
                    for group in (self._parallel.dp_group, self._parallel.edp_group)
                    if group is not None
                }
            plain = not any(isinstance(self._sharding.shard(param), DTensor) for param in params)
            known = self._groups[index] = _Group(
                list(params), keys, dict(zip(keys, params, strict=True)), replicas, plain
            )
        return known
