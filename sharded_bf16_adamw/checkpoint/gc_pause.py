"""A pause of Python's cyclic garbage collector while many objects are built."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()  # guards _pauses and _was_enabled
_pauses = 0  # pauses in progress, over all threads
_was_enabled = False  # before the first of these pauses


@contextmanager
def gc_paused() -> Iterator[None]:
    """Pause the cyclic garbage collector in the body.

    The collector traverses all live objects again and again while their number grows. For the plan
    of 1,024 ranks that takes several times as long as all other work. The body must not wait long
    for other ranks: training in another thread also runs without the collector meanwhile.

    Examples:
        >>> import gc
        >>> with gc_paused():
        ...     gc.isenabled()
        False
        >>> gc.isenabled()
        True
    """
    global _pauses, _was_enabled
    with _lock:
        if _pauses == 0:
            _was_enabled = gc.isenabled()
            gc.disable()
        _pauses += 1
    try:
        yield
    finally:
        with _lock:
            _pauses -= 1
            if _pauses == 0 and _was_enabled:
                gc.enable()
