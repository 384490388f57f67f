"""Formulas for the bytes per rank of each ``train.py`` strategy.

Weights and states persist. Gradients, buffers and activations do not, so each *phase* of a step has
its own sum. The largest sum is the peak:

* *build*: FSDP1 shards the full model;
* *loss*: all activations and the logits;
* *head*: from the gradient of the logits to that of the last layer's output;
* *backward*: the backward pass of a layer, or of the embedding. Every layer frees the same
  activations and leaves the same gradients, so only the first two and the last two layers count;
* *reduce*: FSDP on gloo reduces the gradients of a layer;
* *end*: the last gradients are reduced;
* *update*: the optimizer's step.

Sizes are bytes, except that ``numel`` and ``shard`` count elements. ``shard`` is the largest shard
on any rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

import torch

from planning.activation_memory import ActivationMemory
from sharded_bf16_adamw import ZeRO
from sharded_bf16_adamw.sharding.fp32_sum import SUM_BLOCK_NUMEL
from sharded_bf16_adamw.sharding.zero.param import choose_shard_dim
from sharded_bf16_adamw.step_in_backward.batch import BATCH_BYTES

FP32_BYTES = 4  # per element
BUCKET_BYTES = int(ZeRO.bucket_size_mb * 2**20)  # of weights, by default
MAX_IN_FLIGHT = ZeRO.max_in_flight  # by default


@dataclass(frozen=True)
class Part:
    """Parameters that a strategy shards or reduces together.

    Attributes:
        numel: elements, after tensor parallelism.
        shard: elements of the largest shard.
        tensors: number of parameters.
    """

    numel: int
    shard: int
    tensors: int

    @classmethod
    def of(cls, shapes: Iterable[torch.Size], ranks: int) -> Part:
        """Return the part with these shapes, each sharded as by ZeRO (:func:`choose_shard_dim`).

        FSDP2 shards dimension 0, so it differs only where that is smaller than ``ranks``. FSDP1
        splits a layer's elements evenly, which gives slightly smaller shards.

        Examples:
            >>> Part.of([torch.Size([5, 2])], ranks=4)
            Part(numel=10, shard=4, tensors=1)
        """
        shapes = list(shapes)
        shard = sum(_shard_numel(shape, ranks) for shape in shapes)
        return cls(sum(map(prod, shapes)), shard, len(shapes))


def _shard_numel(shape: torch.Size, ranks: int) -> int:
    dim = choose_shard_dim(shape, ranks)
    assert dim is not None
    return -(-shape[dim] // ranks) * prod(shape[:dim]) * prod(shape[dim + 1 :])


@dataclass(frozen=True)
class Job:
    """Inputs of the formulas: a strategy, the model's sizes and the options of a run.

    Attributes:
        strategy: a name in ``STRATEGIES``.
        layers: number of layers.
        ranks: number of ranks over which weights or states are sharded, or 1.
        data_ranks: number of ranks over which gradients are averaged.
        block: parameters of one layer.
        root: all other parameters.
        head_numel: elements of the last norm and the (perhaps tied) head, whose gradients are
            ready first.
        activations: measured memory of one micro-batch.
        weight_bytes: bytes per element of a weight.
        is_adamw_bf16: True for AdamW_BF16, False for torch's AdamW.
        micro_batches: number of micro-batches in a step.
        in_backward: AdamW_BF16's ``step_in_backward``.
        is_cuda: True for CUDA and NCCL, False for CPUs and gloo.
    """

    strategy: str
    layers: int
    ranks: int
    data_ranks: int
    block: Part
    root: Part
    head_numel: int
    activations: ActivationMemory
    weight_bytes: int
    is_adamw_bf16: bool = True
    micro_batches: int = 1
    in_backward: bool = False
    is_cuda: bool = True

    @property
    def numel(self) -> int:
        return self.layers * self.block.numel + self.root.numel

    @property
    def shard(self) -> int:
        return self.layers * self.block.shard + self.root.shard

    def numel_with_grad(self, done: int) -> int:
        """Return the number of elements that have gradients after the backward of ``done`` layers.

        ``done`` is -1 before the head's gradients, and ``layers + 1`` at the end.
        """
        if done < 0:
            return 0
        return self.numel if done > self.layers else self.head_numel + done * self.block.numel

    @property
    def is_fsdp(self) -> bool:
        return self.strategy in ("fsdp1", "fsdp2", "hsdp", "fsdp2+tp")


@dataclass(frozen=True)
class Phase:
    """Bytes in use during one phase of a step, without weights and states."""

    name: str
    gradients: int
    buffers: int
    activations: int

    @property
    def total(self) -> int:
        return self.gradients + self.buffers + self.activations


def weights(job: Job) -> int:
    """Return the bytes of weights. Besides tensor parallelism, only FSDP shards them."""
    return job.weight_bytes * (job.shard if job.is_fsdp else job.numel)


def states(job: Job) -> int:
    """Return the bytes of optimizer states, which have the dtype of the weights.

    AdamW_BF16 has two moments and a correction, torch's AdamW two moments. Both have one float32
    step for each parameter. FSDP and ZeRO shard all but the steps.
    """
    tensors = job.layers * job.block.tensors + job.root.tensors
    return (3 if job.is_adamw_bf16 else 2) * job.weight_bytes * job.shard + FP32_BYTES * tensors


def phases(job: Job) -> Iterator[Phase]:
    """Yield the phases that may have the peak memory."""
    measured, layers = job.activations, job.layers
    if job.strategy == "fsdp1":  # it shards the full model, before there are states
        built = job.weight_bytes * (job.numel + job.block.numel)
        yield Phase("build", 0, built - weights(job) - states(job), 0)
    yield Phase("loss", gradients(job, -1), loss_buffers(job), measured.loss(layers))
    yield Phase("head", gradients(job, -1), head_buffers(job), measured.head(layers))
    if job.strategy == "zero2" and job.in_backward:
        yield from zero2_in_backward(job)
        return
    for done in sorted({0, min(1, layers - 1), max(0, layers - 2), layers - 1, layers}):
        used = measured.block(layers - done) if done < layers else measured.embedding
        yield Phase("backward", gradients(job, done), backward_buffers(job, done), used)
    if job.is_fsdp and not job.is_cuda:
        # FSDP2 has moved the layer's accumulated gradients into its reduce-scatter input.
        is_moved = job.micro_batches > 1 and job.strategy != "fsdp1"
        for done in sorted({0, layers - 1}):
            used = round(measured.block.per_further_layer) * (layers - 1 - done)
            kept = gradients(job, done) - is_moved * FP32_BYTES * job.block.numel
            yield Phase("reduce", kept, gloo_buffers(job, done), used)
    yield Phase("end", gradients(job, layers + 1), end_buffers(job), 0)
    yield Phase("update", gradients(job, layers + 1), update_buffers(job), 0)


def gradients(job: Job, done: int) -> int:
    """Return the bytes of gradients that are kept; ``done`` as in ``Job.numel_with_grad``.

    Unreduced gradients count as buffers, except those that earlier micro-batches have accumulated.
    These are unsharded, in the dtypes that docs/strategies.md lists.
    """
    complete, accumulates = job.numel_with_grad(done), job.micro_batches > 1
    if job.strategy in ("ddp", "zero1"):
        return job.weight_bytes * job.numel  # DDP keeps its buckets; gradients are views
    if job.strategy == "zero2":
        reduced = complete
        if job.in_backward:  # only the buckets that are still in flight after the backward pass
            last = MAX_IN_FLIGHT + (not job.is_cuda)
            reduced = sum(_buckets(job)[-last:]) if done > job.layers else 0
        return FP32_BYTES * (reduced // job.ranks + accumulates * (job.numel - complete))
    if job.is_fsdp:  # the root's gradients are reduced last
        finished = min(max(done, 0), job.layers)
        reduced = job.shard if done > job.layers else finished * job.block.shard
        unreduced = 0 if done > job.layers else job.numel - finished * job.block.numel
        kept = 0 if job.in_backward else job.weight_bytes * reduced
        return kept + accumulates * unreduced * (
            job.weight_bytes if job.strategy == "fsdp1" else FP32_BYTES
        )
    if accumulates:
        return job.weight_bytes * job.numel
    kept = job.weight_bytes * complete
    return min(kept, BATCH_BYTES) if job.in_backward else kept


def loss_buffers(job: Job) -> int:
    """Return the bytes of buffers while the loss is computed.

    FSDP1's root stays unsharded after the forward pass. FSDP2's does not: train.py sets
    ``reshard_after_forward=True``.
    """
    return job.weight_bytes * job.root.numel if job.strategy == "fsdp1" else 0


def head_buffers(job: Job) -> int:
    """Return the bytes of buffers in phase *head*.

    FSDP has the root unsharded and the last layer prefetched.
    """
    if job.strategy == "zero2":
        return zero2_buffers(job, -1)
    return job.weight_bytes * (job.root.numel + job.block.numel) if job.is_fsdp else 0


def backward_buffers(job: Job, done: int) -> int:
    """Return the bytes of buffers during the backward pass of a layer, or of the embedding.

    FSDP has the root and the layer unsharded, the next layer prefetched, and unreduced gradients of
    the head. FSDP2 also has the float32 reduce-scatter input of the previous layer.
    """
    if job.strategy == "zero2":
        return zero2_buffers(job, done)
    if not job.is_fsdp:
        return 0
    unsharded = job.root.numel + min(2, job.layers - done) * job.block.numel
    head = job.head_numel if job.micro_batches == 1 else 0  # else they are accumulated
    reducing = FP32_BYTES * job.block.numel if done and job.strategy != "fsdp1" else 0
    return job.weight_bytes * (unsharded + head) + reducing + _all_reduced(job, done)


def _all_reduced(job: Job, done: int) -> int:
    """Return the bytes of float32 all-reduce inputs, which HSDP keeps until the backward's end."""
    return done * FP32_BYTES * job.block.shard if job.strategy == "hsdp" else 0


