"""Statistics of what bfloat16 costs in one step: lost updates, effective descent quality, norms.

The next step is tried on copies of a few thousand elements at a time. The optimizer's own kernel
updates the copies, so stochastic rounding gives the bits that :meth:`.AdamW_BF16.step` will store.
Tensor operations compare them with the update in float32, and add up in float64. No tensor of the
optimizer changes, and nothing waits for the device.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .grad_norm import GradNorm, shared_replica_groups
from .gradients import GroupGrads, wrong_numel
from .kernels import FusedAdamW, Hyperparams, StepArgs, double_device
from .sharding.base import Sharding
from .sharding.dtensor import to_local
from .state import STATE_KEYS, check_state
from .validation import param_names

CPU_CHUNK = 1 << 16  # elements: fewer cost more in calls, more leave the processor's cache
DEVICE_CHUNK = 1 << 20  # elements: enough to fill an accelerator

SUMS = (  # what is added up, over chunks and over ranks
    "elements",
    "corrected",  # elements with a correction
    "updates",  # elements whose update is not zero
    "lost",
    "carried",
    "weight_sq",
    "update_sq",
    "descent",  # dot product of the effective and the intended update
    "plain_descent",
    "correction_sq",  # in units of the weight's last place
    "first_sq",  # of exp_avg
    "second_sq",  # of exp_avg_sq
)


@dataclass(frozen=True)
class PrecisionStats:
    """Precision of one step, over all ranks: see :meth:`AdamW_BF16.precision_stats`.

    Every value is a 0-dim float64 tensor on the parameters' device; reading one waits for it. The
    *intended update* of a weight is ``lr * (weight_decay * (p + correction) + m / (sqrt(v) +
    eps))`` with bias-corrected moments, before any rounding. The *effective update* is the change
    of the stored true weight ``p + correction``. A *plain weight* has the parameter's dtype and no
    correction; it is updated by rounding ``p - update`` to nearest.

    Attributes:
        elements: elements that the step updates, each counted once.
        updates: those of them whose intended update is not zero.
        lost_share: share of ``updates`` that leave a plain weight as it is.
        carried_share: share of ``updates`` that leave a plain weight as it is and do change the
            true weight. The difference from ``lost_share`` is what stochastic rounding of the
            correction rounds to nothing; it is made up for by others that it rounds up.
        edq: effective descent quality. Collage (arXiv:2405.03637) defines EDQ as the projection of
            the effective update on the direction of the intended one,
            ``dot(intended / norm(intended), effective)``. This is EDQ over ``norm(intended)``: 1 if
            nothing is lost, 0 if the weights do not move, above 1 if rounding enlarges the update.
        plain_edq: the same for plain weights.
        correction_rms: root mean square of the stored corrections, each in units of its weight's
            last place (the distance to the next bfloat16 number away from zero), over the
            parameters that have one. 0.29 if they are spread evenly over their range.
        weight_norm: 2-norm of the true weights before the step.
        update_norm: 2-norm of the intended updates.
        update_ratio: ``update_norm / weight_norm``.
        exp_avg_norm: 2-norm of the first moments after the step, before they are rounded.
        exp_avg_sq_norm: 2-norm of the second moments, likewise.
        groups: the same of each parameter group, in the order of ``param_groups``.

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

    def as_dict(self) -> dict[str, float]:
        """Return the values as floats by name, without ``groups``. Waits for the device once."""
        names = [field.name for field in fields(self) if field.name != "groups"]
        values = torch.stack([getattr(self, name) for name in names]).tolist()
        return dict(zip(names, values, strict=True))


