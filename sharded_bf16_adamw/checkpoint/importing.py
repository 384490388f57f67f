"""Import weights and AdamW states of another training run into a live model and optimizer.

:mod:`.import_formats` opens the files, and :mod:`.import_matching` matches names, shapes and
parameter groups. DeepSpeed's checkpoints are not read, but the output of its ``zero_to_fp32.py`` is
(``docs/migration.md``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..bf16_split import split
from ..kernels.reference import lowbias32, stochastic_round
from ..names import has_fsdp1
from ..optimizer import AdamW_BF16
from .blocks import local_blocks
from .export import Progress
from .import_formats import WeightsSource, open_optimizer_state, open_weights
from .import_matching import (
    check_states,
    key_states_by_name,
    match_imported_groups,
    match_weights,
    merge_tied_states,
)
from .manifest import as_tensor
from .object_collectives import known_on_other_ranks
from .optimizer_state import (
    check_model_and_optimizer,
    init_frozen_states,
    init_state,
    rollback_new_state,
)
from .rank_errors import check_group, raise_on_all_ranks
from .rank_names import RankNames
from .ties import find_ties
from .torch_state_dict import (
    set_sharded_model_state,
    set_sharded_optimizer_state,
    sharded_model_state,
    sharded_optimizer_state,
)

# options of torch.optim.AdamW that mean the same in AdamW_BF16
HYPERPARAMS = ("lr", "betas", "eps", "weight_decay", "maximize")
_Path = str | os.PathLike[str]


def round_moment(x: Tensor) -> Tensor:
    """Round a float32 moment to bfloat16 stochastically, by the rule of the kernels.

    The random bits are a hash of the value's own bits, so the result is the same on every run and
    for every sharding. Over many values the mean error is zero. A value that bfloat16 represents
    exactly stays unchanged.
    """
    return stochastic_round(x, lowbias32(x.view(torch.int32)) & 0xFFFF)


@torch.no_grad()
def import_fp32(
    source: _Path | Mapping[str, Tensor],
    model: nn.Module,
    optimizer: AdamW_BF16,
    optimizer_state: _Path | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    *,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Replace a model's weights and optimizer states by those of a run in another precision.

    Collective: every rank of ``group`` calls it, and reads its own part of each tensor from
    ``source``, one tensor at a time.

    A bfloat16 parameter becomes ``p``, the weight rounded to nearest, and ``correction``, the
    rounded remainder (see :mod:`sharded_bf16_adamw.checkpoint.export` for the bound). A frozen
    parameter gets a correction only if it has a state in ``optimizer_state`` or ``optimizer``.
    Moments are rounded stochastically, with random bits that depend on the values alone. So the
    result is the same for every sharding strategy and number of ranks.

    Args:
        source: a safetensors file, a directory of them with an index, a torch file, or a state
            dict. Floating dtypes are converted. It must have every key of the model's state dict
            (of tied keys, one is enough). Other keys are errors, unless another rank has them
            (pipeline stages, experts).
        model: the module, wrapped or not.
        optimizer: the optimizer of its parameters.
        optimizer_state: the state of a ``torch.optim.AdamW`` in any floating dtype: a torch file or
            a dict. It is keyed by integers, in the order of this optimizer's groups and parameters,
            or by names, as FSDP and ``get_optimizer_state_dict`` return it. Its lr, betas, eps,
            weight_decay, maximize, decouple_lr and max_lr replace the optimizer's. A state of torch
            lacks the last two, which become False and None: torch multiplies the decay by lr. An
            optimizer with a schedule keeps it and continues at the state's step. None: moments and
            steps become zero; hyperparameters and the position in the schedule stay.
        progress: called with the number of bytes of each tensor filled.
        group: the ranks that hold the model, if several models share a job; None for all ranks.

    Raises:
        ValueError: a missing key, an unexpected key, a size mismatch, tied names with different
            values, or a file that is damaged or of another kind. Nothing is changed.
        RuntimeError: a rank cannot find or read a file; nothing is changed. Or a rank failed while
            it filled the tensors; the message says that some weights are new and some old.

    Examples:
        >>> import torch
        >>> from sharded_bf16_adamw import AdamW_BF16, import_fp32
        >>> model = torch.nn.Linear(2, 1, bias=False).bfloat16()
        >>> optimizer = AdamW_BF16(model.parameters(), lr=1e-3)
        >>> import_fp32({"weight": torch.tensor([[1.0, 1.001]])}, model, optimizer)
        >>> model.weight.float().tolist()
        [[1.0, 1.0]]
        >>> f"{optimizer.state[model.weight]['correction'][0, 1].item():.5f}"
        '0.00100'
    """
    check_group(group)
    with raise_on_all_ranks("cannot import", group):
        check_model_and_optimizer("import_fp32(source, model, optimizer)", model, optimizer)
        if not isinstance(optimizer, AdamW_BF16):
            raise ValueError(
                f"optimizer must be an AdamW_BF16, but it is of type {type(optimizer).__name__}; "
                "build AdamW_BF16(model.parameters())"
            )
        weights = open_weights(source)
        opened_state = None if optimizer_state is None else open_optimizer_state(optimizer_state)
        names = RankNames(model, optimizer)
    names.number_experts()
    names.adopt_stages(weights.infos)
    imported_states: dict[str, Any] = {}
    imported_groups: list[dict[str, Any]] = []
    with rollback_new_state(optimizer):
        with raise_on_all_ranks("cannot import", group):
            init_state(optimizer)
            optimizer_part = sharded_optimizer_state(model, optimizer, ungrouped=True)
            groups = [
                {**part, "params": list(map(names.to_saved, part["params"]))}
                for part in optimizer_part["param_groups"]
            ]
            ties = find_ties(model, names)
            if opened_state is not None:
                imported_states, imported_groups = merge_tied_states(
                    *key_states_by_name(opened_state, groups),
                    ties,
                    weights.ties,
                    {name for group in groups for name in group["params"]},
                )
        with raise_on_all_ranks("cannot import", group):
            with_state = set(map(names.to_saved, optimizer_part["state"]))
            new = imported_states.keys() - with_state
            # Under FSDP1 a rank that holds no element of a parameter may lack its state.
            if new or has_fsdp1(model):
                init_frozen_states(
                    model,
                    optimizer,
                    saved=new | with_state,
                    saved_in_groups=new,
                    to_saved=names.to_saved,
                )
                optimizer_part = sharded_optimizer_state(model, optimizer, ungrouped=True)
            model_part = sharded_model_state(model)
            tensors = {names.to_saved(name): tensor for name, tensor in model_part.items()}
            states = {
                names.to_saved(name): state for name, state in optimizer_part["state"].items()
            }
        foreign_weights = known_on_other_ranks(weights.infos.keys() - tensors.keys(), group)
        foreign_states = known_on_other_ranks(imported_states.keys() - states.keys(), group)
        with raise_on_all_ranks("cannot import", group):
            source_name = match_weights(weights, ties, tensors, foreign_weights)
            for name in foreign_states:
                del imported_states[name]
            if opened_state is not None:
                check_states(imported_states, states)
                matched_groups = match_imported_groups(groups, imported_groups)
    with _fill_errors(group):
        for name, tensor in tensors.items():
            if isinstance(tensor, Tensor):
                _fill_weight(tensor, weights, source_name[name])
                _report(progress, tensor)
        for name, state in states.items():
            for key, tensor in state.items():
                if key == "correction":
                    _fill_correction(tensor, weights, source_name[name])
                elif key == "ema":  # starts at the new weights
                    _fill_weight(tensor, weights, source_name[name])
                else:
                    _fill_state(tensor, imported_states.get(name, {}).get(key))
                _report(progress, tensor)
        if opened_state is not None:
            _set_hyperparams(optimizer, groups, matched_groups, imported_states)
    if has_fsdp1(model):
        # The tensors filled above are copies. Writing them back is collective.
        with _fill_errors(group):
            for part, live in zip(
                optimizer_part["param_groups"], optimizer.param_groups, strict=True
            ):
                part.update({key: live[key] for key in live.keys() - {"params", "param_names"}})
            set_sharded_model_state(model, model_part)
            set_sharded_optimizer_state(model, optimizer, optimizer_part, ungrouped=True)


