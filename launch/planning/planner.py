"""Plans of a run: memory and traffic of each strategy, and the cheapest that fits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from training.build import WEIGHT_DTYPES
from training.errors import UsageError
from training.strategies import STRATEGIES

from planning.activation_memory import measure_activation_memory
from planning.memory import Job, Part, Phase, phases, states, weights
from planning.models import Shape
from planning.traffic import sent_bytes


@dataclass(frozen=True)
class Options:
    """Options of a plan besides model, ranks and strategy.

    Attributes:
        optimizer: as ``train.py --optimizer``.
        batch_size: sequences of a step, over all ranks; None for one micro-batch on each rank.
        micro_batch: sequences of a forward pass on a rank.
        seq_len: tokens of a sequence.
        recompute: checkpoint the activations of each layer.
        in_backward: AdamW_BF16's ``step_in_backward``.
        device: "cuda" or "cpu".
    """

    optimizer: str = "bf16"
    batch_size: int | None = None
    micro_batch: int = 1
    seq_len: int = 4096
    recompute: bool = False
    in_backward: bool = False
    device: str = "cuda"


@dataclass(frozen=True)
class Plan:
    """Memory and traffic of a rank.

    Attributes:
        strategy: a name in ``STRATEGIES``.
        micro_batches: number of micro-batches in a step, ``train.py --grad-accum``.
        weights: bytes of weights, which stay between steps.
        states: bytes of optimizer states, which stay between steps.
        peak: the phase of a step that takes most memory.
        sent_bytes: bytes that a rank sends in a step.
    """

    strategy: str
    micro_batches: int
    weights: int
    states: int
    peak: Phase
    sent_bytes: int

    @property
    def total(self) -> int:
        return self.weights + self.states + self.peak.total


def plan(shape: Shape, world_size: int, strategy: str, options: Options) -> Plan:
    """Plan a run; no process group may be initialized.

    Raises:
        UsageError: the strategy cannot run with this number of ranks, these sizes or this
            optimizer.

    Examples:
        >>> from planning.models import LLAMA_8B
        >>> plan(LLAMA_8B, 8, "fsdp2", Options()).states  # 6 bytes a parameter, 8 ranks
        6022697100
    """
    job = make_job(shape, world_size, strategy, options)
    peak = max(phases(job), key=lambda phase: phase.total)
    return Plan(
        strategy=strategy,
        micro_batches=job.micro_batches,
        weights=weights(job),
        states=states(job),
        peak=peak,
        sent_bytes=sent_bytes(job),
    )


def make_job(shape: Shape, world_size: int, strategy: str, options: Options) -> Job:
    """Return the inputs of the formulas; raises as :func:`plan` does."""
    mesh_shape = STRATEGIES[strategy].mesh_shape(world_size)
    tensor_ranks = mesh_shape.get("tensor", 1)
    data_ranks = world_size // tensor_ranks
    _check(shape, world_size, strategy, tensor_ranks, options)
    batch_size = options.batch_size or world_size * options.micro_batch
    divisor = data_ranks * options.micro_batch
    if batch_size % divisor:
        raise UsageError(
            f"--batch-size {batch_size} is not a multiple of {divisor} = {data_ranks} rank(s) x "
            f"--micro-batch {options.micro_batch}: use a multiple of {divisor}."
        )
    dtype = WEIGHT_DTYPES[options.optimizer]
    activations = measure_activation_memory(
        shape,
        dtype,
        batch=options.micro_batch,
        seq_len=options.seq_len,
        tensor_ranks=tensor_ranks,
        recompute=options.recompute,
        device=options.device,
    )
    sharded = prod(n for name, n in mesh_shape.items() if name not in ("replicate", "tensor"))
    ranks = 1 if strategy in ("single", "ddp", "tp") else sharded
    # The root is the embedding, the last norm and the head; a tied embedding is the head.
    head_shapes = activations.root_shapes[0 if shape.is_tied else 1 :]
    return Job(
        strategy=strategy,
        layers=shape.layers,
        ranks=ranks,
        data_ranks=data_ranks,
        block=Part.of(activations.block_shapes, ranks),
        root=Part.of(activations.root_shapes, ranks),
        head_numel=sum(map(prod, head_shapes)),
        activations=activations,
        weight_bytes=dtype.itemsize,
        is_adamw_bf16=options.optimizer == "bf16",
        micro_batches=batch_size // divisor,
        in_backward=options.in_backward,
        is_cuda=options.device == "cuda",
    )


def _check(
    shape: Shape, world_size: int, strategy: str, tensor_ranks: int, options: Options
) -> None:
    if strategy == "single" and world_size > 1:
        raise UsageError(
            f"--strategy single runs on one process, not {world_size}: use --world-size 1 or "
            "another --strategy."
        )
    if strategy in ("zero1", "zero2") and options.optimizer != "bf16":
        raise UsageError(
            f"--strategy {strategy} shards --optimizer bf16 only, not {options.optimizer}: "
            "use --strategy ddp or fsdp2."
        )
    if options.in_backward and (
        strategy in ("ddp", "fsdp1", "zero1") or options.optimizer != "bf16"
    ):
        raise UsageError(
            f"--step-in-backward does not work with --strategy {strategy} "
            f"--optimizer {options.optimizer}: docs/step_in_backward.md lists what it works with."
        )
    for what, number in (
        ("heads", shape.heads),
        ("key-value heads", shape.kv_heads),
        ("hidden units", shape.ffn),
        ("vocabulary entries", shape.vocab_size),
        ("positions of a sequence", options.seq_len),
    ):
        if number % tensor_ranks:
            raise UsageError(
                f"the {number} {what} are not divisible by {tensor_ranks} tensor-parallel ranks: "
                "use fewer ranks."
            )


def plan_all(
    shape: Shape, world_size: int, strategies: Iterable[str], options: Options
) -> tuple[list[Plan], dict[str, str]]:
    """Return the plans of the strategies that can run, and why each of the others cannot."""
    plans, refused = [], {}
    for strategy in strategies:
        try:
            plans.append(plan(shape, world_size, strategy, options))
        except UsageError as error:
            refused[strategy] = str(error)
    return plans, refused


def cheapest(plans: Iterable[Plan], memory: float) -> Plan | None:
    """Return the plan that sends least among those that take at most ``memory`` bytes, if any.

    Among plans that send equally many bytes, return the one that takes least memory.
    """
    fitting = [plan for plan in plans if plan.total <= memory]
    return min(fitting, key=lambda plan: (plan.sent_bytes, plan.total), default=None)
