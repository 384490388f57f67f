"""Bytes that a rank sends in a step with ring algorithms, which send least."""

from __future__ import annotations

from planning.memory import FP32_BYTES, Job


def gather(nbytes: float, ranks: int) -> float:
    """Return the bytes that a rank sends to all-gather or reduce-scatter a tensor of ``nbytes``.

    Examples:
        >>> gather(1024, ranks=4)
        768.0
    """
    return nbytes * (ranks - 1) / ranks


def all_reduce(nbytes: float, ranks: int) -> float:
    """Return the bytes that a rank sends to all-reduce: a reduce-scatter and an all-gather."""
    return 2 * gather(nbytes, ranks)


def sent_bytes(job: Job) -> int:
    """Return the bytes that a rank sends in a step, without the few of norms and flags."""
    tensor_parallel = job.micro_batches * job.activations.sent_bytes(job.layers)
    return round(tensor_parallel + _data_parallel(job))


def _data_parallel(job: Job) -> float:
    weights, blocks = job.weight_bytes * job.numel, job.layers * job.block.numel
    if job.strategy == "ddp":
        return all_reduce(weights, job.data_ranks)
    if job.strategy == "zero1":  # DDP's all-reduce, then the updated weights
        return all_reduce(weights, job.ranks) + gather(weights, job.ranks)
    reduced = gather(FP32_BYTES * job.numel, job.ranks)
    if job.strategy == "zero2":
        return reduced + gather(weights, job.ranks)
    if not job.is_fsdp:
        return 0.0
    # Each micro-batch gathers weights for the forward and again for the backward pass, but FSDP1
    # keeps the root in between.
    twice = blocks if job.strategy == "fsdp1" else job.numel
    gathered = gather(job.weight_bytes * (job.numel + twice), job.ranks)
    replicas = all_reduce(FP32_BYTES * job.shard, 2) if job.strategy == "hsdp" else 0.0
    return job.micro_batches * gathered + reduced + replicas
