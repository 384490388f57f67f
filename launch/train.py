"""Train a small GPT on bytes with bf16 weights: ``python launch/train.py``, or ``torchrun --nproc-per-node 2 launch/train.py``.

A run writes to ``--out``: ``metrics.jsonl``, ``loss.png`` and ``checkpoints/``. It stops cleanly on SIGTERM and Ctrl-C, and
``--resume auto`` continues it on any number of processes. Errors of use end it with exit code 2 and one sentence on stderr,
a training that has diverged with exit code 1 and one sentence.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from building import Schedule, build_model, make_optimizer, make_schedule, set_seeds
from data import Text, UsageError, load_text
from model import GPT, PRESETS
from options import parse_args
from report import Metrics, optimizer_state_bytes, plot_losses, summary
from resuming import find_checkpoint, undamaged_instead
from stopping import StopRequest, stop_requests
from strategies import STRATEGIES, Strategy, World, init_world, on_all_ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F  # noqa: N812  # its usual name

from sharded_bf16_adamw import AdamW_BF16, latest, load, save, wait_for_save


@dataclass
class Run:
    """What the loop needs. ``module`` is ``model`` as its strategy wraps it: the one to call."""

    args: argparse.Namespace
    world: World
    text: Text
    strategy: Strategy
    model: GPT
    module: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    step: int = 0
    step_seconds: list[float] = field(default_factory=list)
    saved: Path | None = None
    saved_step: int = -1
    nonfinite_steps: int = 0  # whose loss or gradient norm was not finite, in all
    nonfinite_in_row: int = 0  # up to the last step
    is_sound: bool = True  # the last losses and the last norm were finite

    @property
    def folder(self) -> Path:
        return Path(self.args.out)


class DivergedError(Exception):
    """Training cannot go on: too many steps in a row, or the weights, are not finite, or replicas differ. Raised on all ranks
    together."""


def main(argv: list[str] | None = None) -> int:
    joined_before = dist.is_initialized()
    try:
        args = parse_args(argv)
        train(args)
        dist.barrier()  # rank 0 may still be drawing
        code = 0
    except (UsageError, DivergedError) as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr)
        code = 2 if isinstance(error, UsageError) else 1
    if dist.is_initialized() and not joined_before:
        dist.destroy_process_group()
    return code


def train(args: argparse.Namespace) -> None:
    run = set_up(args)
    with stop_requests() as stop:
        metrics = (
            Metrics(run.folder / "metrics.jsonl", run.step, args.steps, args.progress)
            if run.world.rank == 0
            else None
        )
        try:
            stopped = loop(run, metrics, stop)
            save_the_end(run)
        except DivergedError:
            wait_for_save()  # what is under way is good: nothing is saved once a loss is not finite
            raise
        finally:
            if metrics is not None:
                metrics.close()
        finish(run, stopped)


def loop(run: Run, metrics: Metrics | None, stop: StopRequest) -> bool:
    """Train to the last step, or until a rank is asked to stop. Returns whether that happened."""
    args = run.args
    if run.step == 0:
        record_evaluation(run, metrics)
    while run.step < args.steps:
        start = time.perf_counter()
        rank_loss = backward(run)
        loss, stopping = average(
            run.world, rank_loss, float(stop.requested)
        )  # the ranks agree, once a step
        norm = update(run, loss)
        run.step += 1
        if metrics is not None:
            lr = run.optimizer.param_groups[0]["lr"]
            tokens_per_s = args.batch_size * args.seq_len / (time.perf_counter() - start)
            metrics.step(
                step=run.step,
                loss=loss,
                lr=lr,
                grad_norm=norm,
                nonfinite_steps=run.nonfinite_steps,
                tokens_per_s=round(tokens_per_s, 1),
            )
        check_progress(run)
        if args.check_replicas and run.step % args.check_replicas == 0:
            check_replicas(run)
        if stopping:
            return True
        if run.step % args.eval_every == 0 or run.step == args.steps:
            record_evaluation(run, metrics)
        if args.save_every and run.step % args.save_every == 0:
            if run.is_sound:
                checkpoint(run, in_background=args.async_save)
            elif run.world.rank == 0:
                print(
                    f"note: step {run.step} is not saved: its loss or gradient norm is not finite",
                    file=sys.stderr,
                )
    return False


def check_progress(run: Run) -> None:
    """Raise DivergedError once ``--max-nonfinite`` steps in a row were not finite."""
    if run.args.max_nonfinite and run.nonfinite_in_row >= run.args.max_nonfinite:
        raise DivergedError(
            f"the loss or gradient norm was not finite in {run.nonfinite_in_row} steps in a row, up to step {run.step}: {advice(run)}."
        )


def advice(run: Run) -> str:
    """Say how to go on after training has diverged."""
    if run.saved is None:
        return "no checkpoint was saved; start again with a lower --lr"
    return f"the last good checkpoint is {run.saved}; continue with --resume {run.saved} and a lower --lr"


def finish(run: Run, stopped: bool) -> None:
    """Say how the run ended, and draw its losses."""
    state_bytes = optimizer_state_bytes(run.optimizer, run.world.device)
    loss = math.nan if stopped else held_out_loss(run)
    if run.world.rank != 0:
        return
    assert run.saved is not None
    if stopped:
        print(
            f"stopped at step {run.step}, saved {run.saved}; continue with --resume auto --out {run.folder}"
        )
        return
    seconds = sum(run.step_seconds) / max(1, len(run.step_seconds))
    print(
        summary(
            held_out_loss=loss,
            state_bytes=state_bytes,
            parameters=PRESETS[run.args.preset].parameters,
            ranks=run.world.ranks,
            step_seconds=seconds,
            folder=run.folder,
            checkpoint=run.saved,
            nonfinite_steps=run.nonfinite_steps,
            skipped=run.args.skip_nonfinite,
        )
    )
    picture = run.folder / "loss.png"
    if plot_losses(
        run.folder / "metrics.jsonl",
        picture,
        f"{run.args.preset}, --optimizer {run.args.optimizer}",
    ):
        print(f"{'picture':22}{picture}")
    else:
        print("no loss.png: matplotlib is not installed")


# ---------------------------------------------------------------------------------------------------------------- one step


def backward(run: Run) -> Tensor:
    """Accumulate this rank's gradients over its slice of the global batch. Returns the slice's mean loss, 0-dim fp32."""
    args, world = run.args, run.world
    batch = run.text.batch(args.seed, run.step, args.batch_size)[world.rows].to(world.device)
    total = torch.zeros((), device=world.device)
    for index, rows in enumerate(batch.chunk(args.grad_accum)):
        is_last = index == args.grad_accum - 1
        with nullcontext() if is_last else run.strategy.no_sync(run.module, run.optimizer):
            loss = loss_of(run.module, rows) / args.grad_accum
            loss.backward()
        total += loss.detach()
    return total


def loss_of(module: nn.Module, rows: Tensor) -> Tensor:
    """Mean cross-entropy in nats a byte of int64 ``(B, T + 1)``, computed in fp32."""
    return F.cross_entropy(module(rows[:, :-1]).float().flatten(0, 1), rows[:, 1:].flatten())


def update(run: Run, loss: float) -> float:
    """Clip, step and clear the gradients; a step whose loss or norm is not finite changes nothing but the schedule's position.

    Returns:
        The global gradient norm before clipping.
    """
    synchronize(run.world)
    start = time.perf_counter()
    optimizer, clip = run.optimizer, run.args.clip or math.inf
    if isinstance(optimizer, AdamW_BF16):  # it calls the schedule itself
        norm = optimizer.clip_grad_norm_(clip)
    else:
        for group in optimizer.param_groups:
            group["lr"] = run.schedule(run.step)
        own = getattr(run.module, "clip_grad_norm_", None)  # FSDP1 has one
        norm = nn.utils.clip_grad_norm_(run.model.parameters(), clip) if own is None else own(clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    norm_before = float(norm)
    is_finite = on_every_rank(run.world, math.isfinite(loss) and math.isfinite(norm_before))
    if not is_finite and run.args.skip_nonfinite:
        optimizer.zero_grad()  # without gradients, step() only moves the schedule on
    optimizer.step()
    synchronize(run.world)
    run.step_seconds.append(time.perf_counter() - start)
    optimizer.zero_grad()
    run.is_sound = is_finite
    run.nonfinite_steps += not is_finite
    run.nonfinite_in_row = 0 if is_finite else run.nonfinite_in_row + 1
    return norm_before


def check_replicas(run: Run) -> None:
    """End the run where ranks that should hold the same weights and states do not."""
    if isinstance(run.optimizer, AdamW_BF16):
        try:
            run.optimizer.check_replicas()
        except RuntimeError as error:
            raise DivergedError(f"at step {run.step}, {error}") from error


def average(world: World, *values: Tensor | float) -> list[float]:
    """Mean over the ranks of each 0-dim value."""
    row = torch.stack(
        [torch.as_tensor(v, dtype=torch.float64, device=world.device) for v in values]
    )
    dist.all_reduce(row)
    return (row / world.ranks).tolist()


def on_every_rank(world: World, condition: bool) -> bool:
    """Return whether ``condition`` is true on every rank."""
    return average(world, float(not condition)) == [0.0]


def synchronize(world: World) -> None:
    """Wait for the device, so that the optimizer's time is its own."""
    if world.device.type == "cuda":
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------ evaluation and checkpoints


