"""Build an optimizer's sharding strategy from its arguments."""

from __future__ import annotations

from .base import Sharding
from .experts import RankLocalExperts
from .model_parallel import ModelParallel
from .torch_managed import TorchManaged
from .zero.config import ZeRO


def build_sharding(
    sharding: ZeRO | None,
    model_parallel: ModelParallel | None,
    step_in_backward: bool = False,
) -> Sharding:
    """Return the strategy for these arguments of the optimizer.

    Raises:
        ValueError: an argument has the wrong type.
    """
    if not isinstance(sharding, ZeRO | None):
        raise ValueError(
            f"Invalid sharding: {sharding!r}; give ZeRO(mesh), or None to leave sharding to torch "
            "(DDP, FSDP, DTensor)"
        )
    if not isinstance(model_parallel, ModelParallel | None):
        raise ValueError(
            f"Invalid model_parallel: {model_parallel!r}; give ModelParallel(pp=...), or None if "
            "all ranks hold the same model"
        )
    if sharding is None:
        return TorchManaged()
    if model_parallel is not None and model_parallel.experts:
        # check_zero_options() has rejected step_in_backward with experts.
        return RankLocalExperts(sharding.build_stage(), model_parallel)
    return sharding.build_stage(step_in_backward)
