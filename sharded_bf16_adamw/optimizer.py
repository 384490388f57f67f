"""The optimizer that users see: torch's conventions around the update rule of :mod:`sharded_bf16_adamw.kernels`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, repeat
from operator import attrgetter, is_, is_not
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .grad_norm import Gradients, GradNorm, PendingClip
from .kernels import Hyperparams, check_backend, is_capturing
from .kernels.device_memory import WARM_UP
from .schedule import LR, Schedule, apply_rates, lr_at, scheduled_lrs
from .sharding.base import Sharding
from .sharding.dtensor import to_local
from .sharding.experts import ExpertsApart
from .sharding.model_parallel import ModelParallel
from .sharding.replicas import check_replicas
from .sharding.stale_params import sharded_after_construction
from .sharding.torch_managed import TorchManaged
from .sharding.zero.config import ZeRO
from .state import (
    DTYPES,
    check_capturable_lr,
    check_grads,
    check_hyperparameters,
    check_param,
    check_state,
    complete_state,
    log_params,
    new_state,
    numbered_states_only,
    param_name,
    replicas_of,
    warn_if_all_float32,
)
from .step_in_backward import StepInBackward
from .step_plan import StepPlan

MAX_PLANS = 4  # where sets of parameters take turns in having gradients: generator and discriminator, experts

STRIDED = frozenset({torch.strided})
_dtype_of, _layout_of = attrgetter("dtype"), attrgetter("layout")


class AdamW_BF16(torch.optim.Optimizer):
    r"""AdamW with bfloat16 weights and states, at the quality of float32 ones.

    For each bfloat16 parameter the state holds ``exp_avg``, ``exp_avg_sq`` and ``correction``, all bfloat16 and shaped, placed and
    sharded like the parameter: a DTensor's state is a DTensor, so each rank holds its own shard and no more. The true weight is
    ``p + correction``; moments and correction are rounded stochastically, so that no update is too small to count (see
    ``docs/numerics.md``). Float32 parameters keep float32 moments and need no correction. ``step`` is a 0-dim float32 tensor.

    Decoupled weight decay: Loshchilov & Hutter, arXiv:1711.05101. Correction term: Zamirai et al., arXiv:2010.06192, and the
    ``adamw_bfloat16`` library, whose ``AdamW_BF16(params, lr_function=LR(...))`` and ``step(zero_grad=True)`` work here unchanged.

    Args:
        params: parameters, named parameters, or dicts of parameter groups; each parameter bfloat16 or float32.
        lr: constant learning rate (a float or a one-element tensor), which torch's schedulers may change.
        betas: decay rates of the running averages of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: decoupled weight decay, scaled by the learning rate.
        lr_function: the schedule, a callable from the 0-based step to the learning rate, such as :class:`LR`. Written to ``group["lr"]``
            at every step; where somebody else changed ``group["lr"]`` since, theirs holds. With neither this nor ``lr``: ``LR()``.
            A group that brings its own ``lr`` keeps it.
        maximize: ascend instead of descend.
        capturable: whether a step may be captured in a CUDA graph; ``lr`` must then be a float32 or float64 tensor on the parameters'
            device, since a graph would keep the value of any other.
        skip_nonfinite: where any rank's gradient holds inf or NaN, let the step change no parameter, state or step count on any rank,
            and count it in ``skipped_steps``. After :meth:`clip_grad_norm_` the gradients that it saw decide, so do not write to
            them between it and the step.
        model_parallel: names the process groups over whose ranks plain parameters differ, such as pipeline stages; see
            :class:`ModelParallel`. None: plain parameters are replicas on every rank.
        step_in_backward: update each parameter inside the backward pass, as soon as its gradient
            is final, and free the gradient. :meth:`step` still ends each step; all backward passes
            of a step but the last run inside :meth:`accumulate`. For plain modules, FSDP2, HSDP and
            tensor parallelism, without clipping and ``skip_nonfinite``; see
            ``docs/step_in_backward.md``.
        sharding: ``ZeRO(mesh)`` to let this optimizer itself shard a replicated model's states; None leaves sharding to torch.
        backend: kernel back end, one of ``sharded_bf16_adamw.kernels.BACKENDS``; None chooses by device.

    Raises:
        ValueError: a hyper-parameter is out of range, ``lr`` and ``lr_function`` are both given, or a parameter is on the meta device.
        TypeError: a parameter is neither bfloat16 nor float32.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        lr: float | Tensor | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        lr_function: Schedule | None = None,
        maximize: bool = False,
        capturable: bool = False,
        skip_nonfinite: bool = False,
        step_in_backward: bool = False,
        sharding: ZeRO | None = None,
        model_parallel: ModelParallel | None = None,
        backend: str | None = None,
    ) -> None:
        if lr is not None and lr_function is not None:
            raise ValueError(
                "lr and lr_function are both given; pass lr for a constant or lr_function for a schedule, not both"
            )
        if lr_function is not None and not callable(lr_function):
            raise ValueError(
                f"lr_function must be a callable from a step to a learning rate, such as LR(), but got {lr_function!r}"
            )
        check_backend(backend)
        if not isinstance(sharding, ZeRO | None):
            raise ValueError(
                f"Invalid sharding: {sharding!r}; give ZeRO(mesh), or None to leave sharding to torch (DDP, FSDP, DTensor)"
            )
        if not isinstance(model_parallel, ModelParallel | None):
            raise ValueError(
                f"Invalid model_parallel: {model_parallel!r}; give ModelParallel(pp=...), or None where ranks hold the same model"
            )
        if step_in_backward and sharding is not None:
            raise ValueError(
                "step_in_backward=True and sharding=ZeRO(...) are both given; ZeRO has the "
                "gradients of all ranks only in step(), so use fully_shard (FSDP2), or leave "
                "step_in_backward out"
            )
        if step_in_backward and skip_nonfinite:
            raise ValueError(
                "step_in_backward=True and skip_nonfinite=True are both given; the last gradient "
                "can be infinite when other parameters are updated already, so no step can be "
                "skipped as a whole; choose one"
            )
        if lr is None and lr_function is None:
            lr_function = LR()
        if lr_function is not None:
            lr = lr_at(lr_function, 0)
        assert lr is not None
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if capturable and not isinstance(lr, Tensor):
            raise ValueError(
                "capturable=True needs lr as a one-element tensor: a captured graph replays without running Python"
            )
        try:
            beta1, beta2 = map(float, betas)
        except (TypeError, ValueError):
            raise ValueError(f"Invalid betas: {betas!r}; it must be two numbers") from None
        betas = (beta1, beta2)
        check_hyperparameters(lr, betas, eps, weight_decay)
        self.lr_function = lr_function
        self.skip_nonfinite = skip_nonfinite
        self.backend = backend
        self._sharding: Sharding = TorchManaged() if sharding is None else sharding.start()
        if sharding is not None and model_parallel is not None and model_parallel.experts:
            self._sharding = ExpertsApart(self._sharding, model_parallel)
        self._clip = PendingClip()
        self._skipped: Tensor | None = None
        self._checked_not_replaced = False
        self._plans: list[
            StepPlan
        ] = []  # of the last sets of parameters with gradients, the newest last
        self._captured_plans: list[
            StepPlan
        ] = []  # that CUDA graphs still read, though they no longer hold
        self._seen_state: tuple[list[Any], list[Any]] = (
            [],
            [],
        )  # keys and values of self.state when the plan was made
        self.model_parallel = model_parallel
        self._grad_norm = GradNorm(self._sharding, model_parallel)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "capturable": capturable,
            "schedule_step": 0,  # calls of step() so far: the position of lr_function
            "scheduled_lr": None,  # what lr_function last wrote to "lr"; None where the group's own lr rules
        }
        super().__init__(params, defaults)
        self._is_built = True
        self._in_backward = StepInBackward(self) if step_in_backward else None
        all_params = [param for group in self.param_groups for param in group["params"]]
        log_params(all_params, self._sharding)
        warn_if_all_float32(all_params)

    # ------------------------------------------------------------------------------------------------- torch's conventions

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; see :meth:`torch.optim.Optimizer.add_param_group`.

        Raises:
            ValueError, TypeError: as the constructor; the optimizer is then as it was.
        """
        self._check_between_steps("add_param_group()")
        brings_lr = isinstance(param_group, dict) and "lr" in param_group
        if self.param_groups and isinstance(param_group, dict):
            param_group.setdefault(
                "schedule_step", self.param_groups[0]["schedule_step"]
            )  # a late group joins where the others are
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_hyperparameters(group["lr"], group["betas"], group["eps"], group["weight_decay"])
            for index, param in enumerate(group["params"]):
                check_param(param, param_name(group, index))
                if group["capturable"]:
                    check_capturable_lr(group["lr"], param.device)
            if self.lr_function is not None and not brings_lr:
                group["lr"] = group["scheduled_lr"] = lr_at(
                    self.lr_function, group["schedule_step"]
                )
            self._sharding.add_params(
                group["params"], [param_name(group, index) for index in range(len(group["params"]))]
            )
            if (in_backward := self.__dict__.get("_in_backward")) is not None:
                in_backward.add_params()
        except BaseException:  # also of the user's schedule
            self.param_groups.pop()
            raise
        if self.__dict__.get("_is_built"):  # the constructor logs all of its groups together
            log_params(group["params"], self._sharding)

    def __getstate__(self) -> dict[str, Any]:
        self._check_between_steps("a copy of the optimizer")
        self._sharding.check_picklable()
        if self.model_parallel is not None:
            raise TypeError(
                "an optimizer with model_parallel=ModelParallel(...) belongs to its process groups and cannot be pickled or deep-copied; "
                "save its state with sharded_bf16_adamw.save or its state_dict()"
            )
        own = ("lr_function", "skip_nonfinite", "backend", "_skipped")
        return {
            **super().__getstate__(),
            **{name: getattr(self, name) for name in own},
            "step_in_backward": self._in_backward is not None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over unpickled or loaded state, of ours or of torch.optim.AdamW, whose missing entries get their defaults."""
        self.__dict__.setdefault(
            "_sharding", TorchManaged()
        )  # an optimizer with another one cannot be pickled
        self.__dict__.setdefault("model_parallel", None)  # likewise
        position = 0
        if any(
            "schedule_step" not in group for group in state["param_groups"]
        ):  # of torch.optim.AdamW
            own = [entry for key, entry in state["state"].items() if isinstance(key, Tensor)]
            position = max((int(param_state.get("step", 0)) for param_state in own), default=0)
        for group in state["param_groups"]:
            for key, value in (
                ("maximize", False),
                ("capturable", False),
                ("schedule_step", position),
                ("scheduled_lr", None),
            ):
                group.setdefault(key, value)
            for index, param in enumerate(group["params"]):
                if state["state"].get(param):
                    complete_state(
                        state["state"][param], param, param_name(group, index), self._sharding
                    )
        # An unpickled optimizer starts with what a new one does; one being loaded into keeps its own.
        self.__dict__.setdefault("_clip", PendingClip())
        self.__dict__.setdefault("_plans", [])
        self.__dict__.setdefault("_captured_plans", [])
        self.__dict__.setdefault("_seen_state", ([], []))
        self.__dict__.setdefault("_grad_norm", GradNorm(self._sharding, self.model_parallel))
        self.__dict__.setdefault("_checked_not_replaced", False)
        steps_in_backward = state.pop("step_in_backward", False)
        super().__setstate__(state)
        if "_in_backward" not in self.__dict__:
            self._in_backward = StepInBackward(self) if steps_in_backward else None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters, and forget a :meth:`clip_grad_norm_` of them; see
        :meth:`torch.optim.Optimizer.zero_grad`."""
        if self._in_backward is not None:
            self._in_backward.before_zero_grad()
        super().zero_grad(set_to_none)
        self._sharding.clear_grads()
        self._clip.clear()

    def no_sync(self) -> AbstractContextManager[None]:
        """A context in which ZeRO stage 2 lets backward passes accumulate gradients on this rank, to be reduced with the next one outside.

        Raises:
            RuntimeError: another strategy reduces the gradients, whose own means must be used.
        """
        return self._sharding.no_sync()

    def accumulate(self) -> AbstractContextManager[None]:
        """Return a context for all backward passes of a step but the last.

        With ``step_in_backward=True`` they accumulate gradients in it and update nothing. Without
        that option they do so anyway, and the context does nothing.
        """
        return nullcontext() if self._in_backward is None else self._in_backward.accumulate()

    def abandon_step(self) -> None:
        """Forget a step whose backward pass has raised under ``step_in_backward=True``.

        Its gradients are dropped. Parameters that it has updated stay updated, so load a checkpoint
        afterwards.
        """
        if self._in_backward is not None:
            self._in_backward.abandon()
        self.zero_grad()

    def _check_between_steps(self, caller: str) -> None:
        in_backward = self.__dict__.get("_in_backward")
        if in_backward is not None:
            in_backward.check_between_steps(caller)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of :class:`AdamW_BF16` or of :class:`torch.optim.AdamW` (the correction then starts at zero), copying its tensors.

        The learning-rate schedule stays the one that this optimizer was built with, at the loaded position.

        Raises:
            ValueError: groups or shapes do not match this optimizer's; nothing is changed.
        """
        self._check_between_steps("load_state_dict()")
        follows_schedule = [group["scheduled_lr"] is not None for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, follows in zip(self.param_groups, follows_schedule, strict=True):
            group["scheduled_lr"] = group["lr"] if follows else None
        for key, entry in self.state.items():  # torch aliases what it was given
            self.state[key] = _copied(entry)

    def state_dict(self) -> dict[str, Any]:
        """Return the state and groups; see :meth:`torch.optim.Optimizer.state_dict`. The state of a tensor that is in no group (any
        more) is left out, since there is no number for it."""
        self._check_between_steps("state_dict()")
        with numbered_states_only(self):
            return super().state_dict()

    # ---------------------------------------------------------------------------------------------------------------- step

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, zero_grad: bool = False) -> Any:
        """Take one optimization step on every parameter that has a gradient: reduce gradients, update, gather weights.

        Collective with ``sharding=ZeRO(...)``, and with ``skip_nonfinite`` where :meth:`clip_grad_norm_` is: every rank calls it.

        Args:
            closure: re-evaluates the model and returns the loss; called with gradients enabled.
            zero_grad: set all gradients to None afterwards, as :meth:`zero_grad` does.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError: a gradient is sparse or of another size than its parameter, a state no longer fits its parameter, the parameters
                were wrapped by FSDP after the optimizer was built, or a CUDA graph captures this step but not its
                :meth:`clip_grad_norm_`; or ``skip_nonfinite`` found what :meth:`clip_grad_norm_` raises, or another rank has died. Nothing
                is changed.
            TypeError: a gradient is neither bfloat16 nor float32; nothing is changed.
            ValueError: ``lr_function`` returned an invalid learning rate; nothing is changed.
        """
        loss = None
        if self._in_backward is not None:
            self._in_backward.check_not_failed("step()")
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        self._clip.check_capture()
        self._sharding.reduce_grads()
        gradients = self._gradients()
        # the user's code, so before anything is made or written
        rates = (
            scheduled_lrs(self.lr_function, self.param_groups)
            if self._in_backward is None
            else self._in_backward.begin_step(gradients)
        )
        found_inf = (
            self._found_inf(gradients) if self.skip_nonfinite else None
        )  # it may raise: before any state is made
        plan = self._current_plan(gradients)
        grads = (
            []
            if plan is None
            else plan.local_grads([grad for _, _, grads in gradients for grad in grads])
        )
        if found_inf is not None:
            self._skipped = (
                found_inf.clone() if self._skipped is None else self._skipped.add_(found_inf)
            )
        apply_rates(self.param_groups, rates)
        if plan is not None:
            plan.update_(
                grads,
                list(map(_hyper, self.param_groups)),
                grad_scale=self._clip.grad_scale,
                found_inf=found_inf,
            )
        self._sharding.all_gather_params()
        self._clip.clear()
        if self._in_backward is not None:
            self._in_backward.end_step()
        if zero_grad:
            self.zero_grad()
        return loss

    def _gradients(self) -> list[Gradients]:
        """What has a gradient in each group, all of it checked: before any state is made, so that an error leaves nothing half done."""
        found: list[Gradients] = []
        for group in self.param_groups:
            params, grads = group["params"], self._sharding.grads(group["params"])
            if not all(map(is_not, grads, repeat(None))):
                self._check_not_replaced()
                params = [
                    param for param, grad in zip(params, grads, strict=True) if grad is not None
                ]
                grads = [grad for grad in grads if grad is not None]
            if not (
                DTYPES.issuperset(map(_dtype_of, grads))
                and STRIDED.issuperset(map(_layout_of, grads))
            ):
                check_grads(group)
            found.append((group, params, grads))
        return found

    def _current_plan(self, gradients: list[Gradients]) -> StepPlan | None:
        """What this step works on: that of the last step where it still holds. None where nothing has a gradient."""
        groups = [params for _, params, _ in gradients]
        if not any(groups):
            return None
        if not self._same_state():
            self._drop_plans(self._plans)
        plan = next((plan for plan in self._plans if plan.matches(groups)), None)
        if plan is None or not plan.is_valid():
            params = list(chain.from_iterable(groups))
            if is_capturing(
                params[0].device
            ):  # before any state is made, whose zeros the failing capture would not write
                raise RuntimeError(
                    f"a CUDA graph captures a step of these {len(params)} parameters for the first time; {WARM_UP}"
                )
            names = self._names()
            for param in params:
                if self.state.get(param):
                    check_state(self.state[param], param, names[param], self._sharding)
            states = [self.state.get(param) or new_state(param, self._sharding) for param in params]
            self._drop_plans(
                [other for other in self._plans if other is plan or not self._has_all_of(other)]
            )
            self._drop_plans(self._plans[: 1 - MAX_PLANS])
            plan = StepPlan(
                groups, states, [names[param] for param in params], self._sharding, self.backend
            )
            plan.local_grads(
                [grad for _, _, grads in gradients for grad in grads]
            )  # an error leaves no state behind
            self.state.update(zip(params, states, strict=True))
            self._plans.append(plan)
            self._seen_state = (list(self.state), list(self.state.values()))
        return plan

    def _names(self) -> dict[Tensor, str]:
        """Map each parameter to its name in messages."""
        return {
            param: param_name(group, index)
            for group in self.param_groups
            for index, param in enumerate(group["params"])
        }

    def _has_all_of(self, plan: StepPlan) -> bool:
        """Whether the plan's parameters are all still there; one with others would keep their memory for nothing."""
        known = {id(param) for group in self.param_groups for param in group["params"]}
        return all(id(param) in known for param in plan.params)

    def _drop_plans(self, plans: list[StepPlan]) -> None:
        self._captured_plans += [plan for plan in plans if plan.captured]
        self._plans = [plan for plan in self._plans if not any(plan is other for other in plans)]

    def _same_state(self) -> bool:
        """Whether the state has the same keys, and the same dict for each, as when the last plan was made; plans check what is in those."""
        params, states = self._seen_state
        return (
            len(self.state) == len(params)
            and all(map(is_, self.state, params))
            and all(map(is_, self.state.values(), states))
        )

    def _check_not_replaced(self) -> None:
        """Raise RuntimeError where parameters have no gradient because the model has others in their place since."""
        if self._checked_not_replaced:
            return
        if sharded_after_construction(
            [param for group in self.param_groups for param in group["params"]]
        ):
            raise RuntimeError(
                "the optimizer was built before fully_shard or parallelize_module or FullyShardedDataParallel, so it holds parameters that "
                "the model no longer uses and that would not be trained; build AdamW_BF16(model.parameters()) afterwards"
            )
        self._checked_not_replaced = True  # a walk over all objects of the process: once is enough

    # ----------------------------------------------------------------------------------------- gradient norm and the guard

    @torch._disable_dynamo
    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip the global gradient norm in the next :meth:`step`: its scale is folded into the update, the gradients stay as they are.

        Collective where parameters are sharded, replicated on a mesh or named by ``model_parallel``: every rank calls it.
        ``skip_nonfinite`` then goes by what this call has seen: an inf or NaN that is written to a gradient between it and :meth:`step`
        is not noticed.

        Args:
            max_norm: the largest 2-norm of all gradients together.

        Returns:
            The norm before clipping, 0-dim float32: over all ranks, each element counted once.

        Raises:
            ValueError: ``max_norm`` is not positive.
            RuntimeError: plain parameters have unlike gradients on ranks that share sharded ones (on an accelerator a later call
                raises it); or another rank has died or hangs.
        """
        if self._in_backward is not None:
            raise RuntimeError(
                "clip_grad_norm_() needs all gradients before any weight changes, but "
                "step_in_backward=True has used and freed them; to clip, leave step_in_backward out"
            )
        if not max_norm > 0.0:
            raise ValueError(f"Invalid max_norm: {max_norm}; it must be positive")
        self._sharding.reduce_grads()
        norm, grad_scale, found_inf = self._grad_norm.compute(
            self._gradients(), max_norm, self.backend
        )
        self._clip.set(grad_scale, found_inf)
        return norm

    def _found_inf(self, gradients: list[Gradients]) -> Tensor:
        """Return 0-dim float32, 1 where any gradient on any rank is inf or NaN."""
        found_inf = self._clip.found_inf
        if found_inf is None:
            _, _, found_inf = self._grad_norm.compute(gradients, math.inf, self.backend)
        return found_inf

    @property
    def skipped_steps(self) -> int:
        """How many steps ``skip_nonfinite`` has skipped in this process. Reading it waits for the device."""
        return 0 if self._skipped is None else int(self._skipped.item())

    # ------------------------------------------------------------------------------------------------------- true weights

    @torch.no_grad()
    def true_weights(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``(parameter, weight)`` for every parameter of the groups, frozen or not, where ``weight`` is ``p + correction`` in
        float32, sharded as the parameter is, or with ZeRO as its state is: a new tensor. For averages of weights, export and evaluation."""
        self._check_between_steps("true_weights()")
        for group in self.param_groups:
            for param in group["params"]:
                weight = self._sharding.shard(param).detach().to(torch.float32, copy=True)
                correction = self.state[param].get("correction") if param in self.state else None
                yield param, weight if correction is None else weight + correction.float()

    @torch.no_grad()
    def reset_correction(self, params: Iterable[Tensor] | None = None) -> None:
        """Set the correction of ``params`` (default: all) to zero, after their weights were replaced from outside."""
        chosen = (
            [param for group in self.param_groups for param in group["params"]]
            if params is None
            else list(params)
        )
        for param in chosen:
            if param in self.state and "correction" in self.state[param]:
                to_local(self.state[param]["correction"]).zero_()

    @torch.no_grad()
    def check_replicas(self) -> None:
        """Compare weights and states with those of the ranks that hold replicas of them: detection of silent data corruption.

        Equal gradients give equal bits, so replicas that differ are a fault of the hardware, or of code that changes one rank alone.
        Compares 64-bit checksums: reads all of this rank's weights and states once and exchanges 16 bytes a tensor. Call it every few
        hundred steps. Collective: every rank calls it at the same step.

        Compared are DTensors over mesh dimensions that replicate them (HSDP, tensor parallelism), FSDP1's ``HYBRID_SHARD`` and
        ``NO_SHARD``, with ZeRO the weights over all ranks and the states over the replicated dimension, and plain parameters over
        ``ModelParallel(dp=...)`` (experts over ``edp``), or over all ranks where no ``model_parallel`` is given. Where several models
        share a job, give each ``ModelParallel(dp=...)``.

        Raises:
            RuntimeError: replicas differ; on every rank, naming a tensor and the ranks.
        """
        self._check_between_steps("check_replicas()")
        parallel, names = self.model_parallel, self._names()
        params = list(chain.from_iterable(group["params"] for group in self.param_groups))
        experts = set() if parallel is None else {id(param) for param in parallel.expert_params()}
        if parallel is not None:
            of_plain, of_experts = parallel.dp_group, parallel.edp_group
        else:
            of_plain, of_experts = dist.group.WORLD if dist.is_initialized() else None, None
        replicas = [
            replica
            for param in params
            for replica in replicas_of(
                param,
                self.state.get(param, {}),
                names[param],
                self._sharding,
                of_experts if id(param) in experts else of_plain,
            )
        ]
        others = {group for param in params for group in self._sharding.shard_groups(param)}
        if parallel is not None:
            others |= {
                group for group in (parallel.pp_group, parallel.ep_group) if group is not None
            }
        problem = None
        if (
            parallel is not None
            and of_plain is None
            and not replicas
            and any(type(param) is nn.Parameter for param in params)
        ):
            problem = (
                f"rank {dist.get_rank()} has nothing to compare: nobody has said which ranks hold replicas of its plain parameters; name "
                "them by ModelParallel(dp=...)"
            )
        check_replicas(replicas, others, problem)

    def init_state(self, params: Iterable[Tensor] | None = None) -> None:
        """Create states now, at step 0, rather than at the first gradient. Loading a checkpoint needs somewhere to load to.

        Args:
            params: whose states, unless they have one; None means every trainable parameter.
        """
        if params is None:
            params = [
                param
                for group in self.param_groups
                for param in group["params"]
                if param.requires_grad
            ]
        for param in params:
            if not self.state.get(param):
                self.state[param] = new_state(param, self._sharding)


def _copied(value: Any) -> Any:
    """Copy the tensors within dicts; the rest stays."""
    if isinstance(value, Tensor):
        return value.clone()
    return {key: _copied(item) for key, item in value.items()} if isinstance(value, dict) else value


def _hyper(group: dict[str, Any]) -> Hyperparams:
    beta1, beta2 = group["betas"]
    return Hyperparams(
        group["lr"], beta1, beta2, group["eps"], group["weight_decay"], group["maximize"]
    )