def gloo_buffers(job: Job, done: int) -> int:
    """Return the bytes of buffers while FSDP reduces the gradients of a layer on gloo.

    The layer is already resharded, but gloo reduces a copy of the reduce-scatter input.
    """
    unsharded = job.root.numel + min(1, job.layers - done - 1) * job.block.numel
    head = job.head_numel if job.micro_batches == 1 else 0
    unreduced = job.block.numel if job.strategy == "fsdp1" else 0
    reducing = FP32_BYTES * (2 * job.block.numel + job.block.shard)
    return job.weight_bytes * (unsharded + head + unreduced) + reducing + _all_reduced(job, done)


def end_buffers(job: Job) -> int:
    """Return the bytes of buffers when the last gradients are reduced.

    FSDP copies the root's gradients into a float32 reduce-scatter input. FSDP1 first concatenates
    them, while the root is unsharded.
    """
    if job.strategy == "zero2":
        return zero2_buffers(job, job.layers)
    if not job.is_fsdp:
        return 0
    copies = 1 if job.is_cuda else 2  # see gloo_buffers
    scattered = FP32_BYTES * (copies * job.root.numel + job.root.shard)
    if job.strategy != "fsdp1":
        accumulated = FP32_BYTES if job.micro_batches > 1 else job.weight_bytes
        copying = (accumulated + FP32_BYTES) * job.root.numel
        return max(copying, scattered) + _all_reduced(job, job.layers)
    grads = job.weight_bytes * job.root.numel
    # Float32 gradients are the reduce-scatter input themselves.
    return max(3 * grads, scattered + (grads if job.weight_bytes != FP32_BYTES else 0))


