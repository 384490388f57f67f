"""Learning-rate schedules: pure functions of the step, so a checkpoint need only hold the position.

A parameter group holds ``"lr"``, the rate of its next step for all to see and change; ``"scheduled_lr"``, what the schedule last wrote
there, or None where the group's own rate rules; and ``"schedule_step"``, the steps taken so far.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class LR:
    """Linear warm-up ("preheat"), then power-law decay: ``lr * min(x, x ** decay_power)`` with ``x = (step + 1) / preheat_steps``.

    The schedule of the ``adamw_bfloat16`` library. With ``decay_power=-0.5`` it is the inverse square root schedule of
    "Attention Is All You Need" (arXiv:1706.03762). Any other callable from a step to a learning rate serves as well.

    Args:
        lr: the peak, reached at step ``preheat_steps - 1``.
        preheat_steps: length of the warm-up in optimizer steps, at least 1.
        decay_power: exponent of the decay, at most 0; 0 holds the peak.

    Raises:
        ValueError: an argument is out of its range.
    """

    lr: float = 1e-3
    preheat_steps: int = 3000
    decay_power: float = -0.5

    def __post_init__(self) -> None:
        if not self.lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {self.lr}")
        if not self.preheat_steps >= 1:
            raise ValueError(f"Invalid preheat_steps: {self.preheat_steps}; it must be at least 1")
        if not self.decay_power <= 0.0:
            raise ValueError(f"Invalid decay_power: {self.decay_power}; it must not be positive")

    def __call__(self, step: int) -> float:
        """Return the learning rate of the 0-based optimizer step ``step``."""
        x = (step + 1) / self.preheat_steps
        return self.lr * min(x, x**self.decay_power)


def lr_at(schedule: Schedule, step: int) -> float:
    """The schedule's rate at a 0-based step, or ValueError where that is none."""
    rate = schedule(step)
    if isinstance(rate, Tensor):  # to look at its value would wait for its device
        return rate
    try:
        valid = 0.0 <= rate < math.inf
    except TypeError:
        valid = False
    if not valid:
        raise ValueError(
            f"Invalid learning rate: lr_function({step}) is {rate!r}; it must be a finite number, not below 0"
        )
    return float(rate)  # a numpy number would not load with weights_only=True


def scheduled_lrs(schedule: Schedule | None, groups: list[dict[str, Any]]) -> list[float | None]:
    """Each group's rate of the step to come; None where its ``"lr"`` is not what the schedule last wrote and so somebody else's, whose it
    is for this step: torch's schedulers, or torch's checkpoint code, which takes steps at ``lr = 0`` to make states."""
    if schedule is None:
        return [None] * len(groups)
    for group in groups:
        if (
            group["schedule_step"] == 0
            and group["scheduled_lr"] is not None
            and "initial_lr" in group
        ):
            warnings.warn(
                f"a torch learning-rate scheduler was built on an optimizer that follows lr_function={schedule!r}: it starts from that "
                f"function's first value, {group['initial_lr']:g}, and takes over; pass lr= to give the scheduler a rate of its own",
                stacklevel=2,
            )
            break
    return [
        lr_at(schedule, group["schedule_step"]) if _is_followed(group) else None for group in groups
    ]


def apply_rates(groups: list[dict[str, Any]], rates: list[float | None]) -> None:
    """Write what :func:`scheduled_rates` gave, and count the step."""
    for group, rate in zip(groups, rates, strict=True):
        if rate is not None:
            group["lr"] = group["scheduled_lr"] = rate
        group["schedule_step"] += 1


def _is_followed(group: dict[str, Any]) -> bool:
    rate, scheduled = group["lr"], group["scheduled_lr"]
    if scheduled is None or rate is scheduled:
        return scheduled is not None
    return (
        not isinstance(rate, Tensor) and rate == scheduled
    )  # to compare a tensor would wait for its device
