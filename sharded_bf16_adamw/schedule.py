"""Learning-rate schedules: pure functions of the step, so a checkpoint only needs the position.

A parameter group holds three entries. ``"lr"`` is the learning rate of its next step, for anyone
to read and change. ``"scheduled_lr"`` is the value that the schedule last wrote to ``"lr"``, or
None if the group has its own lr. ``"schedule_step"`` counts the steps taken so far.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Schedule = Callable[[int], float]
_DECAYS: dict[str, Callable[[float], float]] = {
    "1-sqrt": lambda t: 1.0 - math.sqrt(t),
    "linear": lambda t: 1.0 - t,
}


@dataclass(frozen=True)
class LR:
    """Linear warm-up ("preheat"), then power-law decay.

    The learning rate is ``lr * min(x, x ** decay_power)`` with ``x = (step + 1) / preheat_steps``,
    as in the ``adamw_bfloat16`` library. With ``decay_power=-0.5`` it is the inverse square root
    schedule of "Attention Is All You Need" (arXiv:1706.03762). Any other callable from a step to a
    learning rate works as ``lr_function`` too.

    Args:
        lr: the peak, reached at step ``preheat_steps - 1``.
        preheat_steps: length of the warm-up in optimizer steps, at least 1.
        decay_power: exponent of the decay, at most 0; 0 holds the peak.

    Raises:
        ValueError: an argument is out of range.

    Examples:
        >>> from sharded_bf16_adamw import LR
        >>> schedule = LR(lr=2.0, preheat_steps=4)
        >>> [schedule(step) for step in range(5)]
        [0.5, 1.0, 1.5, 2.0, 1.7888543819998317]
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


@dataclass(frozen=True)
class WSD:
    """Linear warm-up, a stable phase at the peak, then decay to a floor.

    The learning rate of the 0-based step is ``lr * (step + 1) / warmup_steps`` in the warm-up, as
    in :class:`LR`, then ``lr``. In the decay it is ``floor + (lr - floor) * f(t)`` with
    ``t = (step - warmup_steps - stable_steps) / decay_steps`` and ``f(t) = 1 - t`` (``"linear"``)
    or ``1 - sqrt(t)`` (``"1-sqrt"``), as in Hägele et al., arXiv:2405.18392. After it, ``floor``.

    In ``warmup_steps + stable_steps + decay_steps`` steps no learning rate is 0 (unless ``lr`` is).
    To decide on the end later, start with ``stable_steps=None`` and resume with the number: a
    checkpoint stores the position, not the schedule.

    Args:
        lr: the peak.
        warmup_steps: length of the warm-up in optimizer steps; 0 starts at the peak.
        stable_steps: length of the phase at the peak; None holds the peak without end.
        decay_steps: length of the decay; 0 drops to the floor.
        decay: ``"1-sqrt"`` or ``"linear"``.
        floor: learning rate after the decay, at most ``lr``.

    Raises:
        ValueError: an argument is out of range.

    Examples:
        >>> from sharded_bf16_adamw import WSD
        >>> schedule = WSD(lr=1.0, warmup_steps=2, stable_steps=2, decay_steps=4, decay="linear")
        >>> [schedule(step) for step in range(9)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """

    lr: float
    warmup_steps: int
    stable_steps: int | None
    decay_steps: int
    decay: str = "1-sqrt"
    floor: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.lr < math.inf:
            raise ValueError(f"Invalid learning rate: {self.lr}")
        for name in ("warmup_steps", "stable_steps", "decay_steps"):
            steps = getattr(self, name)
            if not (steps is None and name == "stable_steps") and not 0 <= steps < math.inf:
                raise ValueError(f"Invalid {name}: {steps}; it must be finite and at least 0")
        if self.decay not in _DECAYS:
            choices = " or ".join(map(repr, _DECAYS))
            raise ValueError(f"Invalid decay: {self.decay!r}; choose {choices}")
        if not 0.0 <= self.floor <= self.lr:
            raise ValueError(f"Invalid floor: {self.floor}; it must be from 0 to lr, {self.lr}")

    def __call__(self, step: int) -> float:
        """Return the learning rate of the 0-based optimizer step ``step``."""
        lr, floor = float(self.lr), float(self.floor)
        if step < self.warmup_steps:
            return lr * ((step + 1) / self.warmup_steps)
        if self.stable_steps is None:
            return lr
        decayed = step - self.warmup_steps - self.stable_steps
        if decayed < 0:
            return lr
        if decayed >= self.decay_steps:
            return floor
        factor = _DECAYS[self.decay](decayed / self.decay_steps)
        return lr * factor + floor * (1.0 - factor)  # exactly lr at the first step of the decay


