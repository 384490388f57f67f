"""Find tensors of one name that are not the same on all ranks, which a checkpoint would mix.

Vocabulary: a tensor's *holders* are the ranks of its mesh if it is a DTensor, and nobody in particular if it is plain: every rank that has
a plain tensor of a name is taken to have a replica. An *entry* is what a rank has of a tensor, in comparable form.

Nothing is exchanged but digests as long as all ranks have the same names and plain tensors. A plain tensor is read. A DTensor is
read only where its mesh replicates it (HSDP), or where other holders have a tensor of the same name (pipeline stages that number their
layers from 0). Of the model's tensors every bit is read, of large states a sample (see ``SAMPLED``).
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable
from contextlib import suppress
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..sharding.checksum import checksums
from ..sharding.dtensor import replica_groups, to_local
from ..sharding.replicas import Replica, find_differences
from .blocks import local_blocks
from .manifest import encode
from .rank_errors import Group, all_gather_object, global_rank, raise_on_all_ranks, rank, world_size
from .rank_names import RankNames
from .state_dict import MODEL, STATE, CheckpointState, fqn_of, with_stages

Holders = tuple[int, ...]

# Of a large state one line in so many is compared. Whatever lets replicas drift (gradients that nobody averaged, parameters that are not
# the same) shows in the weights, which are compared in full, and all over the states; reading those in full takes four times as long.
SAMPLED = 64
LINE = 256  # elements


class Entry(NamedTuple):
    """A rank's part of a tensor: global shape, dtype, and a text for the block and its bits."""

    shape: tuple[int, ...]
    dtype: str
    part: str


class Divergence(NamedTuple):
    """A key whose values differ, two ranks of the group that show it, and the pipeline stage within which they do."""

    key: str
    ranks: tuple[int, int]
    stage: int | None = None


class Divergences(NamedTuple):
    """Differences between ranks that should hold replicas, the keys that differ between pipeline stages and not within one, and a
    parameter that not all ranks have."""

    within: list[Divergence]
    between_stages: list[str]
    unshared: Divergence | None


def one_of_each(
    found: CheckpointState, names: RankNames, group: Group, on_divergence: str | None
) -> CheckpointState:
    """Return what this rank is to save: each tensor of a name once, or several under names of their own. Collective.

    Args:
        found: what this rank has, by the names of ``names``, to which those of pipeline stages are added.
        on_divergence: ``"raise"``, or ``"first"`` to leave out what differs from the first rank that has it; None: as ``"raise"``,
            where there is no such choice.

    Raises:
        ValueError: replicas differ; on every rank, with their names.
    """
    params = sorted(fqn for options in found.groups for fqn in options.params)
    within, between_stages, unshared = find_divergences(
        found, group, names.stage, params if names.must_be_the_same else []
    )
    if unshared is not None:
        has, has_not = (global_rank(index, group) for index in unshared.ranks)
        raise ValueError(
            f"rank {has} has a parameter {unshared.key} that rank {has_not} does not have. {_DECLARE}; else build the same model on every "
            "rank, or pass group= with the ranks of this model"
        )
    keys = sorted({divergence.key.removeprefix(MODEL) for divergence in within})
    if within and on_divergence != "first":
        first, second = (global_rank(index, group) for index in within[0].ranks)
        listed = f"{', '.join(keys[:3])}{f' and {len(keys) - 3} more' if keys[3:] else ''}"
        choice = (
            ", or save those of the first rank with on_divergence='first'"
            if on_divergence == "raise"
            else ""
        )
        raise ValueError(
            f"tensors that should be the same differ between ranks (the first between {first} and {second}): {listed}. If these are "
            "replicas that have drifted (BatchNorm statistics, gradients that nobody averaged, a fault of the hardware), broadcast them "
            f"from one rank first{choice}. {_DECLARE}"
        )
    if within:
        own = rank(group)
        differs = {key for key, ranks, stage in within if stage == names.stage and own != ranks[0]}
        left_out = {key for key in differs if _holders(found.tensors.get(key)) == ()}
        left_out |= {key for key, value in found.tensors.items() if _is_further_replica(value)}
        if own == 0:
            warnings.warn(
                f"{len(keys)} tensors differ between ranks and are saved as the first rank has them: {', '.join(keys[:3])}",
                stacklevel=3,
            )
        found = CheckpointState(
            {key: value for key, value in found.tensors.items() if key not in left_out},
            found.plain,
            found.groups,
        )
    if between_stages:
        names.add_stage(map(fqn_of, between_stages))
        found = with_stages(found, names)
    return found


