"""Checks of parameters under ZeRO. A problem on any rank becomes an error on every rank."""

from __future__ import annotations

import gc
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from ...torch_types import is_dtensor
from ..fsdp1 import is_flattened
from ..replica_checksum import checksums, text_checksum
from .host_collectives import HostCollectives
from .param import ParamSpec, ZeroParam


def param_problem(param: Tensor, name: str, mesh: DeviceMesh) -> str | None:
    """Return why ZeRO cannot shard the parameter, or None."""
    if is_dtensor(param) or is_flattened(param):
        kind = (
            "a DTensor (of fully_shard or parallelize_module)"
            if is_dtensor(param)
            else "a part of FullyShardedDataParallel"
        )
        return (
            f"parameter {name} is {kind}, which is sharded already; leave out sharding= there, "
            "ZeRO is for replicated models"
        )
    if param.device.type != mesh.device_type:
        return (
            f"parameter {name} is on {param.device} but the mesh of ZeRO is for "
            f"{mesh.device_type}; move the model before you build the optimizer"
        )
    return None


def changed_spec_problem(zero_param: ZeroParam) -> str | None:
    """Return which property of the parameter has changed since it was added, or None."""
    spec = ParamSpec.of(zero_param.param)
    if spec == zero_param.spec:
        return None
    return (
        f"parameter {zero_param.name} was {zero_param.spec} and is now {spec}; build the "
        "optimizer after all changes to the model"
    )


def grad_problem(grad: Tensor) -> str | None:
    """Return why a gradient cannot be used, or None."""
    if grad.layout != torch.strided:
        return "is sparse, which AdamW_BF16 does not support; build its layer with sparse=False"
    if grad.dtype not in (torch.bfloat16, torch.float32):
        return f"is {grad.dtype}; it must be bfloat16 or float32"
    return None


def check_same_parameters(
    collectives: HostCollectives, params: list[Tensor], names: list[str]
) -> None:
    """Raise ValueError on all ranks unless they have the same parameters in order. Collective."""
    signatures = [
        f"{name} {tuple(p.shape)} {p.dtype} {'' if p.is_contiguous() else p.stride()}"
        for name, p in zip(names, params, strict=True)
    ]
    if all(collectives.are_equal([len(params), text_checksum("\n".join(signatures))])):
        return
    first, *others = collectives.all_gather_object(signatures)
    for rank, other in zip(collectives.ranks[1:], others, strict=True):
        for index in range(max(len(first), len(other))):
            a, b = [row[index] if index < len(row) else "none" for row in (first, other)]
            if a != b:
                raise ValueError(
                    f"the parameters given to ZeRO differ between ranks: number {index} is {a} on "
                    f"rank {collectives.ranks[0]} but {b} on rank {rank}; build the same model and "
                    "the same groups in the same order on every rank"
                )


def find_differing(collectives: HostCollectives, tensors: Iterable[Tensor | None]) -> list[bool]:
    """Return for each tensor whether its bits differ between ranks. Collective."""
    tensors = list(tensors)
    present = iter(checksums([tensor for tensor in tensors if tensor is not None]))
    numbers = [0 if tensor is None else next(present) for tensor in tensors]
    return [not equal for equal in collectives.are_equal(numbers)]


def is_wrapped_by_ddp(params: Iterable[Tensor]) -> bool:
    """Return whether a live DistributedDataParallel holds one of the parameters."""
    ids = {id(param) for param in params}
    return any(
        id(p) in ids
        for ddp in gc.get_objects()
        if issubclass(type(ddp), DistributedDataParallel)
        for p in ddp.parameters()
    )


class ParamOwners:
    """The modules that hold the parameters, to detect a parameter that was replaced in a module."""

    def __init__(self, zero_params: Iterable[ZeroParam]) -> None:
        by_id = {id(zero_param.param): zero_param for zero_param in zero_params}
        self._owners = [
            (parameters, name, by_id[id(param)])
            for module in gc.get_objects()
            # isinstance would run code of proxies and lazy modules
            if issubclass(type(module), nn.Module)
            for parameters in [module.__dict__.get("_parameters") or {}]
            for name, param in parameters.items()
            if id(param) in by_id
        ]

    def replaced_problem(self) -> str | None:
        """Return which parameter has been replaced since the optimizer was built, or None."""
        for parameters, name, zero_param in self._owners:
            if parameters.get(name) is not zero_param.param and parameters.get(name) is not None:
                return (
                    f"parameter {zero_param.name} has been replaced in its module by another one, "
                    "which the optimizer does not train; build the optimizer after all changes to "
                    "the model"
                )
        return None
