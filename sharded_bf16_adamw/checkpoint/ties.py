"""Names that are one tensor: recorded by a save, and brought to the model's own ties by a load.

Tied names have one weight and one state, filed under the first of them, but each name has a copy of the weight on disk. A load into
a model that is tied otherwise reads each parameter from where its values lie::

    saved tied, untied here:  head.weight's state is read from that of emb.weight
    saved untied, tied here:  right only if both names were saved with the same bits, weights and states
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata

from ..sharding.dtensor import to_local
from .manifest import Manifest, ParamGroup
from .names import flat_params, named_tensors, plain_name, unwrapped
from .odd_values import MODEL, is_wrapper
from .rank_errors import Group, call_on_rank_0, gather_object
from .rank_names import RankNames
from .reader import StoredCheckpoint

STATE = "optimizer.state."
Pair = tuple[str, str]  # names of which the values on disk are compared


def ties_of(model: nn.Module, rank_names: RankNames) -> list[list[str]]:
    """Return the names in a checkpoint that are one tensor of the model, also of buffers that share memory; the first holds the
    state."""
    model = unwrapped(model)
    classes: dict[Any, list[str]] = {}
    for name, tensor in named_tensors(model):
        classes.setdefault(_identity(tensor), []).append(plain_name(model, name))
    for dot, flat_param in flat_params(model):
        for info in flat_param._shared_param_infos:
            first, other = (
                plain_name(model, dot + (f"{path}.{name}" if path else name))
                for path, name in (
                    (info.prim_module_name, info.prim_param_name),
                    (info.module_name, info.param_name),
                )
            )
            names = classes.setdefault(("flat", first), [first])
            names += [other] if other not in names else []
    return _merged([list(map(rank_names.stored, names)) for names in classes.values()])


def _names(model: nn.Module, rank_names: RankNames) -> list[str]:
    """Return the names in a checkpoint of all parameters and buffers, those within FSDP1's flat parameters too."""
    names = [name for name, _ in named_tensors(model)]
    names += [dot + name for dot, flat_param in flat_params(model) for name in flat_param._fqns]
    return list(dict.fromkeys(rank_names.stored(plain_name(model, name)) for name in names))


def _identity(tensor: Tensor) -> Any:
    local = to_local(tensor)
    if (
        isinstance(tensor, nn.Parameter)
        or tensor.is_meta
        or is_wrapper(tensor)
        or local.layout != torch.strided
        or not local.numel()
    ):
        return id(tensor)
    return (local.device, local.data_ptr(), local.dtype, tuple(tensor.shape), local.stride())


def _merged(classes: Iterable[list[str]]) -> list[list[str]]:
    """Those of more than one name, each class once."""
    found: dict[str, list[str]] = {}
    for names in classes:
        known = next((found[name] for name in names if name in found), [])
        known += [name for name in dict.fromkeys(names) if name not in known]
        found.update(dict.fromkeys(known, known))
    return [
        names for names in {id(names): names for names in found.values()}.values() if len(names) > 1
    ]


def merged_ties(ties_of_ranks: list[list[list[str]]]) -> list[list[str]]:
    """Return the ties of all ranks, which may hold different parts of the model."""
    return _merged(names for ties in ties_of_ranks for names in ties)


def align_ties(
    folder: Path,
    metadata: Metadata,
    manifest: Manifest,
    model: nn.Module,
    names: RankNames,
    group: Group,
) -> list[str]:
    """Rewrite ``metadata`` and ``manifest`` as if the checkpoint had been saved with the ties of ``model``. Collective.

    Args:
        names: what the checkpoint calls this rank's tensors.
        group: the ranks that load.

    Returns:
        A sentence without a full stop for each pair of names that is one tensor here but was saved with different values; the
        rewritten metadata has those of the first name.
    """
    here, own = ties_of(model, names), _names(unwrapped(model), names)
    saved = _Saved(metadata, manifest)
    tied_here = {name: tied for tied in here for name in tied}
    affected = {
        id(tied): tied
        for name in own
        if name in saved.ties
        for tied in [tied_here.get(name, [name])]
    }
    affected.update({id(tied): tied for tied in here})
    classes = list(affected.values())
    sources = [saved.classes(tied) for tied in classes]
    pairs = [(ones[0][0], other[0]) for ones in sources for other in ones[1:]]
    of_ranks = gather_object(pairs, group)
    cannot = f"cannot compare tied names in the checkpoint {folder}"
    different = call_on_rank_0(
        cannot,
        lambda: _different(folder, manifest, {pair for pairs in of_ranks for pair in pairs}),
        group,
    )
    for tied, ones in zip(classes, sources, strict=True):
        if ones:
            saved.take(tied, ones)
    saved.rewrite()
    return [
        f"{first} and {other} are one tensor here but were saved as two with different {different[first, other]} "
        f"(strict=False takes those of {first})"
        for first, other in pairs
        if (first, other) in different
    ]


