"""One optimizer step: gradients of all micro-batches, clipping, and the update."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F  # noqa: N812  # its usual name

from sharded_bf16_adamw import AdamW_BF16
from training.run_state import Run
from training.world import synchronize, true_on_all_ranks


def backward(run: Run) -> Tensor:
    """Accumulate the gradients of this rank's part of the global batch.

    Returns:
        The mean loss of this rank's sequences, a 0-dim fp32 tensor.

    Raises:
        StopTraining: a rank was asked to stop before the last micro-batch; the step is not taken.
    """
    args, world = run.args, run.world
    batch = run.data.batch(args.seed, run.step, args.batch_size)[world.batch_slice].to(world.device)
    total = torch.zeros((), device=world.device)
    for index, micro_batch in enumerate(batch.chunk(args.grad_accum)):
        if index > 0:
            run.supervisor.stop_if_requested()
        run.supervisor.beat(f"micro-batch {index + 1} of step {run.step + 1}")
        is_last = index == args.grad_accum - 1
        with nullcontext() if is_last else run.strategy.no_sync(run.wrapped_model, run.optimizer):
            loss = compute_loss(run.wrapped_model, micro_batch) / args.grad_accum
            loss.backward()
        total += loss.detach()
    return total


def compute_loss(module: nn.Module, batch: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats per token of an int64 ``(B, T + 1)`` batch, in fp32."""
    return F.cross_entropy(module(batch[:, :-1]).float().flatten(0, 1), batch[:, 1:].flatten())


def update(run: Run, loss: float) -> float:
    """Clip the gradients, take the optimizer step, and clear the gradients.

    ``--skip-nonfinite`` skips steps whose loss or norm is not finite, ``--skip-spikes`` steps whose
    loss or norm is an outlier. A skipped step only advances the schedule.

    Returns:
        The global gradient norm before clipping.
    """
    synchronize(run.world.device)
    start = time.perf_counter()
    optimizer, clip = run.optimizer, run.args.clip or math.inf
    if isinstance(optimizer, AdamW_BF16):  # its lr_function is the schedule
        norm = optimizer.clip_grad_norm_(clip)
    else:
        for group in optimizer.param_groups:
            set_lr(group, run.schedule(run.step))
        clip_grad_norm_ = getattr(run.wrapped_model, "clip_grad_norm_", None)  # FSDP1's
        norm = (
            clip_grad_norm_(clip) if clip_grad_norm_ is not None else clip_in_fp32(run.model, clip)
        )
    norm_before = float(norm)
    is_finite = true_on_all_ranks(run.world, math.isfinite(loss) and math.isfinite(norm_before))
    # Ranks must agree, although their norms may differ in the last bit.
    is_spike = bool(run.args.skip_spikes) and is_finite
    if is_spike:
        is_spike = not true_on_all_ranks(
            run.world, not run.spike_filter.is_spike(loss, norm_before)
        )
    run.spike_filter.skipped += is_spike
    if is_spike or (not is_finite and run.args.skip_nonfinite):
        optimizer.zero_grad()  # without gradients, step() only advances the schedule
    start += measure_precision(run, is_finite and not is_spike)
    optimizer.step()
    synchronize(run.world.device)
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


def measure_precision(run: Run, has_grads: bool) -> float:
    """Set ``run.precision`` to the next step's statistics, if due; return the seconds taken."""
    start = time.perf_counter()
    every, optimizer = run.args.precision_stats, run.optimizer
    is_due = every and (run.step + 1) % every == 0
    run.precision = None
    if is_due and has_grads and isinstance(optimizer, AdamW_BF16):
        run.precision = optimizer.precision_stats(run.args.precision_fraction)
        synchronize(run.world.device)
    return time.perf_counter() - start


def step_values(run: Run, loss: float, norm: float) -> dict[str, float]:
    """Return the values of the last step for the reporters."""
    args = run.args
    values = {
        "loss": loss,
        "lr": float(run.optimizer.param_groups[0]["lr"]),
        "grad_norm": norm,
        "nonfinite_steps": run.nonfinite_steps,
    }
    if args.skip_spikes:
        values["spikes"] = run.spike_filter.skipped
    tokens_per_s = args.batch_size * args.seq_len / run.loop_seconds[-1]
    return {**values, "tokens_per_s": round(tokens_per_s, 1)}
