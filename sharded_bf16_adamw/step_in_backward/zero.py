"""The step inside the backward pass under ZeRO stage 2.

See [Note: updates of ZeRO inside the backward pass] in
:mod:`sharded_bf16_adamw.sharding.zero.in_backward`. The round is that of :mod:`.step`, but its
gradients come bucket by bucket from the reductions of stage 2, not from hooks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..gradients import GroupGrads
from ..sharding.zero.in_backward import LOAD_ADVICE, Stage2InBackward
from . import checks
from .batch import Batch
from .clip import ClipInBackward
from .step import Round, RoundState, StepInBackward


class ZeroStepInBackward(StepInBackward):
    """The round of an optimizer with ``ZeRO(stage=2)``.

    Implements :class:`sharded_bf16_adamw.sharding.zero.in_backward.Updates`.
    """

    def __init__(self, optimizer: Any, clip: ClipInBackward | None = None) -> None:
        optimizer._sharding.updates = self
        self._has_failed = False  # the step has failed, normally on every rank
        self._was_dropped = False  # step() has raised on every rank and dropped this step
        self.has_accumulated = False
        super().__init__(optimizer, clip)

    @property
    def _stage(self) -> Stage2InBackward:
        # Not stored: with a reference cycle the hooks would outlive the optimizer.
        stage: Stage2InBackward = self._get_optimizer()._sharding
        return stage

    def _add_hooks(self) -> None:
        """Do nothing: the stage has its own hooks."""

    @property
    def state(self) -> RoundState:
        """The state of the current step."""
        return RoundState.FAILED if self._has_failed else super().state

    @property
    def is_accumulating(self) -> bool:
        """Return True if the backward pass runs inside ``accumulate()``."""
        return self._is_accumulating

    # --------------------------------------------------------------------- during the backward pass

    def _start_round(self) -> Round:
        self._was_dropped = False
        return super()._start_round()

    def _take(self, group: dict[str, Any], param: Tensor) -> None:
        """Note that the gradient is final. The stage moves it into its bucket."""
        assert self._round is not None
        self._round.taken.add(param)
        if param.is_cuda:
            self._round.streams.add(torch.cuda.current_stream(param.device))

    def has_taken(self, param: Tensor) -> bool:
        """Return True if the parameter's final gradient has become ready since the last step."""
        return self._round is not None and param in self._round.taken

    def update(self, params: list[Tensor], grads: list[Tensor]) -> None:
        """Update this rank's shards; ``grads`` are their gradients."""
        device = params[0].device
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        batch = Batch(device, stream)
        with self._lock:
            for param, grad in zip(params, grads, strict=True):
                if param in self._group_of:  # else it was taken out of its group
                    batch.add(param, grad)
            if batch.params and self._round is not None:
                self._update(batch, self._round)

    def forget_plans(self) -> None:
        """Drop the step plans: later updates will have other sets of parameters."""
        self._plans.clear()

    def reset(self) -> None:
        """Forget this step, which has updated nothing on any rank."""
        self.abandon()
        self._was_dropped = True

    def fail(self) -> None:
        """Refuse further steps until the user abandons this one, which has updated some weights."""
        self._has_failed = True

    # --------------------------------------------------------------------- at and between the steps

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Let backward passes in this context accumulate gradients and update nothing."""
        with super().accumulate():
            self.has_accumulated, self._was_dropped = True, False
            yield

    def _failure(self, caller: str) -> str:
        return f"{caller} was called after a step that has failed; {LOAD_ADVICE}"

    def before_zero_grad(self) -> None:
        """End the round, or raise RuntimeError if this rank has had a final gradient in it."""
        self.check_between_steps("zero_grad()")
        self.abandon()

    def abandon(self) -> None:
        """End the round without a step."""
        super().abandon()
        self.has_accumulated = self._was_dropped = False

    def abandon_step(self) -> None:
        """End the round without a step, whatever its state. Collective."""
        # In every state: a rank that raised before its first gradient is idle, but others may have
        # updated weights.
        self._stage.abandon(is_agreed=self._has_failed or self._was_dropped)
        self._has_failed = False
        self.abandon()

    def begin_step(
        self, gradients: list[GroupGrads]
    ) -> tuple[list[float | None], list[GroupGrads]]:
        """Update the remaining parameters; see :meth:`.StepInBackward.begin_step`."""
        self._check_groups()
        if self._round is None:
            self._round = self._start_round()
        checks.check_hyperparams_kept(self._get_optimizer().param_groups, self._round.group_hypers)
        try:
            for params, grads in self._stage.take_grads():
                self.update(params, grads)
        except BaseException:
            self.fail()  # the remaining gradients are lost
            raise
        self._finish_updates()
        return self._round.lrs, gradients
