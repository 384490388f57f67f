"""Train a GPT with bf16 weights.

    python launch/train.py
    torchrun --nproc-per-node 2 launch/train.py

A run writes ``metrics.jsonl``, ``loss.png`` and ``checkpoints/`` to ``--out``. It saves and stops
on SIGTERM and Ctrl-C, and ``--resume auto`` continues it on any number of processes. A usage error
ends it with exit code 2, diverged training with exit code 1; both print one sentence to stderr.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F  # noqa: N812  # its usual name
from training.build import (
    Schedule,
    build_model,
    make_optimizer,
    make_schedule,
    model_config,
    set_seeds,
)
from training.data import Text, find_files, load_text
from training.errors import UsageError
from training.export import export_hf
from training.hugging_face import FolderTokenizer
from training.initial import init_from
from training.metrics import Metrics, optimizer_state_bytes, plot_losses, summary
from training.options import model_name, parse_args
from training.resume import find_checkpoint, suggest_undamaged
from training.signals import StopRequest, stop_requests
from training.strategies import STRATEGIES, Strategy, World, init_world, on_all_ranks

from sharded_bf16_adamw import (
    AdamW_BF16,
    PrecisionStats,
    latest,
    load,
    save,
    wait_for_save,
)


@dataclass
class Run:
    """State of the training loop.

    Attributes:
        parameters: their number in the full model.
        module: ``model`` as its strategy wraps it: the module to call.
        step: optimizer steps taken.
        step_seconds: duration of each optimizer step of this process.
        saved: the last checkpoint that was saved or loaded.
        saved_step: its step.
        nonfinite_steps: steps whose loss or gradient norm was not finite.
        consecutive_nonfinite: how many of them the last steps were, without a finite one between.
        last_is_finite: the last losses and the last gradient norm were finite.
        precision: statistics of the last step, if ``--precision-stats`` asked for them.
    """

    args: argparse.Namespace
    world: World
    text: Text
    strategy: Strategy
    model: nn.Module
    module: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    parameters: int
    step: int = 0
    step_seconds: list[float] = field(default_factory=list)
    saved: Path | None = None
    saved_step: int = -1
    nonfinite_steps: int = 0
    consecutive_nonfinite: int = 0
    last_is_finite: bool = True
    precision: PrecisionStats | None = None

    @property
    def out_dir(self) -> Path:
        return Path(self.args.out)


class DivergedError(Exception):
    """Training cannot continue: non-finite steps or weights, or replicas that differ.

    Raised on all ranks together.
    """


def main(argv: list[str] | None = None) -> int:
    initialized_before = dist.is_initialized()
    try:
        args = parse_args(argv)
        train(args)
        dist.barrier()  # rank 0 may still be plotting
        code = 0
    except (UsageError, DivergedError) as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr)
        code = 2 if isinstance(error, UsageError) else 1
    if dist.is_initialized() and not initialized_before:
        dist.destroy_process_group()
    return code


def train(args: argparse.Namespace) -> None:
    run = set_up(args)
    with stop_requests() as stop:
        metrics = None
        if run.world.rank == 0:
            path = run.out_dir / "metrics.jsonl"
            metrics = Metrics(path, run.step, args.steps, args.progress)
        try:
            stopped = train_loop(run, metrics, stop)
            save_last_step(run)
        except DivergedError:
            # A save in flight is good: nothing is saved once a loss is not finite.
            wait_for_save()
            raise
        finally:
            if metrics is not None:
                metrics.close()
        print_summary(run, stopped)


def train_loop(run: Run, metrics: Metrics | None, stop: StopRequest) -> bool:
    """Train to the last step, or until a rank is asked to stop; return True for the latter."""
    args = run.args
    if run.step == 0:
        evaluate(run, metrics)
    while run.step < args.steps:
        start = time.perf_counter()
        rank_loss = backward(run)
        # One all-reduce a step makes the ranks agree on the loss and on stopping.
        loss, stopping = all_reduce_mean(run.world, rank_loss, float(stop.requested))
        norm = update(run, loss)
        run.step += 1
        if metrics is not None:
            tokens_per_s = args.batch_size * args.seq_len / (time.perf_counter() - start)
            metrics.step(
                step=run.step,
                loss=loss,
                lr=float(run.optimizer.param_groups[0]["lr"]),
                grad_norm=norm,
                nonfinite_steps=run.nonfinite_steps,
                tokens_per_s=round(tokens_per_s, 1),
            )
            if run.precision is not None:
                metrics.precision(run.step, run.precision)
        check_nonfinite(run)
        if args.check_replicas and run.step % args.check_replicas == 0:
            check_replicas(run)
        if stopping:
            return True
        if run.step % args.eval_every == 0 or run.step == args.steps:
            evaluate(run, metrics)
        if args.save_every and run.step % args.save_every == 0:
            if run.last_is_finite:
                save_checkpoint(run, in_background=args.async_save)
            elif run.world.rank == 0:
                print(
                    f"note: step {run.step} is not saved: its loss or gradient norm is not finite",
                    file=sys.stderr,
                )
    return False


def check_nonfinite(run: Run) -> None:
    """Raise DivergedError after ``--max-nonfinite`` consecutive non-finite steps."""
    if run.args.max_nonfinite and run.consecutive_nonfinite >= run.args.max_nonfinite:
        raise DivergedError(
            f"the loss or gradient norm was not finite in {run.consecutive_nonfinite} consecutive "
            f"steps, up to step {run.step}: {recovery_hint(run)}."
        )


def recovery_hint(run: Run) -> str:
    """Say how to continue after training has diverged."""
    if run.saved is None:
        return "no checkpoint was saved; start again with a lower --lr"
    return (
        f"the last good checkpoint is {run.saved}; "
        f"continue with --resume {run.saved} and a lower --lr"
    )


def print_summary(run: Run, stopped: bool) -> None:
    """Print how the run ended, and plot its losses."""
    state_bytes = optimizer_state_bytes(run.optimizer, run.world.device)
    loss = math.nan if stopped else held_out_loss(run)
    if run.world.rank != 0:
        return
    assert run.saved is not None
    if stopped:
        print(
            f"stopped at step {run.step}, saved {run.saved}; "
            f"continue with --resume auto --out {run.out_dir}"
        )
        return
    print(
        summary(
            held_out_loss=loss,
            state_bytes=state_bytes,
            parameters=run.parameters,
            world_size=run.world.size,
            # The median, since the first steps also compile and load kernels.
            step_seconds=statistics.median(run.step_seconds or [0.0]),
            out_dir=run.out_dir,
            checkpoint=run.saved,
            nonfinite_steps=run.nonfinite_steps,
            skipped=run.args.skip_nonfinite,
        )
    )
    plot = run.out_dir / "loss.png"
    title = f"{model_name(run.args)}, --optimizer {run.args.optimizer}"
    if plot_losses(run.out_dir / "metrics.jsonl", plot, title):
        print(f"{'plot':22}{plot}")
    else:
        print("no loss.png: matplotlib is not installed")


# -------------------------------------------------------------------------------------- one step


def backward(run: Run) -> Tensor:
    """Accumulate this rank's gradients of the step's batch.

    Returns:
        The mean loss of this rank's sequences, a 0-dim fp32 tensor.
    """
    args, world = run.args, run.world
    batch = run.text.batch(args.seed, run.step, args.batch_size)[world.batch_slice].to(world.device)
    total = torch.zeros((), device=world.device)
    for index, micro_batch in enumerate(batch.chunk(args.grad_accum)):
        is_last = index == args.grad_accum - 1
        with nullcontext() if is_last else run.strategy.no_sync(run.module, run.optimizer):
            loss = compute_loss(run.module, micro_batch) / args.grad_accum
            loss.backward()
        total += loss.detach()
    return total


def compute_loss(module: nn.Module, batch: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats per token of an int64 ``(B, T + 1)`` batch, in fp32."""
    return F.cross_entropy(module(batch[:, :-1]).float().flatten(0, 1), batch[:, 1:].flatten())


