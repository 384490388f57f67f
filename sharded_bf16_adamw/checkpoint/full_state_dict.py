"""Gather the full optimizer state on one rank, and scatter it back, one tensor at a time.

torch's ``get_optimizer_state_dict(..., full_state_dict=True, cpu_offload=True)`` gathers every
tensor on every rank. These functions send to rank 0 only, which receives directly into the result.
A rank sends a block without a copy if the block is contiguous in CPU memory.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..names import has_fsdp1
from ..sharding.collectives import cpu_group
from ..sharding.dtensor import group_by
from .blocks import local_blocks
from .diff import find_mismatch, raise_mismatches
from .divergence import resolve_divergence
from .groups import match_groups
from .import_formats import refuse_shards
from .manifest import ParamGroup, as_tensor
from .object_collectives import Group, gather_object, rank, scatter_object
from .optimizer_state import (
    check_model_and_optimizer,
    init_frozen_states,
    init_state,
    rollback_new_state,
)
from .rank_errors import call_on_rank_0, check_group, raise_on_all_ranks
from .rank_names import RankNames
from .state_dict import (
    CheckpointState,
    get_optimizer_state,
    merge_param_groups,
    split_state_key,
)
from .torch_state_dict import set_sharded_optimizer_state
from .transport import (
    Key,
    ShardInfo,
    Transfer,
    local_block,
    plan_transfers,
    receive,
    scatter_block,
    send,
    shard_infos,
)


@torch.no_grad()
def gather_full_state_dict(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, group: dist.ProcessGroup | None = None
) -> dict[str, Any]:
    """Gather the full optimizer state on rank 0, in CPU memory, under every sharding strategy.

    Collective: every rank of ``group`` calls it. The result equals that of
    ``torch.distributed.checkpoint.state_dict.get_optimizer_state_dict`` with
    ``StateDictOptions(full_state_dict=True, cpu_offload=True)``, and ``set_optimizer_state_dict``
    loads it. Parameters that never had a gradient have no state. States of parameters in no group,
    and entries of ``optimizer.state`` that belong to no parameter, are left out.

    Rank 0 needs memory for the result and one more tensor. Other ranks need memory for one block,
    unless it is already contiguous in CPU memory. Under FSDP1, whose flat parameters only torch can
    take apart, each rank first copies its own shard, one flat parameter at a time.

    Args:
        model: the module, wrapped or not.
        optimizer: the optimizer of its parameters: AdamW_BF16, or one of torch's whose state has
            only tensors.
        group: the ranks that hold the model, if several models share a job; its first rank then
            counts as rank 0. None for all ranks.

    Returns:
        On rank 0 ``{"state": {"layer.weight": {"exp_avg": ...}}, "param_groups": [...]}``, keyed by
        parameter names. Its tensors are contiguous, in CPU memory of their own. On other ranks
        ``{}``.

    Raises:
        ValueError: a state is not a tensor, replicas differ between ranks, or the ranks' blocks do
            not make up the full tensor (because a shard is not rectangular).

    Examples:
        >>> import torch
        >>> from sharded_bf16_adamw import AdamW_BF16, gather_full_state_dict
        >>> model = torch.nn.Linear(4, 2, bias=False).bfloat16()
        >>> optimizer = AdamW_BF16(model.parameters(), lr=1e-3)
        >>> model(torch.ones(1, 4).bfloat16()).sum().backward()
        >>> optimizer.step(zero_grad=True)
        >>> full = gather_full_state_dict(model, optimizer)
        >>> sorted(full["state"]["weight"])
        ['correction', 'exp_avg', 'exp_avg_sq', 'step']
        >>> full["param_groups"][0]["params"]
        ['weight']
    """
    failure = "cannot gather the optimizer state"
    names = _rank_names(failure, model, optimizer, group)
    with raise_on_all_ranks(failure, group):
        own_state = get_optimizer_state(model, optimizer, names)
    own_state = resolve_divergence(own_state, names, group, None)
    tensors, infos_of_ranks = _gather_shard_infos(failure, own_state, group)
    groups_of_rank = [
        ParamGroup(params, _copy_options(options)) for params, options in own_state.groups
    ]
    groups = merge_param_groups(gather_object(groups_of_rank, group))
    full_tensors = _merge_infos(infos_of_ranks)
    with raise_on_all_ranks(failure, group):
        plan = plan_transfers(infos_of_ranks, full_tensors, replicas=False)
    transfers = scatter_object(plan, group)
    if rank(group) != 0:
        for transfer in transfers:
            send(local_block(tensors[transfer.key], transfer, group), 0, group)
        return {}
    transfers_of = group_by(transfers, lambda transfer: transfer.key)
    state: dict[str, dict[str, Tensor]] = {}
    for (fqn, name), info in full_tensors.items():
        full_tensor = torch.empty(info.shape, dtype=info.dtype, device="cpu")
        state.setdefault(fqn, {})[name] = full_tensor
        for transfer in transfers_of.get((fqn, name), ()):
            (sender,) = transfer.index_on
            view = transfer.block.view_in(full_tensor)
            if sender == 0:
                view.copy_(local_block(tensors[transfer.key], transfer, group))
            else:
                receive(view, sender, group)
    return {
        "state": state,
        "param_groups": [{"params": params, **options} for params, options in groups],
    }


@torch.no_grad()
def scatter_full_state_dict(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    full: dict[str, Any] | None,
    *,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Scatter a full optimizer state from rank 0. Inverse of :func:`gather_full_state_dict`.

    Collective: every rank of ``group`` calls it. A parameter without a state in ``full`` starts
    with zero states. Hyper-parameters come from ``full``. An optimizer with a schedule keeps the
    schedule and continues it from the position in ``full``.

    Rank 0 needs memory for one tensor more than ``full``, the other ranks for one block (under
    FSDP1 for twice their shard).

    Args:
        model: the module, wrapped or not, in any layout and on any number of ranks.
        optimizer: the optimizer of its parameters.
        full: on rank 0 a result of :func:`gather_full_state_dict` or of torch's
            ``get_optimizer_state_dict(..., full_state_dict=True)``; ignored on other ranks.
        group: as for :func:`gather_full_state_dict`.

    Raises:
        ValueError: on every rank, if ``full`` has a missing key, an unexpected key, a size
            mismatch, a dtype mismatch, or groups that split a group of this optimizer. Nothing is
            changed.

    Examples:
        >>> import torch
        >>> from sharded_bf16_adamw import (
        ...     AdamW_BF16, gather_full_state_dict, scatter_full_state_dict
        ... )
        >>> model = torch.nn.Linear(4, 2, bias=False).bfloat16()
        >>> optimizer = AdamW_BF16(model.parameters(), lr=1e-3)
        >>> model(torch.ones(1, 4).bfloat16()).sum().backward()
        >>> optimizer.step(zero_grad=True)
        >>> full = gather_full_state_dict(model, optimizer)
        >>> fresh = AdamW_BF16(model.parameters(), lr=1.0)
        >>> scatter_full_state_dict(model, fresh, full)
        >>> fresh.state[model.weight]["step"].item(), fresh.param_groups[0]["lr"]
        (1.0, 0.001)
    """
    failure = "cannot scatter the full state"
    names = _rank_names(failure, model, optimizer, group)
    saved_names, saved_groups = call_on_rank_0(failure, lambda: _names_and_groups(full), group)
    names.adopt_stages(saved_names)
    with rollback_new_state(optimizer):
        with raise_on_all_ranks(failure, group):
            init_state(optimizer)
            init_frozen_states(model, optimizer, saved_names, saved_names, names.to_saved)
            own_state = get_optimizer_state(model, optimizer, names)
        tensors, infos_of_ranks = _gather_shard_infos(failure, own_state, group)
        params_of_groups = [params for params, _ in own_state.groups]
        params_of_ranks = gather_object(params_of_groups, group)
        plan: list[list[Transfer]] = []
        with raise_on_all_ranks(failure, group):
            if rank(group) == 0:
                assert full is not None
                infos = _merge_infos(infos_of_ranks)
                raise_mismatches(
                    "the full state is of another model or optimizer",
                    _find_mismatches(infos, params_of_ranks, full),
                )
                to_send = {key: info for key, info in infos.items() if key[0] in full["state"]}
                plan = plan_transfers(infos_of_ranks, to_send, replicas=True)
    transfers = scatter_object(plan, group)
    for transfer in transfers:
        block = None
        if full and rank(group) == 0:
            fqn, name = transfer.key
            block = transfer.block.view_in(as_tensor(full["state"][fqn][name]))
        scatter_block(transfer, block, tensors, group)
    # The states of parameters that never had a gradient are not in ``full``.
    for key in tensors.keys() - {transfer.key for transfer in transfers}:
        for _, local in local_blocks(tensors[key]):
            local.zero_()
    matches = match_groups(params_of_groups, [saved["params"] for saved in saved_groups])
    options_of = [
        _copy_options(own.options if match is None else saved_groups[match])
        for own, match in zip(own_state.groups, matches, strict=True)
    ]
    for live, options in zip(optimizer.param_groups, options_of, strict=True):
        options.pop("params", None)
        options.pop("param_names", None)
        # A group keeps following its schedule, as in load_state_dict().
        if "scheduled_lr" in live:
            options["scheduled_lr"] = None if live["scheduled_lr"] is None else options["lr"]
    if has_fsdp1(model):
        state: dict[str, dict[str, Any]] = {}
        for (fqn, name), tensor in tensors.items():
            state.setdefault(names.to_fqn(fqn), {})[name] = tensor
        groups = [
            {**options, "params": list(map(names.to_fqn, params))}
            for params, options in zip(params_of_groups, options_of, strict=True)
        ]
        set_sharded_optimizer_state(model, optimizer, {"state": state, "param_groups": groups})
        return
    for live, options in zip(optimizer.param_groups, options_of, strict=True):
        for name, value in options.items():
            if isinstance(live.get(name), Tensor):
                live[name].copy_(as_tensor(value))  # a captured graph reads lr from this memory
            else:
                live[name] = value


