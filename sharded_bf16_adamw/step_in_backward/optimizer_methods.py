"""The methods of an optimizer that can update its parameters inside the backward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from .step import StepInBackward


class SteppedInBackward(torch.optim.Optimizer):
    """An optimizer that can update its parameters inside the backward pass."""

    _in_backward: StepInBackward | None = None

    def accumulate(self) -> AbstractContextManager[None]:
        """Return a context for all backward passes of a step but the last.

        With ``step_in_backward=True``, backward passes in this context accumulate gradients and
        update nothing. Without that option the context has no effect.
        """
        return nullcontext() if self._in_backward is None else self._in_backward.accumulate()

    def abandon_step(self) -> None:
        """Forget a step whose backward pass has raised under ``step_in_backward=True``.

        Its gradients are dropped. Parameters that it has updated stay updated, so load a checkpoint
        afterwards. Collective with ``sharding=ZeRO(...)``, even for a rank that has raised before
        its backward pass: every rank calls it, or gets an error from ``step()`` and then calls it.
        """
        if self._in_backward is not None:
            self._in_backward.abandon_step()
        self.zero_grad()

    def _check_between_steps(self, caller: str) -> None:
        if self._in_backward is not None:
            self._in_backward.check_between_steps(caller)

    def _check_keeps_grads(self, caller: str, advice: str = "") -> None:
        if self._in_backward is not None:
            raise RuntimeError(
                f"{caller} needs all gradients before any weight changes, but "
                f"step_in_backward=True has used and freed them; leave step_in_backward out{advice}"
            )