def update(run: Run, loss: float) -> float:
    """Clip, step and clear the gradients.

    With ``--skip-nonfinite``, a step whose loss or norm is not finite only advances the schedule.

    Returns:
        The global gradient norm before clipping.
    """
    synchronize(run.world)
    start = time.perf_counter()
    optimizer, clip = run.optimizer, run.args.clip or math.inf
    if isinstance(optimizer, AdamW_BF16):  # calls the schedule itself
        norm = optimizer.clip_grad_norm_(clip)
    else:
        for group in optimizer.param_groups:
            set_lr(group, run.schedule(run.step))
        clip_grad_norm_ = getattr(run.module, "clip_grad_norm_", None)  # FSDP1's
        norm = (
            clip_grad_norm_(clip) if clip_grad_norm_ is not None else clip_in_fp32(run.model, clip)
        )
    norm_before = float(norm)
    is_finite = on_every_rank(run.world, math.isfinite(loss) and math.isfinite(norm_before))
    if not is_finite and run.args.skip_nonfinite:
        optimizer.zero_grad()  # without gradients, step() only advances the schedule
    start += measure_precision(run, is_finite)
    optimizer.step()
    synchronize(run.world)
    run.step_seconds.append(time.perf_counter() - start)
    optimizer.zero_grad()
    run.last_is_finite = is_finite
    run.nonfinite_steps += not is_finite
    run.consecutive_nonfinite = 0 if is_finite else run.consecutive_nonfinite + 1
    return norm_before


