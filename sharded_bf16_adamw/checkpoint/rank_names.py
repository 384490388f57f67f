"""Names in a checkpoint of what a rank holds alone: experts and pipeline stages that every rank names alike.

A checkpoint has one name for each tensor, a rank's model has names that are unique on that rank only::

    rank 0 of ep: moe.experts.0.weight, moe.experts.1.weight      ->  moe.experts.0.weight, moe.experts.1.weight
    rank 1 of ep: moe.experts.0.weight, moe.experts.1.weight      ->  moe.experts.2.weight, moe.experts.3.weight
    rank 1 of ep: moe.w1 (no ModuleList: nothing says how experts are numbered)  ->  moe.w1@ep1
    stage 1 of pp: layers.0.weight, unlike that of stage 0        ->  layers.0.weight@pp1
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..sharding.model_parallel import ModelParallel
from .names import plain_name


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
        self._parallel: ModelParallel = parallel if isinstance(parallel, ModelParallel) else ModelParallel()
        self._prefixes, self._exact = _find_experts(model, self._parallel)
        self._of_stage: set[str] = set()
        self._local: dict[str, str] = {}
        group = self._parallel.ep_group
        self._ep_rank = 0 if group is None else dist.get_rank(group)
        self._offsets = dict.fromkeys(self._prefixes, 0)

    def number_experts(self) -> None:
        """Learn how many experts the ranks before this one have. Collective over the expert group, if there is one."""
        group = self._parallel.ep_group
        if group is not None:
            counts: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(counts, self._prefixes, group=group)
            for before in counts[: self._ep_rank]:
                for prefix in self._prefixes:
                    self._offsets[prefix] += before.get(prefix) or 0

    @property
    def must_be_the_same(self) -> bool:
        """Whether all ranks must have parameters of the same names: an optimizer of ours for which nothing else is said."""
        return self._is_ours and self._parallel.pp_group is None and self._parallel.ep_group is None

    @property
    def stage(self) -> int | None:
        """This rank's place in the pipeline; None without one."""
        group = self._parallel.pp_group
        return None if group is None else dist.get_rank(group)

    def stored(self, fqn: str) -> str:
        """Return the name in a checkpoint of this rank's ``fqn``."""
        name = self.of_stage(self._of_expert(fqn))
        self._local[name] = fqn
        return name

    def local(self, name: str) -> str:
        """Inverse of :meth:`stored`, of names that it has given."""
        return self._local.get(name, name)

    def of_stage(self, name: str) -> str:
        """Return a checkpoint's ``name``, with this rank's stage where :meth:`add_stage` says so."""
        return f"{name}@pp{self.stage}" if name in self._of_stage else name

    def add_stage(self, names: Iterable[str]) -> None:
        """Let these names (of a checkpoint) stand for tensors of this rank's stage alone."""
        self._of_stage.update(names)

    def add_stage_as_in(self, stored: Iterable[str]) -> None:
        """Name tensors by their stage where a checkpoint, whose names are ``stored``, does."""
        if self.stage is not None:
            suffix = f"@pp{self.stage}"
            self.add_stage(name.removesuffix(suffix) for name in stored if name.endswith(suffix))

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
            return f"{prefix}.{int(index) + self._offsets[prefix]}.{rest}"
        return fqn


def _find_experts(model: nn.Module, parallel: ModelParallel) -> tuple[dict[str, int | None], set[str]]:
    """Return the expert modules by name, with the number of experts of a ``ModuleList``, and the names of single parameters."""
    experts = {id(value): value for value in parallel.experts}  # type: ignore[union-attr]
    if not experts:
        return {}, set()
    prefixes: dict[str, int | None] = {}
    found: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in experts:
            prefixes[plain_name(model, name)] = len(module) if isinstance(module, nn.ModuleList) else None
            found.add(id(module))
    exact = set()
    for name, param in model.named_parameters(remove_duplicate=False):
        if id(param) in experts:
            exact.add(plain_name(model, name))
            found.add(id(param))
    missing = [value for key, value in experts.items() if key not in found]
    if missing:
        what = missing[0].__class__.__name__
        raise ValueError(
            f"a {what} that ModelParallel(experts=...) names is not part of this model; name the modules that hold the experts"
        )
    return prefixes, exact
