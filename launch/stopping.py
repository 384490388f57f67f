"""Stopping ``train.py`` on a signal: take note, finish the step, save."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class StopRequest:
    """Set by a signal. torchrun forwards SIGTERM and kills 30 s later, so the loop looks at this once a step."""

    requested: bool = False


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Within this context, SIGTERM and SIGINT do no more than set what it yields."""
    stop = StopRequest()

    def request(signum: int, frame: Any) -> None:
        stop.requested = True

    previous = {s: signal.signal(s, request) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)
