"""Join the processes of a job, also when torchrun has restarted them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
import uuid

import torch.distributed as dist

POLL_S = 0.02
_PR_SET_PDEATHSIG = 1


def rank() -> int:
    """Return the rank that torchrun gave this process, 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """Return the rank among the processes of this machine, 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", 0))


def join_process_group(backend: str) -> None:
    """Initialize the default process group: torchrun's processes, or this process alone."""
    if "RANK" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    store, own, size = next(dist.rendezvous("env://"))
    store = store_of_attempt(store, own, size)
    dist.init_process_group(backend, store=store, rank=own, world_size=size)


def store_of_attempt(store: dist.Store, own: int, size: int) -> dist.Store:
    """Return a view of ``store`` that only the processes of this attempt use. Collective.

    torchrun keeps its store when it restarts the workers. So the store still holds the addresses of
    dead workers, and ``init_process_group`` would wait for them. ``TORCHELASTIC_RESTART_COUNT``
    does not identify an attempt: the agent of each node counts only its own restarts. So rank 0
    draws a random name and sends it to each rank that asks. Each request has a token of its own, so
    that no rank takes an answer from an earlier attempt.
    """
    if own != 0:
        token = uuid.uuid4().hex
        store.set(f"ask/{own}", token)
        name = store.get(f"answer/{token}").decode()
        store.set(f"{name}/joined/{own}", "")
        return dist.PrefixStore(name, store)
    name = uuid.uuid4().hex
    missing = set(range(1, size))
    deadline = time.monotonic() + store.timeout.total_seconds()  # type: ignore[attr-defined]
    while missing:
        for other in missing:
            if store.check([f"ask/{other}"]):  # may be the request of a dead process
                store.set(f"answer/{store.get(f'ask/{other}').decode()}", name)
        missing = {other for other in missing if not store.check([f"{name}/joined/{other}"])}
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"ranks {sorted(missing)} did not join within {store.timeout}: look for the first "  # type: ignore[attr-defined]
                "error in their logs"
            )
        time.sleep(POLL_S)
    return dist.PrefixStore(name, store)


def die_with_torchrun() -> None:
    """Make the kernel kill this worker when its torchrun dies.

    An orphan would hold its GPU and the lock on ``--out``.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # torchrun died before the call
        os.kill(os.getpid(), signal.SIGKILL)
