"""Let the threads of gloo finish before the interpreter ends.

A gloo process group runs its collectives in threads. A collective's tensors are released there after ``wait()`` has
returned, which takes the GIL. A thread that asks for the GIL while the interpreter finalizes ends the process with
SIGABRT, so that a job that has done all its work looks failed
(https://github.com/pytorch/pytorch/issues/190489). ``dist.destroy_process_group()`` joins these threads only if nothing
else refers to the group, but DDP, FSDP and device meshes do.

Nothing has to be called: importing the package registers :func:`wait_for_gloo_threads` to run at exit.
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
GRACE = 0.2  # seconds, where the system does not show what threads do


def wait_for_gloo_threads() -> None:
    """Return once every gloo thread of this process has been asleep for some samples in a row, or after ``MAX_WAIT``."""
    if not TASKS.is_dir():
        time.sleep(GRACE)
        return
    deadline = time.monotonic() + MAX_WAIT
    idle = 0
    while idle < IDLE_SAMPLES and time.monotonic() < deadline:
        states = [
            state
            for name, state in map(_name_and_state, TASKS.glob("*/stat"))
            if THREAD_NAME in name
        ]
        if not states:
            return
        idle = idle + 1 if all(state == "S" for state in states) else 0
        time.sleep(INTERVAL)


def _name_and_state(stat: Path) -> tuple[str, str]:
    """``"123 (name) S 1 ..."`` -> ``("name", "S")``; empty strings for a thread that has ended meanwhile."""
    try:
        text = stat.read_text()
    except OSError:
        return "", ""
    name, _, rest = text.partition("(")[2].rpartition(")")
    return name, rest.split()[0]


atexit.register(wait_for_gloo_threads)