@torch.no_grad()
def held_out_loss(run: Run) -> float:
    """Mean loss over the fixed held-out windows, all ranks together."""
    args, world = run.args, run.world
    total = torch.zeros((), device=world.device)
    for index in range(args.eval_batches):
        rows = run.text.held_out_batch(index, args.eval_batches, args.batch_size)[world.rows]
        total += loss_of(run.module, rows.to(world.device)) / args.eval_batches
    return average(world, total)[0]


def record_evaluation(run: Run, metrics: Metrics | None) -> None:
    loss = held_out_loss(run)
    run.is_sound = run.is_sound and math.isfinite(loss)
    if metrics is not None:
        metrics.evaluation(run.step, loss)


def checkpoint(run: Run, in_background: bool) -> None:
    """Save everything that a resumed run needs; the data position is the step. First waits for the save before it, if that goes on.

    After a loss that is not finite, older checkpoints are kept: this one may be of a training that has diverged.

    Raises:
        DivergedError: a weight or an optimizer state is not finite; nothing is saved.
    """
    if not on_every_rank(run.world, state_is_finite(run.optimizer)):
        raise DivergedError(
            f"a weight or an optimizer state is not finite after step {run.step}, which is not saved: {advice(run)}."
        )
    extra = {"step": run.step, "nonfinite_steps": run.nonfinite_steps, "config": vars(run.args)}
    keep = run.args.keep if run.is_sound else None
    run.saved = save(
        run.folder / "checkpoints", run.step, run.module, run.optimizer, extra, keep, in_background
    )
    run.saved_step = run.step