def _rank_names(
    failure: str, model: nn.Module, optimizer: torch.optim.Optimizer, group: Group
) -> RankNames:
    """Check the arguments on all ranks and return this rank's names. Collective."""
    check_group(group)
    with raise_on_all_ranks(failure, group):
        check_model_and_optimizer("(model, optimizer)", model, optimizer)
        names = RankNames(model, optimizer)
    names.number_experts()
    return names


def _gather_shard_infos(
    failure: str, own_state: CheckpointState, group: Group
) -> tuple[dict[Key, Tensor], list[dict[Key, ShardInfo]]]:
    """Return this rank's states, and on rank 0 the shard infos of all ranks. Collective."""
    with raise_on_all_ranks(failure, group):
        for key, value in own_state.plain.items():
            fqn, name = split_state_key(key)
            raise ValueError(
                f"the state {name!r} of parameter {fqn} is {type(value).__name__}, but only "
                "tensors can be gathered; remove it from optimizer.state"
            )
        tensors = {split_state_key(key): tensor for key, tensor in own_state.tensors.items()}
        infos = shard_infos(tensors)
    if dist.is_initialized():
        cpu_group(group)  # creates it; collective also for ranks without a transfer
    return tensors, gather_object(infos, group)


def _names_and_groups(full: Any) -> tuple[list[str], list[dict[str, Any]]]:
    if not isinstance(full, dict) or not {"state", "param_groups"} <= full.keys():
        raise ValueError(
            "the full state is of another model or optimizer: rank 0 must pass a dict with "
            '"state" and "param_groups"'
        )
    for fqn, values in full["state"].items():
        refuse_shards(f"the full state of {fqn}", values)
    # lr may be a tensor on rank 0's GPU, on which the other ranks would open a context.
    return list(full["state"]), list(map(_copy_options, full["param_groups"]))


