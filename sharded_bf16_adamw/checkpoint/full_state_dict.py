"""The whole optimizer state on one rank, and back onto the ranks, one tensor at a time.

torch's own ``get_optimizer_state_dict(..., full_state_dict=True, cpu_offload=True)`` gathers every tensor on every rank. Here only rank 0
receives: each rank sends it the block that it holds, straight from where it lies, and rank 0 receives into the result.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .blocks import local_blocks
from .divergence import one_of_each
from .groups import match_groups
from .manifest import ParamGroup, as_tensor
from .names import has_fsdp1
from .optimizer_state import (
    check_model_and_optimizer,
    init_frozen_states,
    init_state,
    rollback_new_state,
)
from .rank_errors import (
    Group,
    call_on_rank_0,
    check_group,
    gather_object,
    join_problems,
    raise_on_all_ranks,
    rank,
    scatter_object,
)
from .rank_names import RankNames
from .state_dict import STATE, CheckpointState, get_optimizer_state, merge_param_groups
from .torch_state_dict import set_sharded_optimizer_state
from .transport import (
    Entry,
    Key,
    Transfer,
    connect,
    deliver,
    held,
    plan_transfers,
    receive,
    send,
    table_of,
)

# --------------------------------------------------------------------------------------------------------- gather and scatter


@torch.no_grad()
def gather_full_state_dict(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, group: dist.ProcessGroup | None = None
) -> dict[str, Any]:
    """Gather the whole optimizer state on rank 0, in CPU memory, whatever the strategy. Collective: every rank of ``group`` calls it.

    Rank 0 needs memory for the result and at most one tensor more, the other ranks for at most one block of a tensor that does not lie
    contiguously in CPU memory. Under FSDP1, whose parameters only torch can take apart, each rank first holds a copy of its own shard,
    and of one flat parameter's whole state while that is made.

    Example, on rank 0; the other ranks get ``{}``::

        {
            "state": {
                "layer.weight": {"step": tensor(7.), "exp_avg": tensor(...), "exp_avg_sq": tensor(...), "correction": tensor(...)},
                "layer.bias": {...},
            },
            "param_groups": [{"params": ["layer.weight", "layer.bias"], "lr": 0.001, "betas": (0.9, 0.999), ...}],
        }

    The states of parameters that are in no group are left out, and so are entries of ``optimizer.state`` that are no parameter's.
    This is what ``torch.distributed.checkpoint.state_dict.get_optimizer_state_dict`` returns with ``StateDictOptions(full_state_dict=True,
    cpu_offload=True)``, and its ``set_optimizer_state_dict`` takes it. Parameters that never had a gradient have no state here.

    Args:
        model: the module, wrapped or not.
        optimizer: the optimizer of its parameters: ours or one of torch's whose state holds tensors only.
        group: the ranks that hold the model, where several models share a job, whose first rank then counts as rank 0; None for all.

    Returns:
        Tensors of their own memory, contiguous, in CPU memory.

    Raises:
        ValueError: a state is no tensor, states of one name differ between ranks that should hold replicas, or the ranks' blocks do
            not add up to the whole tensor (an uneven mix of shardings that a box cannot describe).
    """
    cannot = "cannot gather the optimizer state"
    names = _rank_names(cannot, model, optimizer, group)
    with raise_on_all_ranks(cannot, group):
        found = get_optimizer_state(model, optimizer, names)
    found = one_of_each(found, names, group, None)
    tensors, tables = _gathered_tables(cannot, found, group)
    groups = merge_param_groups(
        gather_object(
            [ParamGroup(params, _plain_options(options)) for params, options in found.groups], group
        )
    )
    wholes = _merged(tables)
    with raise_on_all_ranks(cannot, group):
        plan = plan_transfers(tables, wholes, replicas=False)
    transfers = scatter_object(plan, group)
    if rank(group) != 0:
        for transfer in transfers:
            send(held(tensors[transfer.key], transfer, group), 0, group)
        return {}
    by_key: dict[Key, list[Transfer]] = {key: [] for key in wholes}
    for transfer in transfers:
        by_key[transfer.key].append(transfer)
    full: dict[str, dict[str, Tensor]] = {}
    for (fqn, name), entry in wholes.items():
        whole = full.setdefault(fqn, {})[name] = torch.empty(
            entry.shape, dtype=entry.dtype, device="cpu"
        )
        for transfer in by_key[fqn, name]:
            (sender,) = transfer.ranks
            place = transfer.block.of(whole)
            if sender == 0:
                place.copy_(held(tensors[transfer.key], transfer, group))
            else:
                receive(place, sender, group)
    return {
        "state": full,
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
    """Inverse of :func:`gather_full_state_dict`: give each rank its part of what rank 0 holds. Collective: every rank of
    ``group`` calls it.

    Rank 0 needs memory for at most one tensor more than ``full``, the other ranks for at most one block (twice their shard under FSDP1).
    A parameter that has no state in ``full`` starts afresh. Hyper-parameters come from ``full``, except that an optimizer with a
    schedule keeps it, and continues it from the position in ``full``.

    Args:
        model: the module, wrapped or not, in any layout and on any number of ranks.
        optimizer: the optimizer of its parameters.
        full: on rank 0 as :func:`gather_full_state_dict` or torch's ``get_optimizer_state_dict`` (full) returned it; ignored elsewhere.
        group: as for :func:`gather_full_state_dict`.

    Raises:
        ValueError: on every rank, where ``full`` is of another model or optimizer: a parameter or state is missing, unexpected or of
            another shape or dtype, or the groups divide the parameters otherwise. Nothing is changed.
    """
    cannot = "cannot scatter the full state"
    names = _rank_names(cannot, model, optimizer, group)
    stored, given = call_on_rank_0(cannot, lambda: _names_and_groups(full), group)
    names.add_stage_as_in(stored)
    with rollback_new_state(optimizer):
        with raise_on_all_ranks(cannot, group):
            init_state(optimizer)
            init_frozen_states(model, optimizer, stored, stored, names.stored)
            found = get_optimizer_state(model, optimizer, names)
        tensors, tables = _gathered_tables(cannot, found, group)
        groups_of_ranks = gather_object([params for params, _ in found.groups], group)
        plan: list[list[Transfer]] = []
        with raise_on_all_ranks(cannot, group):
            if rank(group) == 0:
                assert full is not None
                wholes = _merged(tables)
                _check(wholes, groups_of_ranks, full)
                plan = plan_transfers(
                    tables,
                    {key: entry for key, entry in wholes.items() if key[0] in full["state"]},
                    replicas=True,
                )
    transfers = scatter_object(plan, group)
    for transfer in transfers:
        block = (
            transfer.block.of(as_tensor(full["state"][transfer.key[0]][transfer.key[1]]))
            if full and rank(group) == 0
            else None
        )
        deliver(transfer, block, tensors, group)
    for key in tensors.keys() - {
        transfer.key for transfer in transfers
    }:  # those of parameters that never had a gradient
        for _, local in local_blocks(tensors[key]):
            local.zero_()
    matches = match_groups(
        [params for params, _ in found.groups], [other["params"] for other in given]
    )
    options_of = [
        _options(own.options if match is None else given[match])
        for own, match in zip(found.groups, matches, strict=True)
    ]
    for live, options in zip(optimizer.param_groups, options_of, strict=True):
        if (
            "scheduled_lr" in live
        ):  # what follows a schedule follows it after the load too, as with AdamW_BF16.load_state_dict
            options["scheduled_lr"] = None if live["scheduled_lr"] is None else options["lr"]
    if has_fsdp1(model):
        state: dict[str, dict[str, Any]] = {}
        for (fqn, name), tensor in tensors.items():
            state.setdefault(names.local(fqn), {})[name] = tensor
        own = [
            {**options, "params": list(map(names.local, params))}
            for (params, _), options in zip(found.groups, options_of, strict=True)
        ]
        set_sharded_optimizer_state(model, optimizer, {"state": state, "param_groups": own})
        return
    for live, options in zip(optimizer.param_groups, options_of, strict=True):
        _update_group(live, options)


# ----------------------------------------------------------------------------------------------------------------- checks


def _rank_names(
    cannot: str, model: nn.Module, optimizer: torch.optim.Optimizer, group: Group
) -> RankNames:
    """Check the arguments on all ranks and agree on names. Collective."""
    check_group(group)
    with raise_on_all_ranks(cannot, group):
        check_model_and_optimizer("(model, optimizer)", model, optimizer)
        names = RankNames(model, optimizer)
    names.number_experts()
    return names


def _gathered_tables(
    cannot: str, found: CheckpointState, group: Group
) -> tuple[dict[Key, Tensor], list[dict[Key, Entry]]]:
    """Return this rank's states by parameter and name, and on rank 0 what each rank holds of them. Collective."""
    with raise_on_all_ranks(cannot, group):
        for key, value in found.plain.items():
            fqn, _, name = key.removeprefix(STATE).rpartition(".")
            raise ValueError(
                f"the state {name!r} of parameter {fqn} is {type(value).__name__}, but only tensors can be gathered"
            )
        tensors: dict[Key, Tensor] = {}
        for key, tensor in found.tensors.items():
            fqn, _, name = key.removeprefix(STATE).rpartition(".")
            tensors[fqn, name] = tensor
        table = table_of(tensors)
    connect(group)
    return tensors, gather_object(table, group)


