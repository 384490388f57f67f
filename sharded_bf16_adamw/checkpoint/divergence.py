"""Find tensors of one name that are not the same on all ranks, which a checkpoint would mix.

Vocabulary: a tensor's *holders* are the ranks of its mesh if it is a DTensor, and nobody in particular if it is plain: every rank that has
a plain tensor of a name is taken to have a replica. An *entry* is what a rank has of a tensor, in comparable form.

Nothing is exchanged but digests as long as all ranks have the same names and plain tensors. Plain tensors are read in full. A DTensor is
read only where its mesh replicates it (HSDP), or where other holders have a tensor of the same name (pipeline stages that number their
layers from 0).
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..sharding.checksum import checksums
from ..sharding.local import replica_groups, to_local
from ..sharding.replicas import Replica, find_difference
from .agreement import Group, gather_everywhere, global_rank, rank, world_size
from .blocks import local_blocks
from .contents import MODEL, Contents, fqn_of, with_stages
from .rank_names import RankNames

Holders = tuple[int, ...]


class Entry(NamedTuple):
    """A rank's part of a tensor: global shape, dtype, and a text for the block and its bits."""

    shape: tuple[int, ...]
    dtype: str
    part: str


class Divergence(NamedTuple):
    """A key whose tensors differ, and two ranks of the group that show it."""

    key: str
    ranks: tuple[int, int]


class Divergences(NamedTuple):
    """What differs between ranks that should hold replicas, the keys that differ between pipeline stages and not within one, and a
    parameter that not all ranks have."""

    within: list[Divergence]
    between_stages: list[str]
    unshared: Divergence | None


def one_of_each(found: Contents, names: RankNames, group: Group, on_divergence: str) -> Contents:
    """Return what this rank is to save: each tensor of a name once, or several under names of their own. Collective.

    Args:
        found: what this rank has, by the names of ``names``, to which those of pipeline stages are added.
        on_divergence: ``"raise"``, or ``"first"`` to leave out what differs from the first rank that has it.

    Raises:
        ValueError: replicas differ; on every rank, with their names.
    """
    params = sorted(fqn for options in found.groups for fqn in options.params)
    within, between_stages, unshared = find_divergences(found.tensors, group, names.stage, params if names.must_be_the_same else [])
    if unshared is not None:
        has, has_not = (global_rank(index, group) for index in unshared.ranks)
        raise ValueError(
            f"rank {has} has a parameter {unshared.key} that rank {has_not} does not have. If ranks hold different parameters (pipeline "
            "stages, experts), say so by AdamW_BF16(..., model_parallel=ModelParallel(...)), without which gradient norm and guard are of "
            "each rank alone; else build the same model on every rank, or pass group= with the ranks of this model"
        )
    if within and on_divergence == "raise":
        raise ValueError(_refusal(within, found, group))
    if between_stages:
        names.add_stage(map(fqn_of, between_stages))
        found = with_stages(found, names)
    if within:
        left_out = {
            divergence.key
            for divergence in within
            if rank(group) != divergence.ranks[0] and _holders(found.tensors.get(divergence.key)) == ()
        }
        left_out |= {key for key, value in found.tensors.items() if _is_further_replica(value)}
        if rank(group) == 0:
            shown = ", ".join(sorted(divergence.key for divergence in within)[:3])
            warnings.warn(f"{len(within)} tensors differ between ranks and are saved as the first rank has them: {shown}", stacklevel=4)
        found = Contents({key: value for key, value in found.tensors.items() if key not in left_out}, found.plain, found.groups)
    return found


def _is_further_replica(value: Any) -> bool:
    """Return whether a DTensor's mesh has the same shard on an earlier rank."""
    if not isinstance(value, DTensor):
        return False
    coordinate = value.device_mesh.get_coordinate()
    return coordinate is not None and any(place and kind.is_replicate() for place, kind in zip(coordinate, value.placements, strict=True))


def _refusal(within: list[Divergence], found: Contents, group: Group) -> str:
    keys = sorted({divergence.key.removeprefix(MODEL) for divergence in within})
    first, second = (global_rank(index, group) for index in within[0].ranks)
    where = f"on ranks {first} and {second}" if first != second else f"between replicas, rank {first} among them"
    more = f" and {len(keys) - 3} more" if keys[3:] else ""
    return (
        f"the save would mix tensors that differ between ranks: {', '.join(keys[:3])}{more} (the first {where}). If each rank is to hold "
        "its own (experts, pipeline stages), say so by AdamW_BF16(..., model_parallel=ModelParallel(...)); if they are replicas that "
        "have drifted (BatchNorm statistics, gradients that nobody averaged), broadcast them from one rank first, or save those of the "
        "first rank with on_divergence='first'"
    )


