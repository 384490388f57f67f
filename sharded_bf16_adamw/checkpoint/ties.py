"""Tied names: a save records them, and a load adapts the checkpoint to the model's ties.

Tied names share one tensor and one optimizer state. A checkpoint has the state under the first
name, and the weight under each. If the model's ties differ from those saved::

    tied only in the checkpoint:  head.weight reads the state saved under emb.weight
    tied only in the model:       loads cleanly only if both names have bitwise equal values
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..names import clean_fqn, flat_params, named_tensors, unwrap
from ..sharding.dtensor import to_local
from .chunk_table import ChunkTable
from .extra_state import MODEL, STATE, is_wrapper_subclass
from .manifest import Manifest, ParamGroup
from .object_collectives import Group, gather_object
from .rank_errors import call_on_rank_0
from .rank_names import RankNames
from .reader import CheckpointReader

Pair = tuple[str, str]  # two names whose saved values are compared


def find_ties(model: nn.Module, rank_names: RankNames) -> list[list[str]]:
    """Return the model's sets of tied names, as names in a checkpoint.

    The first name of each set has the state. Buffers that share memory also count as tied.
    """
    model = unwrap(model)
    ties: dict[Any, list[str]] = {}
    for name, tensor in named_tensors(model):
        ties.setdefault(_identity(tensor), []).append(clean_fqn(model, name))
    for prefix, flat_param in flat_params(model):
        for info in flat_param._shared_param_infos:
            first, other = (
                clean_fqn(model, prefix + (f"{path}.{name}" if path else name))
                for path, name in (
                    (info.prim_module_name, info.prim_param_name),
                    (info.module_name, info.param_name),
                )
            )
            names = ties.setdefault(("flat", first), [first])
            names += [other] if other not in names else []
    return _merge_overlapping([list(map(rank_names.to_saved, names)) for names in ties.values()])


def merge_ties(ties_of_ranks: list[list[list[str]]]) -> list[list[str]]:
    """Merge the ties of all ranks, which may hold different parts of the model."""
    return _merge_overlapping(names for ties in ties_of_ranks for names in ties)


def align_ties(
    folder: Path,
    table: ChunkTable,
    manifest: Manifest,
    model: nn.Module,
    names: RankNames,
    group: Group,
) -> list[str]:
    """Rewrite ``table`` and ``manifest`` as if saved with the ties of ``model``. Collective.

    Args:
        folder: the checkpoint's directory.
        table: the checkpoint's tensors; changed in place.
        manifest: its manifest; changed in place.
        model: the module to load into.
        names: this rank's names in the checkpoint.
        group: the ranks that load.

    Returns:
        A sentence without a full stop for each pair of names that are tied in the model but were
        saved with different values. The rewritten table points both to the first name's values.
    """
    ties = find_ties(model, names)
    saved = _SavedNames(table, manifest)
    ties_of = {name: tied for tied in ties for name in tied}
    affected = {
        id(tied): tied
        for name in _all_names(unwrap(model), names)
        if name in saved.ties_of
        for tied in [ties_of.get(name, [name])]
    }
    affected.update({id(tied): tied for tied in ties})
    targets = list(affected.values())
    sources_of_targets = [saved.sources_of(target) for target in targets]
    pairs = [(sources[0][0], other[0]) for sources in sources_of_targets for other in sources[1:]]
    pairs_of_ranks = gather_object(pairs, group)
    different = call_on_rank_0(
        f"cannot compare tied names in the checkpoint {folder}",
        lambda: _differences(
            folder, manifest, {pair for pairs in pairs_of_ranks for pair in pairs}
        ),
        group,
    )
    for target, sources in zip(targets, sources_of_targets, strict=True):
        if sources:
            saved.redirect(target, sources)
    saved.rewrite()
    return [
        f"{first} and {other} are tied in the model but were saved with different "
        f"{different[first, other]} (strict=False takes those of {first})"
        for first, other in pairs
        if (first, other) in different
    ]


class _SavedNames:
    """The names saved in a checkpoint, and the changes that give them the model's ties.

    Attributes:
        ties_of: maps each tied name to all names that it was tied to when saved.
    """

    def __init__(self, table: ChunkTable, manifest: Manifest) -> None:
        self._tensors, self._manifest = table.tensors, manifest
        self.ties_of = {name: tied for tied in manifest.ties or [] for name in tied}
        self._states = _states_by_name(table.tensors, manifest)
        self._renamed: dict[str, str] = {}  # new key -> key on disk
        self._holders: dict[str, str] = {}  # name in the model -> name on disk with its state
        self._touched: set[str] = set()

    def sources_of(self, names: list[str]) -> list[list[str]]:
        """Return the sets of names tied when saved that contain one of ``names``.

        Each set starts with the first of ``names`` in it. Names without saved values have no set.
        """
        sources: dict[tuple[str, ...], list[str]] = {}
        for name in names:
            if MODEL + name in self._tensors:
                tied = self.ties_of.get(name, [name])
                others = [other for other in tied if other != name]
                sources.setdefault(tuple(tied), [name, *others])
        return list(sources.values())

    def redirect(self, names: list[str], sources: list[list[str]]) -> None:
        """Make the model's tied ``names`` read the values saved under the first of ``sources``."""
        with_state = [name for source in sources for name in source if name in self._states]
        # If ties were not recorded, tied names look like untied names, one of which has a state.
        is_recorded = self._manifest.ties is not None
        holder = next(
            (name for name in with_state if name in sources[0] or not is_recorded), sources[0][0]
        )
        self._touched |= {*names, *(name for source in sources for name in source)}
        self._holders[names[0]] = holder
        for state in self._states.get(holder, []):
            self._renamed[f"{STATE}{names[0]}.{state}"] = f"{STATE}{holder}.{state}"
        if len(sources) > 1:
            for name in (name for source in sources for name in source if name in names):
                self._renamed[MODEL + name] = MODEL + sources[0][0]

    def rewrite(self) -> None:
        """Apply the redirections to the table and the manifest."""
        entries, values = self._tensors, self._manifest.values
        old = {
            f"{STATE}{name}.{state}"
            for name in self._touched
            for state in self._states.get(name, [])
        }
        renamed = self._renamed.items()
        new_entries = {key: entries[source] for key, source in renamed if source in entries}
        new_values = {key: values[source] for key, source in renamed if source in values}
        unchanged = {key for key, source in renamed if key == source}
        for key in (old | self._renamed.keys()) - unchanged:
            entries.pop(key, None)
            values.pop(key, None)
        entries.update(new_entries)
        values.update(new_values)
        self._manifest.groups = [
            ParamGroup(
                [name for name in group.params if name not in self._touched]
                + [name for name, holder in self._holders.items() if holder in group.params],
                group.options,
            )
            for group in self._manifest.groups
        ]


