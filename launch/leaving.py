"""How ``train.py`` and the benchmarks of several ranks end."""

from __future__ import annotations

import time

import torch.distributed as dist

GRACE = 0.2  # seconds; the threads need a moment of the GIL only


def leave() -> None:
    """Destroy the process groups, and let the threads of gloo drop what they hold before the interpreter ends.

    They drop the tensors of the last collectives on their own time and need the GIL for it. One that waits for it while the interpreter
    ends aborts the process, and a job that has done all its work looks failed (https://github.com/pytorch/pytorch/issues/190489).
    """
    dist.destroy_process_group()
    time.sleep(GRACE)
