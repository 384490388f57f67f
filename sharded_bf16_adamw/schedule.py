"""Learning-rate schedules: pure functions of the step, so a checkpoint need only hold the position."""

from __future__ import annotations

from dataclasses import dataclass


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
