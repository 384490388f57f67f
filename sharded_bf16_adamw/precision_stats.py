"""Statistics of what bfloat16 costs in one step: lost updates, effective descent quality, norms.

The kernels compute the next step without storing it, and sum in float64. The stochastic rounding is
the same, so the bits are those that :meth:`.AdamW_BF16.step` will store. No tensor of the optimizer
changes, and nothing waits for the device.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor

from .grad_norm import GradNorm, GroupInfo, PendingClip, SumKey, shared_replica_groups
from .gradients import GradCollector, GroupGrads
from .kernels import PRECISION_SUMS, Hyperparams, double_device, is_capturing
from .precision_sample import StratifiedSample
from .schedule import Schedule, scheduled_lrs
from .sharding.base import Caller, Sharding
from .state import STATE_KEYS, check_state
from .step_plan import StepPlan, StepPlanCache, hyperparams_at
from .validation import param_names
from .weights import WeightAccess

CPU = torch.device("cpu")
MAX_ONE_IN_COMPARED = 1 << 20  # cap of 1 / fraction, so that float64 sums its squares exactly


@dataclass(frozen=True)
class PrecisionStats:
    """Precision of one step, over all ranks: see :meth:`AdamW_BF16.precision_stats`.

    Every value is a 0-dim float64 tensor on the parameters' device; reading one waits for the
    device. The *intended update* of a weight is ``lr * (weight_decay * (p + correction) + m /
    (sqrt(v) + eps))`` with bias-corrected moments, before any rounding. The *effective update* is
    the change of the stored true weight ``p + correction``. A *plain weight* has the parameter's
    dtype and no correction; it is updated by rounding ``p - update`` to nearest.

    Attributes:
        elements: elements that the step updates, each counted once.
        updates: elements whose intended update is not zero.
        lost_share: share of ``updates`` that leave a plain weight as it is.
        carried_share: share of ``updates`` that leave a plain weight as it is but change the true
            weight. The rest of ``lost_share`` does not change the correction either; on average,
            stochastic rounding makes up for it by enlarging other updates.
        edq: effective descent quality. Collage (arXiv:2405.03637) defines EDQ as the projection of
            the effective update on the direction of the intended one,
            ``dot(intended / norm(intended), effective)``. This value is EDQ divided by
            ``norm(intended)``: 1 if nothing is lost, 0 if the weights do not move, above 1 if
            rounding enlarges the update.
        plain_edq: the same for plain weights.
        correction_rms: root mean square of the stored corrections, each in units of its weight's
            last place (the distance to the next bfloat16 number away from zero), over the
            parameters that have one. 0.29 if they are spread evenly over their range.
        weight_norm: 2-norm of the true weights before the step.
        update_norm: 2-norm of the intended updates.
        update_ratio: ``update_norm / weight_norm``.
        exp_avg_norm: 2-norm of the first moments after the step, before they are rounded.
        exp_avg_sq_norm: 2-norm of the second moments after the step, before they are rounded.
        groups: the same statistics of each parameter group, in the order of ``param_groups``.
        fractions_differ: whether ranks gave different fractions; every value is then NaN. None in
            ``groups``.

    Examples:
        >>> import torch
        >>> from sharded_bf16_adamw import AdamW_BF16
        >>> weight = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
        >>> optimizer = AdamW_BF16([weight], lr=1e-4)
        >>> weight.grad = torch.ones_like(weight)
        >>> stats = optimizer.precision_stats()
        >>> optimizer.step(zero_grad=True)
        >>> float(stats.lost_share), round(float(stats.edq), 1)
        (1.0, 1.0)
    """

    elements: Tensor
    updates: Tensor
    lost_share: Tensor
    carried_share: Tensor
    edq: Tensor
    plain_edq: Tensor
    correction_rms: Tensor
    weight_norm: Tensor
    update_norm: Tensor
    update_ratio: Tensor
    exp_avg_norm: Tensor
    exp_avg_sq_norm: Tensor
    groups: tuple[PrecisionStats, ...] = ()
    fractions_differ: Tensor | None = field(default=None, repr=False)

    def as_dict(self) -> dict[str, float]:
        """Return the values as floats by name, without ``groups``. Waits for the device once.

        Raises:
            ValueError: ranks gave different fractions.
        """
        names = [
            each.name for each in fields(self) if each.name not in ("groups", "fractions_differ")
        ]
        tensors = [getattr(self, name) for name in names]
        differ = self.fractions_differ
        tensors.append(torch.zeros_like(tensors[0]) if differ is None else differ.to(tensors[0]))
        *values, fractions_differ = torch.stack(tensors).tolist()
        _check_fractions(fractions_differ > 0)
        return dict(zip(names, values, strict=True))


class PrecisionPass:
    """The computation of :class:`PrecisionStats`. Keeps its last sample between calls.

    Args:
        sharding: the optimizer's sharding strategy.
        step_plans: the optimizer's step plans, whose kernel tables it uses.
        grad_norm: the optimizer's gradient norm, for its sums over ranks.
    """

    def __init__(self, sharding: Sharding, step_plans: StepPlanCache, grad_norm: GradNorm) -> None:
        self._sharding = sharding
        self._step_plans = step_plans
        self._grad_norm = grad_norm
        # the last sample, with the plan and the infos for which it was built
        self._sample: tuple[weakref.ref[StepPlan], list[GroupInfo], StratifiedSample] | None = None

    def compute(
        self,
        group_grads: list[GroupGrads],
        hyperparams: list[Hyperparams],
        states: dict[Tensor, Any],
        grad_scale: Tensor | None,
        backend: str | None,
        fraction: float,
    ) -> PrecisionStats:
        """Compute the statistics of the step with these gradients, without taking it.

        Collective as :meth:`.GradNorm.compute` is, whatever gradients this rank has.

        Args:
            group_grads: one entry for each parameter group.
            hyperparams: one entry for each parameter group, with the learning rate of this step.
            states: the optimizer's states; a missing one counts as zeros and is not created.
            grad_scale: 0-dim float32 factor of the gradients, or None.
            backend: see :class:`.kernels.FusedAdamW`.
            fraction: share of the elements to read.

        Raises:
            RuntimeError: a state or a gradient does not fit its parameter, or a CUDA graph is
                captured.
            ValueError: ``fraction`` is invalid, or ranks gave different ones; on CUDA
                :meth:`PrecisionStats.as_dict` raises the latter instead.
        """
        if any(is_capturing(param.device) for _, params, _ in group_grads for param in params[:1]):
            raise RuntimeError(
                "a CUDA graph captures precision_stats(), which uploads new addresses at each "
                "call; call it outside of the capture"
            )
        infos = self._grad_norm.group_infos(group_grads)
        device_of_key = {key: p.device for info in infos for key, p in info.param_of_key.items()}
        keys = list(device_of_key) or [(False, ())]
        # A row for each key and, within it, for each group.
        shape = (len(keys), len(group_grads), len(PRECISION_SUMS))
        sums = {
            key: torch.zeros(
                shape[1:], dtype=torch.float64, device=double_device(device_of_key.get(key, CPU))
            )
            for key in keys
        }
        # A rank with an invalid fraction takes part in all collectives, so that every rank raises.
        is_valid = 0.0 < fraction <= 1.0
        one_in = round(1.0 / fraction) if is_valid else 1
        plan = self._plan(group_grads, states, backend)
        if plan is not None:
            grads = plan.local_grads([grad for _, _, grads in group_grads for grad in grads])
            sample = None
            if one_in > 1 or len(keys) > 1:
                sample = self._sample_of(plan, infos, group_grads, keys, one_in)
            runs = None if sample is None else sample.draw(group_grads[0][0]["schedule_step"])
            for found in plan.precision_sums(grads, hyperparams, grad_scale, runs):
                total = found if sample is None else sample.total(found)
                for key, own in zip(keys, total.view(shape), strict=True):
                    sums[key] += own.to(sums[key].device)
        x = one_in if is_valid else 0
        sums = {key: torch.cat([own, _moments(x, own)], 1) for key, own in sums.items()}
        total, mismatch = self._grad_norm.all_reduce(sums, shared_replica_groups(infos))
        if not is_valid:
            raise ValueError(f"Invalid fraction: {fraction}; it must be above 0 and at most 1")
        total, moments = total.split([shape[2], total.shape[1] - shape[2]], 1)
        fractions_differ = _vary(moments) | (mismatch[:, shape[2] :] > 0).any()
        if not fractions_differ.is_cuda:
            _check_fractions(bool(fractions_differ))
        total = torch.where((mismatch > 0).any() | fractions_differ, torch.nan, total)
        whole, *groups = _stats_of(torch.cat([total.sum(0, keepdim=True), total]))
        return replace(whole, groups=tuple(groups), fractions_differ=fractions_differ)

    def _plan(
        self, group_grads: list[GroupGrads], states: dict[Tensor, Any], backend: str | None
    ) -> StepPlan | None:
        """Return the plan of this step, from the cache or with zeros for the missing states."""
        groups = [params for _, params, _ in group_grads]
        if not any(groups):
            return None
        plan = self._step_plans.find(groups, states)
        if plan is not None:
            return plan
        names = param_names([group for group, _, _ in group_grads])
        params = list(chain.from_iterable(groups))
        for param in params:
            if states.get(param):
                check_state(states[param], param, names[param], self._sharding)
        own = [states.get(param) or _zero_state(param, self._sharding) for param in params]
        return StepPlan(groups, own, [names[p] for p in params], self._sharding, backend)

    def _sample_of(
        self,
        plan: StepPlan,
        infos: list[GroupInfo],
        group_grads: list[GroupGrads],
        keys: list[SumKey],
        one_in: int,
    ) -> StratifiedSample:
        """Return the sample of a plan's parameters; reuse the last sample of the same plan."""
        if self._sample is not None:
            plan_ref, old_infos, sample = self._sample
            if plan_ref() is plan and sample.one_in == one_in and all(map(is_, infos, old_infos)):
                return sample
        position_of = {id(p): i for i, p in enumerate(p for info in infos for p in info.params)}
        number_of = {key: number for number, key in enumerate(keys)}
        rows = [
            number_of[info.key_of[id(param)]] * len(infos) + index
            for index, (info, (_, params, _)) in enumerate(zip(infos, group_grads, strict=True))
            for param in params
        ]
        shards = [self._sharding.shard(param) for param in plan.params]
        positions = [position_of[id(param)] for param in plan.params]
        sample = StratifiedSample(shards, positions, rows, len(keys) * len(infos), one_in)
        self._sample = weakref.ref(plan), infos, sample
        return sample


