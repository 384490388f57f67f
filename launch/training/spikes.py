"""Detection of steps whose loss or gradient norm is an outlier among recent ones."""

from __future__ import annotations

import statistics
from collections import deque

WINDOW = 128


class SpikeFilter:
    """A filter for outliers among the last ``WINDOW`` losses and gradient norms.

    The rule is that of OLMo-core's ``SkipStepOptimizer``. Outliers enter the window too, so a
    lasting change of level is soon accepted. Nothing is an outlier until the window is half full.

    Args:
        sigma: number of standard deviations above the mean beyond which a value is an outlier.

    Attributes:
        skipped: steps that the training loop has skipped.
    """

    def __init__(self, sigma: float) -> None:
        self.sigma = sigma
        self.skipped = 0
        self._window: deque[tuple[float, float]] = deque(maxlen=WINDOW)

    def is_spike(self, loss: float, norm: float) -> bool:
        """Record a step's finite loss and norm; return True if one of them is an outlier."""
        is_spike = len(self._window) >= WINDOW // 2 and any(
            value - statistics.fmean(recent) > self.sigma * statistics.stdev(recent)
            for value, recent in zip((loss, norm), zip(*self._window, strict=True), strict=True)
        )
        self._window.append((loss, norm))
        return is_spike

    def state(self) -> dict[str, object]:
        """Return the state as plain data for a checkpoint."""
        return {"skipped": self.skipped, "window": [list(pair) for pair in self._window]}

    def load(self, state: dict[str, object]) -> None:
        """Restore what :meth:`state` returned."""
        self.skipped = state["skipped"]  # type: ignore[assignment]
        self._window.extend((loss, norm) for loss, norm in state["window"])  # type: ignore[attr-defined]
