"""One optimizer step whose updates run inside the backward pass.

One optimizer step is one *round*::

    first final gradient     -> read learning rates, start the round
    each final gradient      -> into the batch; a full batch is updated at once
    end of a backward pass   -> the rest of the batch is updated
    step()                   -> use gradients that no hook saw, advance the schedule, end the round

[Note: when a gradient is final]
A post-accumulate-grad hook runs once autograd has added a gradient to ``param.grad``. FSDP2 calls
the hook once it has reduced a gradient. Either way the hook sees the whole gradient of a backward
pass, which is final if the pass is the last of the step. Earlier passes run inside
``accumulate()``, where hooks do nothing, or under FSDP2 without gradient sync, where no hook runs.
A second gradient in one round would update its parameter twice, so the hook raises instead.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from enum import Enum, auto
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..gradients import GroupGrads, check_grads, wrong_numel
from ..kernels import Hyperparams, clip_coefficient, grad_sum_sq
from ..schedule import scheduled_lrs
from ..sharding.dtensor import group_by, to_local
from ..sharding.grad_hooks import GradHooks
from ..state import states_for
from ..step_plan import StepPlan, hyperparams_at, hyperparams_of
from ..validation import DTYPES, name_in_group
from . import checks
from .batch import Batch, Batcher
from .clip import ClipInBackward, PreviousStepClip

_hooks = GradHooks(torch._disable_dynamo)


class RoundState(Enum):
    """The progress of the current step."""

    IDLE = auto()  # no final gradient since the last step()
    RUNNING = auto()  # gradients were used, and step() has yet to end the round
    FAILED = auto()  # a backward pass has not ended: it raised, or it still runs


@dataclass
class Round:
    """The hyper-parameters of a step, read at its first final gradient, and its progress."""

    lrs: list[float | None]  # see :func:`sharded_bf16_adamw.schedule.scheduled_lrs`
    group_hypers: list[Hyperparams]  # as read from the groups
    hypers: list[Hyperparams]  # the same, but with the learning rates of the schedule
    clip: PreviousStepClip | None = None
    taken: set[Tensor] = field(default_factory=set)  # parameters updated or in the batch
    updated: int = 0  # number of parameters
    backward_passes: set[int] = field(default_factory=set)  # autograd's ids of unfinished passes
    streams: set[torch.cuda.Stream] = field(default_factory=set)  # that have run updates

    def wait_for_streams(self) -> None:
        """Make the current stream wait for the updates, which ran on the gradients' streams."""
        for stream in self.streams:
            torch.cuda.current_stream(stream.device).wait_stream(stream)
        self.streams.clear()


