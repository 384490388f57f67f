"""Time the optimizer step, against other optimizers and the machine's copy bandwidth.

    python launch/benchmark.py --device cpu --threads 1 2 --fsdp2 --json runs/cpu.json --docs
    python launch/benchmark.py --device cuda --json runs/cuda.json --docs

Contenders run interleaved, one turn each per round; ratios are taken within rounds. Gradients are
set once: forward and backward passes are not timed. Packages that are not installed (deepspeed,
torch-optimi, flashoptim, torchao) are named and skipped. Some compile their kernels at first use
and need a C++ compiler, deepspeed also ninja. On a GPU, the checks of ``gpu-checks`` run first; the
exit status is 1 if one of them fails.
"""

from __future__ import annotations

import argparse
import os
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from training.command_line import (
    Parser,
    nonnegative,
    output_file,
    positive,
    positive_float,
    write_json,
)
from training.errors import UsageError

from bench.fsdp2 import measure_fsdp2
from bench.measure import measure_size, parse_size
from bench.optimizers import contenders
from bench.report import describe, machine, markdown, plain_table, plot, rows, write_section
from bench.targets import targets

SIZES = {
    "cpu": ["1M", "16M", "128M", "1000x1000", "1000x1"],
    # The size that may exceed the memory or the time comes last.
    "cuda": ["1M", "16M", "128M", "1000x1000", "1000x1", "1B"],
}
DOCS = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    device = torch.device("cpu")
    if args.device == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    run: dict[str, Any] = {"machine": machine(device), "command": command(argv), "results": []}
    print(describe(run["machine"]), flush=True)
    if device.type == "cuda":
        from bench.gpu_checks import run_checks

        run["gpu_checks"] = [asdict(check) for check in run_checks(device)]
        write_json(args.json, run)
    chosen = [
        c for c in contenders(device) if args.only is None or c.key == "ours" or c.key in args.only
    ]
    timing = {"rounds": args.rounds, "seconds": args.seconds, "turn": args.turn / 1e3}
    for threads in args.threads:
        torch.set_num_threads(threads)
        for size in args.sizes:
            print(f"\n{size}, {threads} thread(s)", flush=True)
            shapes = parse_size(size)
            result: dict[str, Any] = {
                "size": size,
                "tensors": len(shapes),
                "numel": len(shapes) * shapes[0][0],
                "threads": threads,
            }
            result |= measure_size(
                chosen, shapes, device, **timing, log=lambda text: print(text, flush=True)
            )
            result["rows"] = rows(chosen, result)
            run["results"].append(result)
            print(plain_table(result), flush=True)
            write_json(args.json, run)  # an interrupted run keeps its finished sizes
    if args.fsdp2:
        run["fsdp2"] = measure_fsdp2(args.rounds)
    judged = targets(run)
    run["targets"] = [asdict(target) for target in judged]
    lines = [str(target) for target in judged]
    print("\nTargets\n" + "\n".join(lines))
    write_json(args.json, run)
    write_docs(run, lines, args)
    return int(any(not check["passed"] for check in run.get("gpu_checks", [])))


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser("benchmark.py step", __doc__)
    add = parser.add_argument
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=["cpu", "cuda"], default=default, help="default: cuda if there is one")
    add(
        "--threads",
        type=positive,
        nargs="+",
        metavar="N",
        help="number of CPU threads; with several numbers, measure with each (default: torch's)",
    )
    add(
        "--sizes",
        nargs="+",
        metavar="SIZE",
        help="elements of one tensor (128M; K, M, B are powers of 1024), or tensors x elements of "
        "each (1000x1000); the default is a range of both",
    )
    add(
        "--rounds",
        type=positive,
        default=15,
        metavar="N",
        help="measure each size in at most N rounds",
    )
    add(
        "--seconds",
        type=positive_float,
        default=30.0,
        help="start no further round of a batch of optimizers that fit into memory together after "
        "this time, but run at least 5 (default: %(default)s)",
    )
    add(
        "--turn",
        type=nonnegative,
        metavar="MS",
        help="in its turn in a round, repeat an optimizer's step for at least this many "
        "milliseconds, and take the mean (default: 5; cuda: 20)",
    )
    add(
        "--only",
        nargs="+",
        metavar="KEY",
        help="compare AdamW_BF16 with these contenders only; a wrong KEY lists them all",
    )
    add(
        "--fsdp2",
        action="store_true",
        help="also time clipping and step of an FSDP2 model on 2 CPU ranks, against torch's",
    )
    add(
        "--json", type=output_file, metavar="FILE", help="write all figures, and a plot beside them"
    )
    add(
        "--docs",
        type=output_file,
        nargs="?",
        const=DOCS,
        metavar="FILE",
        help="write tables and plot into the documentation (default: docs/benchmarks.md)",
    )
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda, but torch sees no CUDA or ROCm device: use --device cpu.")
    args.threads = args.threads or [torch.get_num_threads()]
    args.sizes = args.sizes or SIZES[args.device]
    args.turn = args.turn if args.turn is not None else {"cpu": 5.0, "cuda": 20.0}[args.device]
    try:
        for size in args.sizes:
            parse_size(size)
    except ValueError as error:
        parser.error(str(error))
    known = {c.key for c in contenders(torch.device(args.device))}
    unknown = set(args.only or ()) - known
    if unknown:
        parser.error(
            f"--only names {', '.join(sorted(unknown))}; "
            f"the contenders here are {', '.join(sorted(known))}"
        )
    return args


def command(argv: list[str]) -> str:
    """Return the command line without its output files."""
    words: list[str] = []
    skip = False
    for word in argv:
        if word.startswith("-"):
            skip = word.partition("=")[0] in ("--json", "--docs")
        if not skip:
            words.append(word)
    return shlex.join(["python", "launch/benchmark.py", *words])


def write_docs(run: dict[str, Any], targets: list[str], args: argparse.Namespace) -> None:
    """Write the section of ``--docs``, and a plot beside each output file."""
    device = run["machine"]["device"]
    plots = []
    if args.docs is not None:
        write_section(args.docs, device, markdown(run, targets))
        plots.append((args.docs, args.docs.parent / "img" / f"benchmark_{device}.png"))
    if args.json is not None:
        plots.append((args.json, args.json.with_suffix(".png")))
    for written, path in plots:
        drawn = plot(run, path)
        name = os.path.relpath(path) if drawn else "no plot, as matplotlib is not installed"
        print(f"wrote {os.path.relpath(written)} and {name}")
