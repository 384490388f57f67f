"""The command line of ``train.py``. Defaults that depend on the model's size come from its preset."""

from __future__ import annotations

import argparse
from typing import NoReturn

from data import UsageError
from model import PRESETS
from strategies import STRATEGIES


class Parser(argparse.ArgumentParser):
    """Reports errors as every other error of use is reported."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help.")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and complete the arguments; the result holds plain data only, so that a checkpoint can keep it.

    Raises:
        UsageError: an argument is unknown, malformed or out of range.
    """
    parser = Parser(prog="train.py", description="Train a byte-level GPT with bf16 weights, on one process or under torchrun.")
    group = parser.add_argument_group("model and data")
    group.add_argument("--preset", choices=PRESETS, default="tiny", help="model size; its defaults are in launch/model.py")
    group.add_argument("--data", metavar="PATH", help="text: a file or a folder (default: Python's standard library sources)")
    group.add_argument("--seq-len", type=positive, help="bytes in a sequence")
    group.add_argument("--batch-size", type=positive, help="sequences in a step, over all ranks and micro-batches")
    group.add_argument("--grad-accum", type=positive, default=1, metavar="N", help="micro-batches in a step")
    group.add_argument("--seed", type=count, default=0)

    group = parser.add_argument_group("parallelism")
    group.add_argument("--strategy", choices=STRATEGIES, help="default: fsdp2 on several ranks, else single")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="CUDA with NCCL, or CPU with gloo")
    group.add_argument("--deterministic", action="store_true", help="the same bits in every run on CUDA too, at some cost")

    group = parser.add_argument_group("optimizer")
    group.add_argument(
        "--optimizer",
        choices=("bf16", "torch-fp32", "torch-bf16"),
        default="bf16",
        help="AdamW_BF16; or torch's AdamW on fp32 master weights with a bf16 forward, or on plain bf16 weights",
    )
    group.add_argument("--optimizer-backend", metavar="NAME", help="kernel back end of AdamW_BF16 (default: by device)")
    group.add_argument("--lr", type=float, help="peak learning rate")
    group.add_argument("--schedule", choices=("cosine", "power", "constant"), default="cosine", help="after the warm-up")
    group.add_argument("--warmup", type=positive, metavar="STEPS", help="default: a twentieth of --steps")
    group.add_argument("--final-lr", type=float, help="of the cosine schedule (default: a thousandth of --lr)")
    group.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.999))
    group.add_argument("--weight-decay", type=float, default=0.1)
    group.add_argument("--clip", type=float, default=1.0, help="maximal global gradient norm; 0 does not clip")

    group = parser.add_argument_group("run")
    group.add_argument("--steps", type=positive)
    group.add_argument("--eval-every", type=positive, metavar="STEPS", help="default: a twelfth of --steps")
    group.add_argument("--eval-batches", type=positive, default=16, metavar="N")
    group.add_argument("--out", metavar="FOLDER", help="default: runs/<preset>-<optimizer>")
    group.add_argument("--save-every", type=count, metavar="STEPS", default=200, help="0: at the end only")
    group.add_argument(
        "--async-save",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write checkpoints while training goes on, from a copy of each rank's part in CPU memory; the last one is always waited for",
    )
    group.add_argument("--keep", type=positive, metavar="N", default=2, help="newest checkpoints to keep")
    group.add_argument("--resume", metavar="auto|PATH", help="auto: from the newest checkpoint in --out, if there is one")
    group.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bar")

    args = parser.parse_args(argv)
    preset = PRESETS[args.preset]
    for name in ("seq_len", "batch_size", "steps", "lr"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(preset, name))
    args.warmup = args.warmup or max(1, args.steps // 20)
    args.eval_every = args.eval_every or max(1, args.steps // 12)
    args.final_lr = args.lr / 1000 if args.final_lr is None else args.final_lr
    args.out = args.out or f"runs/{args.preset}-{args.optimizer}"
    return args
