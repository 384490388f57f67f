"""Time what the ranks of ZeRO exchange beside gradients, weights and norms.

    python launch/benchmark.py exchange --ranks 2 4 8 16 32

``agree`` exchanges full reports, as in the first steps and after a change. ``any_rank`` exchanges
one flag, as a steady step does on NCCL, on a two-dimensional mesh and in stage 1. On gloo and a
one-dimensional mesh, a steady step of stage 2 sends its flag with the last bucket: ``bucket`` is
the reduce-scatter of a bucket without the flag, ``bucket_with_flag`` with it.

Prints milliseconds on rank 0: the median, and the minimum, which other load disturbs least. The
exchanges take turns, each after a barrier. All ranks are processes of this machine. With more ranks
than CPUs, the CPUs limit the times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from training.command_line import Parser, positive, write_json

from sharded_bf16_adamw.sharding.zero.host_collectives import HostCollectives
from sharded_bf16_adamw.sharding.zero.reduce_scatter import PendingReduce


def make_exchanges(args: argparse.Namespace, mesh: DeviceMesh) -> dict[str, Callable[[], Any]]:
    collectives = HostCollectives(mesh)
    report = [0] * (2 * args.parameters)

    def reduce_bucket(flags: int) -> float:
        grads = torch.zeros(mesh.size(), args.row_numel + flags, dtype=torch.bfloat16)
        return PendingReduce(grads, mesh, grads.dtype, collectives.group).wait()[-1].item()

    return {
        "agree": lambda: collectives.all_reduce_max(report),
        "any_rank": lambda: collectives.any_rank(False),
        "bucket": lambda: reduce_bucket(0),
        "bucket_with_flag": lambda: reduce_bucket(1),
    }


def measure(rank: int, ranks: int, folder: str, args: argparse.Namespace) -> None:
    """Run one rank of the measurement; rank 0 writes the result to ``folder``."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    exchanges = make_exchanges(args, init_device_mesh("cpu", (ranks,)))
    seconds: dict[str, list[float]] = {name: [] for name in exchanges}
    for turn in range(args.repeats):
        for name, exchange in list(exchanges.items())[:: 1 if turn % 2 else -1]:
            dist.barrier()
            start = time.perf_counter()
            exchange()
            seconds[name].append(time.perf_counter() - start)
    if rank == 0:
        result = {
            name: {"median_ms": 1e3 * statistics.median(times), "lowest_ms": 1e3 * min(times)}
            for name, times in seconds.items()
        }
        Path(folder, "result").write_text(json.dumps(result))
    dist.destroy_process_group()


def main(argv: list[str]) -> int:
    parser = Parser("benchmark.py exchange", __doc__)
    parser.add_argument(
        "--ranks",
        type=positive,
        nargs="+",
        default=[2, 4, 8],
        help="numbers of ranks, measured one after another (default: 2 4 8)",
    )
    parser.add_argument(
        "--parameters",
        type=positive,
        default=200,
        help="parameters that a report covers (default: 200)",
    )
    parser.add_argument(
        "--row-numel",
        type=positive,
        default=1 << 12,
        help="elements of a bucket that each rank receives (default: 4096)",
    )
    parser.add_argument(
        "--repeats", type=positive, default=40, help="times of each exchange (default: 40)"
    )
    parser.add_json()
    args = parser.parse_args(argv)
    results = {}
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            # Forked: importing torch in many processes takes longer than the measurement.
            torch.multiprocessing.start_processes(
                measure, (ranks, folder, args), nprocs=ranks, start_method="fork"
            )
            results[ranks] = json.loads(Path(folder, "result").read_text())
        print(json.dumps({ranks: results[ranks]}, indent=1), flush=True)
    write_json(args.json, results)
    return 0