def _zero_state(param: Tensor, sharding: Sharding) -> dict[str, Tensor]:
    """Return a state of zeros, whose moments and correction share one tensor."""
    zeros = torch.zeros_like(sharding.shard(param), dtype=param.dtype)
    step = torch.zeros((), dtype=torch.float32, device=param.device)
    keys = STATE_KEYS if param.dtype == torch.bfloat16 else STATE_KEYS[:-1]
    return dict.fromkeys(keys, zeros) | {"step": step}


def _moments(x: int, like: Tensor) -> Tensor:
    """Return a row of 1, x and x * x for each row of ``like``; x stands for the fraction.

    Their sums over ranks tell whether x differs between ranks, without a collective of their own.
    """
    x = min(x, MAX_ONE_IN_COMPARED)
    return torch.cat([torch.full_like(like[:, :1], value) for value in (1, x, x * x)], 1)


def _vary(moments: Tensor) -> Tensor:
    """Return whether x differs between ranks, from summed :func:`_moments`; False if not finite."""
    count, first, second = moments[0].unbind()
    return count * second > first.square()


def _check_fractions(differ: bool) -> None:
    if differ:
        raise ValueError(
            "precision_stats() got different fractions on different ranks; give every rank the "
            "same fraction"
        )


def _stats_of(sums: Tensor) -> list[PrecisionStats]:
    """Return the statistics that follow from each row of ``[rows, PRECISION_SUMS]``."""
    named = dict(zip(PRECISION_SUMS, sums.unbind(1), strict=True))
    weight_norm, update_norm = named["weight_sq"].sqrt(), named["update_sq"].sqrt()
    columns = {
        "elements": named["elements"],
        "updates": named["updates"],
        "lost_share": named["lost"] / named["updates"],
        "carried_share": named["carried"] / named["updates"],
        "edq": named["descent"] / named["update_sq"],
        "plain_edq": named["plain_descent"] / named["update_sq"],
        "correction_rms": (named["correction_sq"] / named["corrected"]).sqrt(),
        "weight_norm": weight_norm,
        "update_norm": update_norm,
        "update_ratio": update_norm / weight_norm,
        "exp_avg_norm": named["first_sq"].sqrt(),
        "exp_avg_sq_norm": named["second_sq"].sqrt(),
    }
    rows = zip(*(column.unbind() for column in columns.values()), strict=True)
    return [PrecisionStats(**dict(zip(columns, row, strict=True))) for row in rows]


