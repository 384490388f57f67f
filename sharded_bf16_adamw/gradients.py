"""The gradients of a step: collected by parameter group, and checked before anything changes."""

from __future__ import annotations

from itertools import repeat
from operator import attrgetter, is_not
from typing import Any

import torch
from torch import Tensor

from .sharding.base import Sharding
from .sharding.stale_params import sharded_after_construction
from .validation import DTYPES, param_name

GroupGrads = tuple[dict[str, Any], list[Tensor], list[Any]]
"""A parameter group, its parameters that have a gradient, and these gradients."""

# Limit on inconclusive searches for replaced parameters: those in which no module has a gradient.
MAX_STALE_CHECKS = 6
STRIDED = frozenset({torch.strided})
_dtype_of, _layout_of = attrgetter("dtype"), attrgetter("layout")


class GradCollector:
    """Collector of one optimizer's gradients, as its sharding strategy returns them."""

    def __init__(self, sharding: Sharding) -> None:
        self._sharding = sharding
        self._stale_checks_left = MAX_STALE_CHECKS

    def collect(self, groups: list[dict[str, Any]]) -> list[GroupGrads]:
        """Return each group's parameters with a gradient, and these gradients.

        Raises:
            RuntimeError: a gradient is sparse, or the model no longer uses the parameters.
            TypeError: a gradient is neither bfloat16 nor float32.
        """
        result: list[GroupGrads] = []
        has_all = True
        for group in groups:
            params, grads = group["params"], self._sharding.grads(group["params"])
            if not all(map(is_not, grads, repeat(None))):
                has_all = False
                params = [p for p, grad in zip(params, grads, strict=True) if grad is not None]
                grads = [grad for grad in grads if grad is not None]
            if not (
                DTYPES.issuperset(map(_dtype_of, grads))
                and STRIDED.issuperset(map(_layout_of, grads))
            ):
                check_grads(group)
            result.append((group, params, grads))
        if not has_all:
            self._check_stale_params(groups)
        return result

    def _check_stale_params(self, groups: list[dict[str, Any]]) -> None:
        """Raise RuntimeError if parameters have no gradient because the model replaced them."""
        if not self._stale_checks_left:
            return
        params = [param for group in groups for param in group["params"]]
        is_stale = sharded_after_construction(params)
        if is_stale:
            raise RuntimeError(
                "the optimizer was built before fully_shard or parallelize_module or "
                "FullyShardedDataParallel, so it holds parameters that the model no longer uses "
                "and that would not be trained; build AdamW_BF16(model.parameters()) afterwards"
            )
        # The check walks all objects of the process, so it does not run in every step.
        self._stale_checks_left = 0 if is_stale is False else self._stale_checks_left - 1


def check_grads(group: dict[str, Any]) -> None:
    """Raise RuntimeError or TypeError for the group's first unusable gradient."""
    for index, param in enumerate(group["params"]):
        if param.grad is None:
            continue
        if param.grad.layout != torch.strided:
            raise RuntimeError(
                "AdamW_BF16 does not support sparse gradients, but parameter "
                f"{param_name(group, index)} has one; build its layer with sparse=False"
            )
        if param.grad.dtype not in DTYPES:
            raise TypeError(
                f"the gradient of parameter {param_name(group, index)} is {param.grad.dtype}; it "
                "must be bfloat16 or float32"
            )


def wrong_numel(name: str, grad_numel: int, param_numel: int) -> RuntimeError:
    """Return the error for a gradient whose number of elements differs from its parameter's."""
    return RuntimeError(
        f"the gradient of parameter {name} has {grad_numel} elements, but the parameter has "
        f"{param_numel}: the parameter was resized after the backward pass; call zero_grad() when "
        "you resize a parameter"
    )
