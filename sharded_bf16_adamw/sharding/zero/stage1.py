"""ZeRO stage 1, and what both stages do alike: check, shard states, gather weights."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .bucket import gather_weights, split_by_size
from .checks import Owners, check_replicated, check_same_parameters, differing
from .param import Rows
from .reduce_scatter import Agreement, broadcast_first

if TYPE_CHECKING:
    from .config import ZeRO


class Stage:
    """One optimizer's side of either stage; the methods are those of :class:`sharded_bf16_adamw.sharding.strategy.Sharding`."""

    def __init__(self, policy: ZeRO) -> None:
        self._policy = policy
        self._mesh = policy.mesh
        self._agreement = Agreement(policy.mesh)
        self._rows: dict[Tensor, Rows] = {}  # of all parameters, in the order of groups
        self._owners = Owners([])
        self._with_grad: list[
            Rows
        ] = []  # those that have a gradient on some rank, as agreed in reduce()
        self._gathered_for: list[Rows] = []
        self._gather_buckets: list[list[Rows]] = []
        self._ready = False  # whether reduce() has been done for the step to come

    def add_params(self, params: list[Tensor], names: list[str]) -> None:
        problems = [
            check_replicated(param, name, self._mesh)
            for param, name in zip(params, names, strict=True)
        ]
        self._agreement.maximum([], next(filter(None, problems), None), ValueError)
        check_same_parameters(self._agreement, params, names)
        if self._policy.broadcast_initial:
            for param in params:
                if param.is_contiguous():
                    broadcast_first(param.detach(), self._mesh)
                else:
                    weights = param.detach().contiguous()
                    broadcast_first(weights, self._mesh)
                    param.detach().copy_(weights)
        elif params:
            for name, differs in zip(names, differing(self._agreement, params), strict=True):
                if differs:
                    raise ValueError(
                        f"the initial weights of parameter {name} differ between ranks; build the model from the same seed or checkpoint "
                        "on every rank, or give ZeRO broadcast_initial=True"
                    )
        self._rows.update(
            {
                param: Rows(param, self._mesh, name)
                for param, name in zip(params, names, strict=True)
            }
        )
        self._owners = Owners(self._rows.values())

    @torch.no_grad()
    def all_gather_params(self) -> None:
        if self._gathered_for is not self._with_grad and self._gathered_for != self._with_grad:
            self._gather_buckets = split_by_size(
                [rows for rows in self._with_grad if not rows.is_whole], self._policy.bucket_bytes
            )
        self._gathered_for = self._with_grad
        gather_weights(self._gather_buckets, self._mesh, self._policy.max_in_flight)
        self._ready = False

    def shard(self, param: Tensor) -> Tensor:
        rows = self._rows_of(param)
        return rows.as_dtensor(rows.own(param.detach()))

    def shard_state(self, param: Tensor, value: Tensor, what: str) -> Tensor:
        rows = self._rows_of(param)
        if not isinstance(value, DTensor):
            return rows.as_dtensor(rows.own(value))
        expected = rows.own(param).shape
        if value.to_local().shape != expected:
            raise ValueError(
                f"this rank's part of {what} has shape {tuple(value.to_local().shape)} but ZeRO on {self._mesh.size()} ranks keeps "
                f"{tuple(expected)}; load what was sharded otherwise with sharded_bf16_adamw.load or set_optimizer_state_dict"
            )
        return value

    def shard_groups(self, param: Tensor) -> tuple[dist.ProcessGroup, ...]:
        return () if self._rows_of(param).is_whole else (self._mesh.get_group(self._mesh.ndim - 1),)

    def replica_groups(self, param: Tensor) -> tuple[dist.ProcessGroup, ...]:
        axes = (
            range(self._mesh.ndim) if self._rows_of(param).is_whole else range(self._mesh.ndim - 1)
        )
        return tuple(self._mesh.get_group(axis) for axis in axes if self._mesh.size(axis) > 1)

    def weight_replica_groups(self, param: Tensor) -> tuple[dist.ProcessGroup, ...]:
        return tuple(
            self._mesh.get_group(axis)
            for axis in range(self._mesh.ndim)
            if self._mesh.size(axis) > 1
        )

    def check_picklable(self) -> None:
        raise TypeError(
            "an optimizer with sharding=ZeRO(...) belongs to its process group and cannot be pickled or deep-copied; "
            "save its state with sharded_bf16_adamw.save or its state_dict()"
        )

    def _rows_of(self, param: Tensor) -> Rows:
        rows = self._rows.get(param)
        if rows is None:
            raise RuntimeError(
                f"a parameter of shape {tuple(param.shape)} has come into param_groups behind the optimizer's back, and ZeRO has no shard "
                "of it; build the optimizer with it or use add_param_group"
            )
        return rows

    def _problem(self) -> str | None:
        """What is wrong on this rank with the parameters and their gradients, or None."""
        for param, rows in self._rows.items():
            if (param.shape, param.dtype, param.device) != rows.form:
                was, now = [
                    f"{tuple(shape)} {dtype} on {device}"
                    for shape, dtype, device in (rows.form, param_form(param))
                ]
                return f"parameter {rows.name} was {was} and is now {now}; build the optimizer after all changes to the model"
            grad = param.grad
            if grad is not None and (problem := grad_problem(grad)):
                return f"the gradient of parameter {rows.name} {problem}"
        return self._owners.replaced()