class _Saved:
    """The keys of a checkpoint by the names of tensors, and how they are to be renamed."""

    def __init__(self, metadata: Metadata, manifest: Manifest) -> None:
        self._metadata, self._manifest = metadata, manifest
        self.ties = {name: names for names in manifest.ties or [] for name in names}
        self._states = _states(metadata.state_dict_metadata, manifest)
        self._renamed: dict[str, str] = {}  # new key -> the key that is on disk
        self._holders: dict[str, str] = {}  # name here -> the name under which its state was saved
        self._touched: set[str] = set()

    def classes(self, names: list[str]) -> list[list[str]]:
        """The classes of saved names that ``names`` belong to, each in the order of ``names`` and with one that is saved first."""
        found: dict[tuple[str, ...], list[str]] = {}
        for name in names:
            if MODEL + name in self._metadata.state_dict_metadata:
                names_of = self.ties.get(name, [name])
                found.setdefault(
                    tuple(names_of), [name, *(other for other in names_of if other != name)]
                )
        return list(found.values())

    def take(self, names: list[str], sources: list[list[str]]) -> None:
        """Let the class ``names`` here have the values of the first of its ``sources``."""
        with_state = [name for source in sources for name in source if name in self._states]
        recorded = (
            self._manifest.ties is not None
        )  # else names that were tied look like two, of which one has no state
        holder = next(
            (name for name in with_state if name in sources[0] or not recorded), sources[0][0]
        )
        self._touched |= {*names, *(name for source in sources for name in source)}
        self._holders[names[0]] = holder
        for suffix in self._states.get(holder, []):
            self._renamed[f"{STATE}{names[0]}.{suffix}"] = f"{STATE}{holder}.{suffix}"
        if len(sources) > 1:
            for source in sources:
                for name in source:
                    if name in names:
                        self._renamed[MODEL + name] = MODEL + sources[0][0]

    def rewrite(self) -> None:
        entries, values = self._metadata.state_dict_metadata, self._manifest.values
        old = {
            f"{STATE}{name}.{suffix}"
            for name in self._touched
            for suffix in self._states.get(name, [])
        }
        new_entries = {
            key: entries[source] for key, source in self._renamed.items() if source in entries
        }
        new_values = {
            key: values[source] for key, source in self._renamed.items() if source in values
        }
        gone = (old | self._renamed.keys()) - {
            key for key, source in self._renamed.items() if key == source
        }
        places: dict[str, list[tuple[Any, Any]]] = {}
        for index, place in self._metadata.storage_data.items():
            places.setdefault(index.fqn, []).append((index, place))
        for key in gone:
            entries.pop(key, None)
            values.pop(key, None)
            for index, _ in places.get(key, []):
                del self._metadata.storage_data[index]
        entries.update(new_entries)
        values.update(new_values)
        for key, source in self._renamed.items():
            self._metadata.storage_data.update(
                {replace(index, fqn=key): place for index, place in places.get(source, [])}
            )
        self._rewrite_groups()

    def _rewrite_groups(self) -> None:
        groups = []
        for group in self._manifest.groups:
            kept = [name for name in group.params if name not in self._touched]
            taken = [name for name, holder in self._holders.items() if holder in group.params]
            groups.append(ParamGroup(kept + taken, group.options))
        self._manifest.groups = groups


def _states(keys: Iterable[str], manifest: Manifest) -> dict[str, list[str]]:
    """``{"layer.weight": ["step", "exp_avg", ...]}`` of the parameters that have a state."""
    result: dict[str, list[str]] = {}
    for key in (*keys, *manifest.values):
        if key.startswith(STATE):
            name, _, suffix = key.removeprefix(STATE).rpartition(".")
            result.setdefault(name, []).append(suffix)
    return result


def _different(folder: Path, manifest: Manifest, pairs: set[Pair]) -> dict[Pair, str]:
    """Compare what was saved under two names, and say of the pairs that differ in what they do."""
    if not pairs:
        return {}
    stored = StoredCheckpoint(folder)
    states = _states(stored.infos, manifest)
    holders = {
        name: other
        for names in manifest.ties or []
        for name in names
        for other in names
        if other in states
    }
    result = {}
    for pair in pairs:
        first, other = (holders.get(name, name) for name in pair)
        if not _same(stored, MODEL + pair[0], MODEL + pair[1]):
            result[pair] = "weights"
        elif manifest.ties is None and (first in states) != (other in states):
            continue  # a save without a record: the weights are the same bits, so they were tied
        elif set(states.get(first, [])) != set(states.get(other, [])):
            result[pair] = "states: one was trained and the other was not"
        elif not all(
            _same(stored, f"{STATE}{first}.{suffix}", f"{STATE}{other}.{suffix}")
            for suffix in states.get(first, [])
        ):
            result[pair] = "optimizer states"
    return result


def _same(stored: StoredCheckpoint, key: str, other: str) -> bool:
    if key not in stored.infos or other not in stored.infos:
        values = stored.manifest.values
        return key in values and other in values and bool(values[key] == values[other])
    return stored.infos[key] == stored.infos[other] and same_bits(
        stored.read(key), stored.read(other)
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same shape, dtype and bits; NaN equals itself."""
    bits = (x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*bits)
