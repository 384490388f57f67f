"""Conversion of a model to bfloat16 that keeps the rounding errors as corrections."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .bf16_split import split
from .names import clean_fqn, has_fsdp1, named_tensors, unwrap
from .param_groups import compile_pattern
from .sharding.dtensor import to_local


def to_bf16_(model: nn.Module, keep_fp32: str | None) -> dict[Tensor, Tensor]:
    """Convert a model in place, as ``model.bfloat16()`` does, and drop its gradients.

    Args:
        model: the module, plain or sharded by ``fully_shard`` or tensor parallelism.
        keep_fp32: regular expression; parameters and buffers whose FQN it matches, anywhere in the
            name, keep their dtype.

    Returns:
        The bfloat16 correction of each converted parameter, sharded like the parameter. Parameters
        stay the same objects.

    Raises:
        ValueError: the model cannot be converted, or ``keep_fp32`` matches nothing. Nothing is
            changed.
    """
    plain = unwrap(model)
    if has_fsdp1(model) or any(isinstance(m, DistributedDataParallel) for m in model.modules()):
        raise ValueError(
            "the model is wrapped by DistributedDataParallel or FullyShardedDataParallel, whose "
            "buffers are already laid out for float32; call from_fp32() before "
            "DistributedDataParallel, and use fully_shard (FSDP2) in place of "
            "FullyShardedDataParallel"
        )
    kept: set[Tensor] = set()
    if keep_fp32 is not None:
        pattern = compile_pattern(keep_fp32)
        named = named_tensors(plain)
        kept = {tensor for name, tensor in named if pattern.search(clean_fqn(plain, name))}
        if not kept:
            raise ValueError(
                f"keep_fp32={keep_fp32!r} matches no parameter or buffer; correct it or leave it "
                "out"
            )
    if not any(param.dtype == torch.float32 and param not in kept for param in model.parameters()):
        raise ValueError(
            "no parameter is left to convert from float32: from_fp32() rounds the model itself, so "
            "pass it as it was before model.bfloat16()"
        )
    corrections: dict[Tensor, Tensor] = {}

    def convert(tensor: Tensor) -> Tensor:
        if tensor in kept or not tensor.is_floating_point() or tensor.dtype == torch.bfloat16:
            return tensor
        if isinstance(tensor, nn.Parameter):
            correction = corrections[tensor] = torch.zeros_like(tensor, dtype=torch.bfloat16)
            to_local(correction).copy_(split(to_local(tensor).float())[1])
        return tensor.to(torch.bfloat16)

    model.zero_grad(set_to_none=True)
    model._apply(convert)
    return corrections
