"""Names in a checkpoint of what a rank holds alone: experts and pipeline stages that every rank names alike.

A checkpoint has one name for each tensor, a rank's model has names that are unique on that rank only::

    rank 0 of ep: moe.experts.0.weight, moe.experts.1.weight      ->  moe.experts.0.weight, moe.experts.1.weight
    rank 1 of ep: moe.experts.0.weight, moe.experts.1.weight      ->  moe.experts.2.weight, moe.experts.3.weight
    rank 1 of ep: moe.w1 (no ModuleList: nothing says how experts are numbered)  ->  moe.w1@ep1
    stage 1 of pp: layers.0.weight, unlike that of stage 0        ->  layers.0.weight@pp1

Where one layer needs its stage in its name, all layers of that list get it: a number that only one stage has would else be taken
for a global one by a pipeline that is cut elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..sharding.model_parallel import ModelParallel
from .names import has_fsdp1, named_tensors, plain_name, unwrapped
from .odd_values import EXTRA_STATE


class RankNames:
    """The names in checkpoints of one rank's tensors, once :meth:`number_experts` was called.

    Args:
        model: the module, wrapped or not.
        optimizer: whose ``model_parallel`` says what differs between ranks; others than ours have none.

    Raises:
        ValueError: a module or parameter named as an expert is not part of the model.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        parallel = getattr(optimizer, "model_parallel", None)
        self._is_ours = hasattr(optimizer, "model_parallel")
        self._parallel: ModelParallel = (
            parallel if isinstance(parallel, ModelParallel) else ModelParallel()
        )
        self._prefixes, self._exact = _find_experts(model, self._parallel)
        self._of_stage: set[str] = set()
        self._lists_of_stage: set[str] = set()  # prefixes, such as "layers."
        self._fqns = _names_of(unwrapped(model))
        if has_fsdp1(model) and (
            self._parallel.pp_group is not None or self._parallel.ep_group is not None
        ):
            raise ValueError(
                "FullyShardedDataParallel (FSDP1) over a part of the ranks does not say which; use fully_shard (FSDP2) beside "
                "ModelParallel(pp=..., ep=...)"
            )
        self._local: dict[str, str] | None = None
        group = self._parallel.ep_group
        self._ep_rank = 0 if group is None else dist.get_rank(group)
        self._offsets = dict.fromkeys(self._prefixes, 0)

    def number_experts(self) -> None:
        """Learn how many experts the ranks before this one have. Collective over the expert group, if there is one."""
        group = self._parallel.ep_group
        self._local = None
        if group is not None:
            counts: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(counts, self._prefixes, group=group)
            for before in counts[: self._ep_rank]:
                for prefix in self._prefixes:
                    self._offsets[prefix] += before.get(prefix) or 0

    @property
    def must_be_the_same(self) -> bool:
        """Return whether all ranks must have parameters of the same names: an optimizer of ours for which nothing else is said."""
        return self._is_ours and self._parallel.pp_group is None and self._parallel.ep_group is None

    @property
    def stage(self) -> int | None:
        """This rank's place in the pipeline; None without one."""
        group = self._parallel.pp_group
        return None if group is None else dist.get_rank(group)

    def stored(self, fqn: str) -> str:
        """Return the name in a checkpoint of this rank's ``fqn``."""
        return self.of_stage(self._of_expert(fqn))

    def local(self, name: str) -> str:
        """Inverse of :meth:`stored`, of names of parameters and buffers; others stay."""
        if self._local is None:
            self._local = {self.stored(fqn): fqn for fqn in self._fqns}
        return self._local.get(name, name)

    def of_stage(self, name: str) -> str:
        """Return a checkpoint's ``name``, with this rank's stage where :meth:`add_stage` says so."""
        has_stage = name in self._of_stage or name.startswith(tuple(self._lists_of_stage))
        return f"{name}@pp{self.stage}" if has_stage else name

    def add_stage(self, names: Iterable[str]) -> None:
        """Let these names (of a checkpoint), and all others in the same lists of layers, stand for tensors of this rank's stage."""
        for name in names:
            prefix = _list_of(name)
            if prefix is None:
                self._of_stage.add(name)
            else:
                self._lists_of_stage.add(prefix)
        self._local = None

    def add_stage_as_in(self, stored: Iterable[str]) -> None:
        """Name tensors by their stage where a checkpoint, whose names are ``stored``, does."""
        if self.stage is not None:
            suffix = f"@pp{self.stage}"
            self._of_stage.update(
                name.removesuffix(suffix) for name in stored if name.endswith(suffix)
            )
            self._local = None

    def _of_expert(self, fqn: str) -> str:
        if self._parallel.ep_group is None:
            return fqn
        if fqn in self._exact:
            return f"{fqn}@ep{self._ep_rank}"
        for prefix, count in self._prefixes.items():
            if not fqn.startswith(f"{prefix}."):
                continue
            if count is None:
                return f"{fqn}@ep{self._ep_rank}"
            index, _, rest = fqn.removeprefix(f"{prefix}.").partition(".")
            if not index.isdecimal():  # the list's own
                return f"{fqn}@ep{self._ep_rank}"
            return f"{prefix}.{int(index) + self._offsets[prefix]}.{rest}"
        return fqn


def _names_of(model: nn.Module) -> list[str]:
    """Return the names of all that a checkpoint may hold of a model: parameters, buffers and extra states."""
    names = [name for name, _ in named_tensors(model)]
    names += [
        f"{prefix}.{EXTRA_STATE}" if prefix else EXTRA_STATE
        for prefix, _ in model.named_modules(remove_duplicate=False)
    ]
    return [plain_name(model, name) for name in names]


def _list_of(name: str) -> str | None:
    """``blocks.layers.0.weight`` -> ``blocks.layers.``; None where no part of the name is a number."""
    parts = name.split(".")
    index = next((index for index, part in enumerate(parts) if part.isdecimal()), 0)
    return ".".join([*parts[:index], ""]) if index else None


def _find_experts(
    model: nn.Module, parallel: ModelParallel
) -> tuple[dict[str, int | None], set[str]]:
    """Return the expert modules by name, with the number of experts of a ``ModuleList``, and the names of single parameters."""
    experts = {id(value): value for value in parallel.experts}  # type: ignore[union-attr]
    if not experts:
        return {}, set()
    prefixes: dict[str, int | None] = {}
    found: set[int] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in experts:
            prefixes[plain_name(model, name)] = (
                len(module) if isinstance(module, nn.ModuleList) else None
            )
            found.add(id(module))
    exact = set()
    for name, param in model.named_parameters(remove_duplicate=False):
        if id(param) in experts:
            exact.add(plain_name(model, name))
            found.add(id(param))
    for name, module in model.named_modules(
        remove_duplicate=False
    ):  # the modules of a list, one by one, are the list
        prefix = plain_name(model, name)
        if (
            isinstance(module, nn.ModuleList)
            and len(module)
            and all(id(child) in experts for child in module)
        ):
            prefixes = {
                other: count
                for other, count in prefixes.items()
                if not other.startswith(f"{prefix}.")
            }
            prefixes[prefix] = len(module)
    missing = [value for key, value in experts.items() if key not in found]
    if missing:
        what = missing[0].__class__.__name__
        raise ValueError(
            f"a {what} that ModelParallel(experts=...) names is not part of this model; name the modules that hold the experts"
        )
    return prefixes, exact
