"""Train a GPT with bf16 weights.

    python launch/train.py
    torchrun --nproc-per-node 2 launch/train.py
    python launch/train.py --config runs/tiny-bf16/config.toml --lr 1e-3 --out runs/other

A run writes ``config.toml``, ``metrics.jsonl``, ``metrics.png`` and ``checkpoints/`` to ``--out``.
The same command continues it, on any number of processes. It saves and stops on SIGTERM, SIGINT,
SIGUSR1 and SIGHUP.

Exit codes: 0 done; 75 stopped, run the same command again; 1 failed; 2 wrong usage, in which case
the same command fails again; 130 aborted by a second Ctrl-C. An error prints one sentence.
torchrun turns each code but 0 into 1; ``launch/elastic.py`` is a torchrun that passes them on.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch.distributed as dist
from training.divergence import check_nonfinite, check_replicas
from training.errors import STOPPED, DivergedError, exit_code
from training.evaluation import evaluate, is_evaluation_due
from training.options import parse_args
from training.rendezvous import die_with_torchrun
from training.reporters import Reporters, open_reporters
from training.run_state import Run
from training.saving import is_save_due, save_checkpoint, save_errors, save_last_step
from training.setup import set_up
from training.signals_and_watchdog import USABLE_GRACE_FRACTION, StopTraining, Supervisor
from training.step import backward, step_values, update
from training.summary import print_summary
from training.world import all_reduce_mean

from sharded_bf16_adamw import wait_for_save

# Enough for a median of step times, since the first steps also compile and load kernels.
MEDIAN_STEPS = 5


def main(argv: list[str] | None = None) -> int:
    initialized_before = dist.is_initialized()
    die_with_torchrun()
    with Supervisor() as supervisor:
        code = exit_code(lambda: train(parse_args(argv), supervisor), lambda: supervisor.requested)
        if dist.is_initialized() and not initialized_before:
            dist.destroy_process_group()
    return code


def train(args: argparse.Namespace, supervisor: Supervisor) -> int:
    """Train to the last step or until a stop signal; return the exit code."""
    supervisor.grace, supervisor.step_timeout = args.grace, args.step_timeout
    with set_up(args, supervisor) as run, open_reporters(run) as reporters:
        try:
            stopped = train_and_save(run, reporters)
        finally:
            supervisor.rest("the last reports, after the last save")
    dist.barrier()  # rank 0 may still be reporting
    return STOPPED if stopped else 0


def train_and_save(run: Run, reporters: Reporters) -> bool:
    """Train, save the last step and print a summary; return True if the run was stopped."""
    stopped = False
    try:
        train_loop(run, reporters)
    except StopTraining:
        stopped = True
    except DivergedError:
        # The save in flight is of a finite step, so the run can resume from it.
        with save_errors():
            wait_for_save()
        raise
    save_last_step(run)
    print_summary(run, stopped)
    return stopped


def train_loop(run: Run, reporters: Reporters) -> None:
    """Train to the last step.

    Raises:
        StopTraining: a rank was asked to stop.
        DivergedError: training cannot continue.
    """
    args, supervisor = run.args, run.supervisor
    if run.evaluated_step != run.step and is_evaluation_due(run):
        evaluate(run, reporters)
    while run.step < args.steps:
        start = time.perf_counter()
        rank_loss = backward(run)
        supervisor.beat(f"the update of step {run.step + 1}")
        # One all-reduce a step makes the ranks agree on the loss and on stopping.
        requested = float(supervisor.requested)
        loss, stopping = all_reduce_mean(run.world, rank_loss, requested)
        norm = update(run, loss)
        run.step += 1
        run.loop_seconds.append(time.perf_counter() - start)
        reporters.log(run.step, step_values(run, loss, norm))
        if run.precision is not None:
            reporters.log(run.step, run.precision.as_dict())
        check_nonfinite(run)
        check_replicas(run)
        if stopping:
            supervisor.stop_if_requested()
        if is_evaluation_due(run):
            evaluate(run, reporters)
        is_saved = is_save_due(run)
        if is_saved:
            save_checkpoint(run, in_background=args.async_save)
        if is_saved or len(run.loop_seconds) == MEDIAN_STEPS:
            note_short_grace(run)


def note_short_grace(run: Run) -> None:
    """Print a note, once, if a stop signal would end the run before its last save."""
    if run.world.rank != 0 or run.is_grace_noted or len(run.loop_seconds) < MEDIAN_STEPS:
        return
    needed = statistics.median(run.loop_seconds) / run.args.grad_accum + run.save_seconds
    if needed > USABLE_GRACE_FRACTION * run.args.grace:
        run.is_grace_noted = True
        print(
            f"note: --grace {run.args.grace:g} is short: a micro-batch and a save take "
            f"{needed:.1f} s, so a stop signal may end the run before its last save; give the "
            "scheduler and --grace more time (torchrun reads TORCH_ELASTIC_SHUTDOWN_TIMEOUT)",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(main())