def zero2_buffers(job: Job, done: int) -> int:
    """Return the bytes of ZeRO-2's buckets while the gradients after ``done`` layers arrive.

    One bucket fills up while others are in flight. Each has a float32 reduce-scatter input, and in
    flight also an output. On NCCL the output is a shard. On gloo it is as large as the input: an
    all-to-all, whose output each rank sums.
    """
    begin, end = job.numel_with_grad(done), job.numel_with_grad(done + 1)
    buckets = _buckets(job)
    peak, start = 0, 0
    for index, numel in enumerate(buckets):
        stop = start + numel
        if start < end and stop > begin:
            in_flight = buckets[max(0, index - MAX_IN_FLIGHT) : index]
            peak = max(peak, FP32_BYTES * numel + _in_flight(job, in_flight))
            if stop <= end:  # the bucket is full and launched
                in_flight = buckets[max(0, index + 1 - MAX_IN_FLIGHT) : index + 1]
                peak = max(peak, _in_flight(job, in_flight))
        start = stop
    return peak


def _in_flight(job: Job, buckets: list[int]) -> int:
    """Return the bytes of the inputs and outputs of buckets in flight."""
    if not buckets:
        return 0
    inputs = FP32_BYTES * sum(buckets)
    if job.is_cuda:
        return inputs + inputs // job.ranks
    return 2 * inputs + 2 * FP32_BYTES * min(SUM_BLOCK_NUMEL, job.shard)


