"""Checkpoints of a run: when they are saved, and errors of a save."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sharded_bf16_adamw import save, wait_for_save
from sharded_bf16_adamw.sharding.dtensor import to_local
from training.divergence import recovery_hint
from training.errors import DivergedError, RunError
from training.hf_export import export_hf
from training.run_state import Run
from training.world import true_on_all_ranks


def is_save_due(run: Run) -> bool:
    """Return True if this step is to be saved. A step with a non-finite loss or norm is not."""
    every = run.args.save_every
    if not every or run.step % every != 0:
        return False
    if not run.last_is_finite and run.world.rank == 0:
        print(
            f"note: step {run.step} is not saved: its loss or gradient norm is not finite",
            file=sys.stderr,
        )
    return run.last_is_finite


def save_checkpoint(run: Run, in_background: bool) -> None:
    """Save all that a resumed run needs, once the previous save is done.

    The position in the data is not saved: it follows from the step. After a non-finite loss all
    older checkpoints are kept, since the new one may be of diverged training.

    Raises:
        DivergedError: a weight or an optimizer state is not finite; nothing is saved.
        RunError: a rank could not write, or the previous save failed.
    """
    run.supervisor.beat(f"the save of step {run.step}")
    if not true_on_all_ranks(run.world, state_is_finite(run.optimizer)):
        raise DivergedError(
            f"a weight or an optimizer state is not finite after step {run.step}, "
            f"which is not saved: {recovery_hint(run)}."
        )
    extra = {
        "step": run.step,
        "evaluated_step": run.evaluated_step,
        "held_out_loss": run.held_out_loss,
        "nonfinite_steps": run.nonfinite_steps,
        "consecutive_nonfinite": run.consecutive_nonfinite,
        "spikes": run.spike_filter.state(),
        "config": vars(run.args),
    }
    keep = run.args.keep if run.last_is_finite else None
    root = run.out_dir / "checkpoints"
    in_background = in_background and run.args.export_hf is None
    start = time.perf_counter()
    with save_errors():
        run.last_checkpoint = save(
            root,
            run.step,
            run.wrapped_model,
            run.optimizer,
            extra=extra,
            keep=keep,
            async_=in_background,
        )
        if run.args.export_hf is not None:
            export_hf(run.args, run.last_checkpoint)
    run.last_checkpoint_step = run.step
    run.save_seconds = time.perf_counter() - start


@contextmanager
def save_errors() -> Iterator[None]:
    """Raise a RunError, on all ranks, for the error of a failed save."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # the latter of unsuitable folders
        raise RunError(f"{error}.") from error


@torch.no_grad()
def state_is_finite(optimizer: torch.optim.Optimizer) -> bool:
    """Return True if all weights and optimizer states of this rank are finite."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    states = [
        x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)
    ]
    local = list(map(to_local, (*params, *states)))
    # torchao's states wrap quantized tensors, and torch has no norm of those
    local = [x.dequantize() if hasattr(x, "__tensor_flatten__") else x for x in local]
    # FlashAdamW's states contain integers, and torch has no norm of those
    local = [x for x in local if x.numel() and x.is_floating_point()]
    # The largest magnitude is inf or NaN if any element is, and needs no temporary tensor.
    return bool(nn.utils.get_total_norm(local, math.inf).isfinite())


def save_last_step(run: Run) -> None:
    """Save the last step unless it is saved. Then raise the error of a failed background save."""
    run.supervisor.beat("the last save")
    try:
        with save_errors():
            wait_for_save()
    except RunError:
        save_checkpoint(run, in_background=False)
        raise
    if run.last_checkpoint_step != run.step:
        save_checkpoint(run, in_background=False)
