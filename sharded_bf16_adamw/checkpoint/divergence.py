"""Find tensors that differ between ranks although a checkpoint would save them under one name.

Plain tensors of one name should be replicas on all ranks that have them. A DTensor belongs to the
ranks of its mesh.

Ranks compare checksums. They exchange only one digest each if all have the same names and plain
tensors. A DTensor has a checksum only if its mesh replicates it (HSDP), or if ranks outside its
mesh have a tensor of the same name (pipeline stages that number their layers from 0). Checksums
cover the model's tensors in full, and large states in part (see ``SAMPLE_STRIDE``).
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
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..sharding.dtensor import replica_groups, to_local
from ..sharding.replica_checksum import checksums
from ..sharding.replicas import Replica, find_differences
from .blocks import local_blocks
from .manifest import encode
from .object_collectives import Group, all_gather_object, global_rank, rank, world_size
from .rank_errors import raise_on_all_ranks
from .rank_names import RankNames
from .state_dict import MODEL, STATE, CheckpointState, fqn_of, with_stages

MeshRanks = tuple[int, ...]

# Of a large state, one in SAMPLE_STRIDE runs of SAMPLE_NUMEL elements is compared. That suffices:
# replicas drift if gradients were not averaged or parameters differ. Either affects all parts of a
# state, and also the weights, which are compared in full. Comparing all of the states would take
# four times as long.
SAMPLE_STRIDE = 64
SAMPLE_NUMEL = 256

_DECLARE = (
    "If ranks hold different parameters (pipeline stages, experts), declare it with "
    "AdamW_BF16(..., model_parallel=ModelParallel(...)); otherwise each rank clips and skips steps "
    "by its own gradients only"
)


class Fingerprint(NamedTuple):
    """Global shape and dtype of a tensor, and one rank's blocks with their checksums, as text."""

    shape: tuple[int, ...]
    dtype: str
    blocks: str


class Divergence(NamedTuple):
    """A key whose values differ, two group ranks that differ in it, and their pipeline stage."""

    key: str
    ranks: tuple[int, int]
    stage: int | None = None


class Divergences(NamedTuple):
    """The result of :func:`find_divergences`.

    Attributes:
        within: differences between ranks that should hold replicas.
        between_stages: keys that differ between pipeline stages, but not within one.
        unshared: a parameter that some rank lacks, with a rank that has it and one that does not.
    """

    within: list[Divergence]
    between_stages: list[str]
    unshared: Divergence | None


class _Inventory(NamedTuple):
    """One rank's tensors and values, as it describes them to the other ranks.

    Attributes:
        plain: fingerprints of plain tensors and of values that are not tensors.
        partial: the ranks of the mesh of each DTensor whose mesh does not span all ranks.
        params: names of the parameters that every rank must have.
    """

    plain: dict[str, Fingerprint]
    partial: dict[str, MeshRanks]
    params: list[str]


def resolve_divergence(
    state: CheckpointState, names: RankNames, group: Group, on_divergence: str | None
) -> CheckpointState:
    """Return the state that this rank saves, with one value for each name over all ranks.

    Collective.

    A tensor that differs between pipeline stages gets one name for each stage.

    Args:
        state: this rank's tensors, under the names of ``names``.
        names: this rank's names; changed in place if tensors get one name for each stage.
        group: the ranks that save.
        on_divergence: ``"raise"``, or ``"first"`` to save only the first rank's replica of a tensor
            that differs. None raises too, with a message that does not offer ``"first"``.

    Raises:
        ValueError: on every rank, if replicas differ or a rank lacks a parameter it should have.
    """
    params = sorted(fqn for options in state.groups for fqn in options.params)
    within, between_stages, unshared = find_divergences(
        state, group, names.stage, params if names.requires_equal_names else []
    )
    if unshared is not None:
        has, lacks = (global_rank(index, group) for index in unshared.ranks)
        raise ValueError(
            f"rank {has} has a parameter {unshared.key} that rank {lacks} does not have. "
            f"{_DECLARE}; else build the same model on every rank, or pass group= with the ranks "
            "of this model"
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
            "tensors that should be the same differ between ranks (the first between ranks "
            f"{first} and {second}): {listed}. If these are replicas that have drifted (BatchNorm "
            "statistics, gradients that were not averaged, a hardware fault), broadcast them from "
            f"one rank before this call{choice}. {_DECLARE}"
        )
    if within:
        own = rank(group)
        differing = {
            key for key, ranks, stage in within if stage == names.stage and own != ranks[0]
        }
        left_out = {key for key in differing if _mesh_ranks(state.tensors.get(key), {}) == ()}
        ranks = _global_ranks(group)
        left_out |= {k for k, value in state.tensors.items() if _has_earlier_replica(value, ranks)}
        if own == 0:
            warnings.warn(
                f"{len(keys)} tensors differ between ranks and are saved as on the first rank: "
                f"{', '.join(keys[:3])}",
                stacklevel=3,
            )
        tensors = {key: value for key, value in state.tensors.items() if key not in left_out}
        state = CheckpointState(tensors, state.plain, state.groups)
    if between_stages:
        names.mark_stage_names(map(fqn_of, between_stages))
        state = with_stages(state, names)
    return state


