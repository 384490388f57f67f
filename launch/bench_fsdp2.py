"""Clipping and a step on an FSDP2 model over 2 gloo ranks: our ``clip_grad_norm_`` against torch's, with the same optimizer."""

from __future__ import annotations

import json
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


def measure_fsdp2(rounds: int) -> dict[str, Any]:
    """Time both, in turn, in each round.

    Returns:
        ``times``: seconds by ``ours_clip``, ``ours_step``, ``torch_clip``, ``torch_step`` and round, each of the slowest rank;
        ``clip_ratio`` and ``clip_and_step_ratio``: torch's time over ours, median over rounds.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (folder, rounds), nprocs=RANKS)
        times = json.loads((Path(folder) / "times.json").read_text())
    return {"ranks": RANKS, "parameters": 2 * LAYERS, "times": times, **ratios(times)}


def ratios(times: dict[str, list[float]]) -> dict[str, float]:
    rounds = list(zip(times["ours_clip"], times["ours_step"], times["torch_clip"], times["torch_step"], strict=True))
    return {
        "clip_ratio": statistics.median(clip / ours for ours, _, clip, _ in rounds),
        "clip_and_step_ratio": statistics.median((clip + step) / (ours + our_step) for ours, our_step, clip, step in rounds),
    }


def _rank(rank: int, folder: str, rounds: int) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    try:
        torch.manual_seed(0)
        layers = [nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16) for _ in range(LAYERS)]
        model = nn.Sequential(*layers)
        for layer in layers:
            fully_shard(layer)
        fully_shard(model)
        optimizer = AdamW_BF16(model.parameters(), lr=1e-4)
        model(torch.randn(8, WIDTH, dtype=torch.bfloat16)).square().mean().backward()
        times: dict[str, list[float]] = {name: [] for name in ("ours_clip", "ours_step", "torch_clip", "torch_step")}
        for round_ in range(-WARM_UP, rounds):
            for name in ("ours", "torch") if round_ % 2 else ("torch", "ours"):
                dist.barrier()
                start = time.perf_counter()
                if name == "ours":
                    optimizer.clip_grad_norm_(1.0)
                else:
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                clipped = time.perf_counter()
                optimizer.step()
                done = time.perf_counter()
                if round_ >= 0:
                    slowest = torch.tensor([clipped - start, done - clipped])
                    dist.all_reduce(slowest, dist.ReduceOp.MAX)
                    for part, seconds in zip(("clip", "step"), slowest.tolist(), strict=True):
                        times[f"{name}_{part}"].append(seconds)
        if rank == 0:
            (Path(folder) / "times.json").write_text(json.dumps(times))
    finally:
        dist.destroy_process_group()
