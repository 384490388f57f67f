"""Load a checkpoint. Everything is checked before anything changes."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import DefaultLoadPlanner

from .async_save import wait_for_own_saves
from .blocks import local_blocks
from .chunk_table import ChunkTable
from .commit import check_folder_visible
from .dcp_storage import ChunkReader, read_chunks
from .diff import compare, keys_on_other_ranks, merge_loaded, params_with_state
from .directory import existing_checkpoint, find_checkpoint, no_checkpoint
from .extra_state import adopt_saved_specs
from .file_checksums import find_damage, share_of
from .gc_pause import gc_paused
from .manifest import Manifest, read_manifest
from .object_collectives import Group, rank, world_size
from .optimizer_state import (
    check_model_and_optimizer,
    drop_averages,
    init_frozen_states,
    init_state,
    rollback_new_state,
)
from .rank_errors import (
    as_path,
    call_on_rank_0,
    check_group,
    check_same_on_all_ranks,
    join_problems,
    raise_on_all_ranks,
)
from .rank_names import RankNames
from .state_dict import (
    MODEL,
    fqn_of,
    get_rng_state,
    get_state,
    param_of_state,
    set_rng_state,
    set_state,
)
from .ties import align_ties

EMA = ".ema"  # suffix of the keys of averages


@dataclass(frozen=True)
class LoadResult:
    """The result of :func:`load`.

    Attributes:
        extra: the caller's data, an empty dict if none was saved.
        path: the checkpoint's folder.
        step: the step that was passed to :func:`save`.
        mismatches: with ``strict=False``, a sentence for each difference between the checkpoint and
            the model and optimizer.
    """

    extra: dict[str, Any]
    path: Path
    step: int
    mismatches: list[str]


@overload
def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    strict: bool = True,
    *,
    missing_ok: Literal[False] = False,
    group: dist.ProcessGroup | None = None,
) -> LoadResult: ...


@overload
def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    strict: bool = True,
    *,
    missing_ok: bool,
    group: dist.ProcessGroup | None = None,
) -> LoadResult | None: ...


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    strict: bool = True,
    *,
    missing_ok: bool = False,
    group: dist.ProcessGroup | None = None,
) -> LoadResult | None:
    """Load a checkpoint into ``model`` and ``optimizer``, whatever layout and world size saved it.

    Collective: every rank of ``group`` calls it.

    Restores weights, optimizer states and groups. Restores torch's random state on each rank that
    the saving run also had. Parameters that had no optimizer state when saved (they never had a
    gradient) start at step 0. Before anything changes, every file is compared with its checksum
    (each rank reads its share), and names, shapes and dtypes are compared with the model's.

    Args:
        path: a checkpoint's folder; or the ``root`` of a run, or the folder that contains it under
            the name ``checkpoints``, to load the latest checkpoint.
        model: the module, wrapped by DDP or FSDP or not at all.
        optimizer: the optimizer of its parameters.
        strict: raise on missing keys, unexpected keys, mismatches in shape or dtype, and names that
            are tied in this model but were saved with different values. If false, load what fits,
            zero the missing states of loaded weights, leave the rest unchanged, and list every
            difference in ``mismatches`` of the result. Keys that other ranks have (pipeline stages,
            experts) are not unexpected.
        missing_ok: return None on every rank, instead of raising, if rank 0 finds no checkpoint at
            ``path``. So either all ranks resume or none. If each rank called :func:`latest`
            instead, ranks could see different states of a network file system.
        group: the ranks that hold the model, if a job trains several models; None for all ranks.

    Returns:
        The saved step and ``extra``, the checkpoint's folder, and the mismatches.

    Raises:
        FileNotFoundError: there is no checkpoint at ``path``, and ``missing_ok`` is false.
        ValueError: a file is missing, damaged or from another checkpoint; the checkpoint does not
            match the model or the optimizer; or ranks give different paths. Nothing is changed.
        RuntimeError: a rank could not read a file, or an asynchronous save failed. If a file
            changed after it was checked, weights may be partly loaded; the message says so.

    Examples:
        >>> import torch
        >>> from sharded_bf16_adamw import AdamW_BF16, load, save
        >>> model = torch.nn.Linear(4, 2).bfloat16()
        >>> optimizer = AdamW_BF16(model.parameters(), lr=1e-3)
        >>> load("checkpoints", model, optimizer, missing_ok=True) is None
        True
        >>> path = save("checkpoints", 200, model, optimizer, extra={"tokens": 6400})
        >>> result = load("checkpoints", model, optimizer)
        >>> result.step, result.extra
        (200, {'tokens': 6400})
    """
    wait_for_own_saves()
    check_group(group)
    with raise_on_all_ranks(f"cannot load the checkpoint {path}", group):
        path = as_path("path", path)
        check_model_and_optimizer("load(path, model, optimizer)", model, optimizer)
    check_same_on_all_ranks({"the checkpoint to load": str(path)}, group)
    found = call_on_rank_0(f"cannot read the checkpoint {path}", lambda: _find(path), group)
    if found is None:
        if missing_ok:
            return None
        raise no_checkpoint(path)
    folder, manifest = found
    table = _check_files(folder, manifest, group)
    failed = f"cannot load the checkpoint {folder}"
    with rollback_new_state(optimizer):
        with raise_on_all_ranks(failed, group):
            names = RankNames(model, optimizer)
        names.number_experts()
        with raise_on_all_ranks(failed, group):
            keys = [*table.tensors, *manifest.values]
            names.adopt_stages(fqn_of(key) for key in keys if key.startswith(MODEL))
        different_ties = align_ties(folder, table, manifest, model, names, group)
        with raise_on_all_ranks(failed, group):
            init_state(optimizer)
            in_groups = [fqn for saved in manifest.groups for fqn in saved.params]
            with_state = params_with_state(table.tensors, manifest)
            init_frozen_states(model, optimizer, with_state, in_groups, names.to_saved)
            state = get_state(model, optimizer, names)
            adopt_saved_specs(state.tensors, state.plain, table, manifest)
        elsewhere = keys_on_other_ranks(table, manifest, state, group)
        with raise_on_all_ranks(failed, group):
            comparison = compare(table, manifest, state, elsewhere)
            comparison.mismatches[:0] = different_ties
            if strict and comparison.mismatches:
                has_rank_names = any(re.search(r"@(pp|ep)\d", key) for key in table.tensors)
                raise ValueError(_mismatch_message(folder, comparison.mismatches, has_rank_names))
        rng_state = {
            key: value
            for key, value in get_rng_state(group, every_device=True).items()
            if key in table.tensors
        }
    tensors = {**{key: state.tensors[key] for key in comparison.loadable}, **rng_state}
    with raise_on_all_ranks(
        f"the model may be partly loaded, because the checkpoint {folder} could not be read after "
        "it was checked",
        group,
    ):
        _read_into(tensors, folder, table, group)
        for key in comparison.missing_states:
            for _, local in local_blocks(state.tensors[key]):
                local.zero_()
    # A block of its own: set_state is collective under FSDP1, so each rank must have read its part.
    with raise_on_all_ranks(f"the model may be partly loaded from {folder}", group):
        set_state(model, optimizer, merge_loaded(state, comparison, tensors), names)
        set_rng_state(rng_state)
        missing = {param_of_state(key) for key in comparison.missing_states if key.endswith(EMA)}
        drop_averages(model, optimizer, missing, names.to_saved)
    mismatches = [] if strict else comparison.mismatches
    return LoadResult(manifest.extra, folder, manifest.step, mismatches)


def verify(path: str | os.PathLike[str]) -> list[str]:
    """Compare every file of a checkpoint with its checksum.

    For one process. Needs no model, and unpickles nothing.

    Args:
        path: a checkpoint's folder, or the ``root`` of a run to verify its latest checkpoint.

    Returns:
        A sentence for each file that is missing, unreadable, damaged or from another checkpoint; an
        empty list if there is none.

    Raises:
        FileNotFoundError: there is no checkpoint at ``path``.

    Examples:
        >>> import torch
        >>> from sharded_bf16_adamw import AdamW_BF16, save, verify
        >>> model = torch.nn.Linear(4, 2).bfloat16()
        >>> path = save("checkpoints", 200, model, AdamW_BF16(model.parameters(), lr=1e-3))
        >>> verify("checkpoints")
        []
        >>> (path / ".metadata").unlink()
        >>> verify("checkpoints")
        ['.metadata is missing']
    """
    try:
        folder = existing_checkpoint(path)
        return find_damage(folder, read_manifest(folder).files)
    except ValueError as error:
        return [str(error)]


def _find(path: Path) -> tuple[Path, Manifest] | None:
    """Return the checkpoint at ``path`` and its manifest, or raise ValueError if it is damaged."""
    folder = find_checkpoint(path)
    return None if folder is None else (folder, read_manifest(folder))


def _check_files(folder: Path, manifest: Manifest, group: Group) -> ChunkTable:
    """Check all files, each rank its share, and return the chunk table. Collective.

    Rank 0 reads the table and broadcasts it: a read on every rank would load the file system, and
    parsing DCP's metadata takes seconds if many ranks have saved.

    Raises:
        ValueError: a file is damaged or missing.
        RuntimeError: a rank failed otherwise.
    """
    failed = f"cannot load the checkpoint {folder}"
    with raise_on_all_ranks(failed, group):
        check_folder_visible(folder.parent, folder, rank(group), "reads")
        damage = find_damage(folder, share_of(manifest.files, rank(group), world_size(group)))
        if damage:
            raise ValueError(
                f"the checkpoint {folder} cannot be used: {join_problems(damage, 'files')}; load "
                "another checkpoint"
            )
    return ChunkTable.from_bytes(
        call_on_rank_0(failed, lambda: read_chunks(folder, manifest.files), group)
    )


def _read_into(tensors: dict[str, Any], folder: Path, table: ChunkTable, group: Group) -> None:
    """Read this rank's part of each tensor in place.

    Each rank plans its own reads, so that no rank blocks on another.
    """
    planner = DefaultLoadPlanner()
    with gc_paused():
        plan, metadata = table.plan_reads(tensors)
        planner.set_up_planner(tensors, metadata, rank(group) == 0)
        plan = planner.finish_plan(plan)
    ChunkReader(folder, metadata).read_data(plan, planner).wait()


def _mismatch_message(folder: Path, differences: list[str], has_rank_names: bool) -> str:
    hint = (
        " (names with @pp or @ep can be loaded only in the layout that saved them: see "
        "ModelParallel)"
        if has_rank_names
        else " (build EMA(model, optimizer) before the load if the checkpoint has an average, "
        "after it otherwise)"
        if any(EMA in difference for difference in differences)
        else ""
    )
    return (
        f"the checkpoint {folder} is of another model or optimizer: {join_problems(differences)}"
        f"{hint}; build the model and optimizer as they were when it was saved, or load what fits "
        "with strict=False"
    )