def compute_precision_stats(
    group_grads: list[GroupGrads],
    hyperparams: list[Hyperparams],
    states: dict[Tensor, Any],
    sharding: Sharding,
    grad_norm: GradNorm,
    grad_scale: Tensor | None,
    backend: str | None,
) -> PrecisionStats:
    """Compute the statistics of the step with these gradients, without taking it.

    Collective as :meth:`.GradNorm.compute` is, whatever gradients this rank has.

    Args:
        group_grads: one entry for each parameter group.
        hyperparams: likewise, with the learning rate of this step.
        states: the optimizer's states; a missing one counts as zeros and is not created.
        sharding: the optimizer's sharding strategy.
        grad_norm: the optimizer's gradient norm, for its sums over ranks.
        grad_scale: 0-dim float32 factor of the gradients, or None.
        backend: see :class:`.kernels.FusedAdamW`.

    Raises:
        RuntimeError: a state or a gradient does not fit its parameter.
    """
    infos = grad_norm.group_infos(group_grads)
    names = param_names([group for group, _, _ in group_grads])
    devices = {key: param.device for info in infos for key, param in info.param_of_key.items()}
    shape = (len(group_grads), len(SUMS))
    sums = {
        key: torch.zeros(shape, dtype=torch.float64, device=double_device(device))
        for key, device in (devices or {(False, ()): torch.device("cpu")}).items()
    }
    trials = TrialSteps(backend, grad_scale)
    for index, (info, (_, params, _)) in enumerate(zip(infos, group_grads, strict=True)):
        key_of = dict(zip(map(id, info.params), info.keys, strict=True))
        for param, grad in zip(params, sharding.local_grads(params), strict=True):
            state = states.get(param) or {}
            if state:
                check_state(state, param, names[param], sharding)
            shard = to_local(sharding.shard(param))
            if grad.numel() != shard.numel():
                raise wrong_numel(names[param], grad.numel(), shard.numel())
            trials.add_sums(sums[key_of[id(param)]][index], shard, grad, state, hyperparams[index])
    total, mismatch = grad_norm.all_reduce(sums, shared_replica_groups(infos))
    total = torch.where((mismatch > 0).any(), torch.nan, total)
    groups = tuple(map(_stats_of, total))
    return replace(_stats_of(total.sum(0)), groups=groups)


def _stats_of(sums: Tensor) -> PrecisionStats:
    """Return the statistics that follow from one row of :data:`SUMS`."""
    named = dict(zip(SUMS, sums.unbind(), strict=True))
    weight_norm, update_norm = named["weight_sq"].sqrt(), named["update_sq"].sqrt()
    return PrecisionStats(
        elements=named["elements"],
        updates=named["updates"],
        lost_share=named["lost"] / named["updates"],
        carried_share=named["carried"] / named["updates"],
        edq=named["descent"] / named["update_sq"],
        plain_edq=named["plain_descent"] / named["update_sq"],
        correction_rms=(named["correction_sq"] / named["corrected"]).sqrt(),
        weight_norm=weight_norm,
        update_norm=update_norm,
        update_ratio=update_norm / weight_norm,
        exp_avg_norm=named["first_sq"].sqrt(),
        exp_avg_sq_norm=named["second_sq"].sqrt(),
    )


class Elements(NamedTuple):
    """The stored tensors of some elements, all flat."""

    p: Tensor
    m: Tensor
    v: Tensor
    g: Tensor
    c: Tensor | None = None  # only a bfloat16 parameter has one


class Scalars(NamedTuple):
    """Scalars of one step: Python floats, and 0-dim tensors if they depend on the step's number."""

    grad_scale: Tensor | float
    hyper: Hyperparams
    step_size: Tensor
    inv_sqrt_bias_correction2: Tensor
    lr_weight_decay: Tensor | float


