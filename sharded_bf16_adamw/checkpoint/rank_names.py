"""Checkpoint names for different tensors that have the same FQN on several ranks.

Names in a checkpoint are unique, but the FQNs of experts and pipeline stages are unique only on
their own rank. The checkpoint's names add an expert number, an ``ep`` rank or a stage::

    rank 1 of ep, 2 experts on each rank: moe.experts.0.weight    ->  moe.experts.2.weight
    rank 1 of ep, experts not in a ModuleList: moe.w1             ->  moe.w1@ep1
    stage 1 of pp, stage 0 has another weight: layers.0.weight    ->  layers.0.weight@pp1

If the name of one layer gets its stage, so do the names of all layers in that list. Otherwise a
number that only one stage has would look like one of the whole model, and a pipeline with other
stage boundaries would load a wrong layer.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from ..names import clean_fqn, has_fsdp1, named_tensors, unwrap
from ..sharding.model_parallel import ModelParallel
from .extra_state import EXTRA_STATE
from .object_collectives import all_gather_object


class RankNames:
    """The mapping between one rank's FQNs and the names in a checkpoint.

    Call :meth:`number_experts` before any other method.

    Args:
        model: the module, wrapped or not.
        optimizer: its ``model_parallel``, if any, tells which parameters differ between ranks.

    Raises:
        ValueError: a module or parameter given as an expert is not part of the model, or FSDP1 is
            combined with pipeline stages or experts.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        parallel = getattr(optimizer, "model_parallel", None)
        self._is_adamw_bf16 = hasattr(optimizer, "model_parallel")
        if not isinstance(parallel, ModelParallel):
            parallel = ModelParallel()
        self._pp_group, self._ep_group = parallel.group("pp"), parallel.group("ep")
        self._expert_modules, self._expert_params = _find_experts(model, parallel)
        self._stage_names: set[str] = set()
        self._stage_lists: set[str] = set()  # prefixes, such as "layers"
        self._fqns = _state_dict_fqns(unwrap(model))
        if has_fsdp1(model) and (self._pp_group is not None or self._ep_group is not None):
            raise ValueError(
                "FullyShardedDataParallel (FSDP1) does not tell which ranks hold which parameters, "
                "so checkpoints do not support it with ModelParallel(pp=..., ep=...); use "
                "fully_shard (FSDP2)"
            )
        self._fqn_of_saved: dict[str, str] | None = None  # cache
        self._ep_rank = 0 if self._ep_group is None else dist.get_rank(self._ep_group)
        self._first_expert = dict.fromkeys(self._expert_modules, 0)

    def number_experts(self) -> None:
        """Exchange how many experts each rank has. Collective over the expert group, if any."""
        self._fqn_of_saved = None
        if self._ep_group is not None:
            counts = all_gather_object(self._expert_modules, self._ep_group)
            for counts_before in counts[: self._ep_rank]:
                for module in self._expert_modules:
                    self._first_expert[module] += counts_before.get(module) or 0

    @property
    def requires_equal_names(self) -> bool:
        """True if all ranks must have the same parameters: AdamW_BF16 without ``pp`` and ``ep``."""
        return self._is_adamw_bf16 and self._pp_group is None and self._ep_group is None

    @property
    def stage(self) -> int | None:
        """This rank's pipeline stage; None without a pipeline."""
        return None if self._pp_group is None else dist.get_rank(self._pp_group)

    def to_saved(self, fqn: str) -> str:
        """Return the checkpoint's name for this rank's ``fqn``."""
        return self.with_stage(self._with_expert(fqn))

    def to_fqn(self, name: str) -> str:
        """Return this rank's FQN for a name in a checkpoint. Inverse of :meth:`to_saved`.

        Names of other ranks' tensors and extra states are returned unchanged.
        """
        if self._fqn_of_saved is None:
            self._fqn_of_saved = {self.to_saved(fqn): fqn for fqn in self._fqns}
        return self._fqn_of_saved.get(name, name)

    def with_stage(self, name: str) -> str:
        """Append this rank's stage to a checkpoint's name that is marked to have one."""
        has_stage = name in self._stage_names or _list_prefix(name) in self._stage_lists
        return f"{name}@pp{self.stage}" if has_stage else name

    def mark_stage_names(self, names: Iterable[str]) -> None:
        """Mark names, and all names in the same lists of layers, to have a stage appended."""
        for name in names:
            prefix = _list_prefix(name)
            if prefix is None:
                self._stage_names.add(name)
            else:
                self._stage_lists.add(prefix)
        self._fqn_of_saved = None

    def adopt_stages(self, saved: Iterable[str]) -> None:
        """Mark each name that was saved with this rank's stage. ``saved``: a checkpoint's names."""
        if self.stage is not None:
            suffix = f"@pp{self.stage}"
            self._stage_names.update(
                name.removesuffix(suffix) for name in saved if name.endswith(suffix)
            )
            self._fqn_of_saved = None

    def _with_expert(self, fqn: str) -> str:
        if self._ep_group is None:
            return fqn
        with_rank = f"{fqn}@ep{self._ep_rank}"
        if fqn in self._expert_params:
            return with_rank
        for module, count in self._expert_modules.items():
            if not fqn.startswith(f"{module}."):
                continue
            index, _, rest = fqn.removeprefix(f"{module}.").partition(".")
            if count is None or not index.isdecimal():  # not a list, or the list's own extra state
                return with_rank
            return f"{module}.{int(index) + self._first_expert[module]}.{rest}"
        return fqn


