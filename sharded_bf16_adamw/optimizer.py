"""``AdamW_BF16``: a ``torch.optim.Optimizer`` around the update rule of :mod:`.kernels`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks

from .grad_norm import GradNorm, PendingClip
from .gradients import GradCollector
from .kernels import check_backend
from .param_log import ParamLog
from .precision_stats import PrecisionMeasured, PrecisionPass
from .profiling import profiler_range
from .schedule import Schedule, apply_lrs, init_lr, resolve_lr, scheduled_lrs
from .sharding.base import Caller
from .sharding.build import build_sharding
from .sharding.model_parallel import ModelParallel
from .sharding.zero.config import ZeRO
from .step_in_backward.checks import check_options, check_zero_options
from .step_in_backward.clip import ClipInBackward, previous_grad_norm
from .step_in_backward.step import StepInBackward
from .step_in_backward.zero import ZeroStepInBackward
from .step_plan import StepPlanCache, hyperparams_of
from .validation import check_group, check_hyperparams, check_max_lr, param_name, to_betas


class AdamW_BF16(PrecisionMeasured):
    r"""AdamW with bfloat16 weights and states, at the quality of float32 AdamW.

    For each bfloat16 parameter the state holds ``exp_avg``, ``exp_avg_sq`` and ``correction``, all
    bfloat16 with the parameter's shape, device and sharding: a DTensor's state is a DTensor, so
    each rank stores only its local shard. The true weight is ``p + correction``. Moments and
    correction are rounded stochastically, so that no update is too small to count (see
    ``docs/numerics.md``). Float32 parameters have float32 moments and no correction. ``step`` is a
    0-dim float32 tensor.

    Decoupled weight decay: Loshchilov & Hutter, arXiv:1711.05101. Correction term: Zamirai et al.,
    arXiv:2010.06192, and the ``adamw_bfloat16`` library, whose
    ``AdamW_BF16(params, lr_function=LR(...))`` and ``step(zero_grad=True)`` work unchanged.

    Args:
        params: parameters, named parameters or parameter groups; each bfloat16 or float32.
        lr: constant learning rate, a float or one-element tensor; torch's schedulers may change it.
        betas: decay rates of the running averages of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: decoupled weight decay, scaled by the learning rate; see ``decouple_lr``.
        lr_function: a schedule: a callable from the 0-based step to the learning rate, such as
            :class:`LR`. Each step writes its value to ``group["lr"]``, unless other code has
            changed ``group["lr"]`` since the last step. ``LR()`` if neither this nor ``lr`` is
            given. A group with its own ``lr`` keeps it.
        maximize: ascend instead of descend.
        decouple_lr: scale the weight decay by ``lr / max_lr`` instead of ``lr``, so that it follows
            the schedule but not the size of the learning rate. ``weight_decay`` is then the share
            of a weight that a step at the peak removes, such as 1e-5.
        max_lr: peak of the learning rate, for ``decouple_lr``. By default ``lr``, or the peak of
            an :class:`LR` or :class:`WSD`.
        capturable: allow a CUDA graph to capture a step. ``lr`` must then be a float32 or float64
            tensor on the parameters' device, since a graph would replay any other value unchanged.
        skip_nonfinite: if any rank's gradient holds inf or NaN, change no parameter, state or step
            count on any rank, and count the step in ``skipped_steps``. :meth:`clip_grad_norm_`, if
            called, makes this decision, so do not modify gradients between it and the step.
        step_in_backward: update each parameter inside the backward pass and free its gradient. Run
            all backward passes of a step but the last inside :meth:`accumulate`, and end the step
            with :meth:`step`. See ``docs/step_in_backward.md``.
        clip_in_backward: gradient clipping for ``step_in_backward``; see :class:`ClipInBackward`.
        model_parallel: the process groups over which plain parameters differ, such as pipeline
            stages; see :class:`ModelParallel`. None: plain parameters are replicas on every rank.
        sharding: ``ZeRO(mesh)`` to shard the states of a replicated model; None shards the states
            as the parameters are.
        backend: one of ``sharded_bf16_adamw.kernels.BACKENDS``; None chooses by device.

    Raises:
        ValueError: a hyperparameter is out of range, ``lr`` and ``lr_function`` are both given, or
            a parameter is on the meta device.
        TypeError: a parameter is neither bfloat16 nor float32.

    Examples:
        >>> import torch
        >>> from sharded_bf16_adamw import LR, AdamW_BF16
        >>> model = torch.nn.Linear(4, 2).to(torch.bfloat16)
        >>> optimizer = AdamW_BF16(model.parameters(), lr_function=LR(lr=1e-3, preheat_steps=100))
        >>> model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        >>> norm = optimizer.clip_grad_norm_(1.0)
        >>> optimizer.step(zero_grad=True)
        >>> list(optimizer.state[model.weight])
        ['step', 'exp_avg', 'exp_avg_sq', 'correction']
    """

    _PICKLED = ("lr_function", "skip_nonfinite", "backend", "_skipped")

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
        decouple_lr: bool = False,
        max_lr: float | None = None,
        capturable: bool = False,
        skip_nonfinite: bool = False,
        step_in_backward: bool = False,
        clip_in_backward: ClipInBackward | None = None,
        sharding: ZeRO | None = None,
        model_parallel: ModelParallel | None = None,
        backend: str | None = None,
    ) -> None:
        check_backend(backend)
        lr, self.lr_function = resolve_lr(lr, lr_function, capturable)
        betas = to_betas(betas)
        check_hyperparams(lr, betas, eps, weight_decay)
        check_options(step_in_backward, skip_nonfinite, clip_in_backward)
        if step_in_backward and isinstance(sharding, ZeRO):
            check_zero_options(sharding, model_parallel, clip_in_backward)
        self._sharding = build_sharding(sharding, model_parallel, step_in_backward)
        self._zero, self.backend = sharding, backend
        self.skip_nonfinite = skip_nonfinite
        self.model_parallel = model_parallel
        self._skipped: Tensor | None = None
        self._init_caches()
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps}
        defaults |= {"weight_decay": weight_decay, "maximize": maximize, "capturable": capturable}
        defaults |= {"decouple_lr": decouple_lr, "max_lr": max_lr}
        defaults |= {"schedule_step": 0, "scheduled_lr": None}  # see :mod:`.schedule`
        super().__init__(params, defaults)
        self._is_built = True
        if step_in_backward:
            cls = StepInBackward if sharding is None else ZeroStepInBackward
            self._in_backward = cls(self, clip_in_backward)
        self._param_log.start(self._all_params())

    def _init_caches(self) -> None:
        self._param_log = ParamLog(self._sharding)
        self._clip = PendingClip()
        self._step_plans = StepPlanCache(self._sharding)
        self._grad_norm = GradNorm(self._sharding, self.model_parallel)
        self._grads = GradCollector(self._sharding)
        self._precision = PrecisionPass(self._sharding, self._step_plans, self._grad_norm)

    # torch's conventions #

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; see :meth:`torch.optim.Optimizer.add_param_group`.

        Raises:
            ValueError, TypeError: as in the constructor; the optimizer is unchanged.
        """
        self._check_between_steps("add_param_group()")
        self.wait()
        has_own_lr = isinstance(param_group, dict) and "lr" in param_group
        if self.param_groups and isinstance(param_group, dict):
            # A late group joins the schedule at the position of the others.
            param_group.setdefault("schedule_step", self.param_groups[0]["schedule_step"])
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group)
            init_lr(group, None if has_own_lr else self.lr_function)
            if group["decouple_lr"]:
                check_max_lr(group["max_lr"], group["weight_decay"])
            names = [param_name(group, index) for index in range(len(group["params"]))]
            if self._in_backward is not None:
                self._in_backward.add_params()
            self._sharding.add_params(group["params"], names)
        except BaseException:  # lr_function may raise anything
            self.param_groups.pop()
            raise
        if self._is_built:  # the constructor logs all of its groups together
            self._param_log.add(group["params"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients, and drop the result of a pending :meth:`clip_grad_norm_`."""
        if self._in_backward is not None:
            self._in_backward.before_zero_grad()
        super().zero_grad(set_to_none)
        self._sharding.clear_grads()
        self._clip.clear()

    def no_sync(self) -> AbstractContextManager[None]:
        """Return a context in which backward passes accumulate gradients without reducing them.

        For ZeRO stage 2. The next backward pass outside it also reduces what was accumulated.

        Raises:
            RuntimeError: the model's wrapper reduces the gradients; use its own context instead.
        """
        return self._sharding.no_sync()

    # Step and gradient norm #

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, zero_grad: bool = False) -> Any:
        """Reduce gradients, update every parameter that has one, and all-gather weights.

        Collective with ``sharding=ZeRO(...)``. With ``skip_nonfinite``, also collective if
        :meth:`clip_grad_norm_` is. Every rank then calls it. An error leaves weights and states
        unchanged, except with ``step_in_backward`` or if another rank has died.

        Args:
            closure: re-evaluates the model and returns the loss; called with gradients enabled.
            zero_grad: set all gradients to None afterwards, as :meth:`zero_grad` does.

        Returns:
            The result of ``closure``, or None.

        Raises:
            RuntimeError: a gradient is sparse; a gradient or state does not fit its parameter; FSDP
                wrapped the parameters after the optimizer was built; a CUDA graph captures this
                step but not its :meth:`clip_grad_norm_`; with ``skip_nonfinite``, any error of
                :meth:`clip_grad_norm_`; or another rank died.
            TypeError: a gradient is neither bfloat16 nor float32.
            ValueError: ``lr_function`` returned an invalid learning rate.
        """
        in_backward = self._in_backward
        if in_backward is not None:
            in_backward.check_not_failed("step()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._param_log.before_step(self.param_groups)
        self._clip.check_capture()
        self._sharding.reduce_grads(Caller.STEP)
        group_grads = self._grads.collect(self.param_groups)
        # Everything that may raise comes before any state is created or changed.
        if in_backward is None:
            lrs = scheduled_lrs(self.lr_function, self.param_groups)
        else:
            lrs, group_grads = in_backward.begin_step(group_grads)
        found_inf = self._clip.found_inf if self.skip_nonfinite else None
        if self.skip_nonfinite and found_inf is None:
            *_, found_inf = self._grad_norm.compute(group_grads, math.inf, self.backend)
        plan = self._step_plans.get(group_grads, self.state, self.backend)
        grads = [grad for _, _, grads in group_grads for grad in grads]
        local_grads = [] if plan is None else plan.local_grads(grads)
        if found_inf is not None:
            skipped = self._skipped
            if skipped is None:
                self._skipped = found_inf.clone()
            else:  # with gradients on other devices than before, found_inf may be on another one
                skipped.add_(found_inf.to(skipped.device))
        apply_lrs(self.param_groups, lrs)
        if plan is not None:
            with profiler_range("AdamW_BF16::update"):
                hyperparams = list(map(hyperparams_of, self.param_groups))
                plan.update_(local_grads, hyperparams, self._clip.grad_scale, found_inf)
        self._sharding.all_gather_params()
        if self._optimizer_step_post_hooks or _global_optimizer_post_hooks:
            self.wait()  # the hooks may read weights
        self._clip.clear()
        if in_backward is not None:
            in_backward.end_step()
        if zero_grad:
            self.zero_grad()
        return loss

    @torch._disable_dynamo
    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip the global gradient norm in the next :meth:`step`.

        The scale is folded into the update; the gradients themselves stay unchanged. Collective if
        parameters are sharded, replicated on a mesh or named by ``model_parallel``: every rank
        calls it.

        Args:
            max_norm: upper bound on the 2-norm of all gradients together.

        Returns:
            The norm before clipping, 0-dim float32, over all ranks with each element counted once.

        Raises:
            ValueError: ``max_norm`` is not positive.
            RuntimeError: the optimizer has ``step_in_backward``; gradients that should be
                equal on several ranks differ (on CUDA a later call raises this); or
                another rank has died or hangs.
        """
        self._check_keeps_grads(
            "clip_grad_norm_()",
            ", or clip by another norm with clip_in_backward=ClipInBackward(max_norm)",
        )
        if not max_norm > 0.0:
            raise ValueError(f"Invalid max_norm: {max_norm}; it must be positive")
        with profiler_range("AdamW_BF16::clip_grad_norm_"):
            self._sharding.reduce_grads(Caller.CLIP)
            grads = self._grads.collect(self.param_groups)
            norm, grad_scale, found_inf = self._grad_norm.compute(grads, max_norm, self.backend)
            self._clip.set(grad_scale, found_inf)
        return norm

    @property
    def previous_grad_norm(self) -> Tensor | None:
        """Gradient norm of the last step with ``ClipInBackward(by="previous_step")``, else None."""
        return previous_grad_norm(self.param_groups)

    @property
    def skipped_steps(self) -> int:
        """Number of steps that ``skip_nonfinite`` has skipped; reading it waits for the device."""
        return 0 if self._skipped is None else int(self._skipped.item())
