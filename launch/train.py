"""Train a small GPT on bytes with bf16 weights: ``python launch/train.py``, or ``torchrun --nproc-per-node 2 launch/train.py``.

A run writes to ``--out``: ``metrics.jsonl``, ``loss.png`` and ``checkpoints/``. It stops cleanly on SIGTERM and Ctrl-C, and
``--resume auto`` continues it on any number of processes. Errors of use end it with exit code 2 and one sentence on stderr.
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
from resuming import find_checkpoint
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

    @property
    def folder(self) -> Path:
        return Path(self.args.out)


def main(argv: list[str] | None = None) -> int:
    joined_before = dist.is_initialized()
    try:
        args = parse_args(argv)
        train(args)
        dist.barrier()  # rank 0 may still be drawing
        code = 0
    except UsageError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr)
        code = 2
    if dist.is_initialized() and not joined_before:
        dist.destroy_process_group()
    return code


def train(args: argparse.Namespace) -> None:
    run = set_up(args)
    with stop_requests() as stop:
        metrics = Metrics(run.folder / "metrics.jsonl", run.step, args.steps, args.progress) if run.world.rank == 0 else None
        stopped = loop(run, metrics, stop)
        save_the_end(run)
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
        norm = update(run)
        loss, stopping = average(run.world, rank_loss, float(stop.requested))  # the ranks agree, once a step
        run.step += 1
        if metrics is not None:
            lr = run.optimizer.param_groups[0]["lr"]
            tokens_per_s = args.batch_size * args.seq_len / (time.perf_counter() - start)
            metrics.step(step=run.step, loss=loss, lr=lr, grad_norm=norm, tokens_per_s=round(tokens_per_s, 1))
        if stopping:
            return True
        if run.step % args.eval_every == 0 or run.step == args.steps:
            record_evaluation(run, metrics)
        if args.save_every and run.step % args.save_every == 0:
            checkpoint(run, in_background=args.async_save)
    return False


def finish(run: Run, stopped: bool) -> None:
    """Say how the run ended, and draw its losses."""
    state_bytes = optimizer_state_bytes(run.optimizer, run.world.device)
    loss = math.nan if stopped else held_out_loss(run)
    if run.world.rank != 0:
        return
    assert run.saved is not None
    if stopped:
        print(f"stopped at step {run.step}, saved {run.saved}; continue with --resume auto --out {run.folder}")
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
        )
    )
    picture = run.folder / "loss.png"
    if plot_losses(run.folder / "metrics.jsonl", picture, f"{run.args.preset}, --optimizer {run.args.optimizer}"):
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


def update(run: Run) -> float:
    """Clip, step and clear the gradients. Returns the global gradient norm before clipping."""
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
    optimizer.step()
    synchronize(run.world)
    run.step_seconds.append(time.perf_counter() - start)
    optimizer.zero_grad()
    return float(norm)


def average(world: World, *values: Tensor | float) -> list[float]:
    """Mean over the ranks of each 0-dim value."""
    row = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=world.device) for v in values])
    dist.all_reduce(row)
    return (row / world.ranks).tolist()


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
    if metrics is not None:
        metrics.evaluation(run.step, loss)


def checkpoint(run: Run, in_background: bool) -> None:
    """Save everything that a resumed run needs; the data position is the step. First waits for the save before it, if that goes on."""
    extra = {"step": run.step, "config": vars(run.args)}
    run.saved = save(run.folder / "checkpoints", run.step, run.module, run.optimizer, extra, run.args.keep, in_background)
    run.saved_step = run.step


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
        extra = load(path, run.module, run.optimizer)
    except (FileNotFoundError, ValueError, RuntimeError) as error:
        raise UsageError(str(error)) from error
    run.step = run.saved_step = extra["step"]
    run.saved = path
    if run.step > run.args.steps:
        raise UsageError(f"the checkpoint {path} is at step {run.step}, past --steps {run.args.steps}: raise --steps to train on.")


# ------------------------------------------------------------------------------------------------------------------- set up


def set_up(args: argparse.Namespace) -> Run:
    """Join the other ranks and build everything, resumed if asked. Errors of use are raised on all ranks."""
    world = init_world(args.device)
    if args.strategy is None:
        args.strategy = "fsdp2" if world.ranks > 1 else "single"
    world = replace(world, same_rows=STRATEGIES[args.strategy].mesh_shape(world.ranks).get("tensor", 1))
    check_world(args, world)
    set_seeds(args)
    text = on_all_ranks(load_text, args.data, args.seq_len)
    on_all_ranks(make_folder, args)
    strategy = STRATEGIES[args.strategy]
    model, module = build_model(args, world, strategy)
    schedule = make_schedule(args)
    run = Run(args, world, text, strategy, model, module, make_optimizer(args, model, schedule), schedule)
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
        raise UsageError(f"--strategy single runs on one process, not {world.ranks}: use --strategy ddp or fsdp2.")
    sets = world.ranks // world.same_rows
    if args.batch_size % (sets * args.grad_accum):
        raise UsageError(
            f"--batch-size {args.batch_size} does not divide into {sets} rank(s) x --grad-accum {args.grad_accum}: "
            f"use a multiple of {sets * args.grad_accum}."
        )


def make_folder(args: argparse.Namespace) -> None:
    """Create ``--out``; refuse one that holds another run, which would mix with this one."""
    folder = Path(args.out)
    if args.resume is None and latest(folder / "checkpoints") is not None:
        raise UsageError(f"--out {folder} already holds a run: add --resume auto to continue it, or give another --out.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {folder} cannot be created ({error.strerror}): give a folder that you may write to.") from None


if __name__ == "__main__":
    sys.exit(main())
