"""Evaluation on held-out data."""

from __future__ import annotations

import math

import torch

from training.reporters import Reporters
from training.run_state import Run
from training.step import compute_loss
from training.world import all_reduce_mean


def is_evaluation_due(run: Run) -> bool:
    return run.step % run.args.eval_every == 0 or run.step == run.args.steps


@torch.no_grad()
def held_out_loss(run: Run) -> float:
    """Return the mean loss over the held-out windows, without dropout.

    Collective: each rank computes a part, in micro-batches, since a whole batch may not fit.
    """
    args, world = run.args, run.world
    total = torch.zeros((), device=world.device)
    run.wrapped_model.eval()
    try:
        for index in range(args.eval_batches):
            batch = run.data.held_out_batch(index, args.eval_batches, args.batch_size)
            local = batch[world.batch_slice].to(world.device)
            for micro_batch in local.chunk(args.grad_accum):
                run.supervisor.stop_if_requested()
                run.supervisor.beat(f"the evaluation after step {run.step}")
                total += compute_loss(run.wrapped_model, micro_batch)
    finally:
        run.wrapped_model.train()
    return all_reduce_mean(world, total / (args.eval_batches * args.grad_accum))[0]


def evaluate(run: Run, reporters: Reporters) -> None:
    loss = held_out_loss(run)
    run.evaluated_step, run.held_out_loss = run.step, loss
    run.last_is_finite = run.last_is_finite and math.isfinite(loss)
    reporters.log(run.step, {"held_out_loss": loss})
