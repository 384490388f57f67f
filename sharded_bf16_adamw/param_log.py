"""Log lines about an optimizer's parameters: their number and bytes, and unwanted float32."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from .sharding.base import Sharding
from .sharding.dtensor import to_local

logger = logging.getLogger("sharded_bf16_adamw")


class ParamLog:
    """The log lines about the parameters of one optimizer."""

    def __init__(self, sharding: Sharding) -> None:
        self._sharding = sharding
        # number of parameters added as float32; None after a step, or in an unpickled optimizer
        self._num_float32: int | None = None

    def start(self, params: list[Tensor]) -> None:
        """Log the constructor's parameters. Warn if none is bfloat16: the model is unconverted."""
        self._log(params)
        self._num_float32 = _count_float32(params)
        if params and self._num_float32 == len(params):
            logger.warning(
                "none of the %d parameters of AdamW_BF16 is bfloat16, so it trains in float32 and "
                "takes 12 bytes for each instead of 8; convert the model with "
                "model.to(torch.bfloat16) before you build the optimizer (under FSDP, "
                "accelerate converts it back unless mixed_precision='no'), or use "
                "torch.optim.AdamW if you want float32",
                len(params),
            )

    def add(self, params: list[Tensor]) -> None:
        """Log the parameters of a later group."""
        self._log(params)
        if self._num_float32 is not None:
            self._num_float32 += _count_float32(params)

    def before_step(self, groups: list[dict[str, Any]]) -> None:
        """Warn once, before the first step, if other code has converted parameters to float32."""
        if self._num_float32 is None:
            return
        params = [param for group in groups for param in group["params"]]
        converted = _count_float32(params) - self._num_float32
        self._num_float32 = None
        if converted > 0:
            logger.warning(
                "%d of the %d parameters of AdamW_BF16 were bfloat16 when it was built and are "
                "float32 now, so they train in float32 and take 12 bytes each instead of 8; keep "
                "other code from converting them (under FSDP, accelerate does unless "
                "mixed_precision='no')",
                converted,
                len(params),
            )

    def _log(self, params: list[Tensor]) -> None:
        """Log at INFO the number of new parameters by dtype, and this rank's bytes."""
        if not logger.isEnabledFor(logging.INFO):
            return
        weights = sum(to_local(param).nbytes for param in params)
        shards = [to_local(self._sharding.shard(param)) for param in params if param.requires_grad]
        states = sum((3 if s.dtype == torch.bfloat16 else 2) * s.nbytes + 4 for s in shards)
        num_float32 = _count_float32(params)
        logger.info(
            "AdamW_BF16 has %d bfloat16 and %d float32 parameters; this rank holds %s bytes of "
            "their weights, and will hold %s bytes of their states once each trainable one has had "
            "a gradient",
            len(params) - num_float32,
            num_float32,
            f"{weights:,}",
            f"{states:,}",
        )


def _count_float32(params: list[Tensor]) -> int:
    return sum(param.dtype == torch.float32 for param in params)
