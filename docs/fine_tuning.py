"""Reproduce the table of fine-tuning in quality.md: ``python docs/fine_tuning.py --preset small``.

Trains a GPT of ``launch/training/model.py`` with fp32 weights, then continues at a learning rate of
1e-6 with several optimizers on the same batches. ``small`` takes a few minutes on a GPU, ``nano``
ten minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from sharded_bf16_adamw import AdamW_BF16

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "launch"))
from bench.markers import write_between_markers  # noqa: E402
from training.data import TokenDataset, find_files, load_dataset  # noqa: E402
from training.model import GPT, PRESETS, Config  # noqa: E402

BEGIN, END = "<!-- fine-tuning: begin -->", "<!-- fine-tuning: end -->"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STEPS, LR = 300, 1e-6
PRETRAINING_STEPS = 600
HELD_OUT_BATCHES = 64
OPTIONS = {"betas": (0.9, 0.999), "weight_decay": 0.0}


class Start(NamedTuple):
    """A way for an optimizer to take over a model with fp32 weights.

    Attributes:
        label: in the table.
        make: converts the model in place, and returns an optimizer for it.
    """

    label: str
    make: Callable[[nn.Module], torch.optim.Optimizer]


class Result(NamedTuple):
    """A fine-tuned model against the one with fp32 weights.

    Attributes:
        error: 2-norm of the difference of the weights, over that of the change by fine-tuning.
        gap: held-out loss above the one with fp32 weights, in nats per byte.
    """

    error: float
    gap: float


def torch_adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LR, **OPTIONS)


STARTS = [
    Start(
        "`AdamW_BF16.from_fp32(model)`", lambda model: AdamW_BF16.from_fp32(model, lr=LR, **OPTIONS)
    ),
    Start(
        "`AdamW_BF16` after `model.bfloat16()`",
        lambda model: AdamW_BF16(model.bfloat16().parameters(), lr=LR, **OPTIONS),
    ),
    Start(
        "`torch.optim.AdamW` after `model.bfloat16()`", lambda model: torch_adamw(model.bfloat16())
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="small", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    args = parser.parse_args()
    config = PRESETS[args.preset]
    data = load_dataset(find_files(None), config.seq_len)
    results: dict[str, list[Result]] = {start.label: [] for start in STARTS}
    for seed in range(args.seeds):
        pretrained = pretrain(config, data, seed)
        expected = copy.deepcopy(pretrained)
        fine_tune(expected, torch_adamw(expected), config, data, seed)
        for start in STARTS:
            model = copy.deepcopy(pretrained)
            optimizer = start.make(model)
            fine_tune(model, optimizer, config, data, seed)
            result = compare(model, optimizer, expected, pretrained, config, data)
            results[start.label].append(result)
            print(f"seed {seed}, {start.label}: {result}", flush=True)
    text = f"{table(results)}\n\n{provenance(args.preset, args.seeds)}"
    print(text)
    write_between_markers(HERE / "quality.md", BEGIN, END, text)


def table(results: dict[str, list[Result]]) -> str:
    """Return a Markdown table of means and standard errors over seeds."""
    rows = [
        "| optimizer | distance from the fp32 weights, % of the change "
        "| held-out loss above fp32's, 1e-3 nats a byte |",
        "|---|--:|--:|",
    ]
    for label, of_seeds in results.items():
        errors, gaps = zip(*of_seeds, strict=True)
        cells = [with_error([100 * error for error in errors]), with_error([1e3 * g for g in gaps])]
        rows.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(rows)


def provenance(preset: str, seeds: int) -> str:
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "a CPU"
    command = f"python docs/fine_tuning.py --preset {preset} --seeds {seeds}"
    return f"Repeat with `{command}`; this was on {device}."


def pretrain(config: Config, text: TokenDataset, seed: int) -> GPT:
    """Return a model trained with fp32 weights, on a cosine schedule."""
    model = GPT(config).to(DEVICE)
    model.init_weights(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, **OPTIONS)
    for step in range(PRETRAINING_STEPS):
        warmup = min(1.0, (step + 1) / 50)
        decay = 0.5 + 0.5 * math.cos(math.pi * step / PRETRAINING_STEPS)
        optimizer.param_groups[0]["lr"] = config.lr * warmup * decay
        train_step(model, optimizer, text.batch(seed, step, config.batch_size))
    return model


def fine_tune(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Config,
    text: TokenDataset,
    seed: int,
) -> None:
    """Train on batches that pre-training has not seen, the same for all."""
    for step in range(STEPS):
        batch = text.batch(seed, PRETRAINING_STEPS + step, config.batch_size)
        train_step(model, optimizer, batch)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> None:
    loss_of(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad()


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    batch = batch.to(DEVICE)
    return F.cross_entropy(model(batch[:, :-1]).float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, config: Config, text: TokenDataset) -> float:
    batches = (
        text.held_out_batch(index, HELD_OUT_BATCHES, config.batch_size)
        for index in range(HELD_OUT_BATCHES)
    )
    return statistics.mean(loss_of(model, batch).item() for batch in batches)


@torch.no_grad()
def compare(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    expected: nn.Module,
    pretrained: nn.Module,
    config: Config,
    text: TokenDataset,
) -> Result:
    """Compare a fine-tuned model with the one that was fine-tuned with fp32 weights."""
    weights = {param: param for param in model.parameters()}
    if isinstance(optimizer, AdamW_BF16):
        weights.update(optimizer.true_weights())
    difference = distance(list(weights.values()), list(expected.parameters()))
    change = distance(list(pretrained.parameters()), list(expected.parameters()))
    gap = held_out_loss(model, config, text) - held_out_loss(expected, config, text)
    return Result(difference / change, gap)


def distance(some: list[Tensor], others: list[Tensor]) -> float:
    """Return the 2-norm of the difference of two lists of tensors."""
    squares = [(a.double() - b.double()).square().sum() for a, b in zip(some, others, strict=True)]
    return math.sqrt(sum(square.item() for square in squares))


def with_error(values: list[float]) -> str:
    """Return the mean and its standard error over seeds; the mean of a single one."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.2f} ± {error:.2f}"


if __name__ == "__main__":
    main()