def zero2_in_backward(job: Job) -> Iterator[Phase]:
    """Yield the phases of ZeRO-2 from the first gradient on, with ``step_in_backward``.

    The network is assumed to be slow: ``MAX_IN_FLIGHT`` buckets and as many all-gathers of updated
    weights stay in flight. The activations of a layer shrink as its gradients arrive. Each bucket
    counts when it is allocated, and when it is full and waits for the oldest bucket in flight,
    whose shard is then updated.
    """
    buckets = _buckets(job)
    accumulates = job.micro_batches > 1
    start = 0
    in_flight: list[int] = []  # elements of buckets, the oldest first
    updated: list[int] = []
    for index, numel in enumerate(buckets):
        for complete, is_full in ((start, False), (start + numel, True)):
            kept = FP32_BYTES * accumulates * (job.numel - complete)
            gathered = sorted(updated)[-MAX_IN_FLIGHT:]
            buffers = round(job.weight_bytes * sum(gathered) * (1 + 1 / job.ranks))
            buffers += FP32_BYTES * numel + (1 if job.is_cuda else 2) * FP32_BYTES * sum(in_flight)
            # On gloo, step() launches the last bucket at once, whatever is in flight.
            in_step = index == len(buckets) - 1 and not job.is_cuda
            buffers += in_step * is_full * FP32_BYTES * numel
            summed = numel if in_step else in_flight[0] if len(in_flight) == MAX_IN_FLIGHT else 0
            if is_full:
                shard = summed // job.ranks
                blocks = 0 if job.is_cuda else min(2 * SUM_BLOCK_NUMEL, shard)
                buffers += FP32_BYTES * (shard + blocks)
            yield Phase("backward", kept, buffers, _activations(job, complete))
        start += numel
        in_flight.append(numel)
        updated += in_flight[:-MAX_IN_FLIGHT]
        del in_flight[:-MAX_IN_FLIGHT]
    yield Phase("update", gradients(job, job.layers + 1), update_buffers(job), 0)


def _activations(job: Job, complete: int) -> int:
    """Return the bytes of activations once ``complete`` elements have gradients."""
    layers = job.layers - max(0, complete - job.head_numel) / job.block.numel
    return max(job.activations.embedding, job.activations.block(layers))


def _buckets(job: Job) -> list[int]:
    """Return the elements of each of ZeRO's buckets, in the order in which gradients arrive.

    A bucket has at least one parameter.
    """
    limit = BUCKET_BYTES // job.weight_bytes
    embedding, *head = job.activations.root_shapes
    buckets = [0]
    for shape in (*head[::-1], *job.activations.block_shapes[::-1] * job.layers, embedding):
        if buckets[-1] and buckets[-1] + prod(shape) > limit:
            buckets.append(0)
        buckets[-1] += prod(shape)
    return buckets


def update_buffers(job: Job) -> int:
    """Return the bytes of buffers of the optimizer's step.

    AdamW_BF16 needs none. ZeRO all-gathers weights through buckets, except in place those that are
    larger than a bucket. torch's AdamW allocates the square roots of all second moments at once on
    CUDA, and on a CPU two tensors for one parameter at a time.
    """
    if not job.is_adamw_bf16:
        shapes = [*job.activations.root_shapes, *job.activations.block_shapes]
        largest = max(_shard_numel(shape, job.ranks) for shape in shapes)
        return job.weight_bytes * (job.shard if job.is_cuda else 2 * largest)
    if job.strategy not in ("zero1", "zero2"):
        return 0
    limit = BUCKET_BYTES // job.weight_bytes
    largest = max((bucket for bucket in _buckets(job) if bucket <= limit), default=0)
    count = min(MAX_IN_FLIGHT, len(_buckets(job)))
    return int(count * largest * (1 + 1 / job.ranks) * job.weight_bytes)
