"""Compare clipping and a step with torch's on FSDP2 over 2 gloo ranks: ``benchmark.py --fsdp2``."""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from sharded_bf16_adamw import AdamW_BF16

RANKS, LAYERS, WIDTH = 2, 50, 256  # a weight and a bias in each layer: 100 parameters
WARM_UP = 3
CONTENDERS = ("ours", "torch", "torch fused", "torch clip with our step")


def measure_fsdp2(rounds: int) -> dict[str, Any]:
    """Time each of :data:`CONTENDERS` once per round, in random order.

    Returns:
        ``times``: seconds of the slowest rank by round, for ``<contender> clip`` and ``<contender>
        step``; ``clip_ratio``: torch's clipping time over ours; ``ratios``: each other contender's
        time of clip and step over ours. Both ratios are medians over rounds.
    """
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(_run_rank, (directory, rounds), nprocs=RANKS)
        times = json.loads((Path(directory) / "times.json").read_text())
    return {"ranks": RANKS, "parameters": 2 * LAYERS, "times": times, **ratios(times)}


def ratios(times: dict[str, list[float]]) -> dict[str, Any]:
    def over_ours(name: str, *parts: str) -> float:
        ours, other = (
            zip(*(times[f"{key} {part}"] for part in parts), strict=True) for key in ("ours", name)
        )
        return statistics.median(sum(a) / sum(b) for a, b in zip(other, ours, strict=True))

    others = [name for name in CONTENDERS if name != "ours"]
    return {
        "clip_ratio": over_ours("torch", "clip"),
        "ratios": {name: over_ours(name, "clip", "step") for name in others},
    }


def _run_rank(rank: int, directory: str, rounds: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{directory}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    try:
        times = time_contenders(rounds)
        if rank == 0:
            (Path(directory) / "times.json").write_text(json.dumps(times))
    finally:
        dist.destroy_process_group()


def time_contenders(rounds: int) -> dict[str, list[float]]:
    """Return the ``times`` of :func:`measure_fsdp2`. Collective."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16) for _ in range(LAYERS)]
    model = nn.Sequential(*layers)
    for layer in layers:
        fully_shard(layer)
    fully_shard(model)
    ours = AdamW_BF16(model.parameters(), lr=1e-4)
    optimizers = {
        "ours": ours,
        "torch": torch.optim.AdamW(model.parameters(), lr=1e-4),
        "torch fused": torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True),
        "torch clip with our step": ours,
    }
    model(torch.randn(8, WIDTH, dtype=torch.bfloat16)).square().mean().backward()
    times: dict[str, list[float]] = {
        f"{name} {part}": [] for name in CONTENDERS for part in ("clip", "step")
    }
    for round_ in range(-WARM_UP, rounds):
        for name in random.Random(round_).sample(CONTENDERS, len(CONTENDERS)):
            dist.barrier()
            start = time.perf_counter()
            if name == "ours":
                ours.clip_grad_norm_(1.0)
            else:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            clipped = time.perf_counter()
            optimizers[name].step()
            done = time.perf_counter()
            if round_ >= 0:
                slowest = torch.tensor([clipped - start, done - clipped])
                dist.all_reduce(slowest, dist.ReduceOp.MAX)
                for part, seconds in zip(("clip", "step"), slowest.tolist(), strict=True):
                    times[f"{name} {part}"].append(seconds)
    return times
