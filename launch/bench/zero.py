"""ZeRO stage 2 against DDP with torch's ZeroRedundancyOptimizer(AdamW), interleaved: ``torchrun --nproc-per-node 2 launch/bench_zero.py``.

Both train the same bf16 layers. A step is forward, backward and optimizer, so that whatever overlaps may do so. Bytes are those that a
rank sends at least (a ring): ``(n - 1) / n`` of the tensor for a reduce-scatter, all-gather, all-to-all or broadcast, twice that for
an all-reduce.
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
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from training.strategies import init_world

from sharded_bf16_adamw import AdamW_BF16, ZeRO

SENT = {
    "all_to_all_single": (1, 1),
    "reduce_scatter_single": (1, 1),
    "reduce_scatter_tensor": (1, 1),
    "broadcast": (1, 0),
}
SENT |= {
    "all_gather_single": (1, 0),
    "all_gather_into_tensor": (1, 0),
    "all_reduce": (2, 0),
}  # times (n - 1) / n, of which argument


class Counter:
    """Bytes sent by this rank through torch.distributed's Python functions."""

    def __init__(self) -> None:
        self.sent = 0.0
        self._originals = {name: getattr(dist, name) for name in SENT if hasattr(dist, name)}
        for name, function in self._originals.items():
            setattr(dist, name, self._counted(name, function))

    def stop(self) -> None:
        for name, function in self._originals.items():
            setattr(dist, name, function)

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        times, position = SENT[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            tensor, ranks = (
                args[position] if len(args) > position else kwargs["tensor"],
                dist.get_world_size(kwargs.get("group")),
            )
            self.sent += times * (ranks - 1) / ranks * tensor.nbytes
            return function(*args, **kwargs)

        return call


def layers(count: int, width: int, device: torch.device) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(count)]).to(
        device, torch.bfloat16
    )


def make_ddp(
    args: argparse.Namespace, device: torch.device, visible: bool = False
) -> Callable[[Tensor], None]:
    """``visible``: with the all-reduces called from Python, where they can be counted, and not from DDP's C++."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    module = DistributedDataParallel(
        layers(args.layers, args.width, device), gradient_as_bucket_view=True
    )

    if visible:
        module.register_comm_hook(dist.group.WORLD, allreduce_hook)
    optimizer = ZeroRedundancyOptimizer(
        module.parameters(), torch.optim.AdamW, parameters_as_bucket_view=True, lr=1e-3
    )
    return lambda x: train_step(module, optimizer, x)


def make_zero(args: argparse.Namespace, device: torch.device) -> Callable[[Tensor], None]:
    from torch.distributed.device_mesh import init_device_mesh

    module = layers(args.layers, args.width, device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    optimizer = AdamW_BF16(
        module.parameters(), lr=1e-3, sharding=ZeRO(mesh, bucket_size_mb=args.bucket_size_mb)
    )
    return lambda x: train_step(module, optimizer, x)


def train_step(module: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    module(x).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    world = init_world(args.device)
    torch.set_num_threads(args.threads)
    contenders = {
        "zero2": make_zero(args, world.device),
        "ddp_zero_redundancy": make_ddp(args, world.device),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    x = torch.randn(args.batch_size, args.width, device=world.device).bfloat16()
    for turn in range(args.warmup + args.repeats):
        order = list(contenders.items())
        for name, step in order[:: 1 if turn % 2 else -1]:
            dist.barrier()
            start = time.perf_counter()
            step(x)
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            dist.barrier()
            if turn >= args.warmup:
                seconds[name].append(time.perf_counter() - start)
    contenders["ddp_zero_redundancy"] = make_ddp(args, world.device, visible=True)
    sent = {name: count_bytes(step, x) for name, step in contenders.items()}
    ratios = [a / b for a, b in zip(seconds["zero2"], seconds["ddp_zero_redundancy"], strict=True)]
    return {
        "ranks": world.ranks,
        "parameters": args.layers * args.width**2,
        "median_ms": {name: 1e3 * statistics.median(values) for name, values in seconds.items()},
        "time_ratio": statistics.median(ratios),
        "sent_bytes": sent,
        "sent_ratio": sent["zero2"] / sent["ddp_zero_redundancy"],
        "rank": world.rank,
    }


def count_bytes(step: Callable[[Tensor], None], x: Tensor) -> float:
    """What this rank sends in the third step: in the first ones DDP and ZeRO find the order of gradients."""
    step(x)
    step(x)
    counter = Counter()
    step(x)
    counter.stop()
    return counter.sent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=16, help="rows on each rank")
    parser.add_argument("--bucket-size-mb", type=float, default=25.0)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of each rank, on a CPU")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    result = measure(args)
    if result.pop("rank") == 0:
        print(json.dumps(result, indent=1))
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
