"""Process groups that only their members create, and an all-reduce of tensors on any device."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

# For each default process group, the number of groups created by each set of ranks. The count
# starts anew with a new default group, which has a new store.
_groups_created: WeakKeyDictionary[dist.ProcessGroup, Counter[tuple[int, ...]]] = (
    WeakKeyDictionary()
)
_cpu_groups: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()


def new_cpu_group(ranks: Sequence[int], timeout: timedelta | None = None) -> dist.ProcessGroup:
    """Create a gloo process group of these ranks. Collective over them; no other rank takes part.

    ``dist.new_group`` is collective over all ranks of the default group. With
    ``use_local_synchronization`` it names the group by the number of groups that this rank is in,
    and ranks block if their names differ. This function instead counts the groups of exactly these
    ranks. Their counts are equal, because each creation was collective over them.

    Args:
        ranks: global ranks in any order, including this one.
        timeout: for the creation and for each collective; None for torch's default.

    Returns:
        The group, with ascending ranks. Free it with ``dist.destroy_process_group``.

    Raises:
        ValueError: a rank is listed twice or does not exist, or this rank is missing.
        RuntimeError: another rank has died or hangs.
    """
    return _new_group(ranks, dist.Backend.GLOO, timeout)


def new_group_like(group: dist.ProcessGroup, device: torch.device) -> dist.ProcessGroup:
    """Create a group with the ranks of ``group``, and its timeout and backend for ``device``.

    Collective over ``group``; see :func:`new_cpu_group`. If the default group is bound to a GPU
    (``device_id`` of ``init_process_group``), NCCL splits that group, so every rank of the default
    group has to create such a group.
    """
    ranks, backend = dist.get_process_group_ranks(group), group._get_backend(device).name()
    return _new_group(ranks, backend, timeout_of(group, device))


def timeout_of(group: dist.ProcessGroup, device: torch.device) -> timedelta | None:
    """Return the timeout that the user gave the group, or None if it is unknown."""
    try:
        options = group._get_backend(device).options
    except (AttributeError, RuntimeError):  # a backend without options, such as MPI
        return None
    return getattr(options, "_timeout", None)


def _new_group(ranks: Sequence[int], backend: str, timeout: timedelta | None) -> dist.ProcessGroup:
    members, world = tuple(sorted(ranks)), dist.get_world_size()
    if len(set(members)) != len(members) or not set(members) <= set(range(world)):
        raise ValueError(f"Invalid ranks: {list(ranks)}; list distinct global ranks below {world}")
    if dist.get_rank() not in members:
        raise ValueError(
            f"Invalid ranks: {list(ranks)} lack rank {dist.get_rank()}; call new_cpu_group only on "
            "the ranks that it lists"
        )
    assert dist.group.WORLD is not None
    created = _groups_created.setdefault(dist.group.WORLD, Counter())
    # Count failed creations too: they leave stale addresses in the store under their name.
    created[members] += 1
    # The digest keeps the name short for any number of ranks.
    digest = hashlib.blake2b(repr(members).encode(), digest_size=8).hexdigest()
    name: Any = f"sharded_bf16_adamw:{digest}:{created[members]}"
    group, _ = c10d._new_process_group_helper(
        len(members),
        members.index(dist.get_rank()),
        list(members),
        backend,
        c10d._get_default_store(),
        name,
        timeout=timeout or c10d.default_pg_timeout,
    )
    c10d._world.pg_group_ranks[group] = {rank: index for index, rank in enumerate(members)}
    return group


def cpu_group(group: dist.ProcessGroup | None = None) -> dist.ProcessGroup:
    """Return ``group`` if it serves CPU tensors, else a gloo group of the same ranks.

    The first call is collective over ``group``; later ones communicate nothing. A rank's group rank
    may differ from its rank in ``group``.
    """
    own = group or dist.group.WORLD
    assert own is not None
    if "cpu" in served_devices(own):
        return own
    if own not in _cpu_groups:
        _cpu_groups[own] = new_cpu_group(dist.get_process_group_ranks(own))
    return _cpu_groups[own]


def served_devices(group: dist.ProcessGroup | None = None) -> list[str]:
    """Return the device types that the group's backends serve, such as ``["cuda"]`` for NCCL."""
    return [part.partition(":")[0] for part in dist.get_backend_config(group).split(",")]


def device_for(group: dist.ProcessGroup | None, device: torch.device) -> torch.device:
    """Return ``device`` if ``group`` serves it, else another device that the group serves.

    FSDP2's ``CPUOffloadPolicy`` keeps parameters on the CPU, which NCCL does not serve.
    """
    served = served_devices(group)
    if device.type in served:
        return device
    if served[0] == "cpu":
        return torch.device("cpu")
    return torch.device(served[0], torch.accelerator.current_device_index())


def all_reduce(value: Tensor, group: dist.ProcessGroup) -> None:
    """Sum ``value`` over the group in place, on a device that the group serves."""
    moved = value.to(device_for(group, value.device))
    dist.all_reduce(moved, group=group)
    if moved is not value:
        value.copy_(moved)
