"""The common part of ZeRO stages 1 and 2: parameter checks, sharded states, weight all-gather."""

from __future__ import annotations

import weakref
from dataclasses import fields
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ...profiling import profiler_range
from ...torch_types import is_dtensor
from ..comm_errors import comm_errors
from ..replica_checksum import text_checksum
from .all_gather import AllGather
from .host_collectives import HostCollectives
from .overlapped_gather import OverlappedGather, wait_for_all_gathers
from .param import ZeroParam
from .param_checks import (
    ParamOwners,
    changed_spec_problem,
    check_same_parameters,
    find_differing,
    grad_problem,
    param_problem,
)

if TYPE_CHECKING:
    from .config import ZeRO


class Stage:
    """The ZeRO sharding of one optimizer.

    Implements :class:`sharded_bf16_adamw.sharding.base.Sharding`.
    """

    STEPS_IN_BACKWARD = False  # see :mod:`.in_backward`

    def __init__(self, policy: ZeRO) -> None:
        self._policy = policy
        self._mesh = policy.mesh
        self._collectives = HostCollectives(policy.mesh)
        self._check_same_options()
        self._zero_params: dict[Tensor, ZeroParam] = {}  # in the order of groups
        self._owners = ParamOwners([])
        self._with_grad: list[ZeroParam] = []  # have a gradient on any rank; same on all ranks
        self._all_gather = AllGather(policy)
        if policy.overlap_gather:
            self._all_gather = overlapped = OverlappedGather(policy, self._collectives)
            weakref.finalize(self, overlapped.release)
        # Whether the ranks have agreed on the gradients of this step, or on an error. Same on all
        # ranks: only step(), or zero_grad() on every rank, resets it.
        self._is_agreed = False
        self._is_reduced = False  # gradients are agreed and reduced; no new ones on this rank since

    def add_params(self, params: list[Tensor], names: list[str]) -> None:
        named = list(zip(params, names, strict=True))
        problems = [param_problem(param, name, self._mesh) for param, name in named]
        self._collectives.all_reduce_max([], next(filter(None, problems), None), ValueError)
        check_same_parameters(self._collectives, params, names)
        wait_for_all_gathers(params)
        if self._policy.broadcast_initial:
            self._broadcast_weights(params)
        elif params:
            for name, differs in zip(names, find_differing(self._collectives, params), strict=True):
                if differs:
                    raise ValueError(
                        f"the initial weights of parameter {name} differ between ranks; build the "
                        "model from the same seed or checkpoint on every rank, or give ZeRO "
                        "broadcast_initial=True"
                    )
        new = {param: ZeroParam(param, self._mesh, name) for param, name in named}
        self._zero_params |= new
        self._all_gather.add_params(list(new.values()))
        self._owners = ParamOwners(self._zero_params.values())

    @torch.no_grad()
    def all_gather_params(self) -> None:
        with profiler_range("ZeRO::all_gather_params"):
            self._all_gather.start(self._with_grad)
        self._is_reduced = self._is_agreed = False

    def wait_for_params(self) -> None:
        self._all_gather.wait()

    def shard(self, param: Tensor) -> Tensor:
        zero_param = self._zero_param(param)
        return zero_param.as_dtensor(zero_param.local_shard(param.detach()))

    def shard_state(self, param: Tensor, value: Tensor, what: str) -> Tensor:
        zero_param = self._zero_param(param)
        if not is_dtensor(value):
            return zero_param.as_dtensor(zero_param.local_shard(value))
        shape, expected = value.to_local().shape, zero_param.local_shard(param).shape
        if shape != expected:
            raise ValueError(
                f"this rank's shard of {what} has shape {tuple(shape)} but ZeRO on "
                f"{self._mesh.size()} ranks needs {tuple(expected)}; load a state of another "
                "sharding with sharded_bf16_adamw.load or set_optimizer_state_dict"
            )
        return value

    def shard_groups(self, param: Tensor) -> tuple[dist.ProcessGroup, ...]:
        if self._zero_param(param).is_replicated:
            return ()
        return (self._mesh.get_group(self._mesh.ndim - 1),)

    def replica_groups(self, param: Tensor) -> tuple[dist.ProcessGroup, ...]:
        is_replicated = self._zero_param(param).is_replicated
        return self._groups(self._mesh.ndim if is_replicated else self._mesh.ndim - 1)

    def weight_replica_groups(self, param: Tensor) -> tuple[dist.ProcessGroup, ...]:
        return self._groups(self._mesh.ndim)

    def check_picklable(self) -> None:
        raise TypeError(
            "an optimizer with sharding=ZeRO(...) belongs to its process group and cannot be "
            "pickled or deep-copied; save its state with sharded_bf16_adamw.save or its "
            "state_dict()"
        )

    def _groups(self, ndim: int) -> tuple[dist.ProcessGroup, ...]:
        """Return the groups of the first ``ndim`` mesh dimensions that have several ranks."""
        sizes = enumerate(self._mesh.shape[:ndim])
        return tuple(self._mesh.get_group(axis) for axis, size in sizes if size > 1)

    def _zero_param(self, param: Tensor) -> ZeroParam:
        zero_param = self._zero_params.get(param)
        if zero_param is None:
            raise RuntimeError(
                f"a parameter of shape {tuple(param.shape)} was put into param_groups without "
                "add_param_group(), so ZeRO has no shard of it; build the optimizer with it or "
                "call add_param_group()"
            )
        return zero_param

    def _find_problem(self) -> str | None:
        """Return the first problem of this rank's parameters and gradients, or None."""
        for param, zero_param in self._zero_params.items():
            if problem := changed_spec_problem(zero_param):
                return problem
            if param.grad is not None and (problem := grad_problem(param.grad)):
                return f"the gradient of parameter {zero_param.name} {problem}"
        return self._owners.replaced_problem()

    def _check_same_options(self) -> None:
        """Raise ValueError on all ranks unless they have the same options. Collective."""
        options = {
            each.name: getattr(self._policy, each.name)
            for each in fields(self._policy)
            if each.name not in ("mesh", "model")
        }
        options["step_in_backward"] = self.STEPS_IN_BACKWARD
        are_equal = self._collectives.are_equal([text_checksum(repr(v)) for v in options.values()])
        differing = [name for name, equal in zip(options, are_equal, strict=True) if not equal]
        if differing:
            raise ValueError(
                f"the ranks of ZeRO have different options: {', '.join(differing)}; give every "
                "rank the same"
            )

    def _broadcast_weights(self, params: list[Tensor]) -> None:
        """Copy the weights of the first rank of the mesh to all ranks."""
        for param in params:
            weights = param.detach().contiguous()
            for axis in reversed(range(self._mesh.ndim)):
                group = self._mesh.get_group(axis)
                ranks = dist.get_process_group_ranks(group)
                with comm_errors("broadcasting the initial weights", ranks):
                    dist.broadcast(weights, group=group, group_src=0)
            if not param.is_contiguous():
                param.detach().copy_(weights)
