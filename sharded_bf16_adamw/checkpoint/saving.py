"""Write a checkpoint: plan on all ranks, write in parallel, and let it appear at once when everything is on the disk."""

from __future__ import annotations

import json
import operator
import os
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

from . import async_save
from .commit import (
    UNPUBLISHED,
    abandoned_on_error,
    begin,
    check_arrived,
    check_shared,
    publish,
    release,
    remove_older,
)
from .dcp_storage import ChecksummedWriter
from .divergence import resolve_divergence
from .manifest import FileRecord, Manifest, ParamGroup
from .plain import encode
from .rank_errors import (
    Group,
    as_path,
    check_group,
    gather_on_rank_0,
    on_rank_0,
    raise_on_all_ranks,
    rank,
    same_on_every_rank,
    scatter_from_rank_0,
    world_size,
)
from .rank_names import RankNames
from .staging import Staged
from .state_dict import contents, describe_strategy, merged, rng_contents
from .ties import merge_ties, find_ties
from .torch_state import check_model_and_optimizer


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
    """Save a checkpoint to a new folder ``root/step-<step>``. Collective: every rank of ``group`` calls it with the same arguments (of
    ``step``, ``extra`` and ``keep`` those of its first rank count).

    Files are written under another name, flushed to the disk, and renamed into place when all ranks are done; then ``LATEST`` is replaced
    and older checkpoints are removed. Wherever a save fails or is killed, the previous checkpoint stays the latest (or, in its last
    moments, the new one is), and the next save removes what is left of it.

    Before anything is written, every rank must see ``root`` as rank 0 does. Before the checkpoint
    is published, rank 0 must see every file. An older checkpoint that cannot be removed is a warning.

    Args:
        root: folder of all checkpoints of one run, on a file system that every rank sees. While a
            save is under way, another one to the same root raises; where the file system has no
            locks, neither harms the other.
        step: position of the run, not negative. Saving a step again (a run that was resumed from an earlier one comes by) replaces the
            older save of it; the new folder has a name of its own, such as ``step-00000200-2``.
        model: the module, wrapped by DDP or FSDP or not at all.
        optimizer: the optimizer of its parameters.
        extra: a dict of plain data that :func:`load` gives back, such as the position in the data: what JSON holds, with strings for keys.
            Tuples come back as lists.
        keep: how many checkpoints to keep, the last saved first; None keeps all.
        async_: return once this rank's part has been copied to CPU memory, and write in a thread.
            Training may go on at once. The next ``save`` or ``load`` of this thread, or
            :func:`wait_for_save`, waits for it and raises its error. Call :func:`wait_for_save`
            before ``dist.destroy_process_group()``. The memory of the copy is kept for the optimizer's next save.
        group: the ranks that hold the model, where several models share a job; None for all ranks.
        on_divergence: what to do where replicas of a tensor differ between ranks, such as the running statistics of BatchNorm:
            ``"raise"``, or ``"first"`` to save the replica of the first rank, with a warning.

    Returns:
        The checkpoint's folder; with ``async_`` what it will be.

    Raises:
        ValueError: an argument is not as above, ranks give different roots, a rank does not see
            ``root`` as the first rank does, or tensors of one name differ between ranks that
            ``AdamW_BF16(..., model_parallel=...)`` does not tell apart; nothing is written.
        RuntimeError: a rank could not write, rank 0 does not see what a rank wrote, another save to
            ``root`` is under way, or the asynchronous save before failed; earlier checkpoints are
            untouched.
    """
    async_save.wait_for_own_saves()
    check_group(group)
    cannot = f"cannot save a checkpoint in {root}"
    with raise_on_all_ranks(cannot, group):
        given = as_path("root", root)
        root = given.absolute()  # the program may change its folder while a thread writes
        check_model_and_optimizer("save(root, step, model, optimizer)", model, optimizer)
        if on_divergence not in ("raise", "first"):
            raise ValueError(f"Invalid on_divergence: {on_divergence!r}; choose 'raise' or 'first'")
    same_on_every_rank({"the folder to save in": str(given), "async_": bool(async_)}, group)

    def prepare() -> tuple[Any, ...]:
        position = _integer(step)
        if position < 0:
            raise ValueError(f"Invalid step: {step!r}; it must be an integer that is not negative")
        if keep is not None and _integer(keep) < 1:
            raise ValueError(
                f"Invalid keep: {keep!r}; it must be an integer of at least 1, or None"
            )
        copy = _copy_of(extra)
        begun.append((folders := begin(root, position))[0])
        return position, copy, *(folder.name for folder in folders)

    begun: list[Path] = []  # on rank 0
    with abandoned_on_error(begun):
        step, extra, *folders = on_rank_0(cannot, prepare, group)
        partial, final = (root / name for name in folders)
        cannot = f"cannot save the checkpoint {given / final.name}"
        with raise_on_all_ranks(cannot, group):
            check_shared(root, partial, rank(group))
            names = RankNames(model, optimizer)
        names.number_experts()
        with raise_on_all_ranks(cannot, group):
            found = contents(model, optimizer, names)
        found = resolve_divergence(found, names, group, on_divergence)
        with raise_on_all_ranks(cannot, group):
            own_groups = [ParamGroup(params, _encoded(options)) for params, options in found.groups]
            own_values, strategy = _encoded(found.plain), describe_strategy(model, optimizer)
            ties = find_ties(model, names)
        of_each = gather_on_rank_0((own_groups, own_values, ties), group)
        manifest = None
        if rank(group) == 0:
            groups = merged([groups for groups, _, _ in of_each])
            values = {
                key: value for _, values, _ in reversed(of_each) for key, value in values.items()
            }
            manifest = Manifest(
                step, UNPUBLISHED, world_size(group), strategy, _versions(), groups, values, extra
            )
            manifest.ties = merge_ties([ties for _, _, ties in of_each])
        writer = ChecksummedWriter(partial)
        planner: SavePlanner
        planner, plan, metadata = _plan(
            {**found.tensors, **rng_contents(group)}, writer, final, group
        )
        if async_:
            with raise_on_all_ranks(cannot, group):
                planner = Staged(planner, plan, optimizer)
        job = _Save(partial, final, keep, writer, planner, plan, metadata, manifest)
        if async_:
            async_save.start(job.run, async_save.borrow_group(group))
        else:
            job.run(group)
    return given / final.name