_DECLARE = (
    "If ranks hold different parameters (pipeline stages, experts), say so by AdamW_BF16(..., model_parallel=ModelParallel(...)), without "
    "which gradient norm and guard are of each rank alone"
)


def _is_further_replica(value: Any) -> bool:
    """Return whether a DTensor's mesh has the same shard on an earlier rank."""
    if not isinstance(value, DTensor):
        return False
    coordinate = value.device_mesh.get_coordinate()
    return coordinate is not None and any(
        place and kind.is_replicate()
        for place, kind in zip(coordinate, value.placements, strict=True)
    )


def find_divergences(
    found: CheckpointState, group: Group, stage: int | None, params: list[str]
) -> Divergences:
    """Compare tensors of the same key between ranks. Collective; every rank gets the same result.

    Args:
        found: what this rank has. Its tensors are plain, DTensor or ShardedTensor (of which each rank has a part of its own).
        stage: this rank's place in the pipeline, over whose stages tensors of one name may differ; None without a pipeline.
        params: names of parameters that every rank must have; empty where ranks may have others.
    """
    if world_size(group) == 1:
        return Divergences([], [], None)
    cannot, tensors = "cannot compare tensors between ranks", found.tensors
    all_ranks = (
        tuple(range(dist.get_world_size()))
        if group is None
        else tuple(dist.get_process_group_ranks(group))
    )
    with raise_on_all_ranks(cannot, group):  # checksums need memory
        holders = {key: _holders(value) for key, value in tensors.items()}
        plain = {
            **_entries({key: value for key, value in tensors.items() if holders[key] == ()}),
            **_entries_of_values(found.plain),
        }
        replicas = [
            Replica(key, _compared(key, to_local(value)), replica_groups(value))
            for key, value in tensors.items()
            if isinstance(value, DTensor)
        ]
        replicas = [replica for replica in replicas if replica.groups]
        numbers = checksums([replica.tensor for replica in replicas])
    partly = {key: ranks for key, ranks in holders.items() if ranks and ranks != all_ranks}
    digests = all_gather_object(_digest(stage, params, plain, partly), group)
    unshared: Divergence | None = None
    within: list[Divergence] = []
    between: set[str] = set()
    if len(set(digests)) > 1:
        speaks = digests.index(digests[rank(group)]) == rank(
            group
        )  # one rank for all with the same digest
        sent = all_gather_object((plain, partly, params) if speaks else None, group)
        of_each = [sent[digests.index(digest)] or ({}, {}, []) for digest in digests]
        unshared = _unshared([set(names) for _, _, names in of_each])
        ambiguous = _held_twice(of_each)
        with raise_on_all_ranks(cannot, group):
            own = _entries(
                {key: tensors[key] for key in ambiguous if key in tensors and holders[key]}
            )
        others = all_gather_object((stage, own), group)
        tables = [
            {**plain_of, **entries}
            for (plain_of, _, _), (_, entries) in zip(of_each, others, strict=True)
        ]
        within, between = _compare(tables, [place for place, _ in others])
    differences = find_differences(replicas, numbers)
    index_of = {rank_: index for index, rank_ in enumerate(all_ranks)}
    of_each_rank = all_gather_object(
        [(name, index_of[ranks[0]], index_of[ranks[1]]) for name, ranks, _ in differences], group
    )
    within += {
        key: Divergence(key, (first, second))
        for rows in of_each_rank
        for key, first, second in rows
    }.values()
    return Divergences(within, sorted(between), unshared)


