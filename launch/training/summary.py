"""Print the result of a run."""

from __future__ import annotations

import statistics
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from sharded_bf16_adamw import AdamW_BF16
from sharded_bf16_adamw.kernels import backend_for
from training.hf_export import LATEST_EXPORT
from training.run_state import Run


def print_summary(run: Run, stopped: bool) -> None:
    """Print the result of the run, or where it stopped. Collective."""
    state_bytes = optimizer_state_bytes(run.optimizer, run.world.device)
    if run.world.rank != 0:
        return
    assert run.last_checkpoint is not None
    if stopped:
        print(
            f"stopped at step {run.step}, saved {run.last_checkpoint}; run the same command again "
            "to continue",
            flush=True,
        )
        return
    print(
        summary(
            held_out_loss=run.held_out_loss,
            state_bytes=state_bytes,
            num_params=run.num_params,
            world_size=run.world.size,
            # The median, since the first steps also compile and load kernels.
            step_seconds=statistics.median(run.step_seconds or [0.0]),
            backend=backend_name(run.optimizer, run.world.device),
            out_dir=run.out_dir,
            checkpoint=run.last_checkpoint,
            nonfinite_steps=run.nonfinite_steps,
            skip_nonfinite=run.args.skip_nonfinite,
            skipped_spikes=run.spike_filter.skipped if run.args.skip_spikes else None,
            exported=Path(run.args.out) / LATEST_EXPORT if run.args.export_hf else None,
        )
    )


def optimizer_state_bytes(
    optimizer: torch.optim.Optimizer, device: torch.device
) -> tuple[int, int]:
    """Return the bytes of optimizer state on this rank, and their sum over all ranks. Collective.

    Counts a DTensor's local shard, and the parts of a quantized tensor of torchao.
    """
    # Some entries of optimizer.state may not be a parameter's dict.
    states = [state for state in optimizer.state.values() if isinstance(state, dict)]
    tensors = [x for state in states for x in state.values() if isinstance(x, torch.Tensor)]
    local = [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
    local_bytes = sum(part.nbytes for x in local for part in parts_of(x))
    total = torch.tensor(local_bytes, dtype=torch.int64, device=device)
    dist.all_reduce(total)
    return local_bytes, int(total)


def backend_name(optimizer: torch.optim.Optimizer, device: torch.device) -> str | None:
    """Return the backend of an AdamW_BF16, or None for another optimizer."""
    return backend_for(device, optimizer.backend) if isinstance(optimizer, AdamW_BF16) else None


def parts_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors that a tensor subclass wraps, or the tensor itself."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    return [tensor] if flatten is None else [getattr(tensor, name) for name in flatten()[0]]


def summary(
    *,
    held_out_loss: float,
    state_bytes: tuple[int, int],
    num_params: int,
    world_size: int,
    step_seconds: float,
    backend: str | None,
    out_dir: Path,
    checkpoint: Path,
    nonfinite_steps: int,
    skip_nonfinite: bool,
    skipped_spikes: int | None,
    exported: Path | None,
) -> str:
    """Return the lines that a finished run prints."""
    local, total = state_bytes
    return "\n".join(
        (
            f"held-out loss         {held_out_loss:.4f} nats per token",
            f"optimizer state       {local:,} bytes on rank 0, {total:,} on {world_size} rank(s): "
            f"{total / num_params:.2f} per parameter",
            f"optimizer step        {step_seconds * 1e3:.2f} ms (median), clipping included"
            f"{'' if backend is None else f', {backend} backend'}",
            f"non-finite steps      {nonfinite_steps}"
            f"{', skipped' if nonfinite_steps and skip_nonfinite else ''}",
            *(
                []
                if skipped_spikes is None
                else [f"spikes                {skipped_spikes}, skipped"]
            ),
            f"metrics               {out_dir / 'metrics.jsonl'}",
            f"checkpoint            {checkpoint}",
            *([] if exported is None else [f"Hugging Face model    {exported}"]),
        )
    )
