"""Gradient clipping for ``step_in_backward=True``, where the gradients never all exist at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..grad_norm import GradNorm, SumKey, shared_replica_groups, zero_sums
from ..kernels import clip_coefficient, double_device

# key in param_groups, so that it is saved and loaded with them
_PREVIOUS = "previous_grad_sum_sq"


@dataclass(frozen=True)
class ClipInBackward:
    """Configuration of gradient clipping for ``AdamW_BF16(..., step_in_backward=True)``.

    Clipping by the global norm of the current step is impossible then: the first weights change
    before the last gradient exists. ``by`` selects one of two other rules.

    Args:
        max_norm: upper bound on a 2-norm, as in :func:`torch.nn.utils.clip_grad_norm_`.
        by: ``"previous_step"`` scales all gradients by ``min(1, max_norm / (norm + 1e-6))``, where
            ``norm`` is the global norm of the previous step, over all ranks. So a spike is not
            clipped in its own step; its norm scales the next one. The first step and a step after
            an inf or NaN norm are not scaled. ``"param"`` scales each parameter's gradient by its
            own norm; it requires unsharded parameters.

    Raises:
        ValueError: ``max_norm`` is not positive, or ``by`` is not one of its two values.

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
    """State of ``by="previous_step"``: this step's scale, and the sums of squares for the next.

    Args:
        max_norm: see :class:`ClipInBackward`.
        groups: the optimizer's parameter groups.
        grad_norm: the optimizer's :class:`.GradNorm`.
        backend: the optimizer's ``backend``.
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
        # One for each key and batch, computed on the batch's stream.
        self._sums: list[tuple[SumKey, Tensor]] = []
        self._scales: dict[tuple[torch.device, torch.cuda.Stream | None], Tensor] = {}
        self._sum_sq: Tensor | None = None  # over all ranks

    def scale(self, device: torch.device, stream: torch.cuda.Stream | None) -> Tensor | None:
        """Return this step's gradient scale, 0-dim float32 on ``device``, or None at first.

        Args:
            device: the gradients' device.
            stream: its current stream. Another stream would have to wait for the result.
        """
        sum_sq, key = previous_sum_sq(self._groups), (device, stream)
        if sum_sq is not None and key not in self._scales:
            on_device = sum_sq.to(double_device(device))
            _, scale, found_inf = clip_coefficient(on_device, self._max_norm, self._backend)
            self._scales[key] = torch.where(found_inf == 0, scale, 1.0).to(device)
        return self._scales.get(key)

    def add(self, index: int, params: list[Tensor], local_grads: list[Tensor], batch: Any) -> None:
        """Add gradients of one group to the norm of this step.

        Args:
            index: the group's index.
            params: some of its parameters.
            local_grads: the local shards of their gradients.
            batch: hashable key for these parameters, the same in every step.
        """
        self._sums += self._grad_norm.sums_by_key(index, params, local_grads, self._backend, batch)

    def all_reduce(self) -> None:
        """All-reduce the sums of squares. Collective, like ``clip_grad_norm_``."""
        sums = zero_sums(self._infos)
        for key, total in self._sums:
            if total.is_cuda:
                total.record_stream(torch.cuda.current_stream(total.device))
            sums[key] += total.to(sums[key].device)
        total, mismatch = self._grad_norm.all_reduce(sums, shared_replica_groups(self._infos))
        self._grad_norm.replica_check.record(mismatch)
        self._sum_sq = total

    def end_step(self) -> None:
        """Store the reduced sum of squares for the next step."""
        for group in self._groups:
            group[_PREVIOUS] = self._sum_sq


def previous_grad_norm(groups: list[dict[str, Any]]) -> Tensor | None:
    """Return the global norm of the last step's gradients, 0-dim float32, if it is known."""
    sum_sq = previous_sum_sq(groups)
    return None if sum_sq is None else sum_sq.sqrt().float()


def previous_sum_sq(groups: list[dict[str, Any]]) -> Tensor | None:
    """Return the sum of squares of the last step's gradients, 0-dim float64, if any."""
    sums = (group.get(_PREVIOUS) for group in groups)
    found = next((total for total in sums if total is not None), None)
    # a number, not a tensor, after a checkpoint was loaded
    return None if found is None else torch.as_tensor(found, dtype=torch.float64)
