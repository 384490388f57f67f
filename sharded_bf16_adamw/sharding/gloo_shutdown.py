"""A wait for gloo's threads before the interpreter exits.

A gloo process group runs its collectives in threads. Such a thread takes the GIL to release a
collective's tensors, which may happen after ``wait()`` has returned. If it asks for the GIL while
the interpreter finalizes, the process ends with SIGABRT, and a finished job seems to have failed
(https://github.com/pytorch/pytorch/issues/190489). ``dist.destroy_process_group()`` joins the
threads only if nothing else refers to the group, but DDP, FSDP and device meshes do.

Importing the package registers :func:`wait_for_gloo_threads` to run at exit.
"""

from __future__ import annotations

import atexit
import time
from pathlib import Path

THREAD_NAME = "gloo"  # substring of "pt_gloo_runloop" and "gloo_tcp_loop"
TASKS = Path("/proc/self/task")
INTERVAL = 0.001  # seconds between samples; time.sleep() gives the GIL to waiting threads
IDLE_SAMPLES = 5
MAX_WAIT = 5.0  # seconds; a collective with a dead peer never ends
GRACE = 0.2  # seconds to wait on systems without /proc


def wait_for_gloo_threads() -> None:
    """Wait until all gloo threads sleep in ``IDLE_SAMPLES`` samples in a row, or ``MAX_WAIT``."""
    if not TASKS.is_dir():
        time.sleep(GRACE)
        return
    deadline = time.monotonic() + MAX_WAIT
    idle = 0
    while idle < IDLE_SAMPLES and time.monotonic() < deadline:
        threads = map(_name_and_state, TASKS.glob("*/stat"))
        states = [state for name, state in threads if THREAD_NAME in name]
        if not states:
            return
        idle = idle + 1 if all(state == "S" for state in states) else 0
        time.sleep(INTERVAL)


def _name_and_state(stat: Path) -> tuple[str, str]:
    """Parse ``"123 (name) S 1 ..."``. Return empty strings if the thread has ended."""
    try:
        text = stat.read_text()
    except OSError:
        return "", ""
    name, _, rest = text.partition("(")[2].rpartition(")")
    return name, rest.split()[0]


atexit.register(wait_for_gloo_threads)
