"""Saves in threads, over a process group of their own: they never mix with training's messages.

A thread that saves has one save under way at a time. Two threads that save two models do not wait
for each other, and each gets the errors of its own saves; what a thread that has ended left is told
to whoever waits next.
"""

from __future__ import annotations

import atexit
import sys
import threading
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch.distributed as dist

from ..sharding.collectives import new_cpu_group
from .rank_errors import Group, on_rank_0


class _Pending(threading.Thread):
    """A save under way.

    Not a daemon: an interpreter that ends waits for it, and the save with it is complete.
    """

    def __init__(self, function: Callable[[Group], None], group: Group) -> None:
        super().__init__(name="checkpoint save")
        self._function: Callable[[Group], None] | None = function
        self._group = group
        self.caller = threading.current_thread()
        self.error: Exception | None = None

    def run(self) -> None:
        assert self._function is not None
        try:
            self._function(self._group)
        except Exception as error:
            self.error = error
        finally:
            self._function = None  # it holds the model's copy
            _borrowed.discard(self._group)

    def concerns_this_thread(self) -> bool:
        """Return whether this thread started it, or one that cannot wait for it any more."""
        return self.caller is threading.current_thread() or not self.caller.is_alive()


_pending: list[
    _Pending
] = []  # in the order in which they were started; done ones until their errors were raised
_lock = threading.Lock()  # of the list
_groups: WeakKeyDictionary[dist.ProcessGroup, list[dist.ProcessGroup]] = (
    WeakKeyDictionary()
)  # by a group of the same ranks
_borrowed: set[dist.ProcessGroup] = set()  # those that a save under way uses


def start(function: Callable[[Group], None], group: Group) -> None:
    """Run ``function(group)`` in a thread, with a group from :func:`borrow_group`. This thread's save before has been waited for."""
    pending = _Pending(function, group)
    pending.start()
    with _lock:
        _pending.append(pending)


def wait_for_save() -> None:
    """Wait until the asynchronous saves of this process, if there are any, are on the disk.

    Waits for the saves of all threads. Raises errors of those that this thread started, or that a
    thread started that has ended since; other threads get their own.

    Raises:
        RuntimeError: a save failed, on whatever rank; earlier checkpoints are untouched. Each error
        is raised once.
    """
    with _lock:
        others = [pending for pending in _pending if not pending.concerns_this_thread()]
    for pending in others:
        pending.join()
    wait_for_own_saves()


def wait_for_own_saves() -> None:
    """Wait as :func:`wait_for_save`, but not for saves of other threads that are alive."""
    while True:
        with _lock:
            first = next((pending for pending in _pending if pending.concerns_this_thread()), None)
        if first is None:
            return
        first.join()
        with _lock:
            if first not in _pending:
                continue  # another thread has waited for it, too
            _pending.remove(first)
        if first.error is not None:
            raise first.error


@atexit.register
def _say_what_nobody_asked_for() -> None:
    """Print errors of saves that nobody waited for. All threads are done by now."""
    for pending in _pending:
        if pending.error is not None:
            print(f"an asynchronous save failed: {pending.error}", file=sys.stderr)


def borrow_group(group: Group) -> Group:
    """Return a gloo group of the same ranks that no other save uses, for :func:`start`. Collective."""
    if not dist.is_initialized():
        return None
    of = dist.group.WORLD if group is None else group
    assert of is not None
    known = _groups.setdefault(of, [])
    index = on_rank_0(  # whose thread is the last to leave a group
        "cannot save",
        lambda: next(
            (i for i, candidate in enumerate(known) if candidate not in _borrowed), len(known)
        ),
        group,
    )
    if index == len(known):
        known.append(new_cpu_group(dist.get_process_group_ranks(of)))
    _borrowed.add(known[index])
    return known[index]
