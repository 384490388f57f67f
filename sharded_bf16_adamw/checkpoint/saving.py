"""Write a checkpoint: plan on all ranks, write in parallel, publish once all files are on disk.

If any rank fails, :func:`.rank_errors.raise_on_all_ranks` raises on all ranks, and
:func:`.commit.abandon_on_error` removes the unpublished folder.
"""

from __future__ import annotations

import json
import logging
import operator
import os
import pickle
import reprlib
import time
import uuid
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

from . import async_save, plan_cache
from .commit import (
    UNPUBLISHED,
    abandon_on_error,
    begin,
    check_files_visible,
    check_folder_visible,
    publish,
    release,
)
from .dcp_storage import ChecksummedWriter
from .directory import remove_older
from .divergence import resolve_divergence
from .file_checksums import FileRecord
from .gc_pause import gc_paused
from .manifest import Manifest, ParamGroup, encode
from .object_collectives import (
    Group,
    all_gather_object,
    gather_object,
    rank,
    scatter_object,
    world_size,
)
from .optimizer_state import check_model_and_optimizer
from .plan_cache import PlannedSave
from .plan_table import Assignment, Locations, to_assigned, to_locations, to_table
from .rank_errors import (
    as_path,
    call_on_rank_0,
    check_group,
    check_same_on_all_ranks,
    raise_on_all_ranks,
)
from .rank_names import RankNames
from .save_plan import merge_plans
from .staging import StagedPlanner
from .state_dict import describe_strategy, get_rng_state, get_state, merge_param_groups
from .ties import find_ties, merge_ties

logger = logging.getLogger("sharded_bf16_adamw")