@torch.no_grad()
def state_is_finite(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether all weights and optimizer states that this rank holds are finite."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    states = [
        x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)
    ]
    local = [x.to_local() if isinstance(x, DTensor) else x for x in (*params, *states)]
    # The maximal magnitude is inf or NaN if any element is, and takes no memory.
    return bool(nn.utils.get_total_norm([x for x in local if x.numel()], math.inf).isfinite())


def save_the_end(run: Run) -> None:
    """Leave a complete checkpoint of the last step, also where the save before it failed in the background: that is raised afterwards."""
    try:
        wait_for_save()
    except RuntimeError:
        checkpoint(run, in_background=False)
        raise
    if run.saved_step != run.step:
        checkpoint(run, in_background=False)


def resume(run: Run) -> None:
    """Load the checkpoint that ``--resume`` names, if any."""
    path = find_checkpoint(run.args)
    if path is None:
        return
    try:
        extra = load(path, run.module, run.optimizer).extra
    except (FileNotFoundError, ValueError, RuntimeError) as error:
        raise UsageError(f"{error}{undamaged_instead(run.args, path)}") from error
    run.step = run.saved_step = extra["step"]
    run.nonfinite_steps = extra.get("nonfinite_steps", 0)
    run.saved = path
    if run.step > run.args.steps:
        raise UsageError(
            f"the checkpoint {path} is at step {run.step}, past --steps {run.args.steps}: raise --steps to train on."
        )


# ------------------------------------------------------------------------------------------------------------------- set up


def set_up(args: argparse.Namespace) -> Run:
    """Join the other ranks and build everything, resumed if asked. Errors of use are raised on all ranks."""
    world = init_world(args.device)
    if args.strategy is None:
        args.strategy = "fsdp2" if world.ranks > 1 else "single"
    world = replace(
        world, same_rows=STRATEGIES[args.strategy].mesh_shape(world.ranks).get("tensor", 1)
    )
    check_world(args, world)
    set_seeds(args)
    text = on_all_ranks(load_text, args.data, args.seq_len)
    on_all_ranks(make_folder, args)
    strategy = STRATEGIES[args.strategy]
    model, module = build_model(args, world, strategy)
    schedule = make_schedule(args)
    run = Run(
        args, world, text, strategy, model, module, make_optimizer(args, model, schedule), schedule
    )
    resume(run)
    if world.rank == 0:
        size = f"{PRESETS[args.preset].parameters:,} parameters"
        print(
            f"{args.preset} ({size}), --optimizer {args.optimizer}, --strategy {args.strategy} on {world.ranks} x {world.device.type}, "
            f"{len(text.train):,} training bytes, steps {run.step} to {args.steps}",
            flush=True,
        )
    return run


def check_world(args: argparse.Namespace, world: World) -> None:
    if args.strategy == "single" and world.ranks > 1:
        raise UsageError(
            f"--strategy single runs on one process, not {world.ranks}: use --strategy ddp or fsdp2."
        )
    sets = world.ranks // world.same_rows
    if args.batch_size % (sets * args.grad_accum):
        raise UsageError(
            f"--batch-size {args.batch_size} does not divide into {sets} rank(s) x --grad-accum {args.grad_accum}: "
            f"use a multiple of {sets * args.grad_accum}."
        )


def make_folder(args: argparse.Namespace) -> None:
    """Create ``--out``; refuse one that holds another run, which would mix with this one."""
    folder = Path(args.out)
    try:
        if args.resume is None and latest(folder / "checkpoints") is not None:
            raise UsageError(
                f"--out {folder} already holds a run: add --resume auto to continue it, or give another --out."
            )
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--out {folder} cannot be used ({error.strerror}): give a folder that you may read and write."
        ) from None


if __name__ == "__main__":
    sys.exit(main())
