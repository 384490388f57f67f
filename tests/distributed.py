"""Run a function on several gloo ranks, as torchrun would, and collect the results.

The worker processes are started once and reused: importing torch takes longer than most tests. Each
call creates its own process group.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import io
import multiprocessing
import os
import runpy
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

# Seconds that a collective waits for a rank. A call waits 20 s longer for its ranks.
TIMEOUT = 100
# Processes that serve only one call are forked from a server that has imported what they need. The
# imports take longer than most tests.
forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(
    [
        "torch",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.debug",
        "torch._dynamo",
        "torch._dynamo.variables",
        "torch._inductor.utils",
        "numpy.ma",
        "pytest",
        "sharded_bf16_adamw.checkpoint",
    ]
)
_pool: list[tuple[Any, Connection]] = []


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``function(rank, world_size, *args)`` on ``world_size`` processes of one gloo group.

    ``function`` must be importable (a module's top level), and ``torch.save`` must be able to save
    its result.

    Returns:
        Each rank's result, in the order of ranks.

    Raises:
        AssertionError: a rank raised; the message has the tracebacks of all ranks that failed.
    """
    while len(_pool) < world_size:
        _start_worker()
    with tempfile.TemporaryDirectory() as directory:
        for rank, (_, connection) in enumerate(_pool[:world_size]):
            connection.send((rank, world_size, f"{directory}/store", function, args))
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
                failures.append(f"rank {rank}:\n{payload}\n{_stack(Path(directory), rank)}")
    if failures:
        stop_workers()  # their state is unknown
        raise AssertionError("\n".join(failures))
    return results


def _stack(directory: Path, rank: int) -> str:
    """Return the stacks of a hung rank's threads just before the timeout, or an empty string."""
    path = directory / f"stack{rank}"
    return path.read_text() if path.exists() else ""


def run_ranks_that_die(world_size: int, function: Callable[..., Any], *args: Any) -> list[int]:
    """Call ``function(rank, world_size, *args)`` in processes of one gloo group, which may die.

    Returns:
        Each process's exit code, in the order of ranks; 0 if the function returned.
    """
    with tempfile.TemporaryDirectory() as directory:
        common = (world_size, f"{directory}/store", function, args)
        return _fork(_run, [(rank, *common) for rank in range(world_size)])


def run_script(path: Path, world_size: int | None) -> tuple[list[int], str]:
    """Run a script in its folder, in a new process or on ``world_size`` ranks as under torchrun.

    It may import what is in its folder or in the repository. Its process has already imported
    torch.

    Returns:
        Each process's exit code, and the output of all.
    """
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "output"
        port = get_free_port()
        ranks = [(path, output, rank, world_size, port) for rank in range(world_size or 1)]
        return _fork(_run_script, ranks), output.read_text()


def _fork(function: Callable[..., Any], args_by_rank: list[tuple[Any, ...]]) -> list[int]:
    processes = [forkserver.Process(target=function, args=args) for args in args_by_rank]
    for process in processes:
        process.start()
    deadline = time.monotonic() + TIMEOUT + 20
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    assert not hung, f"the processes {hung} did not end within {TIMEOUT + 20} s"
    return [process.exitcode for process in processes]


def _run_script(path: Path, output: Path, rank: int, world_size: int | None, port: int) -> None:
    with output.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(path.parent)
    torch.set_num_threads(1)
    if world_size is not None:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="localhost",
            MASTER_PORT=str(port),
        )
    sys.argv = [str(path)]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")
    atexit._run_exitfuncs()  # multiprocessing ends a process without them


def _start_worker() -> None:
    # not forked: as under torchrun, each rank has its own hash seed, so its own order of sets
    context = multiprocessing.get_context("spawn")
    parent, child = context.Pipe()
    process = context.Process(target=_serve, args=(child,), daemon=True)
    process.start()
    child.close()
    _pool.append((process, parent))


@atexit.register
def stop_workers() -> None:
    """End all worker processes; the next call starts new ones."""
    for process, connection in _pool:
        connection.close()
        process.kill()
        process.join()
    _pool.clear()


def _serve(connection: Connection) -> None:
    while True:
        try:
            rank, world_size, store, function, args = connection.recv()
        except EOFError:
            return
        # ZeRO and FSDP1 search all objects for modules; hide the 300,000 of torch from that search.
        gc.collect()
        gc.freeze()
        with Path(store).with_name(f"stack{rank}").open("w") as stack:
            faulthandler.dump_traceback_later(TIMEOUT - 5, file=stack)
            try:
                answer: Any = (True, _run(rank, world_size, store, function, args))
            except BaseException:
                answer = (False, traceback.format_exc())
            faulthandler.cancel_dump_traceback_later()
        connection.send(answer)


def _run(
    rank: int, world_size: int, store: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> bytes:
    torch.set_num_threads(1)
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
        # The cache keeps meshes: a later run's mesh would match one whose groups are destroyed.
        _clear_sharding_prop_cache()
