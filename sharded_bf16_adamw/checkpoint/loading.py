"""Read a checkpoint: everything is checked before anything changes."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata

from .async_save import wait_for_own_saves
from .commit import check_shared
from .dcp_storage import METADATA, PlainReader, read_metadata
from .diff import compare, keys_on_other_ranks, params_with_state, merge_loaded
from .directory import find_checkpoint, no_checkpoint
from .manifest import FileRecord, Manifest, find_damage, read_manifest
from .extra_state import adopt_saved_specs
from .rank_errors import (
    Group,
    as_path,
    check_group,
    on_rank_0,
    raise_on_all_ranks,
    rank,
    same_on_every_rank,
    world_size,
)
from .rank_names import RankNames
from .state_dict import MODEL, contents, fqn_of, rng_contents, set_contents, set_rng_contents
from .ties import align_ties
from .torch_state import (
    check_model_and_optimizer,
    init_frozen_states,
    init_state,
    new_states_only_if_it_succeeds,
)


class Loaded(dict[str, Any]):
    """The ``extra`` that was saved, as a dict.

    Attributes:
        path: the checkpoint's folder.
        step: the position at which it was saved.
        not_loaded: with ``strict=False``, a sentence for each difference between the checkpoint and the model and optimizer.
    """

    def __init__(self, extra: dict[str, Any], path: Path, step: int, not_loaded: list[str]) -> None:
        super().__init__(extra)
        self.path = path
        self.step = step
        self.not_loaded = not_loaded


@overload
def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    strict: bool = True,
    *,
    missing_ok: Literal[False] = False,
    group: dist.ProcessGroup | None = None,
) -> Loaded: ...


@overload
def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    strict: bool = True,
    *,
    missing_ok: bool,
    group: dist.ProcessGroup | None = None,
) -> Loaded | None: ...


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    strict: bool = True,
    *,
    missing_ok: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Loaded | None:
    """Load a checkpoint into ``model`` and ``optimizer``, whatever layout and number of ranks saved it. Collective: every rank of
    ``group`` calls it.

    Restores weights, optimizer states and groups, and torch's random state for each rank that the saving run had too. Parameters that
    had no optimizer state when saved (they never had a gradient) start at step 0. First every file is read and compared with its
    checksum (each rank reads its share), and names, shapes and dtypes are compared, so that on the errors below nothing has changed.

    Args:
        path: a checkpoint's folder, or the ``root`` of a run, which stands for its latest.
        strict: whether a difference in names, shapes or dtypes, or between names that are one tensor here, is an error. Otherwise
            what fits is loaded, the optimizer's states that are missing for a loaded weight are set to zero, the rest stays as it
            is, and ``not_loaded`` of the result lists all of it.
            What only other ranks have (pipeline stages, experts) is no difference.
        missing_ok: return None on every rank if there is no checkpoint at ``path``, as rank 0 sees it, instead of raising. So all ranks
            resume or none does; ranks that each ask :func:`latest` may see different states of a network file system.
        group: the ranks that hold the model, where several models share a job; None for all ranks.

    Returns:
        The ``extra`` that was saved, with some facts as attributes. It is an empty dict if no ``extra`` was saved, so compare the
        result of ``missing_ok=True`` with None.

    Raises:
        FileNotFoundError: there is no checkpoint at ``path``, and not ``missing_ok``.
        ValueError: a file is missing, damaged or from another checkpoint, the checkpoint belongs to another model, or the optimizer does.
            Nothing is changed. Or ranks give different paths.
        RuntimeError: a rank could not read it, or a file changed after it was checked, in which case weights may be partly loaded; the
            message says so. Or an asynchronous save that was under way failed.
    """
    wait_for_own_saves()
    check_group(group)
    with raise_on_all_ranks(f"cannot load the checkpoint {path}", group):
        path = as_path("path", path)
        check_model_and_optimizer("load(path, model, optimizer)", model, optimizer)
    same_on_every_rank({"the checkpoint to load": str(path)}, group)
    found = on_rank_0(f"cannot read the checkpoint {path}", lambda: _find(path), group)
    if found is None:
        if missing_ok:
            return None
        raise no_checkpoint(path)
    folder, manifest = found
    metadata = _checked_metadata(folder, manifest, group)
    with new_states_only_if_it_succeeds(optimizer):
        with raise_on_all_ranks(f"cannot load the checkpoint {folder}", group):
            names = RankNames(model, optimizer)
        names.number_experts()
        with raise_on_all_ranks(f"cannot load the checkpoint {folder}", group):
            keys = [*metadata.state_dict_metadata, *manifest.values]
            names.adopt_stages(fqn_of(key) for key in keys if key.startswith(MODEL))
        tied_otherwise = align_ties(folder, metadata, manifest, model, names, group)
        with raise_on_all_ranks(f"cannot load the checkpoint {folder}", group):
            init_state(optimizer)
            saved_in_groups = [fqn for saved in manifest.groups for fqn in saved.params]
            init_frozen_states(
                model,
                optimizer,
                params_with_state(metadata, manifest),
                saved_in_groups,
                names.to_saved,
            )
            here = contents(model, optimizer, names)
            adopt_saved_specs(here.tensors, here.plain, metadata, manifest)
        elsewhere = keys_on_other_ranks(metadata, manifest, here, group)
        with raise_on_all_ranks(f"cannot load the checkpoint {folder}", group):
            comparison = compare(metadata, manifest, here, elsewhere)
            comparison.mismatches[:0] = tied_otherwise
            if strict and comparison.mismatches:
                by_rank = any(re.search(r"@(pp|ep)\d", key) for key in metadata.state_dict_metadata)
                raise ValueError(_another_model(folder, comparison.mismatches, by_rank))
        random = {
            key: value
            for key, value in rng_contents(group, every_device=True).items()
            if key in metadata.state_dict_metadata
        }
    tensors = {**{key: here.tensors[key] for key in comparison.loadable}, **random}
    with raise_on_all_ranks(
        f"the model may be partly loaded, because the checkpoint {folder} could not be read after it was checked",
        group,
    ):
        _read_into(tensors, folder, metadata, group)
        for key in comparison.missing_states:
            _zero_(here.tensors[key])
    with raise_on_all_ranks(
        f"the model may be partly loaded from {folder}", group
    ):  # collective under FSDP1
        set_contents(model, optimizer, merge_loaded(here, comparison, tensors), names)
        set_rng_contents(random)
    return Loaded(manifest.extra, folder, manifest.step, [] if strict else comparison.mismatches)


def verify(path: str | os.PathLike[str]) -> list[str]:
    """Read a whole checkpoint and compare every file with its checksum. For one process; needs no model, and unpickles nothing.

    Args:
        path: a checkpoint's folder, or the ``root`` of a run, which stands for its latest.

    Returns:
        A sentence for each file that is missing, unreadable, damaged or from another checkpoint; empty where all is well.

    Raises:
        FileNotFoundError: there is no checkpoint at ``path``.
    """
    try:
        found = _find(Path(path))
    except ValueError as error:
        return [str(error)]
    if found is None:
        raise no_checkpoint(path)
    folder, manifest = found
    return find_damage(folder, manifest.files)


def _find(path: Path) -> tuple[Path, Manifest] | None:
    """The checkpoint that ``path`` means, and its manifest. ValueError where that is damaged."""
    folder = find_checkpoint(path)
    return None if folder is None else (folder, read_manifest(folder))


def _checked_metadata(folder: Path, manifest: Manifest, group: Group) -> Metadata:
    """Check all files, each rank its share; return DCP's metadata. Collective.

    Raises:
        ValueError: a file is not what was saved.
        RuntimeError: a rank failed otherwise.
    """
    cannot = f"the checkpoint {folder} cannot be used"
    with raise_on_all_ranks(f"cannot load the checkpoint {folder}", group):
        check_shared(folder.parent, folder, rank(group), "reads")
        damage = find_damage(folder, _share(manifest.files, rank(group), world_size(group)))
        if damage:
            more = f" (and {len(damage) - 3} more files)" if len(damage) > 3 else ""
            raise ValueError(f"{cannot}: {'; '.join(damage[:3])}{more}; load another checkpoint")
        if METADATA not in manifest.files:
            raise ValueError(
                f"{cannot}: its manifest does not list {METADATA}; load another checkpoint"
            )
        metadata = read_metadata(folder, manifest.files[METADATA])
        unchecked = {info.relative_path for info in metadata.storage_data.values()} - set(
            manifest.files
        )
        if unchecked:
            raise ValueError(
                f"{cannot}: {METADATA} names {min(unchecked)}, which its manifest does not list; load another checkpoint"
            )
    return metadata


def _read_into(tensors: dict[str, Any], folder: Path, metadata: Metadata, group: Group) -> None:
    """Read this rank's part of each tensor in place. Each rank finds what it needs by itself, so no rank waits for another."""
    planner = DefaultLoadPlanner()
    reader = PlainReader(folder, metadata)
    planner.set_up_planner(tensors, metadata, rank(group) == 0)
    reader.set_up_storage_reader(metadata, rank(group) == 0)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    reader.read_data(planner.finish_plan(plan), planner).wait()


def _share(files: dict[str, FileRecord], rank: int, ranks: int) -> dict[str, FileRecord]:
    """The files that a rank checks: largest first, each to the rank with the fewest bytes so far."""
    loads = [0] * ranks
    share = {}
    for name, record in sorted(files.items(), key=lambda item: (-item[1].bytes, item[0])):
        least = loads.index(min(loads))
        loads[least] += record.bytes
        if least == rank:
            share[name] = record
    return share


def _another_model(folder: Path, differences: list[str], by_rank: bool) -> str:
    hint = (
        " (names with @pp or @ep load in the layout that saved them: see ModelParallel)"
        if by_rank
        else ""
    )
    more = f" (and {len(differences) - 3} more differences)" if len(differences) > 3 else ""
    return (
        f"the checkpoint {folder} is of another model or optimizer: {'; '.join(differences[:3])}{more}{hint}; "
        "build the model and optimizer as they were when it was saved, or load what fits with strict=False"
    )


def _zero_(tensor: Any) -> None:
    """Set this rank's part to zero."""
    shards = (
        [shard.tensor for shard in tensor.local_shards()]
        if hasattr(tensor, "local_shards")
        else [tensor]
    )
    for shard in shards:
        shard.detach().zero_()
