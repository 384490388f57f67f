"""Compare ZeRO stage 2 with DDP and torch's ZeroRedundancyOptimizer(AdamW), interleaved.

    torchrun --nproc-per-node 2 launch/benchmark.py zero

Both contenders train the same bf16 layers. A step is forward, backward and optimizer, so that
communication may overlap. Bytes sent are those of ring algorithms, the minimum: ``(n - 1) / n`` of
the tensor for a reduce-scatter, all-gather, all-to-all or broadcast, twice that for an all-reduce.

``delayed`` shows the gain of ``overlap_gather`` on slow networks: collectives run one after
another, each with a delay. ``compute_ms`` is a step without delays, and ``network_ms`` the sum of
the delays. ``ratio`` is the time of a step over its lower bound, the larger of these two.
``uncovered_ms`` is the network time that is not hidden behind compute.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from planning.live import LiveBytes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from training.command_line import Parser, nonnegative, positive, positive_float, write_json
from training.world import init_world, synchronize

from bench.slow_network import SlowNetwork
from sharded_bf16_adamw import AdamW_BF16, ZeRO

STEPS_IN_A_ROW = 3  # timed together, since the gather of a step ends in the next one


def build_layers(args: argparse.Namespace, device: torch.device) -> nn.Sequential:
    torch.manual_seed(0)
    linear = [nn.Linear(args.width, args.width, bias=False) for _ in range(args.layers)]
    return nn.Sequential(*linear).to(device, torch.bfloat16)


def make_ddp(args: argparse.Namespace, device: torch.device) -> Callable[[Tensor], None]:
    module = DistributedDataParallel(build_layers(args, device), gradient_as_bucket_view=True)
    optimizer = ZeroRedundancyOptimizer(
        module.parameters(), torch.optim.AdamW, parameters_as_bucket_view=True, lr=1e-3
    )
    return lambda x: train_step(module, optimizer, x)


def make_zero(
    args: argparse.Namespace, device: torch.device, overlap: bool | None = None
) -> Callable[[Tensor], None]:
    """Return a step with ZeRO-2; if ``overlap`` is given, with one bucket per layer."""
    module = build_layers(args, device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    sharding = ZeRO(mesh, bucket_size_mb=args.bucket_size_mb)
    if overlap is not None:
        sharding = ZeRO(
            mesh,
            bucket_size_mb=2 * args.width**2 / 2**20,
            static_graph=True,
            overlap_gather=overlap,
            model=module if overlap else None,
        )
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
    sent = {name: sent_bytes(step, x) for name, step in contenders.items()}
    ratios = [a / b for a, b in zip(seconds[ours], seconds[ddp], strict=True)]
    return {
        "ranks": world.size,
        "parameters": args.layers * args.width**2,
        "median_ms": {name: 1e3 * statistics.median(values) for name, values in seconds.items()},
        "time_ratio": statistics.median(ratios),
        "sent_bytes": sent,
        "sent_ratio": sent[ours] / sent[ddp],
    }


def measure_delayed(args: argparse.Namespace) -> dict[str, Any]:
    """Compare steps with and without ``overlap_gather`` for each delay, interleaved."""
    world = init_world(args.device)
    contenders = {
        name: make_zero(args, world.device, overlap)
        for name, overlap in (("zero2", False), ("zero2_overlap_gather", True))
    }
    x = torch.randn(args.delayed_batch_size, args.width, device=world.device).bfloat16()
    network = SlowNetwork()
    delays = [0.0, *args.delays_ms]
    seconds: dict[tuple[str, float], list[float]] = {
        (name, delay): [] for delay in delays for name in contenders
    }
    network_ms: dict[tuple[str, float], float] = {}
    for step in contenders.values():  # record the orders of gradients and of reads
        for _ in range(3):
            step(x)
    for turn in range(args.repeats):
        for name, delay in list(seconds)[:: 1 if turn % 2 else -1]:
            step = contenders[name]
            dist.barrier()
            network.delay = delay / 1e3
            step(x)  # so that as much is in flight before the timed steps as after them
            synchronize(world.device)
            start, carried = time.perf_counter(), network.carried
            for _ in range(STEPS_IN_A_ROW):
                step(x)
            synchronize(world.device)
            seconds[name, delay].append((time.perf_counter() - start) / STEPS_IN_A_ROW)
            network_ms[name, delay] = delay * (network.carried - carried) / STEPS_IN_A_ROW
    network.stop()
    median = {key: 1e3 * statistics.median(values) for key, values in seconds.items()}
    return {
        f"{delay:g} ms": {
            name: {
                "compute_ms": median[name, 0.0],
                "network_ms": network_ms[name, delay],
                "step_ms": median[name, delay],
                "ratio": median[name, delay] / max(median[name, 0.0], network_ms[name, delay]),
                "uncovered_ms": median[name, delay] - median[name, 0.0],
            }
            for name in contenders
        }
        for delay in args.delays_ms
    }


def sent_bytes(step: Callable[[Tensor], None], x: Tensor) -> float:
    """Return the bytes that a step sends, after steps that recorded the order of gradients."""
    with LiveBytes() as live:
        step(x)
    return live.sent_bytes


def main(argv: list[str]) -> int:
    parser = Parser("benchmark.py zero", __doc__)
    parser.add_argument("--layers", type=positive, default=8, help="of the model (default: 8)")
    parser.add_argument("--width", type=positive, default=1024, help="of a layer (default: 1024)")
    parser.add_argument(
        "--batch-size", type=positive, default=16, help="on each rank (default: 16)"
    )
    parser.add_argument(
        "--bucket-size-mb", type=positive_float, default=25.0, help="as of ZeRO (default: 25)"
    )
    parser.add_argument(
        "--delays-ms",
        type=nonnegative,
        nargs="*",
        default=[1.0, 5.0],
        metavar="MS",
        help="delays to give each collective, measured one after another; none leaves this part "
        "out (default: 1 5)",
    )
    parser.add_argument(
        "--delayed-batch-size",
        type=positive,
        default=64,
        help="batch size on each rank in the part with delays (default: 64)",
    )
    parser.add_argument("--repeats", type=positive, default=15, help="timed steps (default: 15)")
    parser.add_argument(
        "--warmup", type=positive, default=3, help="steps before the timed ones (default: 3)"
    )
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads of each rank")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if available"
    )
    parser.add_json()
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)
    result = measure(args)
    if args.delays_ms:
        result["delayed"] = measure_delayed(args)
    if dist.get_rank() == 0:
        print(json.dumps(result, indent=1))
        write_json(args.json, result)
    dist.destroy_process_group()
    return 0
