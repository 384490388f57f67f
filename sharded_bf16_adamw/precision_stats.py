"""Statistics of what bfloat16 costs in one step: lost updates, effective descent quality, norms.

The kernels compute the next step without storing it: with the same stochastic rounding, so that the
bits are those that :meth:`.AdamW_BF16.step` will store, and they add up in float64. No tensor of
the optimizer changes, and nothing waits for the device.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .grad_norm import GradNorm, shared_replica_groups
from .gradients import GroupGrads, wrong_numel
from .kernels import (
    PRECISION_SUMS,
    FusedAdamW,
    Hyperparams,
    StepArgs,
    double_device,
    is_capturing,
)
from .sharding.base import Sharding
from .sharding.dtensor import to_local
from .state import STATE_KEYS, check_state
from .validation import param_names


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
        RuntimeError: a state or a gradient does not fit its parameter, or a CUDA graph is captured.
    """
    if any(is_capturing(param.device) for _, params, _ in group_grads for param in params[:1]):
        raise RuntimeError(
            "a CUDA graph captures precision_stats(), which uploads new addresses at each call; "
            "call it outside of the capture"
        )
    infos = grad_norm.group_infos(group_grads)
    names = param_names([group for group, _, _ in group_grads])
    devices = {key: param.device for info in infos for key, param in info.param_of_key.items()}
    shape = (len(group_grads), len(PRECISION_SUMS))
    sums = {
        key: torch.zeros(shape, dtype=torch.float64, device=double_device(device))
        for key, device in (devices or {(False, ()): torch.device("cpu")}).items()
    }
    # by device: the key and the index of the group, the tensors and the gradient of each parameter
    rows: defaultdict[torch.device, list[tuple[Any, list[Any], Tensor]]] = defaultdict(list)
    for index, (info, (_, params, _)) in enumerate(zip(infos, group_grads, strict=True)):
        for param, grad in zip(params, sharding.local_grads(params), strict=True):
            state = states.get(param) or {}
            if state:
                check_state(state, param, names[param], sharding)
            shard = to_local(sharding.shard(param))
            if grad.numel() != shard.numel():
                raise wrong_numel(names[param], grad.numel(), shard.numel())
            tensors = [shard, *_states_of(shard, state)]
            rows[shard.device].append(((info.key_of[id(param)], index), tensors, grad))
    for device, of_device in rows.items():
        slots = {slot: number for number, slot in enumerate(dict.fromkeys(x[0] for x in of_device))}
        tensor_rows = [tensors for _, tensors, _ in of_device]
        p, m, v, c, steps = (list(column) for column in zip(*tensor_rows, strict=True))
        groups = [slots[slot] for slot, _, _ in of_device]
        table = FusedAdamW(p, m, v, c, steps, groups, backend)
        args = StepArgs(
            [grad for _, _, grad in of_device],
            [hyperparams[index] for _, index in slots],
            None if grad_scale is None else grad_scale.to(device),
        )
        for (key, index), row in zip(slots, table.precision_sums(args), strict=True):
            sums[key][index] += row.to(sums[key].device)
    total, mismatch = grad_norm.all_reduce(sums, shared_replica_groups(infos))
    total = torch.where((mismatch > 0).any(), torch.nan, total)
    return replace(_stats_of(total.sum(0)), groups=tuple(map(_stats_of, total)))


def _states_of(shard: Tensor, state: dict[str, Any]) -> list[Tensor | None]:
    """Return exp_avg, exp_avg_sq, correction and step; zeros before the first step."""
    if state:
        step, m, v, *c = (to_local(state[key]) for key in STATE_KEYS if key in state)
    else:
        m = v = torch.zeros_like(shard)
        step, c = torch.zeros((), dtype=torch.float32, device=shard.device), [m]
    return [m, v, c[0] if shard.dtype == torch.bfloat16 else None, step]


def _stats_of(sums: Tensor) -> PrecisionStats:
    """Return the statistics that follow from one row of ``PRECISION_SUMS``."""
    named = dict(zip(PRECISION_SUMS, sums.unbind(), strict=True))
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
