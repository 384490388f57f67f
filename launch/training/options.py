"""Command line of ``train.py``. Defaults that depend on the model's size come from its preset."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from training.command_line import (
    Parser,
    count,
    finite,
    is_installed,
    nonempty,
    nonnegative,
    positive,
    seed,
    share,
    vocab_size,
)
from training.config import read_config
from training.errors import UsageError
from training.hugging_face import max_positions
from training.model import PRESETS
from training.optimizers import OPTIMIZERS
from training.rendezvous import rank
from training.signals_and_watchdog import DEFAULT_GRACE_S
from training.strategies import STRATEGIES

DEFAULT_PRESET = "tiny"
# Defaults for --model, which is fine-tuned.
MODEL_DEFAULTS = SimpleNamespace(seq_len=1024, batch_size=16, steps=1000, lr=1e-5)


def preset_default(name: str) -> str:
    value = getattr(PRESETS[DEFAULT_PRESET], name)
    of_model = getattr(MODEL_DEFAULTS, name)
    at_most = "at most " if name == "seq_len" else ""
    return (
        f"default: that of --preset ({DEFAULT_PRESET}: {value}); {at_most}{of_model} with --model"
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the arguments and fill in defaults; the result is plain data that JSON can hold.

    Raises:
        UsageError: an argument, or a key of ``--config``, is unknown, malformed or out of range.
    """
    args = _parse(argv)
    if args.export_hf and args.model is None:
        raise UsageError(
            "--export-hf needs --model, since presets are no Hugging Face models; see --help."
        )
    if args.init_moments and args.init_from is None:
        raise UsageError("--init-moments needs --init-from, which names a checkpoint; see --help.")
    _check_packages(args)
    preset = MODEL_DEFAULTS if args.model is not None else PRESETS[args.preset]
    for name in ("seq_len", "batch_size", "steps", "lr"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(preset, name))
            if name == "seq_len" and args.model is not None:
                args.seq_len = min(args.seq_len, max_positions(args.model) or args.seq_len)
    if rank() == 0:
        for note in options_without_effect(args):
            print(f"note: {note}", file=sys.stderr)
    args.warmup = args.warmup or max(1, args.steps // 20)
    args.eval_every = args.eval_every or max(1, args.steps // 12)
    args.print_every = args.print_every or max(1, args.steps // 50)
    if args.grace is None:
        args.grace = _default_grace()
    if args.final_lr is None and args.schedule == "cosine":
        args.final_lr = args.lr / 1000
    args.out = args.out or f"runs/{model_name(args)}-{args.optimizer}"
    return args


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line and the file of ``--config``, which it overrides."""
    parser = Parser("train.py", "Train a GPT with bf16 weights, on one process or under torchrun.")
    parser.add_argument(
        "--config",
        type=nonempty,
        metavar="TOML",
        help="a file of options, without the dashes in front of their names, such as the "
        "config.toml of another run; those of the command line override it (default: none)",
    )
    model_and_data = parser.add_argument_group("model and data")
    _add_model(model_and_data.add_mutually_exclusive_group().add_argument)
    _add_data(model_and_data.add_argument)
    _add_parallelism(parser.add_argument_group("parallelism").add_argument)
    _add_optimizer(parser.add_argument_group("optimizer").add_argument)
    _add_run(parser.add_argument_group("run").add_argument)
    _add_reports(parser.add_argument_group("reports").add_argument)
    args = parser.parse_args(argv)
    if args.config is not None:
        config = read_config(args.config, parser)
        # argparse sets defaults only for options that the namespace lacks
        args = parser.parse_args(argv, argparse.Namespace(**config))
        if args.preset is not None and args.model is not None:
            setattr(args, "model" if "model" in config else "preset", None)
    if args.preset is None and args.model is None:
        args.preset = DEFAULT_PRESET
    return args


def _check_packages(args: argparse.Namespace) -> None:
    asked_for = {"tensorboard": args.tensorboard, "wandb": args.wandb is not None}
    for package, is_asked_for in asked_for.items():
        if is_asked_for and not is_installed(package):
            raise UsageError(
                f"--{package} needs the package {package}: install it with pip install {package}, "
                "or leave out the option."
            )


def _default_grace() -> float:
    variable = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
    text = os.environ.get(variable)
    try:
        return DEFAULT_GRACE_S if text is None else nonnegative(text)
    except (ValueError, argparse.ArgumentTypeError):
        raise UsageError(
            f"the environment variable {variable} is {text!r}, not a number of seconds: correct "
            "it, or give --grace."
        ) from None


def model_name(args: argparse.Namespace) -> str:
    """Return the preset, or the name of the model's folder."""
    return args.preset or Path(args.model).resolve().name


def _add_model(add: Callable[..., Any]) -> None:
    add(
        "--preset",
        choices=PRESETS,
        help="model size; its defaults are in launch/training/model.py "
        f"(default: {DEFAULT_PRESET})",
    )
    add(
        "--model",
        type=nonempty,
        metavar="FOLDER",
        help="a causal language model of Hugging Face with safetensors, through transformers; its "
        "tokenizer is used for text (default: a model of --preset)",
    )


def _add_data(add: Callable[..., Any]) -> None:
    add(
        "--init-from",
        type=nonempty,
        metavar="PATH",
        help="start a new run from these weights: a checkpoint, a run, or a folder or file of "
        "safetensors (default: random ones, or those of --model)",
    )
    add(
        "--init-moments",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="from a checkpoint, also take AdamW's moments and their step counts; the schedule "
        "starts at 0 (default: --no-init-moments)",
    )
    add(
        "--data",
        type=nonempty,
        metavar="PATH",
        help='a file or a folder: text, .jsonl (the text under "text" of each line) or .bin (token '
        "ids); without --model the bytes of text are its tokens (default: the sources of Python's "
        "standard library)",
    )
    add(
        "--token-dtype",
        choices=("uint16", "uint32"),
        help="integers in .bin files (default: uint16 if that holds the vocabulary)",
    )
    add(
        "--vocab-size",
        type=vocab_size,
        metavar="N",
        help="token ids of a preset, for .bin files (default: 256, the values of a byte)",
    )
    add("--seq-len", type=positive, help=f"tokens in a sequence ({preset_default('seq_len')})")
    add(
        "--batch-size",
        type=positive,
        help="sequences in a step, over all ranks and micro-batches "
        f"({preset_default('batch_size')})",
    )
    add(
        "--grad-accum",
        type=positive,
        default=1,
        metavar="N",
        help="micro-batches in a step (default: %(default)s)",
    )
    add(
        "--seed",
        type=seed,
        default=0,
        help="seed of the initial weights and the batches (default: %(default)s)",
    )


def _add_parallelism(add: Callable[..., Any]) -> None:
    add("--strategy", choices=STRATEGIES, help="default: fsdp2 on several ranks, else single")
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="CUDA with NCCL, or CPU with gloo (default: auto, CUDA if available)",
    )
    add(
        "--deterministic",
        action="store_true",
        help="the same bits in every run on CUDA too, at some cost",
    )


def _add_optimizer(add: Callable[..., Any]) -> None:
    add(
        "--optimizer",
        choices=OPTIMIZERS,
        default="bf16",
        help="AdamW_BF16; or torch's AdamW on fp32 master weights with a bf16 forward, "
        "or on plain bf16 weights; or those of other libraries (default: %(default)s)",
    )
    add(
        "--optimizer-backend",
        type=nonempty,
        metavar="NAME",
        help="kernel backend of AdamW_BF16 (default: by device)",
    )
    add("--lr", type=nonnegative, help=f"peak learning rate ({preset_default('lr')})")
    add(
        "--schedule",
        choices=("cosine", "power", "constant"),
        default="cosine",
        help="after the warm-up (default: %(default)s)",
    )
    add("--warmup", type=positive, metavar="STEPS", help="default: a twentieth of --steps")
    add(
        "--final-lr",
        type=nonnegative,
        help="last learning rate of the cosine schedule (default: a thousandth of --lr)",
    )
    add("--betas", type=finite, nargs=2, default=(0.9, 0.999), help="default: 0.9 0.999")
    add("--weight-decay", type=finite, default=0.1, help="of the matrices (default: %(default)s)")
    add(
        "--clip",
        type=nonnegative,
        default=1.0,
        help="maximum global gradient norm; 0 disables clipping (default: %(default)s)",
    )
    add(
        "--skip-nonfinite",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="skip the update of a step whose loss or gradient norm is not finite, and count it "
        "(default: --skip-nonfinite)",
    )
    add(
        "--max-nonfinite",
        type=count,
        metavar="N",
        default=10,
        help="exit with code 1 after N consecutive such steps; 0 disables this "
        "(default: %(default)s)",
    )
    add(
        "--skip-spikes",
        type=nonnegative,
        metavar="SIGMA",
        default=0.0,
        help="skip the update of a step whose loss or gradient norm exceeds the mean of the last "
        "128 steps by more than SIGMA standard deviations, and count it (default: never)",
    )


def _add_run(add: Callable[..., Any]) -> None:
    add("--steps", type=positive, help=preset_default("steps"))
    add("--eval-every", type=positive, metavar="STEPS", help="default: a twelfth of --steps")
    add(
        "--eval-batches",
        type=positive,
        default=16,
        metavar="N",
        help="batches of held-out text (default: %(default)s)",
    )
    add("--out", type=nonempty, metavar="DIR", help="default: runs/<preset or model>-<optimizer>")
    add(
        "--save-every",
        type=count,
        metavar="STEPS",
        default=200,
        help="steps between saves; 0: at the end only (default: %(default)s)",
    )
    add(
        "--async-save",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write checkpoints while training continues, from a copy of each rank's shards in "
        "CPU memory; the run waits for the last one (default: --async-save)",
    )
    add(
        "--check-replicas",
        type=count,
        metavar="STEPS",
        default=0,
        help="compare the replicas of weights and states every STEPS steps, and end the run if "
        "they differ: a hardware fault (default: never)",
    )
    add(
        "--precision-stats",
        type=count,
        metavar="STEPS",
        default=0,
        help="every STEPS steps, write what bf16 costs in the step to metrics.jsonl: lost updates, "
        "effective descent quality, norms; docs/precision.md has the keys (default: never)",
    )
    add(
        "--precision-fraction",
        type=share,
        metavar="SHARE",
        default=0.125,
        help="share of the elements that --precision-stats reads for its estimates; 1 reads all, "
        "exactly (default: %(default)s)",
    )
    add(
        "--keep",
        type=positive,
        metavar="N",
        default=2,
        help="newest checkpoints to keep (default: %(default)s)",
    )
    add(
        "--export-hf",
        choices=("float32", "bfloat16"),
        help="at each save, which is then blocking, also write --model with the new weights to "
        "<out>/hf/step-*, for from_pretrained(); <out>/hf/latest is the newest (default: never)",
    )
    add(
        "--resume",
        type=nonempty,
        metavar="auto|newest-good|PATH",
        help="default: continue a run of the same configuration in --out, if any, from its newest "
        "undamaged checkpoint. auto: from the newest checkpoint in --out, also with another "
        "--lr, --steps or data; newest-good: the same, from the newest undamaged one",
    )
    add(
        "--grace",
        type=nonnegative,
        metavar="SECONDS",
        help="time to save and end after SIGTERM, SIGINT, SIGUSR1 or SIGHUP; a save that takes "
        "longer is abandoned (default: TORCH_ELASTIC_SHUTDOWN_TIMEOUT, else "
        f"{DEFAULT_GRACE_S:g})",
    )
    add(
        "--step-timeout",
        type=nonnegative,
        metavar="SECONDS",
        default=0.0,
        help="end the run with exit code 1 when a rank hangs: if a micro-batch, an optimizer step, "
        "a batch of an evaluation or a save takes longer; 0 disables this (default: %(default)g)",
    )


def _add_reports(add: Callable[..., Any]) -> None:
    add(
        "--tensorboard",
        action=argparse.BooleanOptionalAction,
        help="write <out>/tensorboard (default: if the package tensorboard is installed)",
    )
    add(
        "--wandb",
        type=nonempty,
        metavar="PROJECT",
        help="report to this project of W&B, through the package wandb (default: do not)",
    )
    add(
        "--print-every",
        type=positive,
        metavar="STEPS",
        help="steps between lines of progress if stderr is not a terminal (default: a fiftieth of "
        "--steps)",
    )
    add("--no-progress", dest="progress", action="store_false", help="no progress bar or lines")


def options_without_effect(args: argparse.Namespace) -> Iterator[str]:
    """Yield notes on options without effect, and on a warm-up that is longer than the run.

    They are not errors, so that one command line can serve several optimizers.
    """
    for name in ("optimizer_backend", "check_replicas", "precision_stats"):
        value = getattr(args, name)
        if value and args.optimizer != "bf16":
            yield (
                f"--{name.replace('_', '-')} {value} has no effect with "
                f"--optimizer {args.optimizer}, only with bf16"
            )
    if args.vocab_size is not None and args.model is not None:
        yield f"--vocab-size {args.vocab_size} has no effect with --model, only with --preset"
    if args.final_lr is not None and args.schedule != "cosine":
        yield (
            f"--final-lr {args.final_lr:g} has no effect with --schedule {args.schedule}, "
            "only with cosine"
        )
    if args.warmup is not None and args.warmup > args.steps:
        yield (
            f"--warmup {args.warmup} is longer than --steps {args.steps}: "
            f"the learning rate will not reach --lr {args.lr:g}"
        )
