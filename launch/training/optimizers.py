"""The optimizers that ``train.py`` trains with and ``compare.py`` compares."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer with decoupled weight decay.

    Attributes:
        label: name in tables.
        weight_dtype: dtype of the parameters. The forward pass is always in bfloat16.
        path: module and class; None for AdamW_BF16, which takes more arguments.
        package: the distribution to install.
        needs_cuda: True if there are no CPU kernels.
        options: arguments beside ``lr``, ``betas`` and ``weight_decay``.
    """

    label: str
    weight_dtype: torch.dtype
    path: str | None = None
    package: str = "torch"
    needs_cuda: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def make(self, groups: list[dict[str, Any]], **common: Any) -> torch.optim.Optimizer:
        """Build the optimizer of these parameter groups."""
        assert self.path is not None
        module, _, name = self.path.rpartition(".")
        cls: Any = getattr(importlib.import_module(module), name)
        optimizer: torch.optim.Optimizer = cls(groups, **self.options, **common)
        return optimizer

    def unavailable_reason(self, has_cuda: bool) -> str | None:
        """Return a clause that tells why the optimizer cannot be used, or None if it can."""
        if self.needs_cuda and not has_cuda:
            return "runs on CUDA only"
        if importlib.util.find_spec((self.path or "torch").partition(".")[0]) is None:
            return f"needs the package {self.package}, which is not installed"
        return None


_BF16, _FP32 = torch.bfloat16, torch.float32
OPTIMIZERS = {
    "bf16": OptimizerSpec("AdamW_BF16 (ours)", _BF16),
    "torch-fp32": OptimizerSpec("torch.optim.AdamW, fp32 weights", _FP32, "torch.optim.AdamW"),
    "torch-bf16": OptimizerSpec("torch.optim.AdamW, bf16 weights", _BF16, "torch.optim.AdamW"),
    "optimi": OptimizerSpec(
        "torch-optimi AdamW, bf16 + Kahan sum", _BF16, "optimi.AdamW", "torch-optimi"
    ),
    "flashoptim": OptimizerSpec(
        "FlashAdamW, 24-bit weights, 8-bit moments",
        _BF16,
        "flashoptim.FlashAdamW",
        "flashoptim",
        needs_cuda=True,
    ),
    "torchao": OptimizerSpec(
        "torchao AdamW8bit, bf16 weights, stochastic rounding",
        _BF16,
        "torchao.optim.AdamW8bit",
        "torchao",
        options={"bf16_stochastic_round": True},
    ),
}