def _find_mismatches(
    infos: dict[Key, ShardInfo], params_of_ranks: list[list[list[str]]], full: dict[str, Any]
) -> list[str]:
    state = full["state"]
    known = {fqn for groups in params_of_ranks for params in groups for fqn in params}
    mismatches = [f"unexpected parameter {fqn}" for fqn in state if fqn not in known]
    for (fqn, name), info in infos.items():
        if fqn not in state:
            continue
        value = state[fqn].get(name)
        saved = None if value is None else as_tensor(value)
        mismatch = find_mismatch(f"{fqn}.{name}", saved, info.shape, info.dtype)
        mismatches += [] if mismatch is None else [mismatch]
    mismatches += [
        f"unexpected key {fqn}.{name}"
        for fqn in state
        for name in state[fqn]
        if fqn in known and (fqn, name) not in infos
    ]
    for groups in params_of_ranks:
        matches = match_groups(groups, [saved["params"] for saved in full["param_groups"]])
        for index, (params, match) in enumerate(zip(groups, matches, strict=True)):
            if params and match is None:
                mismatches.append(f"no saved group has all parameters of group {index}")
    return list(dict.fromkeys(mismatches))


def _merge_infos(infos_of_ranks: list[dict[Key, ShardInfo]]) -> dict[Key, ShardInfo]:
    """Return the tensors of all ranks, rank 0's first. On other ranks the result is empty."""
    return {key: info for infos in infos_of_ranks for key, info in infos.items()}


def _copy_options(group: dict[str, Any]) -> dict[str, Any]:
    """Copy a group's options. A tensor among them (lr) moves to CPU memory."""
    return {
        key: value.detach().cpu().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for key, value in group.items()
    }
