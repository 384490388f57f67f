"""Time saving and loading a checkpoint against plain writing and reading of the same bytes.

    python launch/benchmark.py checkpoint --gb 1 --rounds 5
    torchrun --nproc-per-node 2 launch/benchmark.py checkpoint --gb 1
    torchrun --nproc-per-node 2 launch/benchmark.py checkpoint --gb 1 --replicated

An asynchronous save slows training by its call, and then by its writing thread, which takes CPU
cores and memory bandwidth. ``hold-up`` is the sum: the time from the call until the checkpoint is
on the disk, minus the time that the same steps take alone.

Saves, loads and plain reads and writes take turns in one run on one disk, so that a busy machine
slows all of them alike. Ratios are medians over rounds. On several ranks the comparison of
replicas, a part of each save, is timed too. ``--replicated`` keeps the full model on every rank.
"""

from __future__ import annotations

import functools
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from training.command_line import Parser, output_folder, positive, positive_float, write_json
from training.world import init_world

from sharded_bf16_adamw import AdamW_BF16, latest, load, save, wait_for_save
from sharded_bf16_adamw.checkpoint.divergence import find_divergences
from sharded_bf16_adamw.checkpoint.rank_names import RankNames
from sharded_bf16_adamw.checkpoint.state_dict import get_state

BLOCK = 1 << 23  # bytes per plain read or write
BYTES_PER_PARAMETER = 8  # bf16 weight, two moments and correction
WIDTH = 2048
BATCH_SIZE = 64  # on each rank


def main(argv: list[str]) -> int:
    parser = Parser("benchmark.py checkpoint", __doc__)
    parser.add_argument(
        "--gb",
        type=positive_float,
        default=1.0,
        help="size of the checkpoint in GB, over all ranks (default: %(default)s)",
    )
    parser.add_argument(
        "--replicated",
        action="store_true",
        help="keep the full model on every rank, as DDP does (default: FSDP2)",
    )
    parser.add_argument(
        "--rounds", type=positive, default=5, help="repetitions of each measurement (default: 5)"
    )
    parser.add_argument(
        "--folder",
        type=output_folder,
        help="write the checkpoints here, on the disk to measure (default: the system's temporary "
        "directory)",
    )
    parser.add_json()
    args = parser.parse_args(argv)
    world = init_world("auto")
    root = Path(args.folder or tempfile.gettempdir()) / "bench_checkpoint"
    sharded = world.size > 1 and not args.replicated
    model, optimizer = build(args.gb, world.device, sharded)
    rounds = []
    try:
        for index in range(args.rounds + 1):
            figures = measure(root, model, optimizer, sharded, plain_first=bool(index % 2))
            if index == 0:  # warm-up
                continue
            rounds.append(figures)
            if world.rank == 0:
                print("  ".join(f"{k} {value:.3f}" for k, value in figures.items()), flush=True)
    finally:
        if world.rank == 0:
            shutil.rmtree(root, ignore_errors=True)
    if world.rank == 0:
        report(rounds, args.json)
    dist.destroy_process_group()
    return 0


def build(gb: float, device: torch.device, sharded: bool) -> tuple[nn.Module, AdamW_BF16]:
    """Build layers of 4M parameters each: ``gb`` GB of weights and states in all."""
    torch.manual_seed(0)
    count = max(1, round(gb * 1e9 / BYTES_PER_PARAMETER / WIDTH**2))
    linear = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(count)]
    model = nn.Sequential(*linear).to(device, torch.bfloat16)
    if sharded:
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
    optimizer = AdamW_BF16(model.parameters(), lr=1e-3)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step(zero_grad=True)
    return model, optimizer


