"""Step plans: the prepared input of the kernels, cached between steps.

Unwrapping DTensors, sorting by device and passing pointers to a kernel cost more than the update of
a small tensor, so they are done once. But any code may change an optimizer between two steps: load
a state, swap ``group["params"]``, move the model, replace a state tensor or the memory below it. So
every step compares the addresses of all tensors with the plan's, and builds a new plan on any
difference. The plan's kernel table keeps their memory alive, so an address cannot have passed to
another tensor meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor

from .gradients import GroupGrads, wrong_numel
from .kernels import FusedAdamW, Hyperparams, Runs, StepArgs, is_capturing
from .kernels.device_memory import WARM_UP
from .sharding.base import Sharding
from .sharding.dtensor import group_by, to_local
from .state import states_for
from .torch_types import is_dtensor
from .validation import param_names

MAX_PLANS = 4  # sets of parameters may take turns: generator and discriminator, experts

logger = logging.getLogger("sharded_bf16_adamw")


class StepPlan:
    """The parameters of a step, their states, and a kernel table for each device.

    Args:
        groups: for each parameter group its parameters with a gradient, plain or DTensor; at least
            one parameter in total.
        states: the state of each parameter, group after group, as :func:`.state.new_state` makes
            it. Each has passed :func:`.state.check_state`.
        names: each parameter's name for messages.
        sharding: the optimizer's sharding strategy.
        backend: see :class:`.kernels.FusedAdamW`.
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
        self._is_plain = not any(is_dtensor(shard) for shard in shards)
        self._addresses = self._read_addresses()
        self._layouts = self._read_layouts()
        local_shards = list(map(to_local, shards))
        self._numels = list(map(Tensor.numel, local_shards))
        self._tables = []  # device, indices of its parameters, kernel table
        group_index = [i for i, size in enumerate(self._sizes) for _ in range(size)]
        for indices in group_by(range(len(params)), lambda i: params[i].device).values():
            columns: dict[str, list[Any]] = {
                key: [_local_or_none(states[i], key) for i in indices]
                for key in ("exp_avg", "exp_avg_sq", "correction", "step")
            }
            table = FusedAdamW(
                [local_shards[i] for i in indices],
                columns["exp_avg"],
                columns["exp_avg_sq"],
                columns["correction"],
                columns["step"],
                groups=[group_index[i] for i in indices],
                backend=backend,
            )
            self._tables.append((local_shards[indices[0]].device, indices, table))

    def matches(self, groups: list[list[Tensor]]) -> bool:
        """Return True if the plan was built for exactly these parameters in these groups."""
        return list(map(len, groups)) == self._sizes and all(
            map(is_, chain.from_iterable(groups), self.params)
        )

    def is_valid(self) -> bool:
        """Return True if no tensor has moved and no parameter has changed its strides or size."""
        return (
            self._addresses is not None
            and self._addresses == self._read_addresses()
            and self._layouts == self._read_layouts()
        )

    @property
    def captured(self) -> bool:
        """True if a CUDA graph reads a table; see :attr:`.kernels.FusedAdamW.captured`."""
        return any(table.captured for _, _, table in self._tables)

    def local_grads(self, grads: list[Tensor]) -> list[Tensor]:
        """Return this rank's shard of each parameter's gradient.

        Raises:
            RuntimeError: a gradient has another number of elements than its parameter, which was
                resized after the backward pass. A kernel would read beyond the gradient.
        """
        local = grads if self._is_plain else self._sharding.local_grads(self.params)
        numels = list(map(Tensor.numel, local))
        if numels != self._numels:
            index = next(i for i, numel in enumerate(numels) if numel != self._numels[i])
            raise wrong_numel(self._names[index], numels[index], self._numels[index])
        return local

    def update_(
        self,
        grads: list[Tensor],
        hyperparams: list[Hyperparams],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Update all parameters and states in place.

        Args:
            grads: the local gradients, group after group.
            hyperparams: one entry for each of the optimizer's parameter groups.
            grad_scale: 0-dim float32 factor of the gradients, or None.
            found_inf: 0-dim float32; nonzero leaves everything unchanged. None: always update.
        """
        for args, table, _ in self._per_device(grads, hyperparams, grad_scale, found_inf):
            table.update_(args)

    def precision_sums(
        self,
        grads: list[Tensor],
        hyperparams: list[Hyperparams],
        grad_scale: Tensor | None,
        runs: Runs | None,
    ) -> list[Tensor]:
        """Return each device's sums of the step that :meth:`update_` would take.

        Args:
            grads: the local gradients, group after group.
            hyperparams: one entry for each of the optimizer's parameter groups.
            grad_scale: 0-dim float32 factor of the gradients, or None.
            runs: see :meth:`.kernels.FusedAdamW.precision_sums`; ``params`` are indices into
                :attr:`params`.
        """
        return [
            table.precision_sums(
                args, runs if runs is None or len(self._tables) == 1 else runs.of_params(indices)
            )
            for args, table, indices in self._per_device(grads, hyperparams, grad_scale, None)
        ]

    def _per_device(
        self,
        grads: list[Tensor],
        hyperparams: list[Hyperparams],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> Iterator[tuple[StepArgs, FusedAdamW, list[int]]]:
        """Yield each device's arguments, table and indices of parameters."""
        for device, indices, table in self._tables:
            args = StepArgs(
                grads if len(self._tables) == 1 else [grads[i] for i in indices],
                hyperparams,
                None if grad_scale is None else grad_scale.to(device),
                None if found_inf is None else found_inf.to(device),
            )
            yield args, table, indices

    def _read_layouts(self) -> list[Any]:
        """Read the sizes and strides, which ``param.data = param.data.t()`` changes in place."""
        params = self.params if self._is_plain else list(map(to_local, self.params))
        contiguous = list(map(Tensor.is_contiguous, params))
        # Strides are slow to read, and a contiguous tensor's follow from its shape.
        strides = [] if all(contiguous) else list(map(Tensor.stride, params))
        return [*map(Tensor.numel, params), *contiguous, *strides]

    def _read_addresses(self) -> list[int] | None:
        """Read every tensor's address. None (never valid) if a state holds a non-tensor."""
        tensors = chain(self.params, chain.from_iterable(map(dict.values, self._states)))
        try:
            return list(map(Tensor.data_ptr, tensors if self._is_plain else map(to_local, tensors)))
        except TypeError:
            return None


class StepPlanCache:
    """The latest step plans of one optimizer, one for each set of parameters with gradients."""

    def __init__(self, sharding: Sharding) -> None:
        self._sharding = sharding
        self.plans: list[StepPlan] = []  # the newest last
        self._captured: list[StepPlan] = []  # dropped, but CUDA graphs still read them
        self._seen_keys: list[Any] = []  # of the optimizer's state when the last plan was built
        self._seen_states: list[Any] = []

    def get(
        self,
        group_grads: list[GroupGrads],
        states: dict[Tensor, Any],
        backend: str | None,
    ) -> StepPlan | None:
        """Return the cached plan if it is still valid, else build one and the missing states.

        Args:
            group_grads: one entry for each of the optimizer's parameter groups.
            states: the optimizer's states.
            backend: see :class:`.kernels.FusedAdamW`.

        Returns:
            The plan, or None if no parameter has a gradient.

        Raises:
            RuntimeError: a state or a gradient does not fit its parameter, or a CUDA graph captures
                the first step of these parameters. No state is created.
        """
        groups = [params for _, params, _ in group_grads]
        if not any(groups):
            return None
        if not self._states_are_seen(states):
            self._drop(self.plans)
        plan = self._matching(groups)
        if plan is None or not plan.is_valid():
            plan = self._build(plan, groups, group_grads, states, backend)
        return plan

    def find(self, groups: list[list[Tensor]], states: dict[Tensor, Any]) -> StepPlan | None:
        """Return the plan that :meth:`get` would return, or None if it would build one."""
        plan = self._matching(groups) if self._states_are_seen(states) else None
        return plan if plan is not None and plan.is_valid() else None

    def _matching(self, groups: list[list[Tensor]]) -> StepPlan | None:
        return next((plan for plan in self.plans if plan.matches(groups)), None)

    def _states_are_seen(self, states: dict[Tensor, Any]) -> bool:
        """Return True if the states are the same dicts as when the last plan was built.

        The plans check the tensors in them.
        """
        return (
            len(states) == len(self._seen_keys)
            and all(map(is_, states, self._seen_keys))
            and all(map(is_, states.values(), self._seen_states))
        )

    def _build(
        self,
        stale: StepPlan | None,
        groups: list[list[Tensor]],
        group_grads: list[GroupGrads],
        all_states: dict[Tensor, Any],
        backend: str | None,
    ) -> StepPlan:
        """Build a plan, add it to the cache in place of ``stale``, and store the new states."""
        params = list(chain.from_iterable(groups))
        if is_capturing(params[0].device):
            # A failed capture would leave the new states uninitialized.
            raise RuntimeError(
                f"a CUDA graph captures a step of these {len(params)} parameters for the first "
                f"time; {WARM_UP}"
            )
        name_of = param_names([group for group, _, _ in group_grads])
        names = [name_of[param] for param in params]
        states = states_for(params, names, all_states, self._sharding)
        # Drop plans of parameters that have left the optimizer, since they keep the memory alive.
        self._drop([p for p in self.plans if p is stale or not all(x in name_of for x in p.params)])
        self._drop(self.plans[: 1 - MAX_PLANS])
        plan = StepPlan(groups, states, names, self._sharding, backend)
        # Raises if a gradient does not fit, while the new states are not stored yet.
        plan.local_grads([grad for _, _, grads in group_grads for grad in grads])
        all_states.update(zip(params, states, strict=True))
        self.plans.append(plan)
        self._seen_keys, self._seen_states = list(all_states), list(all_states.values())
        logger.debug(
            "built a step plan for %d parameters%s; %d plans are cached",
            len(params),
            "" if stale is None else " in place of one whose tensors have moved",
            len(self.plans),
        )
        return plan

    def _drop(self, plans: list[StepPlan]) -> None:
        self._captured += [plan for plan in plans if plan.captured]
        self.plans = [plan for plan in self.plans if plan not in plans]


def hyperparams_of(group: dict[str, Any]) -> Hyperparams:
    """Return the hyperparameters of a parameter group.

    The update multiplies the weight decay by ``lr``. With ``decouple_lr`` the product is
    ``lr / max_lr * weight_decay``, also for an ``lr`` on a device that the host never reads.
    """
    beta1, beta2 = group["betas"]
    weight_decay = group["weight_decay"]
    if group["decouple_lr"]:
        weight_decay /= group["max_lr"]
    return Hyperparams(group["lr"], beta1, beta2, group["eps"], weight_decay, group["maximize"])


def hyperparams_at(lrs: list[float | None], groups: list[dict[str, Any]]) -> list[Hyperparams]:
    """Return each group's hyperparameters at the learning rates of :func:`scheduled_lrs`."""
    return [
        hyperparams_of(group if lr is None else {**group, "lr": lr})
        for group, lr in zip(groups, lrs, strict=True)
    ]


def _local_or_none(state: dict[str, Any], key: str) -> Tensor | None:
    return to_local(state[key]) if key in state else None
