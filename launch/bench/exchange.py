"""Time what ZeRO's ranks exchange on the host beside gradients, weights and norms.

    torchrun --nproc-per-node 8 launch/benchmark.py exchange

``agree`` is an exchange of full reports, as in the first steps and after a change. ``any_rank`` is
that of a steady step on NCCL, on a two-dimensional mesh and in stage 1. On gloo and one dimension a
steady step of stage 2 sends a flag with its last bucket: ``bucket`` is its reduce-scatter without,
``bucket_with_flag`` with it. Median milliseconds on rank 0, in turns, each after a barrier. With
more processes than CPUs these are times of the CPUs, not of a network.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from training.strategies import init_world

from sharded_bf16_adamw.sharding.zero.bucket import Bucket
from sharded_bf16_adamw.sharding.zero.closing_bucket import ClosingBucket
from sharded_bf16_adamw.sharding.zero.consensus import Consensus
from sharded_bf16_adamw.sharding.zero.param import ZeroParam


def contenders(args: argparse.Namespace, mesh: DeviceMesh) -> dict[str, Callable[[], Any]]:
    consensus = Consensus(mesh)
    report = [0] * (2 * args.parameters)
    weight = torch.zeros(args.bucket_numel, dtype=torch.bfloat16)
    grad = torch.zeros_like(weight)
    param = ZeroParam(weight, mesh, "weight")
    plain = Bucket([param], mesh, weight.dtype, weight.dtype)
    closing = ClosingBucket([param], mesh, weight.dtype, weight.dtype)

    def bucket() -> None:
        plain.add_grad(param, grad)
        plain.launch_reduce().wait()

    def bucket_with_flag() -> None:
        closing.add_grad(param, grad)
        closing.reduce_unless(False, consensus.group)

    return {
        "agree": lambda: consensus.all_reduce_max(report),
        "any_rank": lambda: consensus.any_rank(False),
        "bucket": bucket,
        "bucket_with_flag": bucket_with_flag,
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmark.py exchange",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parameters", type=int, default=200, help="in a report")
    parser.add_argument("--bucket-numel", type=int, default=1 << 16)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(argv)
    world = init_world("cpu")
    torch.set_num_threads(1)
    functions = contenders(args, init_device_mesh("cpu", (world.size,)))
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(args.repeats):
        for name, function in list(functions.items())[:: 1 if turn % 2 else -1]:
            dist.barrier()
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    result = {
        "ranks": world.size,
        "median_ms": {name: 1e3 * statistics.median(times) for name, times in seconds.items()},
    }
    if world.rank == 0:
        print(json.dumps(result, indent=1))
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")
    dist.destroy_process_group()
    return 0