def measure(
    directory: Path, model: nn.Module, optimizer: AdamW_BF16, sharded: bool, plain_first: bool
) -> dict[str, float]:
    """Return the seconds of one round.

    A write that follows other I/O can be several times slower. So save and plain write both start
    with an empty directory, and take turns in being first.
    """
    figures = {}
    root = directory / "run"
    plain, held, size = plain_files(directory, model, optimizer, sharded)
    content = (os.urandom(BLOCK) * (size // BLOCK + 1))[:size]
    writes: dict[str, Callable[[], object]] = {
        "save": lambda: save(root, 1, model, optimizer),
        "plain write": functools.partial(write, plain, content),
    }
    if dist.get_world_size() > 1:
        names = RankNames(model, optimizer)
        state = get_state(model, optimizer, names)
        make_empty(directory)  # wait for writes of the previous round
        figures["comparing"] = timed(lambda: find_divergences(state, None, None, []))
    order = list(reversed(writes)) if plain_first else list(writes)
    for name in order:
        make_empty(directory)
        figures[name] = timed(writes[name])
    writes[order[0]]()  # again, since make_empty has removed its files
    dist.barrier()
    path = latest(root)
    assert path is not None
    drop_from_cache([*path.iterdir(), *held])
    figures["plain read"] = timed(lambda: read(held, size))
    drop_from_cache([*path.iterdir(), *held])
    figures["load"] = timed(lambda: load(path, model, optimizer))
    make_empty(directory)
    figures["async stall"] = timed(lambda: save(root, 1, model, optimizer, async_=True))
    figures["async rest"] = timed(wait_for_save)
    make_empty(directory)
    steps = 0

    def train_during_save() -> None:
        nonlocal steps
        waiting = threading.Thread(target=wait_for_save)  # ends, without its error, if it fails
        waiting.start()
        while not true_on_all_ranks(not waiting.is_alive()):
            train_step(model, optimizer)
            steps += 1

    def train_alone() -> None:
        for _ in range(steps):
            true_on_all_ranks(True)
            train_step(model, optimizer)

    figures["call"] = timed(lambda: save(root, 1, model, optimizer, async_=True))
    figures["steps meanwhile"] = timed(train_during_save)
    wait_for_save()
    figures["steps alone"] = timed(train_alone)
    return figures


def plain_files(
    directory: Path, model: nn.Module, optimizer: AdamW_BF16, sharded: bool
) -> tuple[Path, list[Path], int]:
    """Return the file that this rank writes, the files with what it loads, and the size of each.

    Ranks share the writing of replicas, but each loads all of them.
    """
    nbytes = sum(  # of a DTensor, over all ranks
        tensor.nbytes
        for param in model.parameters()
        for tensor in (param, *optimizer.state[param].values())
    )
    files = [directory / f"plain-{rank}" for rank in range(dist.get_world_size())]
    own = files[dist.get_rank()]
    return own, [own] if sharded else files, nbytes // len(files)


def train_step(model: nn.Module, optimizer: AdamW_BF16) -> None:
    device = next(model.parameters()).device
    model(torch.ones(BATCH_SIZE, WIDTH, dtype=torch.bfloat16, device=device)).sum().backward()
    optimizer.step(zero_grad=True)


def true_on_all_ranks(condition: bool) -> bool:
    """Return True if the condition holds on all ranks, which then take equally many steps."""
    count = torch.tensor(int(condition))
    dist.all_reduce(count)
    return int(count) == dist.get_world_size()


def make_empty(directory: Path) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        os.sync()
    dist.barrier()


def timed(function: Callable[[], object]) -> float:
    """Return the seconds until all ranks are done."""
    barrier()
    start = time.perf_counter()
    function()
    barrier()
    return time.perf_counter() - start


def barrier() -> None:
    """Wait until the devices of all ranks have done their work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()


def write(path: Path, content: bytes) -> None:
    """Write a file with plain writes and an fsync."""
    view = memoryview(content)
    with open(path, "wb", buffering=0) as file:
        for start in range(0, len(view), BLOCK):
            file.write(view[start : start + BLOCK])
        os.fsync(file.fileno())


def read(paths: list[Path], size: int) -> None:
    """Read files of ``size`` bytes into new memory, as a program that uses the bytes must."""
    for path in paths:
        target = memoryview(bytearray(size))
        offset = 0
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(target[offset : offset + BLOCK]):
                offset += count


def drop_from_cache(paths: list[Path]) -> None:
    """Drop the files from the page cache, so that reading them reads the disk."""
    dist.barrier()
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    dist.barrier()


def report(rounds: list[dict[str, float]], file: Path | None) -> None:
    functions: dict[str, Callable[[dict[str, float]], float]] = {
        "throughput of save / plain write": lambda x: x["plain write"] / x["save"],
        "throughput of load / plain read": lambda x: x["plain read"] / x["load"],
        "comparison of replicas / save": lambda x: x.get("comparing", 0.0) / x["save"],
        "stall of async save / save": lambda x: x["async stall"] / x["save"],
        "hold-up of training by async save / save": lambda x: (
            (x["call"] + x["steps meanwhile"] - x["steps alone"]) / x["save"]
        ),
        "speed of training while a save is written / alone": lambda x: (
            x["steps alone"] / x["steps meanwhile"]
        ),
    }
    ratios = {name: [function(x) for x in rounds] for name, function in functions.items()}
    for name, values in ratios.items():
        print(f"{name}: {statistics.median(values):.2f}  ({min(values):.2f} to {max(values):.2f})")
    write_json(file, {"rounds": rounds, "ratios": ratios})
