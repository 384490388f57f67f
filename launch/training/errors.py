"""Errors that a command of ``launch/`` prints as one sentence, and its exit codes."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from training.rendezvous import local_rank, rank

FAILED = 1
WRONG_USAGE = 2
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command continues the run
REPORT_S = 10.0  # how long a rank waits for the first rank of its machine to print an error
POLL_S = 0.02


class UsageError(ValueError):
    """An error that the user can correct: printed as one sentence, without a stack trace."""


class RunError(Exception):
    """An error that ends a run on all ranks together: printed as one sentence."""


class DivergedError(RunError):
    """Training cannot continue: non-finite steps or weights, or replicas that differ."""


def exit_code(command: Callable[[], int], is_stopped: Callable[[], bool] = lambda: False) -> int:
    """Run a command and return its exit code; print its error once, not on every rank.

    Args:
        command: returns its exit code.
        is_stopped: returns True once this process has handled a stop signal.

    Raises:
        SystemExit: the device is out of memory, perhaps on this rank alone.
    """
    try:
        return command()
    except (UsageError, RunError) as error:
        if _is_reporter(is_stopped):
            print(f"error: {error}", file=sys.stderr)
        return WRONG_USAGE if isinstance(error, UsageError) else FAILED
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        # On every rank that fails, since the first rank may have enough memory.
        print(f"error: rank {rank()}: {out_of_memory_reason(error)}", file=sys.stderr)
        # A caller that destroys the process group would wait for the other ranks, which wait for
        # this one in a collective.
        raise SystemExit(FAILED) from None


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return True if torch could not allocate memory, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def out_of_memory_reason(error: RuntimeError) -> str:
    """Return the error in one sentence, with the size that torch asked for."""
    size = re.search(r"ried to allocate ([\d.]+ \w+)", str(error))
    what = "memory" if size is None else f"memory for {size[1]} more"
    return (
        f"the device has no {what}: use more ranks, or a smaller model or batch; python "
        "launch/plan.py tells what a rank of train.py needs."
    )


def _is_reporter(is_stopped: Callable[[], bool]) -> bool:
    """Return True if this rank prints an error: once the ranks have joined, only rank 0.

    Before, the first rank of each machine prints, since machines may fail differently. Its other
    ranks wait, because torchrun ends all ranks once one has ended. A rank that is alive after
    ``REPORT_S`` prints too, since the first rank had no error.
    """
    if rank() == 0 or dist.is_initialized():
        return rank() == 0
    end = time.monotonic() + REPORT_S
    while local_rank() != 0 and time.monotonic() < end:
        if is_stopped():
            return False
        time.sleep(POLL_S)
    return True
