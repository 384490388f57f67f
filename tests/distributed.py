"""Run functions on several gloo ranks, as torchrun would, and collect what each rank returns.

The worker processes are started once and kept: importing torch costs more than most tests. Each call makes a process group of its own.
"""

from __future__ import annotations

import atexit
import io
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

TIMEOUT = (
    100  # seconds that a collective may wait for a rank, and (plus a margin) a call for its ranks
)
_pool: list[tuple[Any, Connection]] = []


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``function(rank, world_size, *args)`` on ``world_size`` processes of one gloo group.

    ``function`` is importable (a module's top level) and what it returns can be saved with ``torch.save``. An exception on any rank is
    raised here as ``AssertionError`` with the tracebacks of all ranks that failed.

    Returns:
        What each rank returned, in the order of ranks.
    """
    while len(_pool) < world_size:
        _start_worker()
    with tempfile.TemporaryDirectory() as folder:
        for rank, (_, connection) in enumerate(_pool[:world_size]):
            connection.send((rank, world_size, f"{folder}/store", function, args))
        deadline = time.monotonic() + TIMEOUT + 20
        results: list[Any] = []
        failures = []
        for rank, (_, connection) in enumerate(_pool[:world_size]):
            try:
                if not connection.poll(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError(f"no answer after {TIMEOUT + 20} s")
                ok, payload = connection.recv()
            except (EOFError, OSError, TimeoutError) as error:
                ok, payload = False, f"the process died or hung: {error!r}"
            if ok:
                results.append(torch.load(io.BytesIO(payload), weights_only=False))
            else:
                failures.append(f"rank {rank}:\n{payload}")
    if failures:
        stop_workers()  # some rank may be in any state
        raise AssertionError("\n".join(failures))
    return results


def _start_worker() -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    _pool.append((process, ours))


@atexit.register
def stop_workers() -> None:
    """End all worker processes; the next call starts new ones."""
    for process, connection in _pool:
        connection.close()
        process.kill()
        process.join()
    _pool.clear()


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            rank, world_size, store, function, args = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, _run(rank, world_size, store, function, args)))
        except BaseException:
            connection.send((False, traceback.format_exc()))


def _run(
    rank: int, world_size: int, store: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> bytes:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT),
    )
    try:
        buffer = io.BytesIO()
        torch.save(function(rank, world_size, *args), buffer)
        dist.barrier()
        return buffer.getvalue()
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # it keeps meshes, and a later run's mesh would be taken for one whose groups are gone
