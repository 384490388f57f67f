"""What can be wrong with parameters under ZeRO. Every finding is an error on every rank."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterable

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ..checksum import checksums
from ..fsdp1 import is_flattened
from .param import Rows
from .reduce_scatter import Agreement


def check_replicated(param: Tensor, name: str, mesh: DeviceMesh) -> str | None:
    """Why the parameter cannot be sharded by ZeRO, or None."""
    if isinstance(param, DTensor) or is_flattened(param):
        kind = (
            "a DTensor (of fully_shard or parallelize_module)"
            if isinstance(param, DTensor)
            else "a part of FullyShardedDataParallel"
        )
        return f"parameter {name} is {kind}, which is sharded already; leave out sharding= there, ZeRO is for replicated models"
    if param.device.type != mesh.device_type:
        return f"parameter {name} is on {param.device} but the mesh of ZeRO is for {mesh.device_type}; move the model before the optimizer"
    return None


def check_same_parameters(agreement: Agreement, params: list[Tensor], names: list[str]) -> None:
    """Raise ValueError on every rank unless all have the same parameters in the same order. Collective."""
    signatures = [
        f"{name} {tuple(p.shape)} {p.dtype} {'' if p.is_contiguous() else p.stride()}"
        for name, p in zip(names, params, strict=True)
    ]
    digest = int.from_bytes(
        hashlib.blake2b("\n".join(signatures).encode(), digest_size=7).digest(), "big"
    )
    if all(agreement.are_equal([len(params), digest])):
        return
    everyones = agreement.everyones(signatures)
    for rank, theirs in zip(agreement.ranks, everyones, strict=True):
        if theirs == everyones[0]:
            continue
        for index in range(max(len(theirs), len(everyones[0]))):
            a, b = [row[index] if index < len(row) else "none" for row in (everyones[0], theirs)]
            if a != b:
                raise ValueError(
                    f"the parameters given to ZeRO differ between ranks: number {index} is {a} on rank {agreement.ranks[0]} but {b} on "
                    f"rank {rank}; build the same model and the same groups in the same order on every rank"
                )


def differing(agreement: Agreement, tensors: Iterable[Tensor | None]) -> list[bool]:
    """Which of the tensors have not the same bits on every rank. Collective."""
    tensors = list(tensors)
    numbers = iter(checksums([x for x in tensors if x is not None]))
    return [
        not equal
        for equal in agreement.are_equal([0 if x is None else next(numbers) for x in tensors])
    ]


def wrapped_by_ddp(params: Iterable[Tensor]) -> bool:
    """Whether a live DistributedDataParallel holds one of the parameters: it would reduce the same gradients again."""
    ours = {id(param) for param in params}
    return any(
        id(p) in ours
        for ddp in gc.get_objects()
        if issubclass(type(ddp), DistributedDataParallel)
        for p in ddp.parameters()
    )


class Owners:
    """Which modules hold the parameters, to notice when one gets another in its place."""

    def __init__(self, all_rows: Iterable[Rows]) -> None:
        by_id = {id(rows.param): rows for rows in all_rows}
        self._places = [
            (parameters, name, by_id[id(param)])
            for module in gc.get_objects()
            if issubclass(
                type(module), nn.Module
            )  # isinstance would run code of proxies and lazy modules
            for parameters in [module.__dict__.get("_parameters") or {}]
            for name, param in parameters.items()
            if id(param) in by_id
        ]

    def replaced(self) -> str | None:
        """What to say where a module has another parameter now than when the optimizer was built, or None."""
        for parameters, name, rows in self._places:
            if parameters.get(name) is not rows.param and parameters.get(name) is not None:
                return (
                    f"parameter {rows.name} has been replaced in its module by another one, which the optimizer does not train; "
                    "build the optimizer after all changes to the model"
                )
        return None