def _state_dict_fqns(model: nn.Module) -> list[str]:
    """Return the FQNs of parameters and buffers, and of every module's possible extra state."""
    names = [name for name, _ in named_tensors(model)]
    names += [
        f"{prefix}.{EXTRA_STATE}" if prefix else EXTRA_STATE
        for prefix, _ in model.named_modules(remove_duplicate=False)
    ]
    return [clean_fqn(model, name) for name in names]


def _list_prefix(name: str) -> str | None:
    """Return ``blocks.layers`` for ``blocks.layers.0.weight``, None if it is not in a list.

    If the model itself is a list (``nn.Sequential``), its prefix is ``""``.
    """
    segments = name.split(".")
    index = next((i for i, segment in enumerate(segments) if segment.isdecimal()), None)
    return None if index is None else ".".join(segments[:index])


def _find_experts(
    model: nn.Module, parallel: ModelParallel
) -> tuple[dict[str, int | None], set[str]]:
    """Return expert modules (a ``ModuleList`` with its length) and expert parameters, by FQN."""
    experts = {id(expert): expert for expert in parallel.experts}  # type: ignore[union-attr]
    if not experts:
        return {}, set()
    modules = [
        (clean_fqn(model, name), module)
        for name, module in model.named_modules(remove_duplicate=False)
    ]
    params = {
        clean_fqn(model, name): id(param)
        for name, param in model.named_parameters(remove_duplicate=False)
        if id(param) in experts
    }
    counts: dict[str, int | None] = {
        fqn: len(module) if isinstance(module, nn.ModuleList) else None
        for fqn, module in modules
        if id(module) in experts
    }
    missing = experts.keys() - params.values() - {id(module) for _, module in modules}
    if missing:
        expert = next(expert for key, expert in experts.items() if key in missing)
        raise ValueError(
            f"a {type(expert).__name__} in ModelParallel(experts=...) is not part of this model; "
            "name the modules that hold the experts"
        )
    for fqn, module in modules:  # a ModuleList of experts only counts as an expert
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        if all(id(child) in experts for child in module):
            counts = {
                other: count for other, count in counts.items() if not other.startswith(f"{fqn}.")
            }
            counts[fqn] = len(module)
    return counts, set(params)
