"""Bytes that a rank sends in a step, by the ring algorithms, which send least."""

from __future__ import annotations

from planning.memory import FP32, Job


def gather(nbytes: float, ranks: int) -> float:
    """Return what a rank sends in an all-gather or a reduce-scatter of a whole of ``nbytes``.

    Examples:
        >>> gather(1024, ranks=4)
        768.0
    """
    return nbytes * (ranks - 1) / ranks


def all_reduce(nbytes: float, ranks: int) -> float:
    """Return what a rank sends in an all-reduce: a reduce-scatter and an all-gather."""
    return 2 * gather(nbytes, ranks)


def wire(job: Job) -> int:
    """Return the bytes of a step. Norms and flags, a few bytes for each parameter, do not count."""
    tensor_parallel = job.micro_batches * job.probe.wire(job.layers)
    return round(tensor_parallel + _data_parallel(job))


def _data_parallel(job: Job) -> float:
    weights, blocks = job.weight_bytes * job.numel, job.layers * job.block.numel
    if job.strategy == "ddp":
        return all_reduce(weights, job.data_ranks)
    if job.strategy == "zero1":  # DDP's all-reduce, then the updated weights
        return all_reduce(weights, job.ranks) + gather(weights, job.ranks)
    reduced = gather(FP32 * job.numel, job.ranks)
    if job.strategy == "zero2":
        return reduced + gather(weights, job.ranks)
    if not job.is_fsdp:
        return 0.0
    # Every micro-batch gathers weights for the forward and for the backward pass, but FSDP1 keeps
    # the root in between.
    twice = blocks if job.strategy == "fsdp1" else job.numel
    gathered = gather(job.weight_bytes * (job.numel + twice), job.ranks)
    replicas = all_reduce(FP32 * job.shard, 2) if job.strategy == "hsdp" else 0.0
    return job.micro_batches * gathered + reduced + replicas
