"""Time saving and loading a checkpoint against writing and reading the same bytes, and an asynchronous save against a blocking one.

An asynchronous save costs training the time of its call, and then, while a thread writes, whatever of the machine that thread needs too:
on a CPU its cores and memory. ``hold-up`` counts both: how much longer steps took from the call until the checkpoint was on the disk.

All are measured in turn, repeatedly, in one run on one disk, so that a busy machine slows them alike; ratios are medians of rounds::

    python launch/bench_checkpoint.py --gb 1 --rounds 5
    torchrun --nproc-per-node 2 launch/bench_checkpoint.py --gb 1
    torchrun --nproc-per-node 2 launch/bench_checkpoint.py --gb 1 --replicated

``--replicated`` keeps the whole model on every rank, and also times the comparison of the replicas that each save makes.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from training.strategies import init_world

from sharded_bf16_adamw import AdamW_BF16, latest, load, save, wait_for_save
from sharded_bf16_adamw.checkpoint.divergence import find_divergences
from sharded_bf16_adamw.checkpoint.rank_names import RankNames
from sharded_bf16_adamw.checkpoint.state_dict import contents
from sharded_bf16_adamw.sharding.dtensor import to_local

BLOCK = 1 << 23  # bytes per plain read or write
BYTES_PER_PARAMETER = 8  # bf16 weight, two moments and correction
WIDTH = 2048
ROWS = 64  # of a training step's batch, on each rank


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--gb", type=float, default=1.0, help="size of the checkpoint, of all ranks together"
    )
    parser.add_argument(
        "--replicated",
        action="store_true",
        help="keep the whole model on every rank, as DDP does (default: FSDP2)",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder",
        default=None,
        help="on the disk to measure; default: the system's temporary folder",
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    world = init_world("auto")
    folder = Path(args.folder or tempfile.gettempdir()) / "bench_checkpoint"
    model, optimizer = build(
        args.gb / world.ranks,
        world.ranks,
        world.device,
        sharded=world.ranks > 1 and not args.replicated,
    )
    rounds = []
    try:
        for index in range(args.rounds + 1):
            figures = measure(folder, model, optimizer, plain_first=bool(index % 2))
            if index:  # the first warms up
                rounds.append(figures)
                if world.rank == 0:
                    print(
                        "  ".join(f"{name} {value:.3f}" for name, value in figures.items()),
                        flush=True,
                    )
    finally:
        if world.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
    if world.rank == 0:
        report(rounds, args.json)
    dist.destroy_process_group()


def build(
    gb: float, ranks: int, device: torch.device, sharded: bool
) -> tuple[nn.Module, AdamW_BF16]:
    """Build layers of 4M parameters each, ``gb * ranks`` of weights and states together."""
    torch.manual_seed(0)
    count = max(1, round(gb * ranks * 1e9 / BYTES_PER_PARAMETER / WIDTH**2))
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(count))).to(
        device, torch.bfloat16
    )
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
    folder: Path, model: nn.Module, optimizer: AdamW_BF16, plain_first: bool
) -> dict[str, float]:
    """Seconds of one round. What is written after something else can be several times slower, so both begin with an empty folder, and
    rounds take turns in which is first."""
    figures = {}
    root, plain = folder / "run", folder / f"plain-{dist.get_rank()}"
    size = sum(tensor.nbytes for param in model.parameters() for tensor in parts(param, optimizer))
    content = (os.urandom(BLOCK) * (size // BLOCK + 1))[:size]
    writes: dict[str, Callable[[], object]] = {
        "save": lambda: save(root, 1, model, optimizer),
        "plain write": functools.partial(write, plain, content),
    }
    if dist.get_world_size() > 1:
        names = RankNames(model, optimizer)
        found = contents(model, optimizer, names)
        fresh(folder)  # nothing of the round before is still on its way to the disk
        figures["comparing"] = timed(lambda: find_divergences(found, None, None, []))
    order = list(reversed(writes)) if plain_first else list(writes)
    for name in order:
        fresh(folder)
        figures[name] = timed(writes[name])
    writes[order[0]]()  # its files are gone
    dist.barrier()
    path = latest(root)
    assert path is not None
    forget([*path.iterdir(), plain])
    figures["plain read"] = timed(lambda: read(plain, size))
    forget([*path.iterdir(), plain])
    figures["load"] = timed(lambda: load(path, model, optimizer))
    fresh(folder)
    figures["async stall"] = timed(lambda: save(root, 1, model, optimizer, async_=True))
    figures["async rest"] = timed(wait_for_save)
    fresh(folder)
    steps = 0

    def train_meanwhile() -> None:
        nonlocal steps
        while not done_everywhere(latest(root) is not None):
            train(model, optimizer)
            steps += 1

    def train_alone() -> None:
        for _ in range(steps):
            done_everywhere(latest(root) is None)
            train(model, optimizer)

    figures["call"] = timed(lambda: save(root, 1, model, optimizer, async_=True))
    figures["steps meanwhile"] = timed(train_meanwhile)
    wait_for_save()
    figures["steps alone"] = timed(train_alone)
    return figures


def parts(param: torch.Tensor, optimizer: AdamW_BF16) -> list[torch.Tensor]:
    """What this rank holds of a parameter: weight, moments and correction."""
    return [to_local(tensor) for tensor in (param, *optimizer.state[param].values())]


def train(model: nn.Module, optimizer: AdamW_BF16) -> None:
    device = next(model.parameters()).device
    model(torch.ones(ROWS, WIDTH, dtype=torch.bfloat16, device=device)).sum().backward()
    optimizer.step(zero_grad=True)


def done_everywhere(done: bool) -> bool:
    """Whether all ranks say so: they must take the same number of steps."""
    count = torch.tensor(int(done))
    dist.all_reduce(count)
    return int(count) == dist.get_world_size()


def fresh(folder: Path) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        os.sync()
    dist.barrier()


def timed(function: Callable[[], object]) -> float:
    """Seconds until all ranks are done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter() - start


