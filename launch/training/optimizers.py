"""The optimizers that ``train.py`` trains with and ``compare.py`` compares."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Groups = list[dict[str, Any]]
Make = Callable[..., torch.optim.Optimizer]


def _torch_adamw(groups: Groups, **common: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, **common)


def _optimi(groups: Groups, **common: Any) -> torch.optim.Optimizer:
    from optimi import AdamW

    return AdamW(groups, **common)


def _flashoptim(groups: Groups, **common: Any) -> torch.optim.Optimizer:
    from flashoptim import FlashAdamW

    return FlashAdamW(groups, **common)


def _torchao(groups: Groups, **common: Any) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(groups, bf16_stochastic_round=True, **common)


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer with decoupled weight decay.

    Attributes:
        label: its name in tables.
        weight_dtype: of the parameters; the forward pass is in bfloat16 either way.
        make: takes parameter groups, ``lr``, ``betas`` and ``weight_decay``; None for AdamW_BF16,
            which takes more.
        module: what must be installed.
        package: the name of its distribution.
        needs_cuda: it has no CPU kernels.
    """

    label: str
    weight_dtype: torch.dtype
    make: Make | None = None
    module: str = "torch"
    package: str = "torch"
    needs_cuda: bool = False

    def unavailable_reason(self, has_cuda: bool) -> str | None:
        """Return why it cannot be used, in one clause, or None."""
        if self.needs_cuda and not has_cuda:
            return "runs on CUDA only"
        if importlib.util.find_spec(self.module) is None:
            return f"needs the package {self.package}, which is not installed"
        return None


_BF16, _FP32 = torch.bfloat16, torch.float32
OPTIMIZERS = {
    "bf16": OptimizerSpec("AdamW_BF16 (ours)", _BF16),
    "torch-fp32": OptimizerSpec("torch.optim.AdamW, fp32 weights", _FP32, _torch_adamw),
    "torch-bf16": OptimizerSpec("torch.optim.AdamW, bf16 weights", _BF16, _torch_adamw),
    "optimi": OptimizerSpec(
        "torch-optimi AdamW, bf16 + Kahan sum", _BF16, _optimi, "optimi", "torch-optimi"
    ),
    "flashoptim": OptimizerSpec(
        "FlashAdamW, 24-bit weights, 8-bit moments",
        _BF16,
        _flashoptim,
        "flashoptim",
        "flashoptim",
        needs_cuda=True,
    ),
    "torchao": OptimizerSpec(
        "torchao AdamW8bit, bf16 weights, stochastic rounding",
        _BF16,
        _torchao,
        "torchao",
        "torchao",
    ),
}
