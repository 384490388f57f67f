"""Measure the peak memory of gathering and scattering the full optimizer state.

    torchrun --nproc-per-node 4 launch/benchmark.py gather

The figure of a rank is the peak of its resident memory minus the memory before the call; for rank
0 there is a second one without the result. ``--with-torch`` measures torch's full state dict
instead of scattering. Runs on CPUs with gloo, on Linux.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training.command_line import Parser, positive
from training.rendezvous import join_process_group

from bench.resident import peak_bytes, used_bytes
from sharded_bf16_adamw import AdamW_BF16, ZeRO, gather_full_state_dict, scatter_full_state_dict
from sharded_bf16_adamw.sharding.dtensor import to_local

CPU = torch.device("cpu")
MB = 10**6


def peak_of(function: Callable[[], Any]) -> tuple[Any, int, float]:
    """Run ``function``; return its result, the peak of additional bytes, and the seconds."""
    before = used_bytes(CPU) or 0
    with peak_bytes(CPU) as peak:
        dist.barrier()
        start = time.perf_counter()
        result = function()
        seconds = time.perf_counter() - start
    return result, peak[0] - before, seconds


def build(strategy: str, layers: int, width: int) -> tuple[nn.Module, AdamW_BF16]:
    """Build square layers and an optimizer, and fill its states so that they are resident."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    linear = [nn.Linear(width, width, bias=False, dtype=torch.bfloat16) for _ in range(layers)]
    model = nn.Sequential(*linear)
    if strategy == "fsdp2":
        for layer in (*model, model):
            fully_shard(layer, mesh=mesh)
    sharding = ZeRO(mesh) if strategy == "zero2" else None
    optimizer = AdamW_BF16(model.parameters(), lr=1e-3, sharding=sharding)
    optimizer.init_state()
    for state in optimizer.state.values():
        for key, value in state.items():
            if key != "step":
                to_local(value).fill_(dist.get_rank() + 1)
    return model, optimizer


def main(argv: list[str]) -> int:
    parser = Parser("benchmark.py gather", __doc__)
    parser.add_argument(
        "--strategy", choices=("fsdp2", "zero2", "ddp"), default="fsdp2", help="default: fsdp2"
    )
    parser.add_argument("--layers", type=positive, default=12, help="of the model (default: 12)")
    parser.add_argument("--width", type=positive, default=4096, help="of a layer (default: 4096)")
    parser.add_argument(
        "--with-torch",
        action="store_true",
        help="also measure torch's get_optimizer_state_dict with full_state_dict and cpu_offload",
    )
    args = parser.parse_args(argv)
    join_process_group("gloo")
    torch.set_num_threads(1)
    model, optimizer = build(args.strategy, args.layers, args.width)
    tensor_bytes, num_states = 2 * args.width**2, 3 * args.layers
    calls: dict[str, Callable[[], Any]] = {
        "gather": lambda: gather_full_state_dict(model, optimizer)
    }
    if args.with_torch:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        calls["torch's gather"] = lambda: get_optimizer_state_dict(
            model, optimizer, options=options
        )
    if dist.get_rank() == 0:
        print(
            f"{args.strategy}, {dist.get_world_size()} ranks: {num_states} state tensors of "
            f"{tensor_bytes / MB:.1f} MB, {num_states * tensor_bytes / MB:.0f} MB in all"
        )
    full: Any = None
    peak_of(lambda: dist.all_gather_object([None] * dist.get_world_size(), "warm up"))
    for name, call in calls.items():
        full = None
        full, peak, seconds = peak_of(call)
        report(name, peak, seconds, num_states * tensor_bytes)
    if not args.with_torch:
        _, peak, seconds = peak_of(lambda: scatter_full_state_dict(model, optimizer, full))
        report("scatter", peak, seconds, 0)
        filled = dist.get_rank() + 1  # by build()
        for state in optimizer.state.values():
            assert args.strategy == "ddp" or bool((to_local(state["exp_avg"]) == filled).all())
    dist.destroy_process_group()
    return 0


def report(name: str, peak: int, seconds: float, result_bytes: int) -> None:
    """Print every rank's peak, and rank 0's also without the result."""
    peaks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(peaks, peak)
    if dist.get_rank() == 0:
        without = (peaks[0] - result_bytes) / MB
        extra = f" ({without:+.1f} without the result)" if result_bytes else ""
        others = ", ".join(f"{value / MB:.1f}" for value in peaks[1:])
        print(
            f"{name:15} {seconds:6.2f} s; peak extra MB: rank 0 {peaks[0] / MB:.1f}{extra}; "
            f"other ranks {others}",
            flush=True,
        )
