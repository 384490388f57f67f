"""Update parameters inside the backward pass: a gradient is used and freed as soon as it is final.

One optimizer step is one *round*::

    first final gradient     -> read learning rates, start the round
    each final gradient      -> into the batch; a full batch is updated at once
    end of a backward pass   -> the rest of the batch is updated
    step()                   -> use gradients that no hook saw, advance the schedule, end the round

[Note: when a gradient is final]
A post-accumulate-grad hook runs once autograd has added a gradient to ``param.grad``; FSDP2 calls
it once it has reduced one. Either way it is the whole gradient of a backward pass, so it is final
if that pass is the last of the step. Earlier passes run inside ``accumulate()``, or under FSDP2
without gradient sync, where no hook runs. A second gradient in one round would update its parameter
twice, so the hook raises before it touches that parameter.

[Note: gradients that share memory]
All gradients of one FSDP2 group are views of one buffer, which is freed only with the last view. So
the size of a batch counts the storages that it keeps alive, and a batch ends only where a storage
ends. The previous backward pass shows which parameter is the last in its storage.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from enum import Enum, auto
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils.weak import WeakIdKeyDictionary

from .clip_in_backward import ClipInBackward, PreviousStepClip
from .gradients import GroupGrads, check_grads
from .kernels import Hyperparams, clip_coefficient, grad_sum_sq, is_capturing
from .schedule import scheduled_lrs
from .sharding.dtensor import DTensor, group_by, shard_groups, to_local
from .sharding.fsdp1 import is_flattened
from .sharding.zero.checks import is_wrapped_by_ddp
from .state import check_state, new_state
from .step_plan import StepPlan, hyperparams_of
from .validation import DTYPES, param_name

BATCH_BYTES = 2**20  # a launch costs about as much as the update of this many bytes of gradients

# parameter -> weak reference to the newest StepInBackward that has hooked it
_hook_owner: Any = WeakIdKeyDictionary()


class RoundState(Enum):
    """The progress of the current step."""

    IDLE = auto()  # no parameter was updated since the last step()
    RUNNING = auto()  # parameters were updated, and step() has yet to end the round
    FAILED = auto()  # a backward pass has ended early


@dataclass
class Batch:
    """Gradients that wait for their update, all on one device and one stream."""

    device: torch.device
    stream: torch.cuda.Stream | None
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)  # local
    storages: set[int] = field(default_factory=set)
    nbytes: int = 0  # of the storages

    def add(self, param: Tensor, grad: Tensor) -> None:
        """Add one parameter and its local gradient."""
        storage = grad.untyped_storage()
        if storage._cdata not in self.storages:
            self.storages.add(storage._cdata)
            self.nbytes += storage.nbytes()
        self.params.append(param)
        self.grads.append(grad)


@dataclass
class _Round:
    """The hyper-parameters of a step, read at its first final gradient, and its progress since."""

    lrs: list[float | None]  # see :func:`sharded_bf16_adamw.schedule.scheduled_lrs`
    group_hypers: list[Hyperparams]  # as read from the groups
    hypers: list[Hyperparams]  # the same, but with the learning rates of the schedule
    clip: PreviousStepClip | None = None
    taken: set[Tensor] = field(default_factory=set)  # parameters updated or in the batch
    updated: int = 0
    backward_passes: set[int] = field(default_factory=set)  # autograd's ids of unfinished passes
    streams: set[torch.cuda.Stream] = field(default_factory=set)  # that have run updates


class StepInBackward:
    """The hooks on an optimizer's parameters, and the round that they work on.

    Args:
        optimizer: an ``AdamW_BF16`` whose gradients torch reduces; held by a weak reference.
        clip: see :class:`.ClipInBackward`.
    """

    def __init__(self, optimizer: Any, clip: ClipInBackward | None = None) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.clip = clip
        self._round: _Round | None = None
        self._batch: Batch | None = None
        self._is_accumulating = False
        self._lock = threading.RLock()  # autograd has a thread for each device
        self._hooks: Any = WeakIdKeyDictionary()  # parameter -> handle
        self._group_of: dict[Tensor, int] = {}
        # by the id of a batch's first parameter
        self._plans: dict[int, tuple[StepPlan, list[dict[str, Any]]]] = {}
        self._storage_ends: set[int] = set()  # ids of the parameters that are last in a storage
        self.add_params()

    def add_params(self) -> None:
        """Put hooks on the parameters of a new group.

        Raises:
            ValueError: a parameter cannot be updated inside the backward pass; nothing was hooked.
        """
        self._check_groups()
        self._add_hooks()

    def _check_groups(self) -> None:
        for group in self._get_optimizer().param_groups:
            _check_group(group, self.clip)

    def _add_hooks(self) -> None:
        """Put hooks on parameters that have none: new ones, and those that are no longer frozen."""
        me = weakref.ref(self)

        @torch._disable_dynamo
        def on_grad_ready(param: Tensor) -> None:
            hooks = me()
            owner = _hook_owner.get(param)
            if hooks is not None and (owner is me or owner is None or owner() is None):
                hooks.on_grad_ready(param)

        for param in (p for group in self._get_optimizer().param_groups for p in group["params"]):
            if param.requires_grad and param not in self._hooks:
                handle = param.register_post_accumulate_grad_hook(on_grad_ready)
                self._hooks[param] = handle
                _hook_owner[param] = me
                weakref.finalize(self, handle.remove)

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
                self._round = self._start_round(param)
            index = self._group_of.get(param)
            if index is None:  # taken out of its group since it was hooked
                if not self._round.taken:
                    self._round = None
                return
            group = self._get_optimizer().param_groups[index]
            self._watch_backward()  # first, so that any error below fails the round
            if param in self._round.taken:
                raise RuntimeError(self._second_gradient(group, param))
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
            raise RuntimeError(
                f"the gradient of parameter {_name(group, param)} has {local.numel()} elements but "
                f"the parameter has {to_local(param).numel()}; resize parameters only before the "
                "forward pass"
            )
        param.grad = None
        self._round.taken.add(param)
        self._add_to_batch(param, local)

    def _start_round(self, param: Tensor) -> _Round:
        """Read hyper-parameters, and check what may have changed since the last round."""
        optimizer = self._get_optimizer()
        groups = optimizer.param_groups
        if is_capturing(param.device):
            raise RuntimeError(
                "a CUDA graph captures a backward pass of AdamW_BF16(step_in_backward=True), which "
                "reads learning rates on the host; build the optimizer without the option"
            )
        compiled_autograd = sys.modules.get("torch._dynamo.compiled_autograd")
        if compiled_autograd is not None and compiled_autograd.in_compiled_autograd_region:
            raise RuntimeError(
                "compiled autograd runs this backward pass and never tells step_in_backward=True "
                "that it ended; turn torch._dynamo.config.compiled_autograd off, or leave the "
                "option out"
            )
        group_of = {param: index for index, group in enumerate(groups) for param in group["params"]}
        if group_of.keys() != self._group_of.keys():
            self._check_groups()
            if is_wrapped_by_ddp(group_of):
                raise RuntimeError(
                    "the model is wrapped by DistributedDataParallel, which averages gradients "
                    "after the hooks of step_in_backward=True have used them; use fully_shard "
                    "(FSDP2), or build AdamW_BF16 without step_in_backward"
                )
            self._plans.clear()
            self._storage_ends.clear()
        self._group_of = group_of
        lrs = scheduled_lrs(optimizer.lr_function, groups)
        group_hypers = list(map(hyperparams_of, groups))
        hypers = [
            hyper if lr is None else hyper._replace(lr=lr)
            for hyper, lr in zip(group_hypers, lrs, strict=True)
        ]
        return _Round(lrs, group_hypers, hypers, self._new_clip())

    def _new_clip(self) -> PreviousStepClip | None:
        if self.clip is None or self.clip.by != "previous_step":
            return None
        optimizer = self._get_optimizer()
        optimizer._grad_norm.raise_if_mismatch()
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
                    self._wait_for_streams()
                    round_.backward_passes.discard(task)

        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(on_backward_end)

    def _add_to_batch(self, param: Tensor, grad: Tensor) -> None:
        storage, batch = grad.untyped_storage(), self._batch
        stream = torch.cuda.current_stream(grad.device) if grad.is_cuda else None
        is_shared = storage.nbytes() > grad.nbytes
        if batch is not None and storage._cdata not in batch.storages:
            if batch.grads[-1].untyped_storage().nbytes() > batch.grads[-1].nbytes:
                self._storage_ends.add(id(batch.params[-1]))
            if batch.nbytes >= BATCH_BYTES:
                self._flush()
        elif batch is None and is_shared and grad.storage_offset():
            self._storage_ends.clear()  # one of them was not the last, so record them anew
        if batch is not None and (batch.device, batch.stream) != (grad.device, stream):
            self._flush()
        if self._batch is None:
            self._batch = Batch(grad.device, stream)
        self._batch.add(param, grad)
        is_last = not is_shared or id(param) in self._storage_ends
        if is_last and self._batch.nbytes >= BATCH_BYTES:
            self._flush()

    @torch.no_grad()
    def _flush(self) -> None:
        """Update the parameters of the batch and free their gradients."""
        batch, round_ = self._batch, self._round
        if batch is None or round_ is None:
            return
        order = sorted(range(len(batch.params)), key=lambda i: self._group_of[batch.params[i]])
        params, grads = [batch.params[i] for i in order], [batch.grads[i] for i in order]
        with nullcontext() if batch.stream is None else torch.cuda.stream(batch.stream):
            parts = [(params, grads)]
            if self.clip is not None and self.clip.by == "param":
                parts = [([param], [grad]) for param, grad in zip(params, grads, strict=True)]
            plans = [self._current_plan(part) for part, _ in parts]
            scales = [self._grad_scale(*part) for part in parts]
            round_.updated += len(params)  # even if the kernel fails
            self._batch = None
            if batch.stream is not None:
                round_.streams.add(batch.stream)
            for plan, (_, part_grads), scale in zip(plans, parts, scales, strict=True):
                plan.update_(part_grads, round_.hypers, scale, found_inf=None)

    def _grad_scale(self, params: list[Tensor], grads: list[Tensor]) -> Tensor | None:
        """Return the factor of gradients, 0-dim float32, and count them for the next step's."""
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
        return self._round.clip.scale(grads[0].device)

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
        names = [_name(optimizer.param_groups[self._group_of[param]], param) for param in params]
        for param, name in zip(params, names, strict=True):
            if optimizer.state.get(param):
                check_state(optimizer.state[param], param, name, optimizer._sharding)
        states = [
            optimizer.state.get(param) or new_state(param, optimizer._sharding) for param in params
        ]
        plan = StepPlan(groups, states, names, optimizer._sharding, optimizer.backend)
        optimizer.state.update(zip(params, states, strict=True))
        self._plans[id(params[0])] = (plan, states)
        return plan

    def _wait_for_streams(self) -> None:
        """Make the current stream wait for the updates, which ran on the gradients' streams."""
        assert self._round is not None
        for stream in self._round.streams:
            torch.cuda.current_stream(stream.device).wait_stream(stream)
        self._round.streams.clear()

    def _second_gradient(self, group: dict[str, Any], param: Tensor) -> str:
        assert self._round is not None
        sentence = (
            f"parameter {_name(group, param)} got a second gradient before step(), after the first "
            "was used; step_in_backward=True takes one backward pass a step, so run earlier ones "
            "inside optimizer.accumulate(), and pass use_reentrant=False to checkpoint() around a "
            "weight that is used several times"
        )
        if len(self._round.backward_passes) > 1:
            sentence += (
                "; if an earlier backward pass has raised, call optimizer.abandon_step() first"
            )
        return sentence

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
        if self.state is RoundState.FAILED:
            raise RuntimeError(self._failure(caller))
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
        total = len(self._group_of)
        if not self._round.updated:
            return (
                f"{caller} was called after a backward pass that raised before any parameter was "
                "updated; call zero_grad() and repeat the backward pass"
            )
        sentence = (
            f"{caller} was called after a backward pass that raised when {self._round.updated} of "
            f"{total} parameters were updated, so the weights are a mix of two steps; "
        )
        if not any(isinstance(param, DTensor) for param in self._group_of):
            return sentence + (
                "call optimizer.abandon_step(), then load a checkpoint into model and optimizer"
            )
        if not hasattr(FSDPModule, "reset_iter_state"):  # torch 2.11
            return sentence + (
                "FSDP2 of this torch cannot go on after that: restart the processes and load a "
                "checkpoint"
            )
        return sentence + (
            "call reset_iter_state() of the root FSDP2 module, optimizer.abandon_step(), then load "
            "a checkpoint into model and optimizer"
        )

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
        self._round = self._batch = None

    def abandon_step(self) -> None:
        """End the round without a step, whatever its state."""
        self.abandon()

    def begin_step(
        self, gradients: list[GroupGrads]
    ) -> tuple[list[float | None], list[GroupGrads]]:
        """Update what is left of the batch.

        Args:
            gradients: for each group, the gradients that no hook saw.

        Returns:
            The learning rates of this step, and the gradients that :meth:`.AdamW_BF16.step` is to
            use: all of the given ones, or with clipping none.

        Raises:
            RuntimeError: one of them belongs to a parameter that was updated in this round, or
                hyper-parameters have changed during the round. Nothing is changed. Or replicas have
                different gradients.
            ValueError: the model was wrapped by FSDP1 meanwhile. Nothing is changed.
        """
        optimizer = self._get_optimizer()
        self._check_groups()
        if self._round is None and self.clip is not None:
            self._round = self._start_round(optimizer._all_params()[0])
        if self._round is None:
            return scheduled_lrs(optimizer.lr_function, optimizer.param_groups), gradients
        self.check_not_failed("step()")
        for group, params, _ in gradients:
            for param in params:
                if param in self._round.taken:
                    raise RuntimeError(
                        f"parameter {_name(group, param)} was updated in the backward pass and has "
                        "another gradient in .grad; set that to None, and accumulate gradients "
                        "before the last backward pass of a step"
                    )
        self._check_hypers()
        if self.clip is not None:
            for group, params, _ in gradients:
                for param in params:
                    self._take(group, param)
            gradients = [(group, [], []) for group, _, _ in gradients]
        self._flush()
        self._finish_updates()
        return self._round.lrs, gradients

    def _check_hypers(self) -> None:
        """Raise RuntimeError if hyper-parameters have changed since the round began."""
        assert self._round is not None
        now = list(map(hyperparams_of, self._get_optimizer().param_groups))
        if len(now) != len(self._round.group_hypers) or any(
            map(_differs, now, self._round.group_hypers)
        ):
            raise RuntimeError(
                "hyper-parameters in param_groups were changed between a backward pass that used "
                "the old ones and step(); restore them, and change them after step()"
            )

    def _finish_updates(self) -> None:
        """Wait for all updates of the round, and add up the norm of its gradients."""
        assert self._round is not None
        self._wait_for_streams()
        if self._round.clip is not None:
            self._round.clip.all_reduce()

    def end_step(self) -> None:
        """End the round, and hook parameters that are no longer frozen."""
        if self._round is not None and self._round.clip is not None:
            self._round.clip.end_step()
        self.abandon()
        self._add_hooks()


