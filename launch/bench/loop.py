"""Compare whole training steps: speed, bytes sent and peak memory by part.

    torchrun --nproc-per-node 2 launch/benchmark.py loop --model tiny 60m --docs

Every setup trains the same GPT on the same random tokens: forward, backward, optimizer, without
clipping. Each round runs all setups in a random order, and builds a new model for each. A ratio is
the median over rounds of the ratio within a round.

Memory is measured on rank 0, in bytes per parameter of the model, in a step on one sequence of 16
tokens, which needs few activations. Weights, optimizer states and the peak of ``param.grad`` are
counted tensor by tensor. Activations and buffers are the rest of the peak of all live tensors, at
which fewer gradients may be alive; buffers include gradients in flight. The growth of the process
is a second measurement of the same step: the peak of resident memory, or of the bytes that CUDA's
allocator gave out, minus the bytes in use before the model was built. Bytes sent are those of ring
algorithms, which send least.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from planning.live import LiveBytes
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn import functional as F  # noqa: N812  # its usual name
from torch.nn.parallel import DistributedDataParallel
from training.command_line import Parser, is_installed, positive, write_json
from training.model import GPT, PRESETS, Config
from training.strategies import STRATEGIES
from training.world import World, init_world, synchronize

from bench import deepspeed_zero
from bench.markers import write_between_markers
from bench.report import describe, machine
from bench.resident import peak_bytes, used_bytes
from sharded_bf16_adamw import AdamW_BF16, ZeRO
from sharded_bf16_adamw.sharding.dtensor import to_local

REPO = Path(__file__).resolve().parents[2]
# layers, dim, heads, ffn, seq_len, batch_size, steps, lr
MODELS = {
    "tiny": PRESETS["tiny"],
    "60m": Config(10, 704, 11, 1920, 128, 4, 0, 1e-3),
    "1b": replace(PRESETS["1b"], batch_size=4),  # for a GPU
}
WARM_UP = Config(1, 64, 1, 176, 16, 2, 0, 1e-3)
BASELINE, DEEPSPEED = "torch-fsdp2", "deepspeed-zero2"
PARTS = ("weights", "states", "gradients", "activations_and_buffers")
LEGEND = """\
*Peak* counts tensors. *Process* is the growth of the process in the same step: of resident memory,
which includes gloo's buffers and what `malloc` keeps, or on a GPU of CUDA's allocated bytes.
Constant overhead dominates in a small model."""
OPTIONS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "weight_decay": 0.1}


@dataclass(frozen=True)
class Setup:
    """A model wrapper and an optimizer to compare with others.

    Attributes:
        label: name in tables.
        dtype: of the weights.
        build: takes the model and the world; returns the wrapped model and its optimizer.
    """

    label: str
    dtype: torch.dtype
    build: Callable[[GPT, World], tuple[nn.Module, Any]]


def torch_fsdp2(model: GPT, world: World) -> tuple[nn.Module, torch.optim.Optimizer]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (*model.blocks, model):
        fully_shard(module, mesh=world.mesh(), mp_policy=policy)
    return model, torch.optim.AdamW(model.parameters(), **OPTIONS)


def torch_zero1(model: GPT, world: World) -> tuple[nn.Module, torch.optim.Optimizer]:
    module = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = ZeroRedundancyOptimizer(
        module.parameters(), torch.optim.AdamW, parameters_as_bucket_view=True, **OPTIONS
    )
    return module, optimizer


def deepspeed_zero2(model: GPT, world: World) -> tuple[nn.Module, deepspeed_zero.EngineStep]:
    return deepspeed_zero.build(model, OPTIONS)


def our_fsdp2(
    model: GPT, world: World, in_backward: bool = False
) -> tuple[nn.Module, torch.optim.Optimizer]:
    STRATEGIES["fsdp2"].shard(model, world.mesh())
    return model, AdamW_BF16(model.parameters(), step_in_backward=in_backward, **OPTIONS)


def our_zero(
    model: GPT, world: World, stage: int, in_backward: bool = False, **options: Any
) -> tuple[nn.Module, torch.optim.Optimizer]:
    mesh: DeviceMesh = world.mesh()
    module = DistributedDataParallel(model, gradient_as_bucket_view=True) if stage == 1 else model
    if options.get("overlap_gather"):
        options["model"] = module
    if stage == 2:
        options["reduce_dtype"] = torch.float32
    sharding = ZeRO(mesh, stage=stage, **options)
    return module, AdamW_BF16(
        module.parameters(), sharding=sharding, step_in_backward=in_backward, **OPTIONS
    )


_BF16, _FP32 = torch.bfloat16, torch.float32
SETUPS = {
    BASELINE: Setup("torch FSDP2 + AdamW, fp32 weights, bf16 forward", _FP32, torch_fsdp2),
    "torch-zero1": Setup("DDP + ZeroRedundancyOptimizer(AdamW), fp32", _FP32, torch_zero1),
    DEEPSPEED: Setup("DeepSpeed ZeRO 2, bf16, fp32 masters", _BF16, deepspeed_zero2),
    "fsdp2": Setup("ours, FSDP2", _BF16, our_fsdp2),
    "fsdp2-in-backward": Setup(
        "ours, FSDP2, step_in_backward", _BF16, partial(our_fsdp2, in_backward=True)
    ),
    "zero1": Setup("ours, ZeRO 1", _BF16, partial(our_zero, stage=1)),
    "zero1-overlap": Setup(
        "ours, ZeRO 1, overlap_gather", _BF16, partial(our_zero, stage=1, overlap_gather=True)
    ),
    "zero2": Setup("ours, ZeRO 2", _BF16, partial(our_zero, stage=2)),
    "zero2-in-backward": Setup(
        "ours, ZeRO 2, step_in_backward", _BF16, partial(our_zero, stage=2, in_backward=True)
    ),
    "zero2-overlap": Setup(
        "ours, ZeRO 2, overlap_gather, static_graph",
        _BF16,
        partial(our_zero, stage=2, overlap_gather=True, static_graph=True),
    ),
}


def main(argv: list[str]) -> int:
    parser = Parser("benchmark.py loop", __doc__)
    parser.add_argument(
        "--model",
        nargs="+",
        choices=MODELS,
        default=["tiny", "60m"],
        help="models to train (default: tiny 60m)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=SETUPS,
        default=list(SETUPS),
        metavar="NAME",
        help=f"compare {BASELINE} with these only, of {', '.join(SETUPS)} (default: all)",
    )
    parser.add_argument(
        "--rounds", type=positive, default=5, help="repetitions of the comparison (default: 5)"
    )
    parser.add_argument(
        "--steps", type=positive, default=4, help="timed steps of each per round (default: 4)"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if available"
    )
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads of each rank")
    parser.add_json()
    parser.add_argument(
        "--docs", action="store_true", help="write the tables and the plot into docs/"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    world = init_world(args.device)
    names = [BASELINE, *(name for name in args.only if name != BASELINE)]
    if DEEPSPEED in names and not is_installed(deepspeed_zero.PACKAGE):
        names.remove(DEEPSPEED)
        if world.rank == 0:
            print(f"{DEEPSPEED} is skipped: the package deepspeed is not installed.", flush=True)
    run: dict[str, Any] = {"machine": machine(world.device), "ranks": world.size, "models": {}}
    for model in args.model:
        run["models"][model] = measure(MODELS[model], names, world, args.rounds, args.steps)
        if world.rank == 0:
            print(table(model, run["models"][model], world.size), flush=True)
    if world.rank == 0:
        write_json(args.json, run)
        if args.docs:
            write_docs(run, argv)
    dist.destroy_process_group()
    return 0


# --------------------------------------------------------------------------------------- measuring


class Training:
    """A model and optimizer after two warm-up steps, which create states and buckets."""

    def __init__(self, setup: Setup, config: Config, world: World) -> None:
        self.used_before = used_bytes(world.device)
        with torch.device("meta"):
            model = GPT(config).to(setup.dtype)
        model.to_empty(device=world.device)
        model.init_weights(0)
        self.world, self.model = world, model
        self.wrapped_model, self.optimizer = setup.build(model, world)
        generator = torch.Generator().manual_seed(world.rank)
        size = (max(1, config.batch_size // world.size), config.seq_len + 1)
        self.batch = torch.randint(256, size, generator=generator).to(world.device)
        self.tokens = self.batch[:, :-1].numel() * world.size
        for _ in range(2):
            self.step(self.batch)

    def step(self, batch: Tensor) -> None:
        x, y = batch[:, :-1], batch[:, 1:]
        F.cross_entropy(self.wrapped_model(x).float().flatten(0, 1), y.flatten()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def wait(self) -> None:
        """Wait for all-gathers of weights that ``overlap_gather`` has left in flight."""
        if isinstance(self.optimizer, AdamW_BF16):
            self.optimizer.wait()

    def timed(self, steps: int) -> float:
        """Return the seconds per step, between barriers of all ranks."""
        dist.barrier()
        start = time.perf_counter()
        for _ in range(steps):
            self.step(self.batch)
        self.wait()
        synchronize(self.world.device)
        dist.barrier()
        return (time.perf_counter() - start) / steps

    def memory(self) -> dict[str, Any]:
        """Return the bytes of each of ``PARTS``, of the process's ``growth``, and those sent.

        ``growth`` is None if the system does not report it.
        """
        params = list(self.wrapped_model.parameters())
        states = [
            x
            for state in getattr(self.optimizer, "optim", self.optimizer).state.values()
            for x in state.values()
            if isinstance(x, Tensor)
        ]
        with (
            peak_bytes(self.world.device) as peak,
            live_gradients(params) as gradients,
            LiveBytes() as live,
        ):
            for tensor in (*params, *states):
                to_local(tensor).detach()  # LiveBytes counts a tensor from its first use on
            self.step(self.batch[:1, :17])
            self.wait()
        parts = {
            "weights": sum(to_local(p).nbytes for p in params),
            "states": sum(to_local(x).nbytes for x in states),
            "gradients": gradients[0],
        }
        return {
            **parts,
            "activations_and_buffers": live.peak - sum(parts.values()),
            "growth": peak[0] - self.used_before if self.used_before is not None else None,
            "sent_bytes": live.sent_bytes,
        }


@contextmanager
def live_gradients(params: list[nn.Parameter]) -> Iterator[list[int]]:
    """Yield a list of one number, the peak bytes of ``param.grad`` after the optimizer's hooks."""
    peak = [0]

    def update_peak(param: Tensor) -> None:
        peak[0] = max(peak[0], sum(to_local(p.grad).nbytes for p in params if p.grad is not None))

    # The optimizer's hooks run first, so a gradient that they free is not counted.
    handles = [p.register_post_accumulate_grad_hook(update_peak) for p in params]
    try:
        yield peak
    finally:
        for handle in handles:
            handle.remove()


