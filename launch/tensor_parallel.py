"""Tensor and sequence parallelism for the model of ``model.py``.

Each rank has some heads of every attention, some hidden units of every feed-forward network and some rows of the embedding and of the
head. Between them, where all ranks would compute the same, each has some positions of the sequence, so the gains of the norms get
their gradients as partial sums.
"""

from __future__ import annotations

from typing import Any

from data import UsageError
from model import GPT, VOCABULARY
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


def parallelize(model: GPT, mesh: DeviceMesh) -> None:
    """Shard every parameter over a one-dimensional mesh; the gains of the norms are replicated. Activations are cut along dimension 1.

    Raises:
        UsageError: heads, hidden units, byte values or (at the first batch) positions do not divide into the mesh's ranks.
    """
    ranks = mesh.size()
    for what, number in (
        ("heads", model.config.heads),
        ("hidden units", model.config.ffn),
        ("byte values", VOCABULARY),
    ):
        if number % ranks:
            raise UsageError(
                f"the model's {number} {what} do not divide into {ranks} tensor-parallel ranks: use fewer or another --preset."
            )

    def check_positions(module: nn.Module, args: tuple[Tensor]) -> None:
        positions = args[0].shape[1]
        if positions % ranks:
            raise UsageError(
                f"--seq-len {positions} does not divide into {ranks} tensor-parallel ranks: use a multiple of {ranks}."
            )

    model.register_forward_pre_hook(check_positions)
    positions, whole = Shard(1), Replicate()
    outer: dict[str, Any] = {
        "embedding": RowwiseParallel(input_layouts=whole, output_layouts=positions),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=positions, output_layouts=whole),
    }
    inner: dict[str, Any] = {
        "attention_norm": SequenceParallel(),
        "attention": PrepareModuleInput(
            input_layouts=(positions, None), desired_input_layouts=(whole, None)
        ),
        "attention.query": ColwiseParallel(),
        "attention.key": ColwiseParallel(),
        "attention.value": ColwiseParallel(),
        "attention.output": RowwiseParallel(output_layouts=positions),
        "ffn_norm": SequenceParallel(),
        "ffn": PrepareModuleInput(input_layouts=(positions,), desired_input_layouts=(whole,)),
        "ffn.gate": ColwiseParallel(),
        "ffn.up": ColwiseParallel(),
        "ffn.down": RowwiseParallel(output_layouts=positions),
    }
    parallelize_module(model, mesh, outer)
    for block in model.blocks:
        parallelize_module(block, mesh, inner)