def save(
    root: str | os.PathLike[str],
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    extra: dict[str, Any] | None = None,
    keep: int | None = None,
    async_: bool = False,
    *,
    group: dist.ProcessGroup | None = None,
    on_divergence: str = "raise",
) -> Path:
    """Save a checkpoint to a new folder ``root/step-<step>``.

    Collective: every rank of ``group`` calls it with the same arguments. ``step``, ``extra`` and
    ``keep`` are read on the group's first rank only.

    Files are written under a temporary name, flushed to the disk, and renamed into place when all
    ranks are done. Then ``LATEST`` is replaced and older checkpoints are removed. If a save fails
    or is killed before the rename, the previous checkpoint stays the latest, and the next save
    removes the leftovers.

    Before writing, each rank checks that its ``root`` is the folder that rank 0 sees. Before
    publishing, rank 0 checks that it sees every file. If an older checkpoint cannot be removed,
    ``save`` only warns.

    Args:
        root: folder of all checkpoints of one run, on a file system that every rank sees. While a
            save is in progress, another save to the same root raises. On a file system without
            locks both proceed, and neither harms the other.
        step: training step, not negative. Saving a step again, as a resumed run does, replaces the
            older save of that step. The new folder gets a name of its own, such as
            ``step-00000200-2``.
        model: the module, wrapped by DDP or FSDP or not at all.
        optimizer: the optimizer of its parameters.
        extra: data that :func:`load` returns, such as the position in the training data: a dict
            that JSON can hold, with strings as keys. Tuples come back as lists.
        keep: number of newest checkpoints to keep, this one included; None keeps all.
        async_: return once this rank's part has been copied to CPU memory, and write in a thread.
            Training may continue at once. The next ``save`` or ``load`` of the calling thread, or
            :func:`wait_for_save`, waits for the writing thread and raises its error. Call
            :func:`wait_for_save` before ``dist.destroy_process_group()``. The staging memory is
            kept for the optimizer's next save.
        group: the ranks that hold the model, if a job trains several models; None for all ranks.
        on_divergence: what to do if replicas of a tensor differ between ranks, as the running
            statistics of BatchNorm do: ``"raise"``, or ``"first"`` to save the replica of the first
            rank with a warning.

    Returns:
        The checkpoint's folder; with ``async_`` its future path.

    Raises:
        ValueError: an argument is invalid or differs between ranks, a rank sees another folder
            at ``root`` than the first rank, or tensors differ between ranks that should hold
            replicas according to ``AdamW_BF16(..., model_parallel=...)``; nothing is written.
        RuntimeError: a rank could not write, rank 0 does not see a file of another rank, another
            save to ``root`` is in progress, or the previous asynchronous save failed; earlier
            checkpoints are untouched.

    Examples:
        >>> import torch
        >>> from sharded_bf16_adamw import AdamW_BF16, save
        >>> model = torch.nn.Linear(4, 2).bfloat16()
        >>> optimizer = AdamW_BF16(model.parameters(), lr=1e-3)
        >>> path = save("checkpoints", 200, model, optimizer, extra={"tokens": 6400}, keep=3)
        >>> print(path)
        checkpoints/step-00000200
    """
    started = time.monotonic()
    async_save.wait_for_own_saves()
    check_group(group)
    failed = f"cannot save a checkpoint in {root}"
    with raise_on_all_ranks(failed, group):
        given = as_path("root", root)
        root = given.absolute()  # the caller may change its working directory while a thread writes
        check_model_and_optimizer("save(root, step, model, optimizer)", model, optimizer)
        if on_divergence not in ("raise", "first"):
            raise ValueError(f"Invalid on_divergence: {on_divergence!r}; choose 'raise' or 'first'")
    check_same_on_all_ranks(
        {
            "the folder to save in": str(given),
            "async_": bool(async_),
            "on_divergence": on_divergence,
        },
        group,
    )

    def prepare() -> tuple[Any, ...]:
        position = _integer(step)
        if position < 0:
            raise ValueError(f"Invalid step: {step!r}; it must be an integer that is not negative")
        if keep is not None and _integer(keep) < 1:
            raise ValueError(
                f"Invalid keep: {keep!r}; it must be an integer of at least 1, or None"
            )
        copied = _copy_extra(extra)
        begun.append((folders := begin(root, position))[0])
        return position, copied, *(folder.name for folder in folders)

    begun: list[Path] = []  # on rank 0
    with abandon_on_error(begun):
        step, extra, *folders = call_on_rank_0(failed, prepare, group)
        partial, final = (root / name for name in folders)
        failed = f"cannot save the checkpoint {given / final.name}"
        with raise_on_all_ranks(failed, group):
            check_folder_visible(root, partial, rank(group))
            names = RankNames(model, optimizer)
        names.number_experts()
        with raise_on_all_ranks(failed, group):
            state = get_state(model, optimizer, names)
        state = resolve_divergence(state, names, group, on_divergence)
        with raise_on_all_ranks(failed, group):
            own_groups = [ParamGroup(params, _encode(options)) for params, options in state.groups]
            own_values, strategy = _encode(state.plain), describe_strategy(model, optimizer)
            ties = find_ties(model, names)
        with gc_paused():
            packed = gather_object(pickle.dumps((own_groups, own_values, ties)), group)
            # Most ranks send equal bytes, and duplicates would not change the result.
            unpacked = [pickle.loads(each) for each in dict.fromkeys(packed)]
        manifest = None
        if rank(group) == 0:
            groups = merge_param_groups([groups for groups, _, _ in unpacked])
            values = {
                key: value for _, values, _ in reversed(unpacked) for key, value in values.items()
            }
            manifest = Manifest(
                step=step,
                serial=UNPUBLISHED,
                world_size=world_size(group),
                strategy=strategy,
                versions=_versions(),
                groups=groups,
                values=values,
                extra=extra,
                ties=merge_ties([ties for _, _, ties in unpacked]),
            )
        writer = ChecksummedWriter(partial)
        planner: SavePlanner
        with gc_paused():
            planner, planned = _plan(
                {**state.tensors, **get_rng_state(group)}, optimizer, writer, failed, group
            )
        if async_:
            with raise_on_all_ranks(failed, group):
                planner = StagedPlanner(planner, planned.plan, optimizer)
        job = _Save(
            partial=partial,
            final=final,
            keep=keep,
            writer=writer,
            planner=planner,
            planned=planned,
            optimizer=weakref.ref(optimizer),
            manifest=manifest,
            started=started,
        )
        if async_:
            async_save.start(job.run, async_save.borrow_group(group))
        else:
            job.run(group)
    return given / final.name


@dataclass
class _Save:
    """A planned save. It reads model and optimizer only through ``planner``."""

    partial: Path
    final: Path
    keep: int | None
    writer: ChecksummedWriter
    planner: SavePlanner
    planned: PlannedSave
    optimizer: weakref.ref[torch.optim.Optimizer]
    manifest: Manifest | None  # on rank 0
    started: float  # time.monotonic() when save() was called

    def run(self, group: Group) -> None:
        """Write and publish. Collective over ``group``.

        Raises:
            RuntimeError: a rank could not write.
        """
        failed = f"cannot save the checkpoint {self.final}"
        with abandon_on_error([self.partial]):
            try:
                with raise_on_all_ranks(failed, group):
                    plan = self.planned.plan
                    results = self.writer.write_data(plan, self.planner).wait()
                    locations = to_locations(plan, results)
            finally:
                if isinstance(self.planner, StagedPlanner):
                    self.planner.give_back()
            with gc_paused():  # all ranks have written, so no rank waits long for another
                gathered = gather_object((locations, self.writer.files), group)
            with raise_on_all_ranks(failed, group):
                if rank(group) == 0:
                    self._finish([each for each, _ in gathered], [files for _, files in gathered])
        optimizer = self.optimizer()
        if optimizer is not None:
            plan_cache.store_plan(optimizer, self.planned)

    def _finish(self, locations: list[Locations], files: list[dict[str, FileRecord]]) -> None:
        assert self.planned.to_chunks is not None and self.manifest is not None
        check_files_visible(self.partial, files)
        with gc_paused():
            self.writer.write_metadata(self.planned.to_chunks(locations))
        self.manifest.files = {
            name: record for part in [*files, self.writer.files] for name, record in part.items()
        }
        publish(self.partial, self.final, self.manifest)
        logger.info(
            "published checkpoint %s (%d bytes) %.1f s after the call of save()",
            self.final,
            sum(record.bytes for record in self.manifest.files.values()),
            time.monotonic() - self.started,
        )
        remove_older(self.final, self.manifest, self.keep)
        release(self.partial)


