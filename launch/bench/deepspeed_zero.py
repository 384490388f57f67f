"""DeepSpeed's ZeRO-2 as a setup of ``benchmark.py loop``: bf16 weights with fp32 masters.

It also runs on CPUs with gloo, where its first start compiles an operator.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

PACKAGE = "deepspeed"
BUCKET_BYTES = 25 * 2**20  # as DDP's and ours; DeepSpeed's own default is 1 GB


class EngineStep:
    """The optimizer interface of a DeepSpeed engine, which is itself the wrapped model."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def step(self) -> None:
        self._engine.step()

    def zero_grad(self) -> None:
        """Do nothing, since the engine's step has freed the gradients."""

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        """Moments and fp32 master weights of this rank's shards, each one flat tensor."""
        optimizer = self._engine.optimizer.optimizer
        return {master: {**state, "master": master} for master, state in optimizer.state.items()}


def build(model: nn.Module, options: dict[str, Any]) -> tuple[nn.Module, EngineStep]:
    """Return the engine, which is the wrapped model, and its optimizer.

    Args:
        model: a model with bfloat16 weights, the same on every rank.
        options: arguments of ``torch.optim.AdamW``.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    params = list(model.parameters())
    bucket = min(BUCKET_BYTES // 2, sum(p.numel() for p in params))  # elements, all allocated
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(params, **options)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, EngineStep(engine)
