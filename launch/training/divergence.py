"""Checks after a step that end a run whose training cannot continue."""

from __future__ import annotations

import torch.distributed as dist

from sharded_bf16_adamw import AdamW_BF16
from training.errors import DivergedError, is_out_of_memory
from training.run_state import Run


def check_nonfinite(run: Run) -> None:
    """Raise DivergedError after ``--max-nonfinite`` consecutive non-finite steps."""
    if run.args.max_nonfinite and run.consecutive_nonfinite >= run.args.max_nonfinite:
        raise DivergedError(
            f"the loss or gradient norm was not finite in {run.consecutive_nonfinite} consecutive "
            f"steps, up to step {run.step}: {recovery_hint(run)}."
        )


def check_replicas(run: Run) -> None:
    """Raise DivergedError if replicas differ between ranks, every ``--check-replicas`` steps."""
    every = run.args.check_replicas
    if every and run.step % every == 0 and isinstance(run.optimizer, AdamW_BF16):
        try:
            run.optimizer.check_replicas()
        except RuntimeError as error:
            if is_out_of_memory(error) or isinstance(error, dist.DistError):
                raise
            raise DivergedError(f"at step {run.step}, {error}") from error


def recovery_hint(run: Run) -> str:
    """Say how to continue after training has diverged."""
    if run.last_checkpoint is None:
        return "no checkpoint was saved; start again with a lower --lr"
    return (
        f"the last good checkpoint is {run.last_checkpoint}; "
        f"continue with --resume {run.last_checkpoint} and a lower --lr"
    )
