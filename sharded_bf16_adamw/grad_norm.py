"""The norm of all gradients of all ranks, and what a clipped and guarded step needs of it."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter, is_
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .kernels import clip_coefficient, grad_norm_clip, grad_sum_sq, is_capturing
from .sharding.local import DTensor, all_reduce_sums, group_by
from .sharding.strategy import Sharding

Gradients = tuple[dict[str, Any], list[Tensor], list[Any]]  # a group, its parameters that have a gradient, and these
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
        self.grad_scale, self.found_inf, self.captured = grad_scale, found_inf, is_capturing(grad_scale.device)

    def check_capture(self) -> None:
        """Raise RuntimeError where a CUDA graph captures the clipping and not the step, or the step alone."""
        if self.grad_scale is not None and is_capturing(self.grad_scale.device) != self.captured:
            raise RuntimeError(
                "a CUDA graph captures only one of clip_grad_norm_() and the step() that it belongs to; capture both or neither"
            )

    def forget(self) -> None:
        self.grad_scale = self.found_inf = None


@dataclass
class _Group:
    """What is known of a parameter group for as long as its parameters are the same."""

    params: list[Tensor]
    ranks: list[tuple[dist.ProcessGroup, ...]]  # over which each parameter is spread
    one_of: dict[tuple[dist.ProcessGroup, ...], Tensor]  # a parameter for each of ``ranks``: its device is where their sum is
    plain: bool  # whether all gradients lie here as they are

    def is_of(self, params: list[Tensor]) -> bool:
        return len(params) == len(self.params) and all(map(is_, params, self.params))


class GradNorm:
    """Of the groups of one optimizer."""

    def __init__(self, sharding: Sharding) -> None:
        self._sharding = sharding
        self._groups: dict[int, _Group] = {}  # by the group's index

    def clip(self, gradients: list[Gradients], max_norm: float, backend: str | None) -> tuple[Tensor, Tensor, Tensor]:
        """Norm, clip coefficient and whether any gradient is not finite; see :func:`.kernels.clip_coefficient`. Collective where
        parameters are sharded: every rank takes part in every sum, also where it has no gradient itself (FSDP1 may leave it no part)."""
        groups = [self._group(index, group["params"]) for index, (group, _, _) in enumerate(gradients)]
        local = [
            grads if known.plain else self._sharding.local_grads(params)
            for known, (_, params, grads) in zip(groups, gradients, strict=True)
        ]
        devices = {ranks: param.device for known in groups for ranks, param in known.one_of.items()}
        together = [grad for grads in local for grad in grads]
        if together and list(devices) == [()] and len(set(map(_device_of, together))) == 1:
            return grad_norm_clip(together, max_norm, backend)
        sums = {ranks: torch.zeros((), dtype=torch.float64, device=device) for ranks, device in devices.items()}
        for known, (_, params, _), grads in zip(groups, gradients, local, strict=True):
            ranks_of = dict(zip(map(id, known.params), known.ranks, strict=True))
            placed = [(ranks_of[id(param)], grad) for param, grad in zip(params, grads, strict=True)]
            for (ranks, _), members in group_by(placed, lambda item: (item[0], item[1].device)).items():
                sums[ranks] += grad_sum_sq([grad for _, grad in members], backend).to(sums[ranks].device)
        return clip_coefficient(all_reduce_sums(sums), max_norm, backend)

    def _group(self, index: int, params: list[Tensor]) -> _Group:
        known = self._groups.get(index)
        if known is None or not known.is_of(params):
            ranks = [self._sharding.shard_groups(param) for param in params]
            plain = not any(isinstance(self._sharding.shard(param), DTensor) for param in params)
            known = self._groups[index] = _Group(list(params), ranks, dict(zip(ranks, params, strict=True)), plain)
        return known