class PrecisionMeasured(WeightAccess):
    """An optimizer that can measure the precision of its next step."""

    lr_function: Schedule | None
    _clip: PendingClip
    _grads: GradCollector
    _precision: PrecisionPass

    @torch._disable_dynamo
    @torch.no_grad()
    def precision_stats(self, fraction: float = 1.0) -> PrecisionStats:
        """Measure what bfloat16 costs in the next :meth:`step`; changes nothing.

        Call it between :meth:`clip_grad_norm_`, if used, and :meth:`step`. Collective as
        :meth:`clip_grad_norm_` is. See ``docs/precision.md``.

        Args:
            fraction: share of the elements to read, rounded to one over a whole number. Below 1 the
                statistics are estimates from blocks of elements. The blocks change with the step,
                are the same under every sharding, and do not depend on any random state.

        Returns:
            The statistics of all ranks together, and of each parameter group; NaN if a gradient
            that was read is not finite, or if replicas have different gradients there.

        Raises:
            ValueError: ``fraction`` is not above 0 and at most 1, or differs between ranks. On CUDA
                :meth:`.PrecisionStats.as_dict` raises the latter.
            RuntimeError: the optimizer has ``step_in_backward``; a state or gradient does not fit
                its parameter; a CUDA graph captures the call; or another rank has died.
        """
        self._check_keeps_grads("precision_stats()")
        self._sharding.reduce_grads(Caller.STATS)
        grads = self._grads.collect(self.param_groups)
        lrs = scheduled_lrs(self.lr_function, self.param_groups)
        hypers = hyperparams_at(lrs, self.param_groups)
        return self._precision.compute(
            grads,
            hypers,
            self.state,
            grad_scale=self._clip.grad_scale,
            backend=self.backend,
            fraction=fraction,
        )
