"""Tell whether a run fits before it is queued: memory and traffic of each rank, by strategy.

    python launch/plan.py --preset 8b --world-size 64 --memory 72
    python launch/plan.py --config config.json --world-size 1024 --strategy fsdp2 hsdp --recompute

It trains nothing and allocates no model. ``--config`` is the config.json of a Llama-like Hugging
Face model. Prints bytes in GB (10^9) for each strategy at the moment of a step that takes most
memory. With ``--memory``, names the strategy that sends least among those that fit, and exits with
code 1 if none does. A usage error prints one sentence, and the exit code is 2.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from bench.markers import write_between_markers
from planning.models import Shape, from_config, from_preset
from planning.planner import Options, cheapest, plan_all
from planning.report import GB, docs, plot, table
from training.command_line import Parser, positive, positive_float
from training.errors import UsageError, exit_code
from training.model import PRESETS
from training.options import DEFAULT_PRESET
from training.strategies import STRATEGIES

DOCS = Path(__file__).resolve().parent.parent / "docs"
BEGIN, END = "<!-- plans: begin -->", "<!-- plans: end -->"
DOCS_OPTIONS = Options(recompute=True)
DOCS_COMMAND = (
    "Repeat with `python launch/plan.py --docs`: as many sequences of 4,096 tokens in a step as\n"
    "there are GPUs, one at a time on each, with `--recompute`."
)


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse_args(argv)))


def run(args: argparse.Namespace) -> int:
    if args.docs:
        write_docs()
        return 0
    return print_plans(args)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("plan.py", __doc__)
    add = parser.add_argument
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "--preset",
        choices=PRESETS,
        default=DEFAULT_PRESET,
        help="model of train.py (default: %(default)s)",
    )
    model.add_argument(
        "--config", type=Path, metavar="JSON", help="config.json of a Llama-like model"
    )
    add(
        "--world-size",
        type=positive,
        default=8,
        metavar="N",
        help="number of ranks (default: %(default)s)",
    )
    add(
        "--strategy",
        choices=STRATEGIES,
        nargs="+",
        default=list(STRATEGIES),
        metavar="STRATEGY",
        help=f"strategies of train.py to compare, of {', '.join(STRATEGIES)} (default: all)",
    )
    add(
        "--optimizer",
        choices=("bf16", "torch-fp32", "torch-bf16"),
        default="bf16",
        help="bf16 is AdamW_BF16 (default: bf16)",
    )
    add(
        "--seq-len",
        type=positive,
        help="tokens in a sequence (default: the preset's, or 4096 with --config)",
    )
    add(
        "--micro-batch",
        type=positive,
        default=1,
        help="sequences of a forward pass on a rank (default: %(default)s)",
    )
    add(
        "--batch-size",
        type=positive,
        help="sequences in a step, over all ranks and micro-batches (default: a micro-batch for "
        "each rank)",
    )
    add("--recompute", action="store_true", help="plan with activation checkpointing of each layer")
    add(
        "--step-in-backward",
        action="store_true",
        help="AdamW_BF16(step_in_backward=True), which train.py does not have",
    )
    add(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="plan for its kernels (default: cuda)",
    )
    add("--memory", type=positive_float, metavar="GB", help="memory of a rank; names what fits")
    add("--docs", action="store_true", help="write the tables and the plot of docs/planning.md")
    args = parser.parse_args(argv)
    if args.step_in_backward and args.optimizer != "bf16":
        raise UsageError(
            f"--step-in-backward works with --optimizer bf16 only, not {args.optimizer}."
        )
    return args


def print_plans(args: argparse.Namespace) -> int:
    shape: Shape = from_config(args.config) if args.config else from_preset(args.preset)
    options = Options(
        optimizer=args.optimizer,
        batch_size=args.batch_size,
        micro_batch=args.micro_batch,
        seq_len=args.seq_len or shape.seq_len,
        recompute=args.recompute,
        in_backward=args.step_in_backward,
        device=args.device,
    )
    plans, refused = plan_all(shape, args.world_size, args.strategy, options)
    if not plans:
        reasons = [reason.rstrip(".") for reason in dict.fromkeys(refused.values())]
        raise UsageError(f"{'; '.join(reasons)}.")
    memory = args.memory and args.memory * GB
    print(table(plans, memory))
    for strategy, reason in refused.items():
        print(f"{strategy} cannot run: {reason}")
    if not memory:
        return 0
    best = cheapest(plans, memory)
    if best is None:
        least = min(plans, key=lambda plan: plan.total)
        print(
            f"nothing fits into {args.memory:g} GB: {least.strategy} takes least, "
            f"{least.total / GB:.3g} GB"
        )
        return 1
    accumulation = f" --grad-accum {best.micro_batches}" if best.micro_batches > 1 else ""
    print(f"sends least and fits: --strategy {best.strategy}{accumulation}")
    return 0


def write_docs() -> None:
    text = f"{docs(DOCS_OPTIONS)}\n\n{DOCS_COMMAND}"
    write_between_markers(DOCS / "planning.md", BEGIN, END, text)
    fp32 = replace(DOCS_OPTIONS, optimizer="torch-fp32")
    plot({"AdamW_BF16": DOCS_OPTIONS, "fp32 AdamW": fp32}, DOCS / "img" / "planning.png")


if __name__ == "__main__":
    sys.exit(main())