class TrialSteps:
    """The next step of one parameter after the other, taken on copies of a chunk at a time.

    Args:
        backend: see :class:`.kernels.FusedAdamW`.
        grad_scale: 0-dim float32 factor of the gradients, or None.
    """

    def __init__(self, backend: str | None, grad_scale: Tensor | None) -> None:
        self._backend = backend
        self._grad_scale = grad_scale
        # Copies of a chunk and of its step, by device and dtypes; the tables also by their size.
        self._memory: dict[Any, tuple[list[Tensor], Tensor]] = {}
        self._tables: dict[Any, FusedAdamW] = {}

    def add_sums(
        self, total: Tensor, p: Tensor, g: Tensor, state: dict[str, Any], hyper: Hyperparams
    ) -> None:
        """Add the sums of one parameter to ``total``, in the order of :data:`SUMS`.

        Args:
            total: one row of sums.
            p: the local shard of the parameter.
            g: the local shard of its gradient.
            state: its state; empty before its first step.
            hyper: hyperparameters of its group.
        """
        if p.numel() == 0:
            return
        is_bf16 = p.dtype == torch.bfloat16
        zeros = p.new_zeros(()).expand(p.shape)  # takes no memory
        missing = {"step": torch.zeros((), dtype=torch.float32, device=p.device)}
        step, m, v, c = (to_local(state.get(key, missing.get(key, zeros))) for key in STATE_KEYS)
        total[0] += p.numel()
        total[1] += p.numel() if is_bf16 else 0
        chunk = CPU_CHUNK if p.device.type == "cpu" else DEVICE_CHUNK
        flat = [
            x.detach().reshape(-1).split(chunk) for x in (p, m, v, g, *([c] if is_bf16 else []))
        ]
        scalars = self._scalars(step, hyper)
        for old in itertools.starmap(Elements, zip(*flat, strict=True)):
            new = self._step(old, step, hyper, chunk)
            total[2:] += _sums_of(old, new, scalars).to(total.device)

    def _scalars(self, step: Tensor, hyper: Hyperparams) -> Scalars:
        device = step.device
        t = step.reshape(()).to(double_device(device), torch.float64) + 1.0
        lr = hyper.lr.reshape(()) if isinstance(hyper.lr, Tensor) else hyper.lr
        sign = -1.0 if hyper.maximize else 1.0
        return Scalars(
            sign if self._grad_scale is None else sign * self._grad_scale.to(device),
            hyper,
            (lr / (1.0 - hyper.beta1**t)).float(),
            (1.0 - hyper.beta2**t).rsqrt().float(),
            lr * hyper.weight_decay,
        )

    def _step(self, old: Elements, step: Tensor, hyper: Hyperparams, chunk: int) -> Elements:
        """Take the step on copies; return them, valid until the next call."""
        numel, device = old.p.numel(), old.p.device
        tensors = [x for x in old if x is not None]
        key = (device, old.p.dtype, old.g.dtype)
        if key not in self._memory:
            self._memory[key] = ([x.new_empty(chunk) for x in tensors], torch.empty_like(step))
        copies, step_copy = self._memory[key]
        new = Elements(*[copy[:numel].copy_(x) for copy, x in zip(copies, tensors, strict=True)])
        step_copy.copy_(step)
        table_key = (*key, numel)
        table = self._tables.get(table_key)
        if table is None:
            table = FusedAdamW(
                [new.p], [new.m], [new.v], [new.c], [step_copy], backend=self._backend
            )
            self._tables[table_key] = table
        scale = None if self._grad_scale is None else self._grad_scale.to(device)
        table.update_(StepArgs([new.g], [hyper], scale))
        return new


def _sums_of(old: Elements, new: Elements, s: Scalars) -> Tensor:
    """Return the sums of a chunk from its stored tensors before and after the step.

    The intended update is that of :mod:`.kernels.reference`, not rounded to the stored dtypes.
    """
    hyper, dtype = s.hyper, old.p.dtype
    p = old.p.float()
    weight = p if old.c is None else p + old.c.float()
    g = old.g.float() * s.grad_scale
    m = (g * (1.0 - hyper.beta1)).add_(old.m.float(), alpha=hyper.beta1)
    v = (g * g).mul_(1.0 - hyper.beta2).add_(old.v.float(), alpha=hyper.beta2)
    update = m * s.step_size
    update.div_(v.sqrt().mul_(s.inv_sqrt_bias_correction2).add_(hyper.eps))
    update.add_(weight * s.lr_weight_decay)
    plain = (p - update).to(dtype).float().sub_(p)
    effective = new.p.float().sub_(p)
    if old.c is not None and new.c is not None:
        c = old.c.float()
        # Both changes are exact, unlike the change of p + correction.
        effective.add_(new.c.float().sub_(c))
        in_ulps = c.div_(_ulps(old.p))
    else:
        in_ulps = torch.zeros_like(p)
    is_lost = (plain == 0).logical_and_(update != 0)
    counts = [update.count_nonzero(), is_lost.sum(), is_lost.logical_and_(effective != 0).sum()]
    dots = [
        _dot(weight, weight),
        _dot(update, update),
        -_dot(update, effective),
        -_dot(update, plain),
        _dot(in_ulps, in_ulps),
        _dot(m, m),
        _dot(v, v),
    ]
    device = double_device(p.device)
    return torch.stack([x.to(device, torch.float64) for x in (*counts, *dots)])


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the dot product, 0-dim float64: float32 would not hold squares of second moments."""
    device = double_device(a.device)
    wide = a.to(device, torch.float64)
    return torch.dot(wide, wide if a is b else b.to(device, torch.float64))


def _ulps(p: Tensor) -> Tensor:
    """Return the distance to the next bfloat16 number away from zero, float32.

    For a subnormal number it is that of the smallest normal one: the same.
    """
    power_of_two = (p.view(torch.int16) & 0x7F80).view(torch.bfloat16).float()
    return power_of_two.clamp_(min=torch.finfo(torch.bfloat16).tiny).mul_(2.0**-7)