def _holders(value: Any) -> Holders | None:
    """Return the ranks of a DTensor's mesh, ``()`` for a plain tensor, None for what is not compared."""
    if isinstance(value, DTensor):
        return tuple(sorted(value.device_mesh.mesh.flatten().tolist()))
    is_plain = (
        type(value) in (Tensor, nn.Parameter)
        and value.layout == torch.strided
        and not value.is_meta
    )
    return () if is_plain else None  # a subclass (quantised weights) need not have bits of its own


def _entries(tensors: dict[str, Tensor]) -> dict[str, Entry]:
    blocks = {key: list(local_blocks(value)) for key, value in tensors.items()}
    numbers = iter(
        checksums([_compared(key, local) for key, parts in blocks.items() for _, local in parts])
    )
    return {
        key: Entry(
            tuple(tensors[key].shape),
            str(tensors[key].dtype),
            ", ".join(f"{block.offsets} {next(numbers)}" for block, _ in parts),
        )
        for key, parts in blocks.items()
    }


def _compared(key: str, local: Tensor) -> Tensor:
    """Return the elements of a tensor that are compared: all of the model's, and of a state's the sample that ``SAMPLED`` describes."""
    if not key.startswith(STATE) or local.numel() < SAMPLED * LINE:
        return local
    flat = local.detach().contiguous().view(-1)
    lines = flat.numel() // (SAMPLED * LINE)
    return flat[: lines * SAMPLED * LINE].view(lines, SAMPLED, LINE)[:, 0]


def _entries_of_values(values: dict[str, Any]) -> dict[str, Entry]:
    """Return entries of values that are no tensors, as far as a manifest can hold them: extra states, entries of no parameter."""
    entries = {}
    for key, value in values.items():
        with suppress(TypeError):  # the save will name it
            entries[key] = Entry((), "", f"value {encode(value)!r}")
    return entries


def _digest(stage: int | None, params: list[str], *tables: dict[str, Any]) -> str:
    text = repr((stage, params, *(sorted(table.items()) for table in tables)))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _unshared(params_of_each: list[set[str]]) -> Divergence | None:
    every = set().union(*params_of_each)
    for index, params in enumerate(params_of_each):
        if params != every:
            missing = min(every - params)
            return Divergence(
                missing,
                (next(i for i, others in enumerate(params_of_each) if missing in others), index),
            )
    return None


def _held_twice(of_each: list[tuple[dict[str, Entry], dict[str, Holders], list[str]]]) -> list[str]:
    """Return the keys of DTensors for which there are other holders too."""
    found: dict[str, set[Holders]] = {}
    for plain, partly, _ in of_each:
        for key, ranks in chain(((key, ()) for key in plain), partly.items()):
            found.setdefault(key, set()).add(ranks)
    return [key for key, different in found.items() if len(different) > 1]


def _compare(
    tables: list[dict[str, Entry]], stages: Iterable[int | None]
) -> tuple[list[Divergence], set[str]]:
    """Sort the keys whose entries differ into those that differ within a stage and those that differ between stages only."""
    first: dict[tuple[str, int | None, str], tuple[int, Entry]] = {}
    by_stage: dict[str, dict[int | None, set[Entry]]] = {}
    within: dict[tuple[str, int | None], Divergence] = {}
    for index, (table, stage) in enumerate(zip(tables, stages, strict=True)):
        for key, entry in table.items():
            place = (
                entry.part.partition(" ")[0] if not entry.dtype else entry.part.rpartition(" ")[0]
            )  # of DTensors the same is compared
            earlier, same = first.setdefault((key, stage, place), (index, entry))
            if same != entry:
                within.setdefault((key, stage), Divergence(key, (earlier, index), stage))
            by_stage.setdefault(key, {}).setdefault(stage, set()).add(entry)
    between = {
        key for key, entries in by_stage.items() if len(set(map(frozenset, entries.values()))) > 1
    }
    return list(within.values()), between
