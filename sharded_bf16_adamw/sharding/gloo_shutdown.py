"""A wait for gloo's threads before the interpreter exits.

A gloo process group runs its collectives in threads. A collective's tensors are released in such a
thread after ``wait()`` has returned, which takes the GIL. A thread that asks for the GIL while the
interpreter finalizes ends the process with SIGABRT, so that a job that has done all its work seems
to have failed (https://github.com/pytorch/pytorch/issues/190489). ``dist.destroy_process_group()``
joins these threads only if nothing else refers to the group, but DDP, FSDP and device meshes do.

Importing the package registers :func:`wait_for_gloo_threads` to run at exit.
"""

from __future__ import annotations

import atexit
import time
from pathlib import Path

THREAD_NAME = "gloo"  # part of it: "pt_gloo_runloop", "gloo_tcp_loop"
TASKS = Path("/proc/self/task")
INTERVAL = 0.001  # seconds; a thread that wants the GIL gets it while this one sleeps
IDLE_SAMPLES = 5
MAX_WAIT = 5.0  # seconds; a collective that a dead peer leaves unfinished never ends
GRACE = 0.2  # seconds to wait on systems that do not show the state of threads


def wait_for_gloo_threads() -> None:
    """Wait until every gloo thread has slept for ``IDLE_SAMPLES`` in a row, or ``MAX_WAIT``."""
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
    """Parse ``"123 (name) S 1 ..."``; return empty strings for a thread that has ended."""
    try:
        text = stat.read_text()
    except OSError:
        return "", ""
    name, _, rest = text.partition("(")[2].rpartition(")")
    return name, rest.split()[0]


atexit.register(wait_for_gloo_threads)
