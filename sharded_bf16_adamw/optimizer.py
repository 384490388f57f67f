"""``AdamW_BF16``: a ``torch.optim.Optimizer`` around the update rule of :mod:`.kernels`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks

from .clip_in_backward import ClipInBackward, previous_sum_sq
from .conversion import to_bf16_
from .grad_norm import GradNorm, PendingClip
from .gradients import GradCollector
from .kernels import backend_for, check_backend
from .precision_stats import PrecisionStats, compute_precision_stats
from .profiling import profiler_range
from .schedule import Schedule, apply_lrs, lr_at, peak_lr, resolve_lr, scheduled_lrs
from .serialization import SerializableOptimizer, describe
from .sharding.build import build_sharding
from .sharding.dtensor import to_local
from .sharding.model_parallel import ModelParallel
from .sharding.replicas import check_replicas
from .sharding.zero.config import ZeRO
from .state import (
    collect_replicas,
    count_float32,
    log_params,
    new_state,
    warn_if_all_float32,
    warn_if_converted,
)
from .step_in_backward import StepInBackward, check_options
from .step_plan import StepPlanCache, hyperparams_of, next_hyperparams
from .validation import check_group, check_hyperparams, check_max_lr, param_name, to_betas


class AdamW_BF16(SerializableOptimizer):
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
            of a weight that a step at the peak takes off, such as 1e-5.
        max_lr: peak of the learning rate, for ``decouple_lr``. By default ``lr``, or the peak of
            an :class:`LR` or :class:`WSD`.
        capturable: allow a CUDA graph to capture a step. ``lr`` must then be a float32 or float64
            tensor on the parameters' device, since a graph would replay any other value unchanged.
        skip_nonfinite: if any rank's gradient holds inf or NaN, change no parameter, state or step
            count on any rank, and count the step in ``skipped_steps``. If
            :meth:`clip_grad_norm_` was called, the gradients at that call decide: do not modify
            them before the step.
        step_in_backward: update each parameter inside the backward pass, as soon as its gradient is
            final, and free the gradient. :meth:`step` still ends each step; all backward passes of
            a step but the last run inside :meth:`accumulate`. For plain modules, FSDP2, HSDP and
            tensor parallelism, without ``skip_nonfinite``; see ``docs/step_in_backward.md``.
        clip_in_backward: gradient clipping for ``step_in_backward``, which cannot know the norm of
            all gradients in time; see :class:`ClipInBackward`.
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
    _zero: ZeRO | None = None
    _num_float32: int | None = None  # parameters that were added as float32; None after a step

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
        check_options(step_in_backward, sharding, skip_nonfinite, clip_in_backward)
        self._sharding = build_sharding(sharding, model_parallel)
        self._zero = sharding
        self.skip_nonfinite = skip_nonfinite
        self.backend = backend
        self.model_parallel = model_parallel
        self._skipped: Tensor | None = None
        self._num_float32 = 0
        self._init_caches()
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps}
        defaults |= {"weight_decay": weight_decay, "maximize": maximize, "capturable": capturable}
        defaults |= {"decouple_lr": decouple_lr, "max_lr": max_lr}
        defaults |= {"schedule_step": 0, "scheduled_lr": None}  # see :mod:`.schedule`
        super().__init__(params, defaults)
        self._is_built = True
        self._in_backward = StepInBackward(self, clip_in_backward) if step_in_backward else None
        log_params(self._all_params(), self._sharding)
        warn_if_all_float32(self._all_params())

    @classmethod
    @torch.no_grad()
    def from_fp32(
        cls,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        *,
        keep_fp32: str | None = None,
        **options: Any,
    ) -> AdamW_BF16:
        r"""Convert a float32 model to bfloat16 in place, and return an optimizer for it.

        ``model.bfloat16()`` drops what the rounding of each weight leaves. Here that remainder
        becomes the ``correction``, so that ``p + correction`` is the float32 weight up to 2^-17 of
        it. All floating-point parameters and buffers become bfloat16; parameters stay the same
        objects, and gradients are dropped. A parameter that is frozen or not in ``params`` is
        rounded without a correction.

        Args:
            model: the module, plain or sharded by ``fully_shard`` or tensor parallelism, before its
                first forward pass. Call this before DistributedDataParallel.
            params: as in the constructor; None for ``model.parameters()``.
            keep_fp32: a regular expression. Parameters and buffers in whose name
                :func:`re.search` finds it keep their dtype.
            options: arguments of the constructor, by keyword.

        Raises:
            ValueError, TypeError: as in the constructor, when the model is converted already; or
                the model cannot be converted, or ``keep_fp32`` matches nothing. Then nothing has
                changed.

        Examples:
            >>> import torch
            >>> from sharded_bf16_adamw import AdamW_BF16
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
            >>> weight = model[0].weight.detach().clone()
            >>> optimizer = AdamW_BF16.from_fp32(model, keep_fp32=r"^1\.", lr=1e-3)
            >>> model[0].weight.dtype, model[1].weight.dtype
            (torch.bfloat16, torch.float32)
            >>> true_weight = dict(optimizer.true_weights())[model[0].weight]
            >>> bool(((true_weight - weight).abs() <= 2**-17 * weight.abs()).all())
            True
        """
        zero = options.get("sharding")
        if zero is not None and zero.broadcast_initial:
            raise ValueError(
                "ZeRO(broadcast_initial=True) copies the weights of the first rank but not what "
                "their rounding leaves; build the same float32 model on every rank, or broadcast "
                "it before from_fp32()"
            )
        corrections = to_bf16_(model, keep_fp32)
        optimizer = cls(model.parameters() if params is None else params, **options)
        optimizer.init_state()
        for param, correction in corrections.items():
            if param in optimizer.state:
                shard = optimizer._sharding.shard_state(param, correction, "the correction")
                to_local(optimizer.state[param]["correction"]).copy_(to_local(shard))
        return optimizer

    def _init_caches(self) -> None:
        self._clip = PendingClip()
        self._step_plans = StepPlanCache(self._sharding)
        self._grad_norm = GradNorm(self._sharding, self.model_parallel)
        self._grads = GradCollector(self._sharding)

    def _all_params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

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
            if self.lr_function is not None and not has_own_lr:
                lr = lr_at(self.lr_function, group["schedule_step"])
                group["lr"] = group["scheduled_lr"] = lr
            if group["decouple_lr"]:
                if group["max_lr"] is None:
                    schedule = None if has_own_lr else self.lr_function
                    group["max_lr"] = peak_lr(schedule, group["lr"])
                check_max_lr(group["max_lr"], group["weight_decay"])
            names = [param_name(group, index) for index in range(len(group["params"]))]
            self._sharding.add_params(group["params"], names)
            if self._in_backward is not None:
                self._in_backward.add_params()
        except BaseException:  # lr_function may raise anything
            self.param_groups.pop()
            raise
        if self._num_float32 is not None:
            self._num_float32 += count_float32(group["params"])
        if self._is_built:  # the constructor logs all of its groups together
            log_params(group["params"], self._sharding)

    def __repr__(self) -> str:
        """Return torch's repr, plus the back end, the sharding and this rank's bytes of state.

        Never raises or waits for a device: wrappers and debuggers call it at any time.
        """
        try:
            backends = {backend_for(p.device, self.backend) for p in self._all_params()}
            return describe(self, backends, self._zero)
        except Exception:  # half built, or changed by another thread meanwhile
            return object.__repr__(self)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients and drop the result of a pending :meth:`clip_grad_norm_`.

        See :meth:`torch.optim.Optimizer.zero_grad`.
        """
        if self._in_backward is not None:
            self._in_backward.before_zero_grad()
        super().zero_grad(set_to_none)
        self._sharding.clear_grads()
        self._clip.clear()

    def no_sync(self) -> AbstractContextManager[None]:
        """Return a context in which backward passes accumulate gradients without reducing them.

        For ZeRO stage 2. The next backward pass outside the context also reduces what was
        accumulated.

        Raises:
            RuntimeError: the model's wrapper reduces the gradients; use its own context instead.
        """
        return self._sharding.no_sync()

    # Step #

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, zero_grad: bool = False) -> Any:
        """Reduce gradients, update every parameter that has one, and all-gather weights.

        Collective with ``sharding=ZeRO(...)``. With ``skip_nonfinite``, also collective if
        :meth:`clip_grad_norm_` is. Every rank then calls it. After an error nothing has changed.

        Args:
            closure: re-evaluates the model and returns the loss; called with gradients enabled.
            zero_grad: set all gradients to None afterwards, as :meth:`zero_grad` does.

        Returns:
            The result of ``closure``, or None.

        Raises:
            RuntimeError: a gradient is sparse or differs in size from its parameter; a state no
                longer fits its parameter; FSDP wrapped the parameters after the optimizer was
                built; a CUDA graph captures this step but not its :meth:`clip_grad_norm_`; with
                ``skip_nonfinite``, any error of :meth:`clip_grad_norm_`; or another rank died.
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
        if self._num_float32 is not None:
            warn_if_converted(self._all_params(), self._num_float32)
            self._num_float32 = None
        self._clip.check_capture()
        self._sharding.reduce_grads()
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
            self._skipped = found_inf.clone() if skipped is None else skipped.add_(found_inf)
        apply_lrs(self.param_groups, lrs)
        if plan is not None:
            with profiler_range("AdamW_BF16::update"):
                hyperparams = list(map(hyperparams_of, self.param_groups))
                plan.update_(local_grads, hyperparams, self._clip.grad_scale, found_inf)
        self._sharding.all_gather_params()
        if self._optimizer_step_post_hooks or _global_optimizer_post_hooks:
            self.wait()  # they may read weights
        self._clip.clear()
        if in_backward is not None:
            in_backward.end_step()
        if zero_grad:
            self.zero_grad()
        return loss

    def wait(self) -> None:
        """Wait until the weights that the last :meth:`step` has updated are in the parameters.

        Does nothing without ``ZeRO(overlap_gather=True)``. With it, call this after a step before
        code outside the model's forward pass reads or writes weights. Forward passes,
        ``state_dict``, ``load_state_dict`` and this package's functions wait by themselves.
        Collective: every rank waits, or runs the next forward pass.

        Raises:
            RuntimeError: another rank has died or hangs, or a weight was changed meanwhile. This
                rank's weights are then partly old ones: load a checkpoint.
        """
        self._sharding.wait_for_params()

    # Gradient norm #

    @torch._disable_dynamo
    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip the global gradient norm in the next :meth:`step`.

        The scale is folded into the update; the gradients themselves stay unchanged. Collective if
        parameters are sharded, replicated on a mesh or named by ``model_parallel``: every rank
        calls it. ``skip_nonfinite`` does not check the gradients again in :meth:`step`: an inf or
        NaN written to them between the two calls goes unnoticed.

        Args:
            max_norm: upper bound on the 2-norm of all gradients together.

        Returns:
            The norm before clipping, 0-dim float32, over all ranks with each element counted once.

        Raises:
            ValueError: ``max_norm`` is not positive.
            RuntimeError: ``step_in_backward`` has used the gradients; gradients that should be
                equal on several ranks differ (on an accelerator a later call raises this); or
                another rank has died or hangs.
        """
        if self._in_backward is not None:
            raise RuntimeError(
                "clip_grad_norm_() needs all gradients before any weight changes, but "
                "step_in_backward=True has used and freed them; leave step_in_backward out, or "
                "clip by another norm with clip_in_backward=ClipInBackward(max_norm)"
            )
        if not max_norm > 0.0:
            raise ValueError(f"Invalid max_norm: {max_norm}; it must be positive")
        with profiler_range("AdamW_BF16::clip_grad_norm_"):
            self._sharding.reduce_grads()
            grads = self._grads.collect(self.param_groups)
            norm, grad_scale, found_inf = self._grad_norm.compute(grads, max_norm, self.backend)
            self._clip.set(grad_scale, found_inf)
        return norm

    @property
    def previous_grad_norm(self) -> Tensor | None:
        """Global 2-norm of the last step's gradients, 0-dim float32, before clipping.

        Known only with ``ClipInBackward(by="previous_step")``, else None.
        """
        sum_sq = previous_sum_sq(self.param_groups)
        return None if sum_sq is None else sum_sq.sqrt().float()

    @property
    def skipped_steps(self) -> int:
        """Number of steps that ``skip_nonfinite`` has skipped; reading it waits for the device."""
        return 0 if self._skipped is None else int(self._skipped.item())

    @torch._disable_dynamo
    @torch.no_grad()
    def precision_stats(self) -> PrecisionStats:
        """Measure what bfloat16 costs in the next :meth:`step`; changes nothing.

        Call it between :meth:`clip_grad_norm_`, if used, and :meth:`step`. Collective as
        :meth:`clip_grad_norm_` is. Takes about twice as long as a step on a CPU, without a host
        sync on a GPU; see ``docs/precision.md``.

        Returns:
            The statistics of all ranks together, and of each parameter group. They stay on the
            device until they are read. NaN if a gradient is not finite, or if ranks have different
            gradients where they must agree.

        Raises:
            RuntimeError: ``step_in_backward`` has used the gradients; a state or gradient does not
                fit its parameter; a CUDA graph captures the call; or another rank has died or
                hangs.
        """
        if self._in_backward is not None:
            raise RuntimeError(
                "precision_stats() needs the gradients of the next step(), but "
                "step_in_backward=True has used and freed them; leave step_in_backward out"
            )
        self._sharding.reduce_grads()
        grads = self._grads.collect(self.param_groups)
        hyperparams = next_hyperparams(self.lr_function, self.param_groups)
        clip, backend = self._clip.grad_scale, self.backend
        return compute_precision_stats(
            grads, hyperparams, self.state, self._sharding, self._grad_norm, clip, backend
        )

    # Weights and states #

    @torch.no_grad()
    def true_weights(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``(parameter, weight)`` for every parameter, frozen or not.

        ``weight`` is ``p + correction``, a new float32 tensor, sharded like the parameter, or with
        ZeRO like its state. For averages of weights, export and evaluation.
        """
        self._check_between_steps("true_weights()")
        self.wait()
        for param in self._all_params():
            weight = self._sharding.shard(param).detach().to(torch.float32, copy=True)
            correction = self.state[param].get("correction") if param in self.state else None
            yield param, weight if correction is None else weight + correction.float()

    @torch.no_grad()
    def reset_correction(self, params: Iterable[Tensor] | None = None) -> None:
        """Zero the correction of ``params`` (default: all) after other code set the weights."""
        for param in self._all_params() if params is None else params:
            if param in self.state and "correction" in self.state[param]:
                to_local(self.state[param]["correction"]).zero_()

    @torch.no_grad()
    def check_replicas(self) -> None:
        """Compare weights and states with their replicas on other ranks, to find silent corruption.

        Equal gradients give equal bits, so replicas differ only through a hardware fault or code
        that changes a single rank. Compares 64-bit checksums: reads all of this rank's weights and
        states once and exchanges 16 bytes per tensor. Call it every few hundred steps. Collective:
        every rank calls it at the same step.

        It compares

        * DTensors over the mesh dimensions that replicate them (HSDP, tensor parallelism);
        * FSDP1's parameters under ``HYBRID_SHARD`` and ``NO_SHARD``;
        * with ZeRO, weights over all ranks and states over the mesh's replicate dimension;
        * plain parameters over ``ModelParallel(dp=...)`` and experts over ``edp``, or both over all
          ranks without ``model_parallel``.

        If several models share a job, give each a ``ModelParallel(dp=...)``.

        Raises:
            RuntimeError: replicas differ; raised on every rank, with a tensor's name and the ranks.
        """
        self._check_between_steps("check_replicas()")
        self.wait()
        check_replicas(*collect_replicas(self, self._sharding, self.model_parallel))

    def init_state(self, params: Iterable[Tensor] | None = None) -> None:
        """Create missing states at step 0 now, before the first gradient, as targets of a load.

        Args:
            params: the parameters; None for every trainable one.
        """
        if params is None:
            params = [param for param in self._all_params() if param.requires_grad]
        for param in params:
            if not self.state.get(param):
                self.state[param] = new_state(param, self._sharding)
