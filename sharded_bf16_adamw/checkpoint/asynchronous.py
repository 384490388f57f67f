"""One save at a time in a thread, over a process group of its own, so that its messages never mix with those of training."""

from __future__ import annotations

import atexit
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from .agreement import Group


class _Pending(threading.Thread):
    """Not a daemon: an interpreter that ends waits for it, and the save with it is complete."""

    def __init__(self, function: Callable[[], None]) -> None:
        super().__init__(name="checkpoint save")
        self._function = function
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self._function()
        except Exception as error:
            self.error = error


_pending: _Pending | None = None
_group: tuple[Any, Group] = (None, None)  # the default process group, and ours of the same ranks


def start(function: Callable[[], None]) -> None:
    """Run ``function`` in a thread. The one before has been waited for."""
    global _pending
    assert _pending is None
    _pending = _Pending(function)
    _pending.start()


def wait_for_save() -> None:
    """Wait until the asynchronous save, if there is one, is on the disk and the latest checkpoint.

    Raises:
        RuntimeError: it failed, on whatever rank; earlier checkpoints are untouched. Said once.
    """
    global _pending
    if _pending is None:
        return
    _pending.join()
    error, _pending = _pending.error, None
    if error is not None:
        raise error


@atexit.register
def _say_what_nobody_asked_for() -> None:
    """Of a program that ends without :func:`wait_for_save`, this is the last chance to tell of an error. All threads are done by now."""
    if _pending is not None and _pending.error is not None:
        print(f"an asynchronous save failed: {_pending.error}", file=sys.stderr)


def own_group(group: Group = None) -> Group:
    """A gloo group of all ranks for the thread. Collective at the first call for a default process group."""
    global _group
    if not dist.is_initialized():
        return None
    if _group[0] is not dist.group.WORLD:
        _group = (dist.group.WORLD, dist.new_group(backend="gloo"))
    return _group[1]