class StepInBackward:
    """The hooks on an optimizer's parameters, and the current round.

    Args:
        optimizer: an ``AdamW_BF16`` whose gradients torch reduces; held by a weak reference.
        clip: see :class:`.ClipInBackward`.

    Attributes:
        refusal: message of the error that a round raises instead of starting; None lets it start.
    """

    def __init__(self, optimizer: Any, clip: ClipInBackward | None = None) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.clip = clip
        self._round: Round | None = None
        self._batcher = Batcher()
        self._is_accumulating = False
        self.refusal: str | None = None
        self._lock = threading.RLock()  # autograd has a thread for each device
        self._hooked: Any = WeakIdKeyDictionary()
        self._group_of: dict[Tensor, int] = {}
        # by the id of a batch's first parameter
        self._plans: dict[int, tuple[StepPlan, list[dict[str, Any]]]] = {}
        self.add_params()

    def add_params(self) -> None:
        """Put hooks on the parameters of a new group.

        Raises:
            ValueError: a parameter cannot be updated inside the backward pass; nothing was hooked.
        """
        self._check_groups()
        self._add_hooks()

    def _check_groups(self) -> None:
        checks.check_groups(self._get_optimizer().param_groups, self.clip)

    def _add_hooks(self) -> None:
        """Put hooks on parameters that have none: new ones, and those that are no longer frozen."""
        params = self._get_optimizer()._all_params()
        _hooks.add(self, params, self._hooked, StepInBackward.on_grad_ready)

    def _get_optimizer(self) -> Any:
        """Return the optimizer. It is alive because it holds this object."""
        return self._optimizer()

    @property
    def state(self) -> RoundState:
        """The state of the current step."""
        if self._round is None:
            return RoundState.IDLE
        return RoundState.FAILED if self._round.backward_passes else RoundState.RUNNING

    # --------------------------------------------------------------------- during the backward pass

    @torch.no_grad()
    def on_grad_ready(self, param: Tensor) -> None:
        """Use ``param.grad``, which is final unless accumulating."""
        grad = param.grad
        if self._is_accumulating or grad is None:
            return
        with self._lock:
            if self._round is None:
                checks.check_backward_mode(param.device)
                self._round = self._start_round()
            index = self._group_of.get(param)
            if index is None:  # taken out of its group since it was hooked
                if not self._round.taken:
                    self._round = None
                return
            group = self._get_optimizer().param_groups[index]
            self._watch_backward()  # first, so that any error below fails the round
            if param in self._round.taken:
                num_passes = len(self._round.backward_passes)
                name = name_in_group(group, param)
                raise RuntimeError(checks.second_gradient_message(name, num_passes))
            self._take(group, param)

    def _take(self, group: dict[str, Any], param: Tensor) -> None:
        """Move the final gradient of ``param`` into the batch."""
        assert self._round is not None and param.grad is not None
        if param.grad.dtype not in DTYPES or param.grad.layout != torch.strided:
            check_grads(group)
        # Reduce partial gradients of tensor parallelism here and not with the batch: hooks run in
        # the same order on every rank, but batches may end at different parameters.
        local = self._get_optimizer()._sharding.local_grads([param])[0]
        if local.numel() != to_local(param).numel():
            name = name_in_group(group, param)
            raise wrong_numel(name, local.numel(), to_local(param).numel())
        param.grad = None
        self._round.taken.add(param)
        self._batcher.add(param, local, self._flush)

    def _start_round(self) -> Round:
        """Read the hyper-parameters, and check the groups if they changed since the last round."""
        if self.refusal is not None:
            raise RuntimeError(self.refusal)
        optimizer = self._get_optimizer()
        groups = optimizer.param_groups
        group_of = {param: index for index, group in enumerate(groups) for param in group["params"]}
        if group_of.keys() != self._group_of.keys():
            self._check_groups()
            checks.check_not_ddp(group_of)
            self._plans.clear()
            self._batcher.forget_params()
        self._group_of = group_of
        lrs = scheduled_lrs(optimizer.lr_function, groups)
        group_hypers = list(map(hyperparams_of, groups))
        return Round(lrs, group_hypers, hyperparams_at(lrs, groups), self._new_clip())

    def _new_clip(self) -> PreviousStepClip | None:
        if self.clip is None or self.clip.by != "previous_step":
            return None
        optimizer = self._get_optimizer()
        optimizer._grad_norm.replica_check.raise_if_mismatch()
        return PreviousStepClip(
            self.clip.max_norm, optimizer.param_groups, optimizer._grad_norm, optimizer.backend
        )

    def _watch_backward(self) -> None:
        """Register a callback for the end of this backward pass.

        It never runs if the backward pass raises.
        """
        assert self._round is not None
        task = torch._C._current_graph_task_id()
        if task < 0 or task in self._round.backward_passes:  # -1: outside a backward pass
            return
        self._round.backward_passes.add(task)
        round_ = self._round

        @torch._disable_dynamo
        def on_backward_end() -> None:
            with self._lock:
                if self._round is round_:  # else it was abandoned meanwhile
                    self._flush()
                    round_.wait_for_streams()
                    round_.backward_passes.discard(task)

        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(on_backward_end)

    def _flush(self) -> None:
        if self._batcher.batch is not None and self._round is not None:
            self._update(self._batcher.batch, self._round)

    @torch.no_grad()
    def _update(self, batch: Batch, round_: Round) -> None:
        """Update the parameters of a batch and free their gradients."""
        order = sorted(range(len(batch.params)), key=lambda i: self._group_of[batch.params[i]])
        params, grads = [batch.params[i] for i in order], [batch.grads[i] for i in order]
        with nullcontext() if batch.stream is None else torch.cuda.stream(batch.stream):
            parts = [(params, grads)]
            if self.clip is not None and self.clip.by == "param":
                parts = [([param], [grad]) for param, grad in zip(params, grads, strict=True)]
            plans = [self._current_plan(part) for part, _ in parts]
            scales = [self._grad_scale(*part, batch.stream) for part in parts]
            round_.updated += len(params)  # even if the kernel fails
            self._batcher.batch = None
            if batch.stream is not None:
                round_.streams.add(batch.stream)
            for plan, (_, part_grads), scale in zip(plans, parts, scales, strict=True):
                plan.update_(part_grads, round_.hypers, scale, found_inf=None)

    def _grad_scale(
        self, params: list[Tensor], grads: list[Tensor], stream: torch.cuda.Stream | None
    ) -> Tensor | None:
        """Return the gradients' clip coefficient, if any, and add them to the norm of this step."""
        optimizer = self._get_optimizer()
        if self.clip is None:
            return None
        if self.clip.by == "param":
            sum_sq = grad_sum_sq(grads, optimizer.backend)
            return clip_coefficient(sum_sq, self.clip.max_norm, optimizer.backend)[1]
        assert self._round is not None and self._round.clip is not None
        groups = group_by(zip(params, grads, strict=True), lambda pair: self._group_of[pair[0]])
        for index, pairs in groups.items():
            own_params, own_grads = map(list, zip(*pairs, strict=True))
            self._round.clip.add(index, own_params, own_grads, id(params[0]))
        return self._round.clip.scale(grads[0].device, stream)

    def _current_plan(self, params: list[Tensor]) -> StepPlan:
        """Return the cached plan of a batch if it is still valid, else build one.

        Stores new states only once nothing more can fail.
        """
        optimizer = self._get_optimizer()
        groups: list[list[Tensor]] = [[] for _ in optimizer.param_groups]
        for param in params:
            groups[self._group_of[param]].append(param)
        plan, states = self._plans.get(id(params[0]), (None, []))
        if (
            plan is not None
            and plan.matches(groups)
            and all(map(is_, states, map(optimizer.state.get, params)))
            and plan.is_valid()
        ):
            return plan
        names = [
            name_in_group(optimizer.param_groups[self._group_of[param]], param) for param in params
        ]
        states = states_for(params, names, optimizer.state, optimizer._sharding)
        plan = StepPlan(groups, states, names, optimizer._sharding, optimizer.backend)
        optimizer.state.update(zip(params, states, strict=True))
        self._plans[id(params[0])] = (plan, states)
        return plan

    # --------------------------------------------------------------------- at and between the steps

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Let backward passes in this context accumulate gradients and update nothing."""
        self.check_between_steps("optimizer.accumulate()")
        before, self._is_accumulating = self._is_accumulating, True
        try:
            yield
        finally:
            self._is_accumulating = before

    def check_between_steps(self, caller: str) -> None:
        """Raise RuntimeError, with the remedy, if a round is running or has failed.

        Args:
            caller: the function that the user called, for the message.
        """
        self.check_not_failed(caller)
        if self.state is RoundState.RUNNING:
            raise RuntimeError(
                f"{caller} was called between a backward pass that has updated parameters and "
                "step(), so it would see half a step; call step() first"
            )

    def check_not_failed(self, caller: str) -> None:
        """Raise RuntimeError, with the remedy, if a backward pass has ended early."""
        if self.state is RoundState.FAILED:
            raise RuntimeError(self._failure(caller))

    def _failure(self, caller: str) -> str:
        assert self._round is not None
        return checks.failure_message(caller, self._round.updated, self._group_of)

    def before_zero_grad(self) -> None:
        """Discard gradients that wait in the batch.

        Raises:
            RuntimeError: other gradients of this step were already used.
        """
        if self._round is not None and self._round.updated:
            self.check_between_steps("zero_grad()")
        self.abandon()

    def abandon(self) -> None:
        """End the round without a step."""
        self._round = self._batcher.batch = None

    def abandon_step(self) -> None:
        """End the round without a step, whatever its state."""
        self.abandon()

    def begin_step(
        self, gradients: list[GroupGrads]
    ) -> tuple[list[float | None], list[GroupGrads]]:
        """Update the parameters that are still in the batch.

        Args:
            gradients: for each group, the gradients that no hook saw.

        Returns:
            The learning rates of this step, and the gradients that :meth:`.AdamW_BF16.step` is to
            use: all of ``gradients``, or none with clipping, which updates them in the batch.

        Raises:
            RuntimeError: a gradient belongs to a parameter that was updated in this round, or
                hyper-parameters have changed during the round. Nothing is changed. Or replicas have
                different gradients.
            ValueError: the model was wrapped by FSDP1 meanwhile. Nothing is changed.
        """
        optimizer = self._get_optimizer()
        self._check_groups()
        if self._round is None and self.clip is not None:
            self._round = self._start_round()
        if self._round is None:
            return scheduled_lrs(optimizer.lr_function, optimizer.param_groups), gradients
        self.check_not_failed("step()")
        checks.check_taken_once(gradients, self._round.taken)
        checks.check_hyperparams_kept(optimizer.param_groups, self._round.group_hypers)
        if self.clip is not None:
            for group, params, _ in gradients:
                for param in params:
                    self._take(group, param)
            gradients = [(group, [], []) for group, _, _ in gradients]
        self._flush()
        self._finish_updates()
        return self._round.lrs, gradients

    def _finish_updates(self) -> None:
        """Wait for all updates of the round, and add up the norm of its gradients."""
        assert self._round is not None
        self._round.wait_for_streams()
        if self._round.clip is not None:
            self._round.clip.all_reduce()

    def end_step(self) -> None:
        """End the round, and hook parameters that are no longer frozen."""
        if self._round is not None and self._round.clip is not None:
            self._round.clip.end_step()
        self.abandon()
        self._add_hooks()
