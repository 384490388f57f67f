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
from training.hf_export import export_hf, export_hf_if_missing
from training.run_state import Run
from training.world import true_on_all_ranks


def is_save_due(run: Run) -> bool:
    """Return True if a save is due. Steps with a non-finite loss or norm are not saved."""
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
    """Wait for the previous save, then save all that a resumed run needs. Collective.

    The position in the data is not saved: it follows from the step. After a non-finite loss all
    older checkpoints are kept, since training may have diverged.

    Raises:
        DivergedError: a weight or an optimizer state is not finite; nothing is saved.
        RunError: a rank could not write, or the previous save failed; this step is then saved.
    """
    run.supervisor.beat(f"the save of step {run.step}")
    _wait_for_background_save(run)
    _save(run, in_background)


def save_last_step(run: Run) -> None:
    """Save and export the last step unless that is done. Collective.

    Raises:
        DivergedError, RunError: as :func:`save_checkpoint`.
    """
    run.supervisor.beat("the last save")
    _wait_for_background_save(run)
    if run.last_checkpoint_step != run.step:
        _save(run, in_background=False)
    elif run.args.export_hf is not None and run.last_checkpoint is not None:
        # The run may have been killed before the export, or have had no --export-hf.
        with save_errors():
            export_hf_if_missing(run.args, run.last_checkpoint)


def _wait_for_background_save(run: Run) -> None:
    """Wait for the save in flight. If it failed, save this step, then raise the error."""
    try:
        with save_errors():
            wait_for_save()
    except RunError:
        _save(run, in_background=False)
        raise


def _save(run: Run, in_background: bool) -> None:
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
    """Raise the error of a failed save, which every rank raises, as a RunError."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # ValueError: an unsuitable folder
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