def write(path: Path, content: bytes) -> None:
    """As simply as can be, but to the disk."""
    view = memoryview(content)
    with open(path, "wb", buffering=0) as file:
        for start in range(0, len(view), BLOCK):
            file.write(view[start : start + BLOCK])
        os.fsync(file.fileno())


def read(path: Path, size: int) -> None:
    """Into new memory, as a program that uses the bytes must."""
    target = memoryview(bytearray(size))
    place = 0
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(target[place : place + BLOCK]):
            place += count


def forget(paths: list[Path]) -> None:
    """Drop the files from the memory of the operating system, so that reading reads the disk."""
    dist.barrier()
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    dist.barrier()


def report(rounds: list[dict[str, float]], file: str | None) -> None:
    ratios = {
        "throughput of save / plain write": [
            figures["plain write"] / figures["save"] for figures in rounds
        ],
        "throughput of load / plain read": [
            figures["plain read"] / figures["load"] for figures in rounds
        ],
        "comparison of replicas / save": [
            figures.get("comparing", 0.0) / figures["save"] for figures in rounds
        ],
        "stall of async save / save": [
            figures["async stall"] / figures["save"] for figures in rounds
        ],
        "hold-up of training by async save / save": [
            (figures["call"] + figures["steps meanwhile"] - figures["steps alone"])
            / figures["save"]
            for figures in rounds
        ],
        "speed of training while a save is written / alone": [
            figures["steps alone"] / figures["steps meanwhile"] for figures in rounds
        ],
    }
    for name, values in ratios.items():
        print(f"{name}: {statistics.median(values):.2f}  ({min(values):.2f} to {max(values):.2f})")
    if file:
        Path(file).write_text(json.dumps({"rounds": rounds, "ratios": ratios}, indent=1))


if __name__ == "__main__":
    main()