def _plan(
    tensors: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    writer: ChecksummedWriter,
    failed: str,
    group: Group,
) -> tuple[DefaultSavePlanner, PlannedSave]:
    """Plan what each rank writes. Replicas are written once, spread over the ranks. Collective.

    Reuse the plan of the optimizer's last save if no rank's layout has changed since.

    Returns:
        The planner of ``tensors``, and this rank's plan.
    """
    planner = DefaultSavePlanner()
    is_first = rank(group) == 0
    with raise_on_all_ranks(failed, group):
        planner.set_up_planner(tensors, storage_meta=writer.storage_meta(), is_coordinator=is_first)
        writer.set_up_storage_writer(is_first, rank=rank(group), use_collectives=True)
        layout = plan_cache.layout_of(tensors, group)
        cached = plan_cache.pop_plan(optimizer, layout)
    identities = set(all_gather_object(cached and cached.identity, group))
    if cached is not None and len(identities) == 1:
        planner.finish_plan(cached.plan)
        return planner, cached
    with raise_on_all_ranks(failed, group):
        local_plan = writer.prepare_local_plan(planner.create_local_plan())
        table = to_table(local_plan)
    tables = gather_object(table, group)
    to_scatter: list[tuple[str, Assignment | SavePlan]] = []
    to_chunks = None
    with raise_on_all_ranks(failed, group):
        if is_first:
            assignments, to_chunks = merge_plans(tables, planner, writer.prepare_global_plan)
            identity = uuid.uuid4().hex
            to_scatter = [(identity, assignment) for assignment in assignments]
    identity, assignment = scatter_object(to_scatter, group)
    plan = planner.finish_plan(to_assigned(local_plan, assignment))
    return planner, PlannedSave(layout, identity, plan, to_chunks)


def _integer(value: Any) -> int:
    """Return an integer, such as one of numpy's, as an int; return -1 for any other value."""
    try:
        return int(operator.index(value))
    except TypeError:
        return -1


def _copy_extra(extra: Any) -> dict[str, Any]:
    """Check ``extra``, and return a copy, since the caller may change it while a thread writes."""
    if extra is None:
        return {}
    if not isinstance(extra, dict):
        raise ValueError(
            "extra must be a dict of plain data, but it is of type "
            f"{type(extra).__name__}; put it into a dict"
        )
    try:
        copy: dict[str, Any] = json.loads(json.dumps(extra))
    except (TypeError, ValueError) as error:
        raise ValueError(f"extra must be plain data that JSON can hold: {error}") from error
    for change in _json_changes("extra", extra, copy):
        raise ValueError(
            f"extra must be plain data that JSON does not change: {change}; use strings as keys"
        )
    return copy


def _json_changes(place: str, value: Any, copy: Any) -> Iterator[str]:
    """Yield values that do not round-trip through JSON: dicts with keys other than strings.

    Tuples may become lists. NaN round-trips, although it differs from itself.
    """
    if isinstance(value, dict) and value.keys() == copy.keys():
        for key in value:
            yield from _json_changes(f"{place}[{key!r}]", value[key], copy[key])
    elif isinstance(value, (list, tuple)):
        for index, (item, other) in enumerate(zip(value, copy, strict=True)):
            yield from _json_changes(f"{place}[{index}]", item, other)
    elif value != copy and value == value:
        yield f"{place} is {reprlib.repr(value)} but would come back as {reprlib.repr(copy)}"


def _encode(values: dict[str, Any]) -> dict[str, Any]:
    result = {}
    for key, value in values.items():
        try:
            result[key] = encode(value)
        except TypeError as error:
            raise ValueError(
                f"{key} cannot be saved: {error}; use tensors and plain data"
            ) from None
    return result


def _versions() -> dict[str, str]:
    from .. import __version__

    return {"torch": torch.__version__, "sharded_bf16_adamw": __version__}