def find_divergences(tensors: dict[str, Any], group: Group, stage: int | None, params: list[str]) -> Divergences:
    """Compare tensors of the same key between ranks. Collective; every rank gets the same result.

    Args:
        tensors: this rank's by key: plain, DTensor or ShardedTensor (of which each rank has a part of its own).
        stage: this rank's place in the pipeline, over whose stages tensors of one name may differ; None without a pipeline.
        params: names of parameters that every rank must have; empty where ranks may have others.
    """
    if world_size(group) == 1:
        return Divergences([], [], None)
    holders = {key: _holders(value) for key, value in tensors.items()}
    plain = _entries({key: value for key, value in tensors.items() if holders[key] == ()})
    all_ranks = tuple(range(dist.get_world_size())) if group is None else tuple(dist.get_process_group_ranks(group))
    partly = {key: ranks for key, ranks in holders.items() if ranks and ranks != all_ranks}
    digests = gather_everywhere(_digest(stage, params, plain, partly), group)
    unshared: Divergence | None = None
    within: list[Divergence] = []
    between: set[str] = set()
    if len(set(digests)) > 1:
        speaks = digests.index(digests[rank(group)]) == rank(group)  # one rank for all with the same digest
        sent = gather_everywhere((plain, partly, params) if speaks else None, group)
        of_each = [sent[digests.index(digest)] or ({}, {}, []) for digest in digests]
        unshared = _unshared([set(names) for _, _, names in of_each])
        ambiguous = _held_twice(of_each)
        own = _entries({key: tensors[key] for key in ambiguous if key in tensors and holders[key]})
        others = gather_everywhere((stage, own), group)
        tables = [{**plain_of, **entries} for (plain_of, _, _), (_, entries) in zip(of_each, others, strict=True)]
        within, between = _compare(tables, [place for place, _ in others])
    replicated = [Replica(key, to_local(value), replica_groups(value)) for key, value in tensors.items() if isinstance(value, DTensor)]
    difference = find_difference([replica for replica in replicated if replica.groups])
    found = gather_everywhere(None if difference is None else difference.name, group)
    within += [Divergence(key, (index, index)) for index, key in enumerate(found) if key is not None][:1]
    return Divergences(within, sorted(between), unshared)


def _holders(value: Any) -> Holders | None:
    """Return the ranks of a DTensor's mesh, ``()`` for a plain tensor, None for what is not compared."""
    if isinstance(value, DTensor):
        return tuple(sorted(value.device_mesh.mesh.flatten().tolist()))
    is_plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided and not value.is_meta
    return () if is_plain else None  # a subclass (quantised weights) need not have bits of its own


def _entries(tensors: dict[str, Tensor]) -> dict[str, Entry]:
    blocks = {key: list(local_blocks(value)) for key, value in tensors.items()}
    numbers = iter(checksums([local for parts in blocks.values() for _, local in parts]))
    return {
        key: Entry(tuple(tensors[key].shape), str(tensors[key].dtype), ", ".join(f"{block.offsets} {next(numbers)}" for block, _ in parts))
        for key, parts in blocks.items()
    }


def _digest(stage: int | None, params: list[str], *tables: dict[str, Any]) -> str:
    text = repr((stage, params, *(sorted(table.items()) for table in tables)))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _unshared(params_of_each: list[set[str]]) -> Divergence | None:
    every = set().union(*params_of_each)
    for index, params in enumerate(params_of_each):
        if params != every:
            missing = min(every - params)
            return Divergence(missing, (next(i for i, others in enumerate(params_of_each) if missing in others), index))
    return None


def _held_twice(of_each: list[tuple[dict[str, Entry], dict[str, Holders], list[str]]]) -> list[str]:
    """Return the keys of DTensors for which there are other holders too."""
    found: dict[str, set[Holders]] = {}
    for plain, partly, _ in of_each:
        for key, ranks in chain(((key, ()) for key in plain), partly.items()):
            found.setdefault(key, set()).add(ranks)
    return [key for key, different in found.items() if len(different) > 1]


def _compare(tables: list[dict[str, Entry]], stages: Iterable[int | None]) -> tuple[list[Divergence], set[str]]:
    """Sort the keys whose entries differ into those that differ within a stage and those that differ between stages only."""
    first: dict[tuple[str, int | None, str], tuple[int, Entry]] = {}
    by_stage: dict[str, dict[int | None, list[tuple[int, Entry]]]] = {}
    within: dict[str, Divergence] = {}
    for index, (table, stage) in enumerate(zip(tables, stages, strict=True)):
        for key, entry in table.items():
            offsets = entry.part.rpartition(" ")[0]  # of DTensors those at the same place are compared
            earlier, same = first.setdefault((key, stage, offsets), (index, entry))
            if same != entry:
                within.setdefault(key, Divergence(key, (earlier, index)))
            by_stage.setdefault(key, {}).setdefault(stage, []).append((index, entry))
    between = {
        key
        for key, entries in by_stage.items()
        if len({frozenset(entry for _, entry in ofs) for ofs in entries.values()}) > 1 and key not in within
    }
    return list(within.values()), between
