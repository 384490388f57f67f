"""Ranks that hold different parameters: pipeline stages and rank-local experts.

A DTensor knows over which ranks it is sharded. A plain tensor may be a replica or a parameter that
only this rank has. :class:`ModelParallel` tells the two apart for the gradient norm, for
``skip_nonfinite`` and for checkpoints.
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
    """The process groups over which plain parameters differ or are replicated.

    FSDP2, HSDP and tensor parallelism need no entry, because a DTensor knows its groups. They, DDP
    and ``sharding=ZeRO(mesh["dp"])`` may be used inside each pipeline stage. Each argument but
    ``experts`` is a process group or a one-dimensional ``DeviceMesh``.

    Args:
        pp: the pipeline, such as torchtitan's ``pp_mesh``. Every parameter belongs to this rank's
            stage, even if it is sharded inside the stage. If a rank holds several stages, give all
            of them to one optimizer. A weight that two stages hold (a tied embedding) counts twice
            in the norm.
        ep: the ranks over which ``experts`` differ: expert parallelism with plain tensors
            (Megatron's ``allreduce=False`` parameters).
        experts: the modules or parameters that only this rank of ``ep`` holds. Pass an
            ``nn.ModuleList`` of experts as a whole: checkpoints then number its modules over all
            ranks of ``ep``, so that they load on another number of ranks. Checkpoints append the
            rank in ``ep`` to the names of all other experts. ``sharding=ZeRO(...)`` neither shards
            the states of experts nor averages their gradients.
        dp: the ranks that hold replicas of the plain parameters other than experts, such as
            DistributedDataParallel's. ``skip_nonfinite`` then skips a step on all of them or on
            none, and ``check_replicas`` compares them.
        edp: the ranks that hold replicas of the experts; otherwise like ``dp``.

    Raises:
        ValueError: a group is invalid, this rank is not in it, or ``experts`` is given without
            ``ep``.

    Examples:
        >>> import torch
        >>> import torch.distributed as dist
        >>> from sharded_bf16_adamw import AdamW_BF16, ModelParallel
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> mesh = dist.init_device_mesh("cpu", (1, 1), mesh_dim_names=("pp", "dp"))
        >>> stage = torch.nn.Linear(4, 2, dtype=torch.bfloat16)
        >>> parallel = ModelParallel(pp=mesh["pp"], dp=mesh["dp"])
        >>> optimizer = AdamW_BF16(stage.parameters(), lr=1e-3, model_parallel=parallel)
        >>> stage(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        >>> optimizer.clip_grad_norm_(1.0)  # the norm over all pipeline stages
        tensor(3.1623)
        >>> optimizer.step(zero_grad=True)
        >>> dist.destroy_process_group()
    """

    pp: GroupLike | None = None
    ep: GroupLike | None = None
    experts: nn.Module | Tensor | Iterable[nn.Module | Tensor] = ()
    dp: GroupLike | None = None
    edp: GroupLike | None = None

    def __post_init__(self) -> None:
        is_single = isinstance(self.experts, (nn.Module, Tensor))
        experts = (self.experts,) if is_single else tuple(self.experts)  # type: ignore[arg-type]
        object.__setattr__(self, "experts", experts)
        for value in experts:
            if not isinstance(value, (nn.Module, Tensor)):
                raise ValueError(f"Invalid experts: {value!r}; give modules or parameters")
        for name in ("pp", "ep", "dp", "edp"):
            _check_group(name, getattr(self, name))
        if self.ep is None and experts:
            raise ValueError(
                "experts are given without ep; name the process group or mesh dimension over which "
                "they differ"
            )

    def group(self, name: str) -> dist.ProcessGroup | None:
        """Return the process group of an argument. None if not given, or if it has one rank.

        Args:
            name: ``"pp"``, ``"ep"``, ``"dp"`` or ``"edp"``.
        """
        value: GroupLike | None = getattr(self, name)
        group = value.get_group() if isinstance(value, DeviceMesh) else value
        return None if group is None or dist.get_world_size(group) == 1 else group

    def expert_params(self) -> Iterator[Tensor]:
        """Yield the parameters that the expert modules hold now, and the single ones."""
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
                f"Invalid {name}: the mesh has {value.ndim} dimensions; take one of them, such as "
                f"mesh[{name!r}]"
            )
        is_member = value.get_coordinate() is not None
    # new_group() returns NON_GROUP_MEMBER on other ranks.
    elif value == dist.GroupMember.NON_GROUP_MEMBER:
        is_member = False
    elif isinstance(value, dist.ProcessGroup):
        is_member = dist.get_rank(value) >= 0
    else:
        raise ValueError(
            f"Invalid {name}: {value!r}; give a process group or a one-dimensional DeviceMesh"
        )
    if not is_member:
        raise ValueError(f"Invalid {name}: this rank is not in it; give a group of this rank")