class SteppedInBackward(torch.optim.Optimizer):
    """An optimizer that can update its parameters inside the backward pass."""

    _in_backward: StepInBackward | None = None

    def accumulate(self) -> AbstractContextManager[None]:
        """Return a context for all backward passes of a step but the last.

        With ``step_in_backward=True``, backward passes in this context accumulate gradients and
        update nothing. Without that option the context has no effect.
        """
        return nullcontext() if self._in_backward is None else self._in_backward.accumulate()

    def abandon_step(self) -> None:
        """Forget a step whose backward pass has raised under ``step_in_backward=True``.

        Its gradients are dropped. Parameters that it has updated stay updated, so load a checkpoint
        afterwards. Collective with ``sharding=ZeRO(...)``, also for a rank that has raised before
        its backward pass: every rank calls it, or gets an error from ``step()`` and then calls it.
        """
        if self._in_backward is not None:
            self._in_backward.abandon_step()
        self.zero_grad()

    def _check_between_steps(self, caller: str) -> None:
        if self._in_backward is not None:
            self._in_backward.check_between_steps(caller)


def check_options(
    step_in_backward: bool, skip_nonfinite: bool, clip: ClipInBackward | None
) -> None:
    """Raise ValueError if other options are incompatible with ``step_in_backward``."""
    if not step_in_backward:
        if clip is not None:
            raise ValueError(
                "clip_in_backward is for step_in_backward=True; without it call "
                "optimizer.clip_grad_norm_(max_norm) before step()"
            )
        return
    if skip_nonfinite:
        raise ValueError(
            "step_in_backward=True and skip_nonfinite=True are both given; the last gradient can "
            "turn out infinite after other parameters were updated, so a step cannot be skipped as "
            "a whole; choose one"
        )