def measure(
    config: Config, names: list[str], world: World, rounds: int, steps: int
) -> dict[str, Any]:
    for name in names:  # load libraries before memory is measured
        Training(SETUPS[name], WARM_UP, world)
    measurements: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in names}
    tokens = 0
    order = random.Random(0)  # the same on every rank
    for index in range(rounds):
        for name in order.sample(names, len(names)):
            training = Training(SETUPS[name], config, world)
            measurements[name]["seconds"].append(training.timed(steps))
            tokens = training.tokens
            if index == 0:
                measurements[name] |= training.memory()
            del training
    return {"parameters": config.num_params, "tokens": tokens, "setups": measurements}


# --------------------------------------------------------------------------------------- reporting


def table(model: str, result: dict[str, Any], ranks: int) -> str:
    """Return a Markdown table of one model."""
    parameters, setups = result["parameters"], result["setups"]
    parts = " | ".join(part.replace("_", " ") for part in PARTS)
    rows = [
        f"**{model}**, {parameters / 1e6:.1f} million parameters, {ranks} ranks",
        "",
        f"| | tokens/s | time, ratio | sent | {parts} | peak | process |",
        f"|---|--:|--:|--:|{'--:|' * (len(PARTS) + 2)}",
    ]
    base = setups[BASELINE]["seconds"]
    for name, each in setups.items():
        ratio = statistics.median(a / b for a, b in zip(each["seconds"], base, strict=True))
        speed = result["tokens"] / statistics.median(each["seconds"])
        sizes = [each[part] / parameters for part in PARTS]
        cells = [SETUPS[name].label, f"{speed:,.0f}", f"{ratio:.2f}"]
        cells += [f"{value:.2f}" for value in (each["sent_bytes"] / parameters, *sizes, sum(sizes))]
        growth = each["growth"]
        cells.append("unknown" if growth is None else f"{growth / parameters:.2f}")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def write_docs(run: dict[str, Any], argv: list[str]) -> None:
    command = " ".join(
        [f"torchrun --nproc-per-node {run['ranks']} launch/benchmark.py loop", *argv]
    )
    tables = [table(model, result, run["ranks"]) for model, result in run["models"].items()]
    name = f"loop_{run['ranks']}"
    parts = [f"Measured on: {describe(run['machine'])}.", LEGEND, *tables]
    parts += [f"![Peak memory by part](img/{name}.png)", f"Repeat with `{command}`."]
    begin, end = f"<!-- benchmark:{name}:begin -->", f"<!-- benchmark:{name}:end -->"
    write_between_markers(REPO / "docs" / "benchmarks.md", begin, end, "\n\n".join(parts))
    plot(run, REPO / "docs" / "img" / f"{name}.png")


def plot(run: dict[str, Any], path: Path) -> None:
    """Plot the peak memory of each setup and model, by part."""
    from matplotlib.figure import Figure

    models = run["models"]
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    all_axes = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
    for axes, (model, result) in zip(all_axes, models.items(), strict=True):
        labels = [SETUPS[name].label for name in result["setups"]]
        left = [0.0] * len(labels)
        for part in PARTS:
            values = [each[part] / result["parameters"] for each in result["setups"].values()]
            axes.barh(labels, values, left=left, label=part.replace("_", " "))
            left = [a + b for a, b in zip(left, values, strict=True)]
        title = f"{model}, {run['ranks']} ranks"
        axes.set(xlabel="bytes per parameter on rank 0", title=title)
    all_axes[0].invert_yaxis()
    # Below the axes: inside, it would hide bars.
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
