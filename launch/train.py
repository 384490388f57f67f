"""Train a GPT with bf16 weights.

    python launch/train.py
    torchrun --nproc-per-node 2 launch/train.py

A run writes ``metrics.jsonl``, ``loss.png`` and ``checkpoints/`` to ``--out``. The same command
continues it, on any number of processes. It saves and stops on SIGTERM, SIGINT, SIGUSR1 and SIGHUP.

Exit codes: 0 done; 75 stopped, run the same command again; 1 failed; 2 wrong usage, in which case
the same command fails again; 130 aborted by a second Ctrl-C. An error prints one sentence.
torchrun turns each code but 0 into 1; ``launch/elastic.py`` is a torchrun that passes them on.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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
from training.errors import FAILED, STOPPED, WRONG_USAGE, DivergedError, RunError, UsageError
from training.export import export_hf
from training.hugging_face import FolderTokenizer
from training.initial import init_from
from training.metrics import Metrics, optimizer_state_bytes, plot_losses, summary
from training.options import model_name, parse_args
from training.rendezvous import die_with_torchrun
from training.resume import find_checkpoint, find_undamaged, lock_out_dir, suggest_undamaged
from training.spikes import SpikeFilter
from training.strategies import STRATEGIES, Strategy, World, init_world, on_all_ranks, on_rank_0
from training.supervisor import USABLE_GRACE_FRACTION, Supervisor, rank

from sharded_bf16_adamw import (
    AdamW_BF16,
    PrecisionStats,
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
        supervisor: knows whether the run shall stop, and ends a run that hangs.
        spikes: finds outliers for ``--skip-spikes``.
        step: optimizer steps taken.
        evaluated_step: the last step after which the model was evaluated, -1 before.
        held_out_loss: the loss of that evaluation.
        step_seconds: duration of each optimizer step of this process.
        loop_seconds: duration of each whole step of this process, without evaluations and saves.
        save_seconds: duration of the last save that training waited for.
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
    supervisor: Supervisor
    spikes: SpikeFilter
    step: int = 0
    evaluated_step: int = -1
    held_out_loss: float = math.nan
    step_seconds: list[float] = field(default_factory=list)
    loop_seconds: list[float] = field(default_factory=list)
    save_seconds: float = 0.0
    saved: Path | None = None
    saved_step: int = -1
    nonfinite_steps: int = 0
    consecutive_nonfinite: int = 0
    last_is_finite: bool = True
    precision: PrecisionStats | None = None

    @property
    def out_dir(self) -> Path:
        return Path(self.args.out)


class StopTraining(Exception):  # noqa: N818  # no error
    """A rank was asked to stop. Raised on all ranks together."""


def main(argv: list[str] | None = None) -> int:
    initialized_before = dist.is_initialized()
    die_with_torchrun()
    with Supervisor() as supervisor:
        try:
            args = parse_args(argv)
            supervisor.grace, supervisor.step_timeout = args.grace, args.step_timeout
            code = STOPPED if train(args, supervisor) else 0
            dist.barrier()  # rank 0 may still be plotting
        except (UsageError, RunError) as error:
            if rank() == 0:
                print(f"error: {error}", file=sys.stderr)
            code = WRONG_USAGE if isinstance(error, UsageError) else FAILED
        if dist.is_initialized() and not initialized_before:
            dist.destroy_process_group()
    return code


def train(args: argparse.Namespace, supervisor: Supervisor) -> bool:
    """Train to the last step, or until the run shall stop; return True for the latter."""
    with set_up(args, supervisor) as run:
        metrics = on_rank_0(open_metrics, run)
        stopped = False
        try:
            train_loop(run, metrics)
        except StopTraining:
            stopped = True
        except DivergedError:
            # A save in flight is good: nothing is saved once a loss is not finite.
            with save_errors():
                wait_for_save()
            raise
        finally:
            if metrics is not None:
                metrics.close()
        save_last_step(run)
        print_summary(run, stopped)
    return stopped


def open_metrics(run: Run) -> Metrics:
    args, path = run.args, run.out_dir / "metrics.jsonl"
    evaluated = run.evaluated_step == run.step
    try:
        return Metrics(path, run.step, args.steps, args.progress, evaluated, args.print_every)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written ({error.strerror}): make it writable, free space, or give "
            "another --out."
        ) from error


def train_loop(run: Run, metrics: Metrics | None) -> None:
    """Train to the last step.

    Raises:
        StopTraining: a rank was asked to stop.
    """
    args = run.args
    if run.evaluated_step != run.step and is_evaluation_due(run):
        evaluate(run, metrics)
    while run.step < args.steps:
        start = time.perf_counter()
        rank_loss = backward(run)
        run.supervisor.beat(f"the update of step {run.step + 1}")
        # One all-reduce a step makes the ranks agree on the loss and on stopping.
        requested = float(run.supervisor.requested)
        loss, stopping = all_reduce_mean(run.world, rank_loss, requested)
        norm = update(run, loss)
        run.step += 1
        run.loop_seconds.append(time.perf_counter() - start)
        if metrics is not None:
            tokens_per_s = args.batch_size * args.seq_len / run.loop_seconds[-1]
            spikes = {"spikes": run.spikes.skipped} if args.skip_spikes else {}
            metrics.step(
                step=run.step,
                loss=loss,
                lr=float(run.optimizer.param_groups[0]["lr"]),
                grad_norm=norm,
                nonfinite_steps=run.nonfinite_steps,
                **spikes,
                tokens_per_s=round(tokens_per_s, 1),
            )
            if run.precision is not None:
                metrics.precision(run.step, run.precision)
        check_nonfinite(run)
        if args.check_replicas and run.step % args.check_replicas == 0:
            check_replicas(run)
        if stopping:
            stop_if_requested(run)
        if is_evaluation_due(run):
            evaluate(run, metrics)
        if args.save_every and run.step % args.save_every == 0:
            if run.last_is_finite:
                save_checkpoint(run, in_background=args.async_save)
            elif run.world.rank == 0:
                print(
                    f"note: step {run.step} is not saved: its loss or gradient norm is not finite",
                    file=sys.stderr,
                )
        note_short_grace(run)


def is_evaluation_due(run: Run) -> bool:
    return run.step % run.args.eval_every == 0 or run.step == run.args.steps


def stop_if_requested(run: Run) -> None:
    """Raise StopTraining if a rank was asked to stop. Collective.

    The ranks take over the earliest deadline.
    """
    # On the CPU, so that the device is not waited for.
    seconds_left = torch.tensor(run.supervisor.seconds_left(), dtype=torch.float64)
    dist.all_reduce(seconds_left, op=dist.ReduceOp.MIN)
    if math.isfinite(seconds_left.item()):
        run.supervisor.request(seconds_left.item())
        raise StopTraining


def note_short_grace(run: Run) -> None:
    """Print a note, once, if a stop signal would end the run before its last save."""
    steps = 5  # the first ones also compile and load kernels
    if run.world.rank != 0 or len(run.loop_seconds) != steps:
        return
    needed = statistics.median(run.loop_seconds) / run.args.grad_accum + run.save_seconds
    if needed > USABLE_GRACE_FRACTION * run.args.grace:
        print(
            f"note: --grace {run.args.grace:g} is short: a step and a save take {needed:.1f} s, so "
            "a stop signal may end the run before its last save; give the scheduler and --grace "
            "more time (torchrun reads TORCH_ELASTIC_SHUTDOWN_TIMEOUT)",
            file=sys.stderr,
        )


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
    if run.world.rank != 0:
        return
    assert run.saved is not None
    if stopped:
        print(
            f"stopped at step {run.step}, saved {run.saved}; the same command continues",
            flush=True,
        )
        return
    print(
        summary(
            held_out_loss=run.held_out_loss,
            state_bytes=state_bytes,
            parameters=run.parameters,
            world_size=run.world.size,
            # The median, since the first steps also compile and load kernels.
            step_seconds=statistics.median(run.step_seconds or [0.0]),
            out_dir=run.out_dir,
            checkpoint=run.saved,
            nonfinite_steps=run.nonfinite_steps,
            skipped=run.args.skip_nonfinite,
            spikes=run.spikes.skipped if run.args.skip_spikes else None,
        )
    )
    plot = run.out_dir / "loss.png"
    title = f"{model_name(run.args)}, --optimizer {run.args.optimizer}"
    try:
        plotted = plot_losses(run.out_dir / "metrics.jsonl", plot, title)
    except OSError as error:
        print(f"no loss.png: {plot} cannot be written ({error.strerror})")
    else:
        print(f"{'plot':22}{plot}" if plotted else "no loss.png: matplotlib is not installed")


# -------------------------------------------------------------------------------------- one step


def backward(run: Run) -> Tensor:
    """Accumulate this rank's gradients of the step's batch.

    Returns:
        The mean loss of this rank's sequences, a 0-dim fp32 tensor.

    Raises:
        StopTraining: a rank was asked to stop before the last micro-batch; the step is not taken.
    """
    args, world = run.args, run.world
    batch = run.text.batch(args.seed, run.step, args.batch_size)[world.batch_slice].to(world.device)
    total = torch.zeros((), device=world.device)
    for index, micro_batch in enumerate(batch.chunk(args.grad_accum)):
        if index > 0:
            stop_if_requested(run)
        run.supervisor.beat(f"micro-batch {index + 1} of step {run.step + 1}")
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

    With ``--skip-nonfinite``, a step whose loss or norm is not finite only advances the schedule,
    and with ``--skip-spikes`` one whose loss or norm is an outlier.

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
    # The norm may differ in its last bit between ranks.
    is_spike = bool(run.args.skip_spikes) and is_finite
    if is_spike:
        is_spike = not on_every_rank(run.world, not run.spikes.is_spike(loss, norm_before))
    run.spikes.skipped += is_spike
    if is_spike or (not is_finite and run.args.skip_nonfinite):
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
        stop_if_requested(run)
        run.supervisor.beat(f"the evaluation after step {run.step}")
        batch = run.text.held_out_batch(index, args.eval_batches, args.batch_size)
        local = batch[world.batch_slice].to(world.device)
        total += compute_loss(run.module, local) / args.eval_batches
    return all_reduce_mean(world, total)[0]


def evaluate(run: Run, metrics: Metrics | None) -> None:
    loss = held_out_loss(run)
    run.evaluated_step, run.held_out_loss = run.step, loss
    run.last_is_finite = run.last_is_finite and math.isfinite(loss)
    if metrics is not None:
        metrics.evaluation(run.step, loss)


def save_checkpoint(run: Run, in_background: bool) -> None:
    """Save all that a resumed run needs, after the previous save; the data position is the step.

    After a non-finite loss older checkpoints are kept: this one may be of diverged training.

    Raises:
        DivergedError: a weight or an optimizer state is not finite; nothing is saved.
        RunError: this save or the previous one failed.
    """
    run.supervisor.beat(f"the save of step {run.step}")
    if not on_every_rank(run.world, state_is_finite(run.optimizer)):
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
        "spikes": run.spikes.state(),
        "config": vars(run.args),
    }
    keep = run.args.keep if run.last_is_finite else None
    root = run.out_dir / "checkpoints"
    in_background = in_background and run.args.export_hf is None
    start = time.perf_counter()
    with save_errors():
        run.saved = save(root, run.step, run.module, run.optimizer, extra, keep, in_background)
        if run.args.export_hf is not None:
            export_hf(run.args, run.saved)
    run.saved_step = run.step
    run.save_seconds = time.perf_counter() - start


@contextmanager
def save_errors() -> Iterator[None]:
    """Raise the error of a failed save, which is raised on all ranks, as a RunError."""
    try:
        yield
    except RuntimeError as error:
        raise RunError(f"{error}.") from error


@torch.no_grad()
def state_is_finite(optimizer: torch.optim.Optimizer) -> bool:
    """Return True if all weights and optimizer states of this rank are finite."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    states = [
        x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)
    ]
    local = [x.to_local() if isinstance(x, DTensor) else x for x in (*params, *states)]
    # torchao's states wrap quantized tensors, and have no norm
    local = [x.dequantize() if hasattr(x, "__tensor_flatten__") else x for x in local]
    # FlashAdamW keeps integers, of which torch has no norm
    local = [x for x in local if x.numel() and x.is_floating_point()]
    # The largest magnitude is inf or NaN if any element is, and needs no temporary tensor.
    return bool(nn.utils.get_total_norm(local, math.inf).isfinite())