def _differs(a: Hyperparams, b: Hyperparams) -> bool:
    """Compare without a device sync: the same tensor object counts as unchanged."""
    return any(
        x is not y and (isinstance(x, Tensor) or isinstance(y, Tensor) or x != y)
        for x, y in zip(a, b, strict=True)
    )


def _check_group(group: dict[str, Any], clip: ClipInBackward | None) -> None:
    """Raise ValueError unless the group's parameters can be updated inside the backward pass."""
    if group["capturable"]:
        raise ValueError(
            "capturable=True and step_in_backward=True are both given; the hooks read learning "
            "rates on the host, which a CUDA graph does not replay, so choose one"
        )
    for index, param in enumerate(group["params"]):
        if is_flattened(param):
            raise ValueError(
                f"parameter {param_name(group, index)} belongs to FullyShardedDataParallel "
                "(FSDP1), which reduces gradients after the hooks of step_in_backward=True have "
                "used them; use fully_shard (FSDP2), or leave step_in_backward out"
            )
        if clip is not None and clip.by == "param" and shard_groups(param):
            raise ValueError(
                f"parameter {param_name(group, index)} is sharded, so its own norm would take a "
                "collective for each parameter; use ClipInBackward(max_norm, by='previous_step')"
            )


def _name(group: dict[str, Any], param: Tensor) -> str:
    index = next(index for index, other in enumerate(group["params"]) if other is param)
    return param_name(group, index)
