"""Gradient clipping for the step inside the backward pass, which never has all gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .grad_norm import GradNorm, SumKey, shared_replica_groups, zero_sums
from .kernels import clip_coefficient, double_device

# in param_groups, so that it is saved and loaded with them
_PREVIOUS = "previous_grad_sum_sq"


@dataclass(frozen=True)
class ClipInBackward:
    """Clipping under ``AdamW_BF16(..., step_in_backward=True)``.

    Clipping by the norm of all gradients of the same step is impossible there: the first weights
    change before the last gradient exists. Two other rules are possible.

    Args:
        max_norm: upper bound on a 2-norm, as in :func:`torch.nn.utils.clip_grad_norm_`.
        by: ``"previous_step"`` scales all gradients by ``min(1, max_norm / (norm + 1e-6))``, where
            ``norm`` is the global norm of the step before, over all ranks. A spike is scaled one
            step late. The first step, and one after a norm that is inf or NaN, is not scaled.
            ``"param"`` scales each parameter's gradient by its own norm; for parameters that are
            not sharded.

    Raises:
        ValueError: ``max_norm`` is not positive, or ``by`` is neither of the two.

    Examples:
        >>> import torch
        >>> from sharded_bf16_adamw import AdamW_BF16, ClipInBackward
        >>> model = torch.nn.Linear(4, 2).to(torch.bfloat16)
        >>> optimizer = AdamW_BF16(
        ...     model.parameters(), step_in_backward=True, clip_in_backward=ClipInBackward(1.0)
        ... )
        >>> model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        >>> optimizer.step()
        >>> float(optimizer.previous_grad_norm) > 0
        True
    """

    max_norm: float
    by: Literal["previous_step", "param"] = "previous_step"

    def __post_init__(self) -> None:
        if not self.max_norm > 0.0:
            raise ValueError(f"Invalid max_norm: {self.max_norm}; it must be positive")
        if self.by not in ("previous_step", "param"):
            raise ValueError(f"Invalid by: {self.by!r}; it must be 'previous_step' or 'param'")


class PreviousStepClip:
    """The gradients of one step, summed up for the next step and scaled for this one.

    Args:
        max_norm: see :class:`ClipInBackward`.
        groups: the optimizer's parameter groups.
        grad_norm: its global norm.
        backend: its back end.
    """

    def __init__(
        self,
        max_norm: float,
        groups: list[dict[str, Any]],
        grad_norm: GradNorm,
        backend: str | None,
    ) -> None:
        self._max_norm, self._groups = max_norm, groups
        self._grad_norm, self._backend = grad_norm, backend
        self._infos = grad_norm.group_infos([(group, [], []) for group in groups])
        self._sums: list[tuple[SumKey, Tensor]] = []  # of each batch, on its stream
        self._scales: dict[torch.device, Tensor] = {}
        self._sum_sq: Tensor | None = None  # over all ranks

    def scale(self, device: torch.device) -> Tensor | None:
        """Return the factor of this step's gradients, 0-dim float32 on ``device``, or None for 1.

        It is read on several streams, so it is computed once per device.
        """
        sum_sq = previous_sum_sq(self._groups)
        if sum_sq is not None and device not in self._scales:
            on_device = sum_sq.to(double_device(device))
            _, scale, found_inf = clip_coefficient(on_device, self._max_norm, self._backend)
            self._scales[device] = torch.where(found_inf == 0, scale, 1.0).to(device)
        return self._scales.get(device)

    def add(self, index: int, params: list[Tensor], local_grads: list[Tensor], batch: Any) -> None:
        """Add gradients of one group to the norm of this step.

        Args:
            index: of the group.
            params: some of its parameters.
            local_grads: the local shards of their gradients.
            batch: a hashable name of these parameters, the same in every step.
        """
        self._sums += self._grad_norm.sums_by_key(index, params, local_grads, self._backend, batch)

    def reduce(self) -> None:
        """Add up the sums over all ranks. Collective as ``clip_grad_norm_`` is."""
        sums = zero_sums(self._infos)
        for key, total in self._sums:
            if total.is_cuda:
                total.record_stream(torch.cuda.current_stream(total.device))
            sums[key] += total.to(sums[key].device)
        total, mismatch = self._grad_norm.all_reduce(sums, shared_replica_groups(self._infos))
        self._grad_norm.record_mismatch(mismatch)
        self._sum_sq = total

    def end_step(self) -> None:
        """Keep the reduced norm for the next step."""
        for group in self._groups:
            group[_PREVIOUS] = self._sum_sq


def previous_sum_sq(groups: list[dict[str, Any]]) -> Tensor | None:
    """Return the sum of squares of the last step's gradients, 0-dim float64, or None."""
    sums = (group.get(_PREVIOUS) for group in groups)
    found = next((total for total in sums if total is not None), None)
    # a checkpoint holds a number
    return None if found is None else torch.as_tensor(found, dtype=torch.float64)