def save_last_step(run: Run) -> None:
    """Save the last step, even if the previous background save failed; then raise its error."""
    run.supervisor.beat("the last save")
    try:
        with save_errors():
            wait_for_save()
    except RunError:
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
        other = find_undamaged(run.args, path)
        if other is None:
            raise UsageError(f"{error}{suggest_undamaged(run.args, path)}") from error
        path, extra = other, load(other, run.module, run.optimizer).extra
    run.step = run.saved_step = extra["step"]
    run.evaluated_step = extra.get("evaluated_step", -1)
    run.held_out_loss = extra.get("held_out_loss", math.nan)
    run.nonfinite_steps = extra.get("nonfinite_steps", 0)
    run.consecutive_nonfinite = extra.get("consecutive_nonfinite", 0)
    if "spikes" in extra:
        run.spikes.load(extra["spikes"])
    run.saved = path


# ----------------------------------------------------------------------------------------- set up


@contextmanager
def set_up(args: argparse.Namespace, supervisor: Supervisor) -> Iterator[Run]:
    """Join the process group, lock ``--out``, build everything, and resume a run.

    Yields:
        The run; ``--out`` is locked until the context ends.

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
    lock = on_rank_0(lock_out_dir, args)
    try:
        text = on_all_ranks(
            lambda: load_text(
                files, args.seq_len, config.vocab_size, tokenizer, args.token_dtype, args.out
            )
        )
        yield build_run(args, config, world, text, supervisor)
    finally:
        if lock is not None:
            lock.release()


def build_run(
    args: argparse.Namespace, config: Any, world: World, text: Text, supervisor: Supervisor
) -> Run:
    strategy = STRATEGIES[args.strategy]
    model, module, parameters = build_model(args, config, world, strategy)
    schedule = make_schedule(args)
    optimizer = make_optimizer(args, model, schedule)
    spikes = SpikeFilter(args.skip_spikes)
    run = Run(
        args,
        world,
        text,
        strategy,
        model,
        module,
        optimizer,
        schedule,
        parameters,
        supervisor,
        spikes,
    )
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


if __name__ == "__main__":
    sys.exit(main())
