"""Compare ZeRO stage 2 with DDP and torch's ZeroRedundancyOptimizer(AdamW), interleaved.

    torchrun --nproc-per-node 2 launch/benchmark.py zero

Both train the same bf16 layers. A step is forward, backward and optimizer, so that communication
may overlap. Bytes are the minimum that a rank sends (in a ring): ``(n - 1) / n`` of the tensor for
a reduce-scatter, all-gather, all-to-all or broadcast, and twice that for an all-reduce.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from training.strategies import init_world

from bench.measure import synchronize
from sharded_bf16_adamw import AdamW_BF16, ZeRO

# How often (n - 1) / n of a tensor is sent, and the position of that argument.
COLLECTIVES = {
    "all_to_all_single": (1, 1),
    "reduce_scatter_single": (1, 1),
    "reduce_scatter_tensor": (1, 1),
    "broadcast": (1, 0),
    "all_gather_single": (1, 0),
    "all_gather_into_tensor": (1, 0),
    "all_reduce": (2, 0),
}


class SentBytes:
    """Counter of the bytes that this rank sends through torch.distributed's Python functions."""

    def __init__(self) -> None:
        self.total = 0.0
        names = [name for name in COLLECTIVES if hasattr(dist, name)]
        self._originals = {name: getattr(dist, name) for name in names}
        for name, function in self._originals.items():
            setattr(dist, name, self._counted(name, function))

    def stop(self) -> None:
        for name, function in self._originals.items():
            setattr(dist, name, function)

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        times, position = COLLECTIVES[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            tensor = args[position] if len(args) > position else kwargs["tensor"]
            ranks = dist.get_world_size(kwargs.get("group"))
            self.total += times * (ranks - 1) / ranks * tensor.nbytes
            return function(*args, **kwargs)

        return call


def layers(args: argparse.Namespace, device: torch.device) -> nn.Sequential:
    torch.manual_seed(0)
    linear = [nn.Linear(args.width, args.width, bias=False) for _ in range(args.layers)]
    return nn.Sequential(*linear).to(device, torch.bfloat16)


def make_ddp(
    args: argparse.Namespace, device: torch.device, countable: bool = False
) -> Callable[[Tensor], None]:
    """Return a step of DDP; ``countable`` calls the all-reduces from Python, not from DDP's C++."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    module = DistributedDataParallel(layers(args, device), gradient_as_bucket_view=True)
    if countable:
        module.register_comm_hook(dist.group.WORLD, allreduce_hook)
    optimizer = ZeroRedundancyOptimizer(
        module.parameters(), torch.optim.AdamW, parameters_as_bucket_view=True, lr=1e-3
    )
    return lambda x: train_step(module, optimizer, x)


def make_zero(args: argparse.Namespace, device: torch.device) -> Callable[[Tensor], None]:
    module = layers(args, device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    sharding = ZeRO(mesh, bucket_size_mb=args.bucket_size_mb)
    optimizer = AdamW_BF16(module.parameters(), lr=1e-3, sharding=sharding)
    return lambda x: train_step(module, optimizer, x)


def train_step(module: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    module(x).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    world = init_world(args.device)
    torch.set_num_threads(args.threads)
    ours, ddp = "zero2", "ddp_zero_redundancy"
    contenders = {ours: make_zero(args, world.device), ddp: make_ddp(args, world.device)}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    x = torch.randn(args.batch_size, args.width, device=world.device).bfloat16()
    for turn in range(args.warmup + args.repeats):
        order = list(contenders.items())
        for name, step in order[:: 1 if turn % 2 else -1]:
            dist.barrier()
            start = time.perf_counter()
            step(x)
            synchronize(world.device)
            dist.barrier()
            if turn >= args.warmup:
                seconds[name].append(time.perf_counter() - start)
    contenders[ddp] = make_ddp(args, world.device, countable=True)
    sent = {name: count_bytes(step, x) for name, step in contenders.items()}
    ratios = [a / b for a, b in zip(seconds[ours], seconds[ddp], strict=True)]
    return {
        "ranks": world.size,
        "parameters": args.layers * args.width**2,
        "median_ms": {name: 1e3 * statistics.median(values) for name, values in seconds.items()},
        "time_ratio": statistics.median(ratios),
        "sent_bytes": sent,
        "sent_ratio": sent[ours] / sent[ddp],
    }


def count_bytes(step: Callable[[Tensor], None], x: Tensor) -> float:
    """Return the bytes sent in the third step: the first two find the order of gradients."""
    step(x)
    step(x)
    sent = SentBytes()
    step(x)
    sent.stop()
    return sent.total


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmark.py zero",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=16, help="rows on each rank")
    parser.add_argument("--bucket-size-mb", type=float, default=25.0)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of each rank, on a CPU")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)
    result = measure(args)
    if dist.get_rank() == 0:
        print(json.dumps(result, indent=1))
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")
    dist.destroy_process_group()
    return 0
