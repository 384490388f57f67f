"""A simulated slow network for benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

COLLECTIVES = (
    "all_gather_into_tensor",
    "all_gather_single",
    "all_reduce",
    "all_to_all_single",
    "broadcast",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
)


class SlowNetwork:
    """A network that carries one collective at a time, each for ``delay`` seconds.

    It wraps torch.distributed's Python functions. A collective runs as usual, but completes only
    once the network has carried it.

    Attributes:
        delay: seconds for each collective.
        carried: number of collectives so far.
    """

    def __init__(self) -> None:
        self.delay = 0.0
        self.carried = 0
        self._free_at = 0.0
        names = [name for name in COLLECTIVES if hasattr(dist, name)]
        self._originals = {name: getattr(dist, name) for name in names}
        for name, function in self._originals.items():
            setattr(dist, name, self._delayed(function))

    def stop(self) -> None:
        for name, function in self._originals.items():
            setattr(dist, name, function)

    def _delayed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.carried += 1
            self._free_at = max(self._free_at, time.perf_counter()) + self.delay
            arrival = self._free_at
            work = function(*args, **kwargs)
            if work is None:
                sleep_until(arrival)
                return None
            return DelayedWork(work, arrival)

        return call


class DelayedWork:
    """A collective in flight that completes no sooner than ``arrival``."""

    def __init__(self, work: Any, arrival: float) -> None:
        self._work = work
        self._arrival = arrival

    def is_completed(self) -> bool:
        return self._work.is_completed() and time.perf_counter() >= self._arrival

    def wait(self) -> None:
        self._work.wait()
        sleep_until(self._arrival)


def sleep_until(when: float) -> None:
    time.sleep(max(0.0, when - time.perf_counter()))