@contextmanager
def _fill_errors(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Raise RuntimeError on every rank if the body failed on any rank. Collective."""
    message = (
        "the import failed halfway, so some weights are new and some are old; import again or load "
        "a checkpoint. The error"
    )
    with raise_on_all_ranks(message, group):
        try:
            yield
        except ValueError as error:  # a ValueError would be raised without the message
            raise RuntimeError(str(error)) from error


def _fill_weight(tensor: Tensor, weights: WeightsSource, name: str) -> None:
    for block, local in local_blocks(tensor):
        x = weights.read(name, block)
        local.copy_(split(x.float())[0] if local.dtype == torch.bfloat16 else x)


def _fill_correction(tensor: Tensor, weights: WeightsSource, name: str) -> None:
    for block, local in local_blocks(tensor):
        local.copy_(split(weights.read(name, block).float())[1])


def _fill_state(tensor: Tensor, value: Any) -> None:
    for block, local in local_blocks(tensor):
        if value is None:
            local.zero_()
            continue
        x = block.view_in(as_tensor(value)).detach().float()
        local.copy_(round_moment(x) if local.dtype == torch.bfloat16 else x)


def _set_hyperparams(
    optimizer: AdamW_BF16,
    groups: list[dict[str, Any]],
    imported_groups: list[dict[str, Any]],
    imported_states: dict[str, Any],
) -> None:
    """Set the hyperparameters and the schedule's position of each group.

    Args:
        optimizer: its groups are changed in place.
        groups: the optimizer's groups, with the names of their parameters.
        imported_groups: for each of ``groups``, the imported group to copy from, or {}.
        imported_states: imported states by name.
    """
    for live, group, imported in zip(optimizer.param_groups, groups, imported_groups, strict=True):
        for key in HYPERPARAMS:
            if key in imported:
                value = imported[key]
                if isinstance(live[key], Tensor):
                    live[key].copy_(as_tensor(value))  # a captured graph reads lr from this memory
                else:
                    live[key] = float(value) if isinstance(value, Tensor) else value
        if "weight_decay" in imported:  # torch's AdamW multiplies it by lr
            live["decouple_lr"] = imported.get("decouple_lr", False)
            live["max_lr"] = imported.get("max_lr")
        # A group without parameters continues at the largest imported step.
        names = [name for name in group["params"] or imported_states if name in imported_states]
        live["schedule_step"] = max((int(imported_states[n]["step"]) for n in names), default=0)
        if live["scheduled_lr"] is not None:
            live["scheduled_lr"] = live["lr"]


def _report(progress: Progress | None, tensor: Tensor) -> None:
    if progress is not None:
        progress(sum(local.nbytes for _, local in local_blocks(tensor)))