def _all_names(model: nn.Module, rank_names: RankNames) -> list[str]:
    """Return the checkpoint's names of all parameters and buffers, also in flat parameters."""
    names = [name for name, _ in named_tensors(model)]
    names += [prefix + name for prefix, flat in flat_params(model) for name in flat._fqns]
    return list(dict.fromkeys(rank_names.to_saved(clean_fqn(model, name)) for name in names))


def _identity(tensor: Tensor) -> Any:
    local = to_local(tensor)
    if (
        isinstance(tensor, nn.Parameter)
        or tensor.is_meta
        or is_wrapper_subclass(tensor)
        or local.layout != torch.strided
        or not local.numel()
    ):
        return id(tensor)
    return (local.device, local.data_ptr(), local.dtype, tuple(tensor.shape), local.stride())


def _merge_overlapping(ties: Iterable[list[str]]) -> list[list[str]]:
    """Merge sets that share a name. Drop sets of a single name."""
    merged: dict[str, list[str]] = {}
    for names in ties:
        known = (merged[name] for name in names if name in merged)
        union = list(dict.fromkeys(chain(*known, names)))
        merged.update(dict.fromkeys(union, union))
    unique = {id(names): names for names in merged.values()}
    return [names for names in unique.values() if len(names) > 1]


def _states_by_name(keys: Iterable[str], manifest: Manifest) -> dict[str, list[str]]:
    """Return ``{"layer.weight": ["step", "exp_avg", ...]}`` for the parameters with a state."""
    states: dict[str, list[str]] = {}
    for key in (*keys, *manifest.values):
        if key.startswith(STATE):
            name, _, state = key.removeprefix(STATE).rpartition(".")
            states.setdefault(name, []).append(state)
    return states


def _differences(folder: Path, manifest: Manifest, pairs: set[Pair]) -> dict[Pair, str]:
    """Return which values differ, for each pair of names whose saved values differ."""
    if not pairs:
        return {}
    reader = CheckpointReader(folder)
    states = _states_by_name(reader.infos, manifest)
    holders = {
        name: other
        for tied in manifest.ties or []
        for name in tied
        for other in tied
        if other in states
    }
    different = {}
    for pair in pairs:
        first, other = (holders.get(name, name) for name in pair)
        if not _saved_equal(reader, MODEL + pair[0], MODEL + pair[1]):
            different[pair] = "weights"
        elif manifest.ties is None and (first in states) != (other in states):
            continue  # ties were not recorded; equal weights and one state show that they were tied
        elif set(states.get(first, [])) != set(states.get(other, [])):
            different[pair] = "states: one was trained and the other was not"
        elif not all(
            _saved_equal(reader, f"{STATE}{first}.{state}", f"{STATE}{other}.{state}")
            for state in states.get(first, [])
        ):
            different[pair] = "optimizer states"
    return different


def _saved_equal(reader: CheckpointReader, key: str, other: str) -> bool:
    if key not in reader.infos or other not in reader.infos:
        values = reader.manifest.values
        return key in values and other in values and bool(values[key] == values[other])
    return reader.infos[key] == reader.infos[other] and bitwise_equal(
        reader.read(key), reader.read(other)
    )


def bitwise_equal(a: Tensor, b: Tensor) -> bool:
    """Return True if two tensors have the same shape, dtype and bits. NaN equals itself."""
    bits = (x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*bits)