@dataclass
class _Save:
    """A save that is planned: all that remains is to write. It needs no more of model and optimizer than ``planner`` gives out."""

    partial: Path
    final: Path
    keep: int | None
    writer: ChecksummedWriter
    planner: SavePlanner
    plan: SavePlan
    metadata: Metadata | None  # on rank 0
    manifest: Manifest | None  # on rank 0

    def run(self, group: Group) -> None:
        """Collective over ``group``.

        Raises:
            RuntimeError: a rank could not write.
        """
        with abandoned_on_error([self.partial]):
            try:
                with raise_on_all_ranks(f"cannot save the checkpoint {self.final}", group):
                    results = self.writer.write_data(self.plan, self.planner).wait()
            finally:
                if isinstance(self.planner, Staged):
                    self.planner.give_back()
            gathered = gather_on_rank_0((results, self.writer.files), group)
            with raise_on_all_ranks(f"cannot save the checkpoint {self.final}", group):
                if rank(group) == 0:
                    self._finish(
                        [results for results, _ in gathered], [files for _, files in gathered]
                    )

    def _finish(self, results: list[Any], files: list[dict[str, FileRecord]]) -> None:
        assert self.metadata is not None and self.manifest is not None
        check_arrived(self.partial, files)
        self.writer.finish(self.metadata, results)
        self.manifest.files = {
            name: record for part in [*files, self.writer.files] for name, record in part.items()
        }
        publish(self.partial, self.final, self.manifest)
        remove_older(self.final, self.manifest, self.keep)
        release(self.partial)


def _plan(
    tensors: dict[str, Any], writer: ChecksummedWriter, final: Path, group: Group
) -> tuple[DefaultSavePlanner, SavePlan, Metadata | None]:
    """Agree on who writes what: replicas are written once, by ranks in turn. Collective.

    Returns:
        The planner, which knows the tensors; what this rank writes; and on rank 0 the metadata, which lacks the places in files.
    """
    planner, cannot = DefaultSavePlanner(), f"cannot save the checkpoint {final}"
    is_first = rank(group) == 0
    with raise_on_all_ranks(cannot, group):
        planner.set_up_planner(tensors, storage_meta=writer.storage_meta(), is_coordinator=is_first)
        writer.set_up_storage_writer(is_first, rank=rank(group), use_collectives=True)
        local_plan = writer.prepare_local_plan(planner.create_local_plan())
    plans = gather_on_rank_0(local_plan, group)
    metadata = None
    with raise_on_all_ranks(cannot, group):
        if is_first:
            plans, metadata = planner.create_global_plan(plans)
            plans = writer.prepare_global_plan(plans)
    return planner, planner.finish_plan(scatter_from_rank_0(plans, group)), metadata


def _integer(value: Any) -> int:
    """What stands for an integer (also numpy's) as Python's own, and -1 for anything else."""
    try:
        return int(operator.index(value))
    except TypeError:
        return -1


def _copy_of(extra: Any) -> dict[str, Any]:
    """The caller may change the original while a thread writes."""
    if extra is None:
        return {}
    if not isinstance(extra, dict):
        raise ValueError(
            f"extra must be a dict of plain data, but it is of type {type(extra).__name__}; put it into a dict"
        )
    try:
        copy: dict[str, Any] = json.loads(json.dumps(extra))
    except (TypeError, ValueError) as error:
        raise ValueError(f"extra must be plain data that JSON can hold: {error}") from error
    for change in _changes("extra", extra, copy):
        raise ValueError(
            f"extra must be plain data that JSON gives back as it was: {change}; use strings as keys"
        )
    return copy


def _changes(place: str, value: Any, copy: Any) -> Iterator[str]:
    """What JSON made something else of: dicts with keys that are no strings. Tuples may become lists, and NaN stays what it is."""
    if isinstance(value, dict) and value.keys() == copy.keys():
        for key in value:
            yield from _changes(f"{place}[{key!r}]", value[key], copy[key])
    elif isinstance(value, (list, tuple)):
        for index, (item, other) in enumerate(zip(value, copy, strict=True)):
            yield from _changes(f"{place}[{index}]", item, other)
    elif value != copy and value == value:
        yield f"{place} is {reprlib.repr(value)} but would come back as {reprlib.repr(copy)}"


def _encoded(values: dict[str, Any]) -> dict[str, Any]:
    result = {}
    for key, value in values.items():
        try:
            result[key] = encode(value)
        except TypeError as error:
            raise ValueError(
                f"{key} cannot be saved: {error}; only tensors and plain data can"
            ) from None
    return result


def _versions() -> dict[str, str]:
    from .. import __version__

    return {"torch": torch.__version__, "sharded_bf16_adamw": __version__}
