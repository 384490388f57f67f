"""The command line of ``train.py``. Defaults that depend on the model's size come from its preset."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from typing import NoReturn

from data import UsageError
from model import PRESETS
from strategies import STRATEGIES

DEFAULT_PRESET = "tiny"


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


def not_negative(text: str) -> float:
    value = float(text)
    if not value >= 0.0:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 on")
    return value


def by_preset(name: str) -> str:
    return f"default: by --preset, {DEFAULT_PRESET}: {getattr(PRESETS[DEFAULT_PRESET], name)}"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and complete the arguments; the result holds plain data only, so that a checkpoint can keep it.

    Raises:
        UsageError: an argument is unknown, malformed or out of range.
    """
    parser = Parser(
        prog="train.py",
        description="Train a byte-level GPT with bf16 weights, on one process or under torchrun.",
    )
    group = parser.add_argument_group("model and data")
    group.add_argument(
        "--preset",
        choices=PRESETS,
        default=DEFAULT_PRESET,
        help="model size; its defaults are in launch/model.py (default: %(default)s)",
    )
    group.add_argument(
        "--data",
        metavar="PATH",
        help="text: a file or a folder (default: Python's standard library sources)",
    )
    group.add_argument(
        "--seq-len", type=positive, help=f"bytes in a sequence ({by_preset('seq_len')})"
    )
    group.add_argument(
        "--batch-size",
        type=positive,
        help=f"sequences in a step, over all ranks and micro-batches ({by_preset('batch_size')})",
    )
    group.add_argument(
        "--grad-accum",
        type=positive,
        default=1,
        metavar="N",
        help="micro-batches in a step (default: %(default)s)",
    )
    group.add_argument(
        "--seed",
        type=count,
        default=0,
        help="of the initial weights and the batches (default: %(default)s)",
    )

    group = parser.add_argument_group("parallelism")
    group.add_argument(
        "--strategy", choices=STRATEGIES, help="default: fsdp2 on several ranks, else single"
    )
    group.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="CUDA with NCCL, or CPU with gloo (default: auto, CUDA where there is one)",
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="the same bits in every run on CUDA too, at some cost",
    )

    group = parser.add_argument_group("optimizer")
    group.add_argument(
        "--optimizer",
        choices=("bf16", "torch-fp32", "torch-bf16"),
        default="bf16",
        help="AdamW_BF16; or torch's AdamW on fp32 master weights with a bf16 forward, or on plain bf16 weights (default: %(default)s)",
    )
    group.add_argument(
        "--optimizer-backend",
        metavar="NAME",
        help="kernel back end of AdamW_BF16 (default: by device)",
    )
    group.add_argument("--lr", type=not_negative, help=f"peak learning rate ({by_preset('lr')})")
    group.add_argument(
        "--schedule",
        choices=("cosine", "power", "constant"),
        default="cosine",
        help="after the warm-up (default: %(default)s)",
    )
    group.add_argument(
        "--warmup", type=positive, metavar="STEPS", help="default: a twentieth of --steps"
    )
    group.add_argument(
        "--final-lr",
        type=not_negative,
        help="of the cosine schedule (default: a thousandth of --lr)",
    )
    group.add_argument(
        "--betas", type=float, nargs=2, default=(0.9, 0.999), help="default: 0.9 0.999"
    )
    group.add_argument(
        "--weight-decay", type=float, default=0.1, help="of the matrices (default: %(default)s)"
    )
    group.add_argument(
        "--clip",
        type=not_negative,
        default=1.0,
        help="maximal global gradient norm; 0 does not clip (default: %(default)s)",
    )
    group.add_argument(
        "--skip-nonfinite",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let a step whose loss or gradient norm is not finite change no weight; it is counted (default: --skip-nonfinite)",
    )
    group.add_argument(
        "--max-nonfinite",
        type=count,
        metavar="N",
        default=10,
        help="end the run with exit code 1 after N such steps in a row; 0 never does (default: %(default)s)",
    )

    group = parser.add_argument_group("run")
    group.add_argument("--steps", type=positive, help=by_preset("steps"))
    group.add_argument(
        "--eval-every", type=positive, metavar="STEPS", help="default: a twelfth of --steps"
    )
    group.add_argument(
        "--eval-batches",
        type=positive,
        default=16,
        metavar="N",
        help="batches of held-out text (default: %(default)s)",
    )
    group.add_argument("--out", metavar="FOLDER", help="default: runs/<preset>-<optimizer>")
    group.add_argument(
        "--save-every",
        type=count,
        metavar="STEPS",
        default=200,
        help="0: at the end only (default: %(default)s)",
    )
    group.add_argument(
        "--async-save",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write checkpoints while training goes on, from a copy of each rank's part in CPU memory; the last one is always waited for "
        "(default: --async-save)",
    )
    group.add_argument(
        "--check-replicas",
        type=count,
        metavar="STEPS",
        default=0,
        help="compare the replicas of weights and states every so many steps, and end the run where they differ: a fault of the hardware "
        "(default: never)",
    )
    group.add_argument(
        "--keep",
        type=positive,
        metavar="N",
        default=2,
        help="newest checkpoints to keep (default: %(default)s)",
    )
    group.add_argument(
        "--resume",
        metavar="auto|newest-good|PATH",
        help="auto: from the newest checkpoint in --out, if there is one; newest-good: from the newest undamaged one (default: afresh)",
    )
    group.add_argument(
        "--no-progress", dest="progress", action="store_false", help="no progress bar"
    )

    args = parser.parse_args(argv)
    preset = PRESETS[args.preset]
    for name in ("seq_len", "batch_size", "steps", "lr"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(preset, name))
    if int(os.environ.get("RANK", 0)) == 0:
        for note in without_effect(args):
            print(f"note: {note}", file=sys.stderr)
    args.warmup = args.warmup or max(1, args.steps // 20)
    args.eval_every = args.eval_every or max(1, args.steps // 12)
    args.final_lr = args.lr / 1000 if args.final_lr is None else args.final_lr
    args.out = args.out or f"runs/{args.preset}-{args.optimizer}"
    return args


def without_effect(args: argparse.Namespace) -> Iterator[str]:
    """What was asked for and will not happen. Not an error: one command line may serve several optimizers, or the start of a longer run."""
    if args.optimizer_backend is not None and args.optimizer != "bf16":
        yield f"--optimizer-backend {args.optimizer_backend} has no effect with --optimizer {args.optimizer}, only with bf16"
    if args.check_replicas and args.optimizer != "bf16":
        yield f"--check-replicas {args.check_replicas} has no effect with --optimizer {args.optimizer}, only with bf16"
    if args.final_lr is not None and args.schedule != "cosine":
        yield f"--final-lr {args.final_lr:g} has no effect with --schedule {args.schedule}, only with cosine"
    if args.warmup is not None and args.warmup > args.steps:
        yield f"--warmup {args.warmup} is longer than --steps {args.steps}: the learning rate will not reach --lr {args.lr:g}"