def find_divergences(
    state: CheckpointState, group: Group, stage: int | None, params: list[str]
) -> Divergences:
    """Compare tensors of the same key between ranks. Collective; all ranks get the same result.

    Args:
        state: this rank's tensors: plain, DTensor, or ShardedTensor, which is not compared.
        group: the ranks to compare.
        stage: this rank's pipeline stage; tensors of one name may differ between stages. None
            without a pipeline.
        params: names of parameters that every rank must have; empty if ranks may differ.
    """
    if world_size(group) == 1:
        return Divergences([], [], None)
    failure, tensors = "cannot compare tensors between ranks", state.tensors
    all_ranks = _global_ranks(group)
    with raise_on_all_ranks(failure, group):  # checksums may run out of memory
        known: dict[DeviceMesh, MeshRanks] = {}
        mesh_ranks = {key: _mesh_ranks(value, known) for key, value in tensors.items()}
        plain = {
            **_fingerprints({k: value for k, value in tensors.items() if mesh_ranks[k] == ()}),
            **_value_fingerprints(state.plain),
        }
        replicas = [
            Replica(key, _compared_part(key, to_local(value)), groups)
            for key, value in tensors.items()
            if isinstance(value, DTensor) and (groups := _replica_groups_within(value, all_ranks))
        ]
        replica_checksums = checksums([replica.tensor for replica in replicas])
    partial = {key: ranks for key, ranks in mesh_ranks.items() if ranks and ranks != all_ranks}
    inventory = _Inventory(plain, partial, params)
    digests = all_gather_object(_digest(stage, inventory), group)
    unshared: Divergence | None = None
    within: list[Divergence] = []
    between: set[str] = set()
    if len(set(digests)) > 1:
        own = rank(group)
        is_first = digests.index(digests[own]) == own  # sends for all ranks with the same digest
        sent = all_gather_object(inventory if is_first else None, group)
        inventories = [sent[digests.index(digest)] or _Inventory({}, {}, []) for digest in digests]
        unshared = _find_unshared([set(other.params) for other in inventories])
        ambiguous = _held_outside_mesh(inventories)
        with raise_on_all_ranks(failure, group):
            own_shards = _fingerprints(
                {key: tensors[key] for key in ambiguous if key in tensors and mesh_ranks[key]}
            )
        gathered = all_gather_object((stage, own_shards), group)
        fingerprints = [
            {**other.plain, **shards}
            for other, (_, shards) in zip(inventories, gathered, strict=True)
        ]
        within, between = _compare(fingerprints, [stage for stage, _ in gathered])
    index_of = {rank_: index for index, rank_ in enumerate(all_ranks)}
    differing_replicas = [
        (name, index_of[ranks[0]], index_of[ranks[1]])
        for name, ranks, _ in find_differences(replicas, replica_checksums)
    ]
    within += {
        key: Divergence(key, (first, second))
        for differing in all_gather_object(differing_replicas, group)
        for key, first, second in differing
    }.values()
    return Divergences(within, sorted(between), unshared)


def _global_ranks(group: Group) -> MeshRanks:
    """Return the global ranks of a group, in the order of its ranks."""
    return tuple(global_rank(index, group) for index in range(world_size(group)))


def _mesh_ranks(value: Any, known: dict[DeviceMesh, MeshRanks]) -> MeshRanks | None:
    """Return the ranks of a DTensor's mesh, ``()`` for a plain tensor, None if not compared.

    Args:
        value: the tensor.
        known: results by mesh; changed in place.
    """
    if isinstance(value, DTensor):
        mesh = value.device_mesh
        if mesh not in known:
            known[mesh] = tuple(sorted(mesh.mesh.flatten().tolist()))
        return known[mesh]
    is_plain = (
        type(value) in (Tensor, nn.Parameter)
        and value.layout == torch.strided
        and not value.is_meta
    )
    return () if is_plain else None  # a subclass (quantised weights) may have no bits of its own


