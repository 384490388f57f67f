"""Build an optimizer's sharding strategy from its arguments."""

from __future__ import annotations

from .base import Sharding
from .experts import ExpertsApart
from .model_parallel import ModelParallel
from .torch_managed import TorchManaged
from .zero.config import ZeRO


def build_sharding(
    zero: ZeRO | None, parallel: ModelParallel | None, in_backward: bool = False
) -> Sharding:
    """Return the strategy for the optimizer's ``sharding`` and ``model_parallel``.

    Args:
        zero: ``sharding`` of the optimizer.
        parallel: ``model_parallel`` of the optimizer.
        in_backward: ``step_in_backward`` of the optimizer, for ZeRO stage 2.

    Raises:
        ValueError: an argument has another type.
    """
    if not isinstance(zero, ZeRO | None):
        raise ValueError(
            f"Invalid sharding: {zero!r}; give ZeRO(mesh), or None to leave sharding to torch "
            "(DDP, FSDP, DTensor)"
        )
    if not isinstance(parallel, ModelParallel | None):
        raise ValueError(
            f"Invalid model_parallel: {parallel!r}; give ModelParallel(pp=...), or None if all "
            "ranks hold the same model"
        )
    if zero is None:
        return TorchManaged()
    if parallel is not None and parallel.experts:
        return ExpertsApart(zero.start(), parallel)
    return zero.start(in_backward)
