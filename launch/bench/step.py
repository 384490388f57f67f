"""Time the optimizer's step against other optimizers and against the machine's own copy bandwidth.

    python launch/benchmark.py --device cpu --threads 1 2 --fsdp2 --json runs/benchmark.json --docs
    python launch/benchmark.py --device cuda --json runs/benchmark_cuda.json --docs

Contenders run interleaved, one turn each a round; ratios are taken within rounds. Gradients are set once: the forward and backward pass
are not timed. Packages that are not installed (deepspeed, torch-optimi, flashoptim, torchao) are left out and named. Packages
that compile their kernels at first use need a C++ compiler (and deepspeed also ninja). On a GPU, ``gpu_checks.py`` runs first: bits,
launches, host syncs, CUDA graphs and memory; the exit status is 1 if one of them fails.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

REPO = Path(__file__).resolve().parent.parent
if str(REPO) not in sys.path:
    sys.path.insert(1, str(REPO))  # run from a clone that is not installed

from bench.measure import measure_size, parse_size  # noqa: E402
from bench.optimizers import contenders  # noqa: E402
from bench.report import describe, machine, markdown, plain_table, plot, rows, write_between_markers  # noqa: E402
from bench.targets import as_data, targets  # noqa: E402

SIZES = {
    "cpu": ["1M", "16M", "128M", "1000x1000", "1000x1"],
    "cuda": [
        "1M",
        "16M",
        "128M",
        "1000x1000",
        "1000x1",
        "1B",
    ],  # what may run out of memory or time comes last
}
DOCS = REPO / "docs" / "benchmarks.md"


def main() -> int:
    args = parse_arguments()
    device = (
        torch.device(args.device, torch.cuda.current_device())
        if args.device == "cuda"
        else torch.device("cpu")
    )
    run: dict[str, Any] = {"machine": machine(device), "command": repeat_command(), "results": []}
    print(describe(run["machine"]), flush=True)
    if device.type == "cuda":
        from bench.gpu_checks import run_checks

        run["gpu_checks"] = [check.as_data() for check in run_checks(device)]
        write_json(run, args)
    everyone = contenders(device)
    chosen = [c for c in everyone if args.only is None or c.key == "ours" or c.key in args.only]
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
            timing = {"rounds": args.rounds, "seconds": args.seconds, "turn": args.turn / 1e3}
            result |= measure_size(
                chosen, shapes, device, **timing, report=lambda text: print(text, flush=True)
            )
            result["rows"] = rows(chosen, result)
            run["results"].append(result)
            print(plain_table(result), flush=True)
            write_json(run, args)
    if args.fsdp2:
        from bench.fsdp2 import measure_fsdp2

        run["fsdp2"] = measure_fsdp2(args.rounds)
    judged = targets(run)
    run["targets"] = as_data(judged)
    lines = [str(target) for target in judged]
    print("\nTargets\n" + "\n".join(lines))
    write_json(run, args)
    write_charts(run, lines, args)
    return int(any(not check["passed"] for check in run.get("gpu_checks", [])))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        default=None,
        help="CPU threads; several are measured one after another",
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=None,
        help="elements (128M; K, M, B are powers of 1024) or tensors x elements (1000x1000)",
    )
    parser.add_argument("--rounds", type=int, default=15, help="at most, for each size")
    parser.add_argument(
        "--seconds",
        type=float,
        default=30.0,
        help="stop after so long for each size, but not before 5 rounds",
    )
    parser.add_argument(
        "--turn",
        type=float,
        default=None,
        help="least ms of a turn: shorter steps are repeated (5; cuda: 20)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=None,
        metavar="KEY",
        help="only these contenders, beside ours (keys as in the JSON file)",
    )
    parser.add_argument(
        "--fsdp2",
        action="store_true",
        help="compare clipping on an FSDP2 model over 2 gloo ranks too (CPU)",
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=None,
        metavar="FILE",
        help="write every round, and the chart beside it",
    )
    parser.add_argument(
        "--docs",
        type=Path,
        nargs="?",
        const=DOCS,
        default=None,
        metavar="FILE",
        help="write the table into docs/benchmarks.md",
    )
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no CUDA or ROCm device; use --device cpu")
    args.threads = args.threads or [torch.get_num_threads()]
    if min(args.threads) < 1 or args.rounds < 1:
        parser.error("--threads and --rounds must be at least 1")
    args.sizes = args.sizes or SIZES[args.device]
    args.turn = args.turn if args.turn is not None else {"cpu": 5.0, "cuda": 20.0}[args.device]
    try:
        for size in args.sizes:
            parse_size(size)
        if args.only is not None:
            known = {c.key for c in contenders(torch.device(args.device))}
            unknown = set(args.only) - known
            if unknown:
                raise ValueError(
                    f"--only names {', '.join(sorted(unknown))}; the contenders here are {', '.join(sorted(known))}"
                )
    except ValueError as error:
        parser.error(str(error))
    return args


def repeat_command() -> str:
    """The command line without where its output goes."""
    words: list[str] = []
    skip = False
    for word in sys.argv[1:]:
        if word.startswith("-"):
            skip = word.partition("=")[0] in ("--json", "--docs")
        if not skip:
            words.append(word)
    return shlex.join(["python", "launch/benchmark.py", *words])


def write_json(run: dict[str, Any], args: argparse.Namespace) -> None:
    """What was measured so far, where asked for: a run that is cut short loses no size that was done."""
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(run, indent=1) + "\n")


def write_charts(run: dict[str, Any], targets: list[str], args: argparse.Namespace) -> None:
    """The docs and the chart of each, where asked for."""
    device = run["machine"]["device"]
    charts = []
    if args.docs is not None:
        write_between_markers(args.docs, device, markdown(run, targets))
        charts.append((args.docs, args.docs.parent / "img" / f"benchmark_{device}.png"))
    if args.json is not None:
        charts.append((args.json, args.json.with_suffix(".png")))
    for written, chart in charts:
        drawn = plot(run, chart)
        print(
            f"wrote {os.path.relpath(written)} and "
            + (os.path.relpath(chart) if drawn else "no chart, as matplotlib is not installed")
        )


if __name__ == "__main__":
    sys.exit(main())