def set_lr(group: dict[str, Any], lr: float) -> None:
    if isinstance(group["lr"], Tensor):  # torchao's
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def clip_in_fp32(model: nn.Module, max_norm: float) -> Tensor:
    """Clip all gradients in place by their global 2-norm, and return that norm as float32.

    ``nn.utils.clip_grad_norm_`` returns the norm of bfloat16 gradients as bfloat16, up to 0.4 %
    off.
    """
    params = [param for param in model.parameters() if param.grad is not None]
    norms = [torch.linalg.vector_norm(param.grad, dtype=torch.float32) for param in params]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    nn.utils.clip_grads_with_norm_(params, max_norm, norm)
    return norm


def measure_precision(run: Run, is_finite: bool) -> float:
    """Set ``run.precision`` for the step to come if it is due; return the seconds that it took."""
    start = time.perf_counter()
    every, optimizer = run.args.precision_stats, run.optimizer
    is_due = every and (run.step + 1) % every == 0
    run.precision = None
    if is_due and is_finite and isinstance(optimizer, AdamW_BF16):
        run.precision = optimizer.precision_stats()
        synchronize(run.world)
    return time.perf_counter() - start


def check_replicas(run: Run) -> None:
    """Raise DivergedError if replicas of weights or states differ between ranks."""
    if isinstance(run.optimizer, AdamW_BF16):
        try:
            run.optimizer.check_replicas()
        except RuntimeError as error:
            raise DivergedError(f"at step {run.step}, {error}") from error


def all_reduce_mean(world: World, *values: Tensor | float) -> list[float]:
    """Return the mean over the ranks of each 0-dim value."""
    stacked = torch.stack(
        [torch.as_tensor(v, dtype=torch.float64, device=world.device) for v in values]
    )
    dist.all_reduce(stacked)
    return (stacked / world.size).tolist()


def on_every_rank(world: World, condition: bool) -> bool:
    """Return True if ``condition`` is true on every rank."""
    return all_reduce_mean(world, float(not condition)) == [0.0]


def synchronize(world: World) -> None:
    """Wait for the device, so that the optimizer's time excludes earlier work."""
    if world.device.type == "cuda":
        torch.cuda.synchronize()


# -------------------------------------------------------------------- evaluation and checkpoints


@torch.no_grad()
def held_out_loss(run: Run) -> float:
    """Return the mean loss over the held-out windows, which all ranks share."""
    args, world = run.args, run.world
    total = torch.zeros((), device=world.device)
    for index in range(args.eval_batches):
        batch = run.text.held_out_batch(index, args.eval_batches, args.batch_size)
        local = batch[world.batch_slice].to(world.device)
        total += compute_loss(run.module, local) / args.eval_batches
    return all_reduce_mean(world, total)[0]


def evaluate(run: Run, metrics: Metrics | None) -> None:
    loss = held_out_loss(run)
    run.last_is_finite = run.last_is_finite and math.isfinite(loss)
    if metrics is not None:
        metrics.evaluation(run.step, loss)


def save_checkpoint(run: Run, in_background: bool) -> None:
    """Save all that a resumed run needs, after the previous save; the data position is the step.

    After a non-finite loss older checkpoints are kept: this one may be of diverged training.

    Raises:
        DivergedError: a weight or an optimizer state is not finite; nothing is saved.
    """
    if not on_every_rank(run.world, state_is_finite(run.optimizer)):
        raise DivergedError(
            f"a weight or an optimizer state is not finite after step {run.step}, "
            f"which is not saved: {recovery_hint(run)}."
        )
    extra = {"step": run.step, "nonfinite_steps": run.nonfinite_steps, "config": vars(run.args)}
    keep = run.args.keep if run.last_is_finite else None
    root = run.out_dir / "checkpoints"
    in_background = in_background and run.args.export_hf is None
    run.saved = save(root, run.step, run.module, run.optimizer, extra, keep, in_background)
    run.saved_step = run.step
    if run.args.export_hf is not None:
        export_hf(run.args, run.saved)