def _replica_groups_within(tensor: DTensor, ranks: MeshRanks) -> tuple[dist.ProcessGroup, ...]:
    """Return the groups whose ranks hold replicas, but none that has ranks outside ``ranks``.

    With HSDP the caller's group may be one replica. The other replicas then take no part.
    """
    return tuple(
        group
        for group in replica_groups(tensor)
        if set(dist.get_process_group_ranks(group)) <= set(ranks)
    )


def _has_earlier_replica(value: Any, ranks: MeshRanks) -> bool:
    """Return True if an earlier rank of a DTensor's mesh, within ``ranks``, has the same shard."""
    if not isinstance(value, DTensor) or value.device_mesh.get_coordinate() is None:
        return False
    groups = _replica_groups_within(value, ranks)
    return any(dist.get_group_rank(group, dist.get_rank()) > 0 for group in groups)


def _fingerprints(tensors: dict[str, Tensor]) -> dict[str, Fingerprint]:
    blocks = {key: list(local_blocks(value)) for key, value in tensors.items()}
    block_checksums = iter(
        checksums([_compared_part(key, x) for key, parts in blocks.items() for _, x in parts])
    )
    return {
        key: Fingerprint(
            tuple(tensors[key].shape),
            str(tensors[key].dtype),
            ", ".join(f"{block.offsets} {next(block_checksums)}" for block, _ in parts),
        )
        for key, parts in blocks.items()
    }


def _compared_part(key: str, local: Tensor) -> Tensor:
    """Return all elements of a model's tensor or a small state, a sample of a large state."""
    if not key.startswith(STATE) or local.numel() < SAMPLE_STRIDE * SAMPLE_NUMEL:
        return local
    flat = local.detach().contiguous().view(-1)
    count = flat.numel() // (SAMPLE_STRIDE * SAMPLE_NUMEL)
    whole = flat[: count * SAMPLE_STRIDE * SAMPLE_NUMEL]
    return whole.view(count, SAMPLE_STRIDE, SAMPLE_NUMEL)[:, 0]


def _value_fingerprints(values: dict[str, Any]) -> dict[str, Fingerprint]:
    """Return fingerprints of extra states and entries that are not tensors."""
    fingerprints = {}
    for key, value in values.items():
        # A manifest cannot hold every value. The save raises an error about those.
        with suppress(TypeError):
            fingerprints[key] = Fingerprint((), "", f"value {encode(value)!r}")
    return fingerprints


def _digest(stage: int | None, inventory: _Inventory) -> str:
    plain, partial, params = inventory
    text = repr((stage, params, sorted(plain.items()), sorted(partial.items())))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _find_unshared(params_of_ranks: list[set[str]]) -> Divergence | None:
    all_params = set().union(*params_of_ranks)
    for index, params in enumerate(params_of_ranks):
        if params != all_params:
            missing = min(all_params - params)
            has = next(i for i, others in enumerate(params_of_ranks) if missing in others)
            return Divergence(missing, (has, index))
    return None


def _held_outside_mesh(inventories: list[_Inventory]) -> list[str]:
    """Return the keys of DTensors that ranks outside their mesh also have."""
    holders: dict[str, set[MeshRanks]] = {}
    for plain, partial, _ in inventories:
        for key, ranks in chain(((key, ()) for key in plain), partial.items()):
            holders.setdefault(key, set()).add(ranks)
    return [key for key, different in holders.items() if len(different) > 1]


def _compare(
    fingerprints_of_ranks: list[dict[str, Fingerprint]], stages: Iterable[int | None]
) -> tuple[list[Divergence], set[str]]:
    """Return the keys that differ within a stage, and those that differ between stages."""
    first: dict[tuple[str, int | None, str], tuple[int, Fingerprint]] = {}
    by_stage: dict[str, dict[int | None, set[Fingerprint]]] = {}
    within: dict[tuple[str, int | None], Divergence] = {}
    for index, (fingerprints, stage) in enumerate(zip(fingerprints_of_ranks, stages, strict=True)):
        for key, fingerprint in fingerprints.items():
            # Compare a DTensor's block only with blocks at the same offsets. In the text, the
            # offsets come before the checksum.
            blocks = fingerprint.blocks
            offsets = blocks.rpartition(" ")[0] if fingerprint.dtype else blocks.partition(" ")[0]
            earlier, expected = first.setdefault((key, stage, offsets), (index, fingerprint))
            if expected != fingerprint:
                within.setdefault((key, stage), Divergence(key, (earlier, index), stage))
            by_stage.setdefault(key, {}).setdefault(stage, set()).add(fingerprint)
    between = {
        key
        for key, fingerprints_of in by_stage.items()
        if len(set(map(frozenset, fingerprints_of.values()))) > 1
    }
    return list(within.values()), between
