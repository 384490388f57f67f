"""Tensor and sequence parallelism for the model of ``model.py``.

The attention heads, the hidden units of the feed-forward networks, and the vocabulary dimension of
the embedding and the output head are sharded. Between these modules activations are sharded along
the sequence, so each rank's gradient of a norm's weight is a partial sum, over its own positions.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from training.errors import UsageError
from training.model import GPT


def parallelize(model: GPT, mesh: DeviceMesh) -> None:
    """Shard all parameters over a one-dimensional mesh, except the weights of norms.

    Raises:
        UsageError: the number of heads, hidden units, token ids or (at the first batch) sequence
            positions is not divisible by the number of ranks.
    """
    ranks = mesh.size()
    for what, number in (
        ("heads", model.config.heads),
        ("hidden units", model.config.ffn),
        ("token ids", model.config.vocab_size),
    ):
        if number % ranks:
            raise UsageError(
                f"the model's {number} {what} are not divisible by {ranks} tensor-parallel ranks: "
                "use fewer ranks or another --preset."
            )

    def check_positions(module: nn.Module, args: tuple[Tensor]) -> None:
        positions = args[0].shape[1]
        if positions % ranks:
            raise UsageError(
                f"--seq-len {positions} is not divisible by {ranks} tensor-parallel ranks: "
                f"use a multiple of {ranks}."
            )

    model.register_forward_pre_hook(check_positions)
    sharded, replicated = Shard(1), Replicate()  # activations are sharded by position
    outer: dict[str, Any] = {
        "embedding": RowwiseParallel(input_layouts=replicated, output_layouts=sharded),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=sharded, output_layouts=replicated),
    }
    inner: dict[str, Any] = {
        "attention_norm": SequenceParallel(),
        "attention": PrepareModuleInput(
            input_layouts=(sharded, None), desired_input_layouts=(replicated, None)
        ),
        "attention.query": ColwiseParallel(),
        "attention.key": ColwiseParallel(),
        "attention.value": ColwiseParallel(),
        "attention.output": RowwiseParallel(output_layouts=sharded),
        "ffn_norm": SequenceParallel(),
        "ffn": PrepareModuleInput(input_layouts=(sharded,), desired_input_layouts=(replicated,)),
        "ffn.gate": ColwiseParallel(),
        "ffn.up": ColwiseParallel(),
        "ffn.down": RowwiseParallel(output_layouts=sharded),
    }
    parallelize_module(model, mesh, outer)
    for block in model.blocks:
        parallelize_module(block, mesh, inner)