@torch.no_grad()
def state_is_finite(optimizer: torch.optim.Optimizer) -> bool:
    """Return True if all weights and optimizer states of this rank are finite."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    states = [
        x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)
    ]
    local = [x.to_local() if isinstance(x, DTensor) else x for x in (*params, *states)]
    quantized = [x for x in local if type(x) not in (Tensor, nn.Parameter)]  # torchao's
    local = [x for x in local if x.numel() and type(x) in (Tensor, nn.Parameter)]
    local += [x.dequantize() for x in quantized]
    # The largest magnitude is inf or NaN if any element is, and needs no temporary tensor.
    return bool(nn.utils.get_total_norm(local, math.inf).isfinite())


def save_last_step(run: Run) -> None:
    """Save the last step, even if the previous background save failed; then raise its error."""
    try:
        wait_for_save()
    except RuntimeError:
        save_checkpoint(run, in_background=False)
        raise
    if run.saved_step != run.step:
        save_checkpoint(run, in_background=False)


def resume(run: Run) -> None:
    """Load the checkpoint that ``--resume`` selects, if any."""
    path = find_checkpoint(run.args)
    if path is None:
        return
    try:
        extra = load(path, run.module, run.optimizer).extra
    except (FileNotFoundError, ValueError, RuntimeError) as error:
        raise UsageError(f"{error}{suggest_undamaged(run.args, path)}") from error
    run.step = run.saved_step = extra["step"]
    run.nonfinite_steps = extra.get("nonfinite_steps", 0)
    run.saved = path
    if run.step > run.args.steps:
        raise UsageError(
            f"the checkpoint {path} is at step {run.step}, past --steps {run.args.steps}: "
            "increase --steps to continue training."
        )


# ----------------------------------------------------------------------------------------- set up


def set_up(args: argparse.Namespace) -> Run:
    """Join the process group, build everything, and resume if asked.

    Raises:
        UsageError: on all ranks, if an argument is wrong on any of them.
    """
    world = init_world(args.device)
    if args.strategy is None:
        args.strategy = "fsdp2" if world.size > 1 else "single"
    mesh_shape = STRATEGIES[args.strategy].mesh_shape(world.size)
    world = replace(world, tp_size=mesh_shape.get("tensor", 1))
    check_world(args, world)
    set_seeds(args)
    config = on_all_ranks(model_config, args)
    files = on_all_ranks(find_files, args.data)
    tokenizer = None
    if args.model is not None and files.kind != ".bin":
        tokenizer = on_all_ranks(FolderTokenizer, args.model)
    on_all_ranks(make_out_dir, args)
    text = on_all_ranks(
        lambda: load_text(
            files, args.seq_len, config.vocab_size, tokenizer, args.token_dtype, args.out
        )
    )
    strategy = STRATEGIES[args.strategy]
    model, module, parameters = build_model(args, config, world, strategy)
    schedule = make_schedule(args)
    optimizer = make_optimizer(args, model, schedule)
    run = Run(args, world, text, strategy, model, module, optimizer, schedule, parameters)
    resume(run)
    if run.saved is None:
        init_from(args, module, optimizer)
    if world.rank == 0:
        print(
            f"{model_name(args)} ({parameters:,} parameters), "
            f"--optimizer {args.optimizer}, --strategy {args.strategy} "
            f"on {world.size} x {world.device.type}, "
            f"{text.cut:,} training tokens, steps {run.step} to {args.steps}",
            flush=True,
        )
    return run


def check_world(args: argparse.Namespace, world: World) -> None:
    if args.strategy == "single" and world.size > 1:
        raise UsageError(
            f"--strategy single runs on one process, not {world.size}: use --strategy ddp or fsdp2."
        )
    divisor = world.dp_size * args.grad_accum
    if args.batch_size % divisor:
        raise UsageError(
            f"--batch-size {args.batch_size} does not divide into {world.dp_size} rank(s) "
            f"x --grad-accum {args.grad_accum}: use a multiple of {divisor}."
        )


def make_out_dir(args: argparse.Namespace) -> None:
    """Create ``--out``; refuse one that another run uses, whose files would mix with this run's."""
    out_dir = Path(args.out)
    try:
        if args.resume is None and latest(out_dir / "checkpoints") is not None:
            raise UsageError(
                f"--out {out_dir} already holds a run: add --resume auto to continue it, "
                "or give another --out."
            )
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--out {out_dir} cannot be used ({error.strerror}): "
            "give a directory that you may read and write."
        ) from None


if __name__ == "__main__":
    sys.exit(main())