def param_form(param: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return (param.shape, param.dtype, param.device)


def grad_problem(grad: Tensor) -> str | None:
    """Why a gradient cannot be used, or None."""
    if grad.layout != torch.strided:
        return "is sparse, which AdamW_BF16 does not support; build its layer with sparse=False"
    if grad.dtype not in (torch.bfloat16, torch.float32):
        return f"is {grad.dtype}; it must be bfloat16 or float32"
    return None


class Stage1(Stage):
    """Beside DDP: gradients are the same on every rank, and each takes its rows of them."""

    def __init__(self, policy: ZeRO) -> None:
        super().__init__(policy)
        self._compared = False  # whether the ranks' gradients have been found to be the same
        self._agreed_has: list[
            bool
        ] = []  # which parameters, in the order of groups, had gradients in the last reduce()

    @torch.no_grad()
    def reduce_grads(self) -> None:
        all_rows = list(self._rows.values())
        has = [rows.param.grad is not None for rows in all_rows]
        if (
            self._ready and has == self._agreed_has
        ):  # a backward pass may have come after clip_grad_norm_, alike on all ranks
            return
        agreed = self._agreement.maximum([*has, *[not x for x in has]], self._problem())
        for rows, somewhere, missing in zip(all_rows, agreed, agreed[len(has) :], strict=False):
            if somewhere and missing:
                raise RuntimeError(
                    f"parameter {rows.name} has a gradient on some ranks and none on others; ZeRO stage 1 goes beside "
                    "DistributedDataParallel, which averages gradients: wrap the model (find_unused_parameters=True if need be), or use "
                    "ZeRO(stage=2) on the plain module"
                )
        self._with_grad = [
            rows for rows, somewhere in zip(all_rows, agreed, strict=False) if somewhere
        ]
        self._agreed_has = has
        if not self._compared and self._with_grad:
            self._compare_gradients()
        self._ready = True

    def _compare_gradients(self) -> None:
        """Raise RuntimeError on every rank where the gradients differ: nobody has averaged them. Zeros prove nothing."""
        grads = [rows.param.grad for rows in self._with_grad]
        for rows, differs in zip(self._with_grad, differing(self._agreement, grads), strict=True):
            if differs:
                raise RuntimeError(
                    f"the gradients of parameter {rows.name} differ between ranks; ZeRO stage 1 goes beside DistributedDataParallel, which "
                    "averages them: call the wrapped model, or use ZeRO(stage=2) on the plain module"
                )
        self._compared = any(bool(grad.any()) for grad in grads if grad is not None)

    def grads(self, params: list[Tensor]) -> list[Any]:
        return [param.grad for param in params]

    def local_grads(self, params: list[Tensor]) -> list[Tensor]:
        return [self._rows_of(param).own(param.grad) for param in params if param.grad is not None]

    def clear_grads(self) -> None:
        self._ready = False

    def no_sync(self) -> AbstractContextManager[None]:
        raise RuntimeError(
            "in ZeRO stage 1 DDP reduces the gradients: use no_sync() of the DistributedDataParallel module"
        )
