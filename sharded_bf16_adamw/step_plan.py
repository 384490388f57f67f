"""What a step works on, kept between steps for as long as it is what the optimizer holds.

Unwrapping DTensors, sorting by device and handing pointers to a kernel cost more than the update of a small tensor, so they are done
once. Anybody may change an optimizer between two steps, though: load a state, swap ``group["params"]``, move the model, replace
a state tensor or the memory below it. So every step compares where all tensors lie with where they lay, and starts afresh on any
difference. The kernel's table holds their memory, so an address cannot have passed to another tensor meanwhile.
"""

from __future__ import annotations

from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor

from .kernels import FusedAdamW, Hyperparams, StepArgs
from .sharding.base import Sharding
from .sharding.dtensor import DTensor, group_by, to_local


class StepPlan:
    """Parameters that take part in a step, their states and a kernel table for each device.

    Args:
        groups: for each parameter group its parameters with a gradient, plain or DTensor; at least one in all.
        states: the state of each parameter, group after group, by the names of :func:`sharded_bf16_adamw.state.new_state`; each fits its
            parameter (:func:`sharded_bf16_adamw.state.check_state`).
        names: what messages call each parameter.
        sharding: how they are spread over ranks.
        backend: see :class:`sharded_bf16_adamw.kernels.FusedAdamW`.
    """

    def __init__(
        self,
        groups: list[list[Tensor]],
        states: list[dict[str, Any]],
        names: list[str],
        sharding: Sharding,
        backend: str | None,
    ) -> None:
        params = self.params = list(chain.from_iterable(groups))
        self._sizes = list(map(len, groups))
        self._states = states
        self._names = names
        self._sharding = sharding
        shards = [sharding.shard(param) for param in params]
        self._plain = not any(isinstance(tensor, DTensor) for tensor in shards)
        self._addresses = self._read_addresses()
        self._layouts = self._read_layouts()
        self._numels = [to_local(shard).numel() for shard in shards]
        self._tables = []
        group_of = [number for number, size in enumerate(self._sizes) for _ in range(size)]
        for indices in group_by(range(len(params)), lambda i: params[i].device).values():
            local_params = [to_local(shards[i]) for i in indices]
            columns: dict[str, list[Any]] = {
                key: [_local_or_none(states[i], key) for i in indices] for key in _STATE_KEYS
            }
            groups_here = [group_of[i] for i in indices]
            states_here = (
                columns["exp_avg"],
                columns["exp_avg_sq"],
                columns["correction"],
                columns["step"],
            )
            table = FusedAdamW(local_params, *states_here, groups=groups_here, backend=backend)
            self._tables.append((local_params[0].device, indices, table))

    def matches(self, groups: list[list[Tensor]]) -> bool:
        """Whether the plan is for just these parameters in these groups."""
        return list(map(len, groups)) == self._sizes and all(
            map(is_, chain.from_iterable(groups), self.params)
        )

    def is_valid(self) -> bool:
        """Whether all memory of the parameters and of their states lies where it lay, and the parameters are laid out as they were."""
        return (
            self._addresses is not None
            and self._addresses == self._read_addresses()
            and self._layouts == self._read_layouts()
        )

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph reads from it; see :attr:`sharded_bf16_adamw.kernels.FusedAdamW.captured`."""
        return any(table.captured for _, _, table in self._tables)

    def local_grads(self, grads: list[Tensor]) -> list[Tensor]:
        """This rank's part of each parameter's gradient.

        Raises:
            RuntimeError: one has not as many elements as its parameter, which was resized after the backward pass: a kernel would read
                beyond it.
        """
        local = grads if self._plain else self._sharding.local_grads(self.params)
        numels = list(map(Tensor.numel, local))
        if numels != self._numels:
            index = next(
                i for i, (a, b) in enumerate(zip(numels, self._numels, strict=True)) if a != b
            )
            raise RuntimeError(
                f"the gradient of parameter {self._names[index]} has {numels[index]} elements, not as many as the parameter, which was "
                "resized after the backward pass; call zero_grad() when you resize a parameter"
            )
        return local

    def update_(
        self,
        grads: list[Tensor],
        hypers: list[Hyperparams],
        *,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Take one step. ``grads``: local, group after group; ``hypers``: one for each group."""
        for device, indices, table in self._tables:
            args = StepArgs(
                grads if len(self._tables) == 1 else [grads[i] for i in indices],
                hypers,
                None if grad_scale is None else grad_scale.to(device),
                None if found_inf is None else found_inf.to(device),
            )
            table.update_(args)

    def _read_layouts(self) -> list[Any]:
        """What tells which elements the parameters have, and in which order, where the memory stays: ``param.data = param.data.t()``.
        Strides take long to read and tell more only of what is not contiguous."""
        locals_ = self.params if self._plain else list(map(to_local, self.params))
        contiguous = list(map(Tensor.is_contiguous, locals_))
        strides = [] if all(contiguous) else list(map(Tensor.stride, locals_))
        return [*map(Tensor.numel, locals_), *contiguous, *strides]

    def _read_addresses(self) -> list[int] | None:
        """Where every tensor's memory lies now; None where a state holds what is no tensor, which is never taken to be current."""
        tensors = chain(self.params, chain.from_iterable(map(dict.values, self._states)))
        try:
            return list(map(Tensor.data_ptr, tensors if self._plain else map(to_local, tensors)))
        except TypeError:
            return None


_STATE_KEYS = ("exp_avg", "exp_avg_sq", "correction", "step")


def _local_or_none(state: dict[str, Any], key: str) -> Tensor | None:
    return to_local(state[key]) if key in state else None
