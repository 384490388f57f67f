"""ZeRO stage 1, for use with DDP: each rank uses its shards of the gradients that DDP averaged."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..base import Caller
from .calls import Call, find_difference, timeout_errors
from .param_checks import find_differing
from .stage import Stage
from .static_graph import STATIC_GRAPH_ADVICE, changed_grads_problem

if TYPE_CHECKING:
    from .config import ZeRO


class Stage1(Stage):
    """The stage that shards states; DistributedDataParallel averages the gradients."""

    def __init__(self, policy: ZeRO) -> None:
        super().__init__(policy)
        self._checked_averaged = False
        self._last_has_grad: list[bool] = []  # of each parameter, in the last reduce_grads()
        self._last_call: Call | None = None
        self._is_steady = False  # whether the next step is likely to repeat _last_has_grad

    def add_params(self, params: list[Tensor], names: list[str]) -> None:
        if self._zero_params:
            was_agreed = self._is_agreed
            self._agree(Caller.ADD_PARAM_GROUP, self._has_grad())
            self._is_agreed = was_agreed
        super().add_params(params, names)
        self._is_steady = False

    @torch.no_grad()
    def reduce_grads(self, caller: Caller = Caller.STEP) -> None:
        self._all_gather.wait()  # the update changes weights that may still be in flight
        zero_params = list(self._zero_params.values())
        has_grad = self._has_grad()
        # New gradients may have come since clip_grad_norm_(), on all ranks alike.
        is_late = not self._is_reduced or has_grad != self._last_has_grad
        # A step() after clip_grad_norm_() on every rank, the usual case, exchanges nothing.
        if not is_late and (caller is Caller.STEP or self._is_promised):
            return
        problem = self._find_problem()
        if self._is_promised:
            problem = problem or changed_grads_problem(zero_params, self._last_has_grad, has_grad)
            if problem is not None:
                raise RuntimeError(f"{problem}; {STATIC_GRAPH_ADVICE}")
            self._is_agreed = self._is_reduced = True
            return
        agreed = self._agree(caller, has_grad, problem)
        if agreed is None:
            self._is_reduced = True
            return
        any_has, any_lacks = agreed
        for zero_param, some_have, some_lack in zip(zero_params, any_has, any_lacks, strict=True):
            if some_have and some_lack:
                raise RuntimeError(
                    f"parameter {zero_param.name} has a gradient on some ranks and none on others; "
                    "ZeRO stage 1 goes beside DistributedDataParallel, which averages gradients: "
                    "wrap the model (find_unused_parameters=True if need be), or use "
                    "ZeRO(stage=2) on the plain module"
                )
        last = self._with_grad
        self._with_grad = [each for each, some in zip(zero_params, any_has, strict=True) if some]
        self._last_has_grad = has_grad
        if not self._checked_averaged and self._with_grad:
            self._check_averaged()
        self._is_steady = (
            self._checked_averaged
            and bool(self._with_grad)
            and (self._policy.static_graph or self._with_grad == last)
        )
        self._is_reduced = True

    def _has_grad(self) -> list[bool]:
        return [param.grad is not None for param in self._zero_params]

    @property
    def _is_promised(self) -> bool:
        """Return True once ranks rely on the promise of ``static_graph`` and exchange nothing."""
        return self._policy.static_graph and self._is_steady

    def _agree(
        self, caller: Caller, has_grad: list[bool], problem: str | None = None
    ) -> tuple[list[int], list[int]] | None:
        """Agree on the call and on the parameters with a gradient. Collective.

        Returns:
            For each parameter, whether any rank has a gradient, and whether any rank has none. None
            instead if every rank repeats its last call with the same gradients.
        """
        call = Call(caller, self._is_agreed)
        with timeout_errors(call, self._collectives.ranks):
            if self._is_steady and not self._policy.static_graph:
                is_same = has_grad == self._last_has_grad and call == self._last_call
                differs = problem is not None or not is_same
                self._is_steady = not self._collectives.any_rank(differs)
                if self._is_steady:
                    self._is_agreed = True
                    return None
            flags = [*has_grad, *[not has for has in has_grad], *call.flatten()]
            values, problems = self._collectives.all_reduce_max_and_problems(flags, problem)
        self._last_call, self._is_reduced, self._is_agreed = call, False, True
        count = len(has_grad)
        if error := problems or find_difference(values[2 * count :]):
            raise RuntimeError(error)
        return values[:count], values[count : 2 * count]

    def _check_averaged(self) -> None:
        """Raise RuntimeError on every rank if gradients differ, so were not averaged."""
        grads = [zero_param.param.grad for zero_param in self._with_grad]
        differing = find_differing(self._collectives, grads)
        for zero_param, differs in zip(self._with_grad, differing, strict=True):
            if differs:
                raise RuntimeError(
                    f"the gradients of parameter {zero_param.name} differ between ranks; ZeRO "
                    "stage 1 goes beside DistributedDataParallel, which averages them: call the "
                    "wrapped model, or use ZeRO(stage=2) on the plain module"
                )
        # Zeros are equal on all ranks without averaging too, so check again in the next step.
        self._checked_averaged = any(bool(grad.any()) for grad in grads if grad is not None)

    def grads(self, params: list[Tensor]) -> list[Any]:
        return [param.grad for param in params]

    def local_grads(self, params: list[Tensor]) -> list[Tensor]:
        return [
            self._zero_param(param).local_shard(param.grad)
            for param in params
            if param.grad is not None
        ]

    def clear_grads(self) -> None:
        if self._is_agreed and not self._is_promised:
            self._agree(Caller.ZERO_GRAD, self._has_grad())
        self._is_reduced = self._is_agreed = False

    def no_sync(self) -> AbstractContextManager[None]:
        raise RuntimeError(
            "in ZeRO stage 1 DDP reduces the gradients: use no_sync() of the "
            "DistributedDataParallel module"
        )
