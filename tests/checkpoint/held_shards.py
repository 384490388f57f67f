"""Compare what a rank holds with full tensors, without a gather for each comparison.

Torch's own gather says once where the elements of the full tensors come from: it gathers numbers
that name the rank, the tensor and the position. Then each rank compares those that are its own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharded_bf16_adamw import AdamW_BF16
from sharded_bf16_adamw.sharding.dtensor import to_local

from .layouts import everything

EXACT = 256  # bfloat16 holds the integers up to here
EVERY = -1  # in place of a rank


def held_by(optimizer: AdamW_BF16) -> dict[tuple[int, int, str], Tensor]:
    """Return the local parameters and states, flat, by group, position in it, and state key."""
    found = {}
    for number, group in enumerate(optimizer.param_groups):
        for position, param in enumerate(group["params"]):
            tensors = {"": param, **optimizer.state.get(param, {})}
            for key, tensor in tensors.items():
                found[number, position, key] = to_local(tensor).detach().view(-1)
    return found


class HeldShards:
    """The elements of the full tensors that this rank holds, for one module and its optimizer."""

    def __init__(self, module: nn.Module, optimizer: AdamW_BF16) -> None:
        """Learn them. Collective. The tensors keep their values."""
        self._optimizer = optimizer
        held = held_by(optimizer)
        self._signature = signature(held)
        names = sorted(set().union(*all_gather(list(held))))
        assert max(len(names), dist.get_world_size(), *map(len, held.values())) <= EXACT
        before = [tensor.clone() for tensor in held.values()]
        numbers = []
        for number_of in (
            # torch refuses to gather steps that differ; each rank compares its own
            lambda name, tensor: torch.tensor(EVERY if name[2] == "step" else dist.get_rank()),
            lambda name, tensor: torch.tensor(names.index(name)),
            lambda name, tensor: torch.arange(len(tensor)),
        ):
            for name, tensor in held.items():
                tensor.copy_(number_of(name, tensor))
            full, options = everything(module, optimizer)
            numbers.append({key: value.flatten().int() for key, value in full.items()})
        for tensor, value in zip(held.values(), before, strict=True):
            tensor.copy_(value)
        # Of a replicated tensor each rank may have gathered its own copy, or that of another.
        everyones = all_gather(numbers)
        self._pieces: dict[str, list[tuple[Any, Tensor, Tensor]]] = {}
        for key, value in numbers[0].items():
            order = torch.arange(len(value))
            ranks, *found = torch.cat(
                [torch.stack([*(each[key] for each in of_rank), order]) for of_rank in everyones],
                dim=1,
            )
            own = torch.stack(found)[:, (ranks == dist.get_rank()) | (ranks == EVERY)].unique(dim=1)
            self._pieces[key] = [
                (names[index], *own[1:, own[0] == index].long())
                for index in own[0].unique().tolist()
                if names[index] in held
            ]
        self._group_of = {fqn: names[int(numbers[1][fqn][0])][0] for fqn in options}

    def is_current(self) -> bool:
        """Return whether every rank holds tensors like those that were learned. Collective."""
        changed = torch.tensor(float(signature(held_by(self._optimizer)) != self._signature))
        dist.all_reduce(changed)
        return not changed

    def differences(self, expected: tuple[dict[str, Tensor], dict[str, Any]]) -> str:
        """Compare this rank's elements and options with the result of :func:`everything`.

        A tensor that is not expected must be zero: a parameter without a gradient is at step 0.
        """
        held = held_by(self._optimizer)
        wrong = sorted(expected[0].keys() - self._pieces.keys())
        for key, pieces in self._pieces.items():
            value = expected[0].get(key)
            for name, positions, full_positions in pieces:
                found = held[name][positions]
                if value is None:
                    is_same = not found.any()
                else:
                    wanted = value.flatten()[full_positions]
                    is_same = found.dtype == wanted.dtype and torch.equal(found, wanted)
                if not is_same:
                    wrong.append(key)
        groups = self._optimizer.param_groups
        for fqn, options in expected[1].items():
            group = groups[self._group_of[fqn]]
            if {key: value for key, value in group.items() if key != "params"} != options:
                wrong.append(f"options of {fqn}")
        return f"not as saved: {wrong}" if wrong else ""


def all_gather(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def signature(held: dict[tuple[int, int, str], Tensor]) -> list[Any]:
    return [(name, tensor.dtype, len(tensor)) for name, tensor in held.items()]
