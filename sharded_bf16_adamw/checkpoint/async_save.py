"""Asynchronous saves: each runs in its own thread, over its own process group.

So its collectives never mix with those of training. A calling thread has at most one save in
flight: its next save or load first waits for that one and raises its error. If the calling thread
has ended, the next thread that waits raises the error.
"""

from __future__ import annotations

import atexit
import sys
import threading
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed.distributed_c10d import default_pg_timeout

from ..sharding.collectives import device_for, new_cpu_group, timeout_of
from .object_collectives import CPU, CollectiveError, Group
from .rank_errors import call_on_rank_0, raise_on_all_ranks


class _Pending(threading.Thread):
    """A save in flight.

    Not a daemon: the interpreter waits for it at exit, so that the save completes.
    """

    def __init__(self, function: Callable[[Group], None], group: Group) -> None:
        super().__init__(name="checkpoint save")
        self._function: Callable[[Group], None] | None = function
        self._group = group
        self._decided = threading.Event()
        self.caller = threading.current_thread()
        self.error: BaseException | None = None

    def run(self) -> None:
        self._decided.wait()
        try:
            if self._function is not None:
                self._function(self._group)
        except Exception as error:
            self.error = error
        finally:
            self._function = None  # frees the staged copy
            # gloo closes the connections of a group whose collective failed. No save may get it.
            if not isinstance(self.error, CollectiveError):
                _borrowed.discard(self._group)

    def start_on_all_ranks(self) -> None:
        """Start the thread if it can start on every rank, else raise on every rank. Collective."""
        try:
            with raise_on_all_ranks("cannot start the thread of a save", self._group):
                self.start()
        except BaseException as error:
            self._function, self.error = None, error
            if self.ident is None and not isinstance(error, CollectiveError):
                _borrowed.discard(self._group)  # run() does it otherwise
            raise
        finally:
            self._decided.set()

    def concerns_this_thread(self) -> bool:
        """Return True if the current thread, or one that has ended, started the save."""
        return self.caller is threading.current_thread() or not self.caller.is_alive()


_pending: list[_Pending] = []  # in the order of their start, until waited for
_lock = threading.Lock()  # guards _pending
# For each caller's group, gloo groups of the same ranks.
_groups: WeakKeyDictionary[dist.ProcessGroup, list[dist.ProcessGroup]] = WeakKeyDictionary()
_borrowed: set[dist.ProcessGroup] = set()  # groups of saves in flight, and broken groups


def start(function: Callable[[Group], None], group: Group) -> None:
    """Run ``function(group)`` in a thread, with a group from :func:`borrow_group`. Collective.

    Call :func:`wait_for_own_saves` first.
    """
    pending = _Pending(function, group)
    pending.start_on_all_ranks()
    with _lock:
        _pending.append(pending)


def wait_for_save() -> None:
    """Wait until all asynchronous saves of this process are on the disk.

    Raises only the errors of saves that this thread, or a thread that has ended, started. Other
    threads raise the errors of their own saves.

    Raises:
        RuntimeError: a save failed on some rank; earlier checkpoints are untouched. Each error is
            raised once.

    Examples:
        >>> import torch
        >>> from sharded_bf16_adamw import AdamW_BF16, latest, save, wait_for_save
        >>> model = torch.nn.Linear(4, 2).bfloat16()
        >>> optimizer = AdamW_BF16(model.parameters(), lr=1e-3)
        >>> path = save("checkpoints", 200, model, optimizer, async_=True)
        >>> wait_for_save()
        >>> latest("checkpoints") == path
        True
    """
    with _lock:
        others = [pending for pending in _pending if not pending.concerns_this_thread()]
    for pending in others:
        pending.join()
    wait_for_own_saves()


def wait_for_own_saves() -> None:
    """Wait like :func:`wait_for_save`, but not for the saves of other live threads."""
    while True:
        with _lock:
            first = next((pending for pending in _pending if pending.concerns_this_thread()), None)
        if first is None:
            return
        first.join()
        with _lock:
            if first not in _pending:
                continue  # another thread waited too, and has removed it
            _pending.remove(first)
        if first.error is not None:
            raise first.error


@atexit.register
def _print_unraised_errors() -> None:
    """Print errors of saves that nobody waited for. All threads have ended by now."""
    for pending in _pending:
        if pending.error is not None:
            print(f"an asynchronous save failed: {pending.error}", file=sys.stderr)


def borrow_group(group: Group) -> Group:
    """Return a gloo group of the same ranks that no save in flight uses. Collective.

    Its timeout is that of ``group``, but not shorter than torch's default.
    """
    if not dist.is_initialized():
        return None
    parent = dist.group.WORLD if group is None else group
    assert parent is not None
    known = _groups.setdefault(parent, [])

    def first_free() -> int:
        return next((i for i, other in enumerate(known) if other not in _borrowed), len(known))

    # Rank 0 decides: once its save has ended, all ranks have entered that save's last collective.
    index = call_on_rank_0("cannot save", first_free, group)
    if index == len(known):
        timeout = timeout_of(parent, device_for(parent, CPU)) or default_pg_timeout
        ranks = dist.get_process_group_ranks(parent)
        known.append(new_cpu_group(ranks, max(timeout, default_pg_timeout)))
    _borrowed.add(known[index])
    return known[index]
