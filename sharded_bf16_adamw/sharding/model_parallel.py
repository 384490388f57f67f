"""Ranks that hold different parameters: pipeline stages and rank-local experts.

A DTensor says over which ranks it is spread. A plain tensor does not: it may be a replica of what other ranks hold, or a parameter of
this rank alone. :class:`ModelParallel` tells the two apart, for the gradient norm, the non-finite guard and checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

GroupLike = dist.ProcessGroup | DeviceMesh


@dataclass(frozen=True, eq=False)
class ModelParallel:
    """Process groups over whose ranks parameters differ: ``AdamW_BF16(params, model_parallel=ModelParallel(pp=mesh["pp"]))``.

    Name only what DTensors do not say. FSDP2, HSDP and tensor parallelism by DTensor need no entry; they, DDP and
    ``sharding=ZeRO(mesh["dp"])`` may be used inside each pipeline stage. Groups are process groups or one-dimensional ``DeviceMesh``.

    Args:
        pp: the pipeline, as torchtitan's ``pp_mesh``: every parameter belongs to this rank's stage, whatever shards it there. Give one
            optimizer all stages that a rank holds. A weight that two stages hold (a tied embedding) counts twice in the norm.
        ep: the ranks over which ``experts`` differ: expert parallelism with plain tensors (Megatron's ``allreduce=False`` parameters).
        experts: the modules that this rank alone of ``ep`` holds, or single parameters. Name an ``nn.ModuleList`` of experts itself: its
            modules are numbered from 0 on each rank and get numbers of the whole group in checkpoints, so that they load on another
            number of ranks. The names of what is in other modules, and of single parameters, get the rank in ``ep`` appended.
            ``sharding=ZeRO(...)`` leaves experts to their rank: it neither shards their states nor averages their gradients.
        dp: the ranks that hold replicas of the plain parameters that are no experts, such as DistributedDataParallel's. The guard then
            skips a step on all of them or on none, and ``check_replicas`` compares them.
        edp: likewise the ranks that hold replicas of the experts.

    Raises:
        ValueError: a group is none, this rank is not in it, or ``experts`` is given without ``ep``.

    Example:
        >>> from sharded_bf16_adamw import ModelParallel
        >>> ModelParallel()
        ModelParallel(pp=None, ep=None, experts=(), dp=None, edp=None)
    """

    pp: GroupLike | None = None
    ep: GroupLike | None = None
    experts: nn.Module | Tensor | Iterable[nn.Module | Tensor] = ()
    dp: GroupLike | None = None
    edp: GroupLike | None = None

    def __post_init__(self) -> None:
        experts = (
            (self.experts,)
            if isinstance(self.experts, (nn.Module, Tensor))
            else tuple(self.experts)
        )
        object.__setattr__(self, "experts", experts)
        wrong = next(
            (value for value in experts if not isinstance(value, (nn.Module, Tensor))), None
        )
        if wrong is not None:
            raise ValueError(f"Invalid experts: {wrong!r}; give modules or parameters")
        for name, value in (("pp", self.pp), ("ep", self.ep), ("dp", self.dp), ("edp", self.edp)):
            _check_group(name, value)
        if self.ep is None and experts:
            raise ValueError(
                "experts are given without ep; name the process group or mesh dimension over which they differ"
            )

    @property
    def pp_group(self) -> dist.ProcessGroup | None:
        """The process group of ``pp``; None where there is none, or this rank alone is in it."""
        return _group_of(self.pp)

    @property
    def ep_group(self) -> dist.ProcessGroup | None:
        """The process group of ``ep``; None where there is none, or this rank alone is in it."""
        return _group_of(self.ep)

    @property
    def dp_group(self) -> dist.ProcessGroup | None:
        """The process group of ``dp``; None where there is none, or this rank alone is in it."""
        return _group_of(self.dp)

    @property
    def edp_group(self) -> dist.ProcessGroup | None:
        """The process group of ``edp``; None where there is none, or this rank alone is in it."""
        return _group_of(self.edp)

    def check_holds_experts(self, params: Iterable[Tensor]) -> None:
        """Raise ValueError where a single parameter among the experts is not one of ``params``: it would silently be no expert."""
        known = {id(param) for param in params}
        for value in self.experts:  # type: ignore[union-attr]
            if isinstance(value, Tensor) and id(value) not in known:
                raise ValueError(
                    f"ModelParallel(experts=...) names a parameter of shape {tuple(value.shape)} that the optimizer does not hold; name "
                    "its module, or the parameter as it is after fully_shard and the like, which replace it"
                )

    def expert_params(self) -> Iterator[Tensor]:
        """Yield the parameters of this rank alone of ``ep``, as the modules hold them now."""
        for value in self.experts:  # type: ignore[union-attr]
            if isinstance(value, nn.Module):
                yield from value.parameters()
            else:
                yield value


def _check_group(name: str, value: GroupLike | None) -> None:
    if value is None:
        return
    if isinstance(value, DeviceMesh):
        if value.ndim != 1:
            raise ValueError(
                f"Invalid {name}: the mesh has {value.ndim} dimensions; take one of them, such as mesh[{name!r}]"
            )
        inside = value.get_coordinate() is not None
    elif (
        value == dist.GroupMember.NON_GROUP_MEMBER
    ):  # what new_group() returns on the ranks that are not in it
        inside = False
    elif isinstance(value, dist.ProcessGroup):
        inside = dist.get_rank(value) >= 0
    else:
        raise ValueError(
            f"Invalid {name}: {value!r}; give a process group or a one-dimensional DeviceMesh"
        )
    if not inside:
        raise ValueError(f"Invalid {name}: this rank is not in it")


def _group_of(value: GroupLike | None) -> dist.ProcessGroup | None:
    group = value.get_group() if isinstance(value, DeviceMesh) else value
    return None if group is None or dist.get_world_size(group) == 1 else group
