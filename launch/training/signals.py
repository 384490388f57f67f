"""Stop ``train.py`` on a signal: note the request, finish the step, save."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class StopRequest:
    """Flag that a signal sets.

    The loop polls it once a step: torchrun forwards SIGTERM, and kills the process 30 s later.
    """

    requested: bool = False


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Make SIGTERM and SIGINT set the yielded request and nothing else."""
    stop = StopRequest()

    def request(signum: int, frame: Any) -> None:
        stop.requested = True

    previous = {s: signal.signal(s, request) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)