def _names_and_groups(full: Any) -> tuple[list[str], list[dict[str, Any]]]:
    if not isinstance(full, dict) or not {"state", "param_groups"} <= full.keys():
        raise ValueError(
            'the full state is of another model or optimizer: rank 0 must pass a dict with "state" and "param_groups"'
        )
    return list(full["state"]), full["param_groups"]


def _check(
    wholes: dict[Key, Entry], groups_of_ranks: list[list[list[str]]], full: dict[str, Any]
) -> None:
    """Refuse a full state that does not fit this model and optimizer."""
    problems = _differences(wholes, groups_of_ranks, full)
    if problems:
        raise ValueError(
            f"the full state is of another model or optimizer: {join_problems(problems)}"
        )


def _differences(
    wholes: dict[Key, Entry], groups_of_ranks: list[list[list[str]]], full: dict[str, Any]
) -> list[str]:
    state, problems = full["state"], []
    known = {fqn for groups in groups_of_ranks for params in groups for fqn in params}
    problems += [
        f"it has a state of {fqn}, which is no parameter here" for fqn in state if fqn not in known
    ]
    for (fqn, name), entry in wholes.items():
        if fqn not in state:
            continue
        value = state[fqn].get(name)
        if value is None:
            problems.append(f"it has no {name} of {fqn}")
        elif tuple(as_tensor(value).shape) != entry.shape:
            problems.append(
                f"{name} of {fqn} has shape {tuple(as_tensor(value).shape)} there but {entry.shape} here"
            )
        elif as_tensor(value).dtype != entry.dtype:
            problems.append(
                f"{name} of {fqn} is {as_tensor(value).dtype} there but {entry.dtype} here"
            )
    problems += [
        f"it has {name} of {fqn}, which is not here"
        for fqn in state
        for name in state[fqn]
        if fqn in known and (fqn, name) not in wholes
    ]
    for groups in groups_of_ranks:
        matches = match_groups(groups, [group["params"] for group in full["param_groups"]])
        for index, (params, match) in enumerate(zip(groups, matches, strict=True)):
            if params and match is None:
                problems.append(f"no group there has all parameters of group {index} here")
    return list(dict.fromkeys(problems))


# ----------------------------------------------------------------------------------------------------------- plan and groups


def _merged(tables: list[dict[Key, Entry]]) -> dict[Key, Entry]:
    """Everything that any rank holds a part of, in the order of rank 0; empty on the others."""
    return {key: entry for table in tables for key, entry in table.items()}


def _plain_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a group's options whose tensors (lr) are in CPU memory."""
    return {
        key: value.detach().cpu().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for key, value in options.items()
    }


def _options(options: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a group's options without its parameters."""
    return {
        key: value
        for key, value in _plain_options(options).items()
        if key not in ("params", "param_names")
    }


def _update_group(live: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(live.get(key), Tensor):
            live[key].copy_(as_tensor(value))  # a captured graph reads lr from this memory
        else:
            live[key] = value