def resolve_lr(
    lr: float | Tensor | None, lr_function: Schedule | None, capturable: bool
) -> tuple[float | Tensor, Schedule | None]:
    """Return the first learning rate and the schedule for the constructor's arguments.

    Raises:
        ValueError: both are given, or one of them is unusable.
    """
    if lr is not None and lr_function is not None:
        raise ValueError(
            "lr and lr_function are both given; pass lr for a constant or lr_function for a "
            "schedule, not both"
        )
    if lr_function is not None and not callable(lr_function):
        raise ValueError(
            "lr_function must be a callable from a step to a learning rate, such as LR(), but it "
            f"is {lr_function!r}"
        )
    if lr is None:
        lr_function = LR() if lr_function is None else lr_function
        lr = lr_at(lr_function, 0)
    if capturable and not isinstance(lr, Tensor):
        raise ValueError(
            "capturable=True needs lr as a one-element tensor: a captured graph replays without "
            "running Python"
        )
    return lr, lr_function


def lr_at(schedule: Schedule, step: int) -> float:
    """Return the schedule's learning rate at a 0-based step. Raise ValueError if it is invalid."""
    lr = schedule(step)
    if isinstance(lr, Tensor):  # checking its value would wait for its device
        return lr
    try:
        valid = 0.0 <= lr < math.inf
    except TypeError:
        valid = False
    if not valid:
        raise ValueError(
            f"lr_function returned an invalid learning rate: lr_function({step}) is {lr!r}; it "
            "must be a finite number of at least 0"
        )
    return float(lr)  # a NumPy number would not load with weights_only=True


def init_lr(group: dict[str, Any], schedule: Schedule | None) -> None:
    """Set the first ``"lr"`` of a new group, and ``"max_lr"`` if ``decouple_lr`` needs its default.

    Args:
        group: a parameter group, changed in place.
        schedule: the schedule that the group follows; None if it has its own lr.

    Raises:
        ValueError: the schedule returned an invalid learning rate, or its peak is unknown.
    """
    if schedule is not None:
        group["lr"] = group["scheduled_lr"] = lr_at(schedule, group["schedule_step"])
    if not group["decouple_lr"] or group["max_lr"] is not None:
        return
    if schedule is not None and not isinstance(schedule, (LR, WSD)):
        raise ValueError(
            f"decouple_lr=True needs the peak of the learning rate, which is unknown for "
            f"lr_function={schedule!r}; pass max_lr="
        )
    group["max_lr"] = float(group["lr"] if schedule is None else schedule.lr)


def scheduled_lrs(schedule: Schedule | None, groups: list[dict[str, Any]]) -> list[float | None]:
    """Return each group's next lr, or None if the group keeps its own or other code has set it.

    torch's schedulers overwrite ``"lr"``. So does torch's checkpoint code: it takes a step at
    ``lr = 0`` to create the states.
    """
    if schedule is None:
        return [None] * len(groups)
    for group in groups:
        is_first_step = group["schedule_step"] == 0 and group["scheduled_lr"] is not None
        if is_first_step and "initial_lr" in group:
            warnings.warn(
                "a torch learning-rate scheduler (the Hugging Face Trainer builds one, too) was "
                f"built on an optimizer that follows lr_function={schedule!r}: its base learning "
                f"rate is that function's first value, {group['initial_lr']:g}; pass lr= to the "
                "optimizer, or leave the scheduler out",
                stacklevel=2,
            )
            break
    return [
        lr_at(schedule, group["schedule_step"]) if _is_followed(group) else None for group in groups
    ]


def apply_lrs(groups: list[dict[str, Any]], lrs: list[float | None]) -> None:
    """Write the result of :func:`scheduled_lrs` to the groups and count the step."""
    for group, lr in zip(groups, lrs, strict=True):
        if lr is not None:
            group["lr"] = group["scheduled_lr"] = lr
        group["schedule_step"] += 1


def _is_followed(group: dict[str, Any]) -> bool:
    """Return True if ``"lr"`` still is the value that the schedule wrote."""
    lr, scheduled = group["lr"], group["scheduled_lr"]
    if scheduled is None or lr is scheduled:
        return scheduled is not None
    return not isinstance(lr, Tensor) and lr == scheduled  # comparing a tensor waits for its device
