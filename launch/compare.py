"""Compare optimizers over seeds: held-out losses, and the paired gaps to fp32 AdamW.

    python launch/compare.py --seeds 6 --jobs 2
    python launch/compare.py --preset small --budget 10     # on a GPU, in ten minutes

Runs ``train.py`` once per optimizer and seed, and prints a table. Skips runs already finished in
``--out`` with the same arguments. With ``--docs`` also writes the table into the preset's section
of ``docs/quality.md``, and plots losses and memory. Other arguments go to ``train.py``.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from bench.markers import write_between_markers
from tqdm import tqdm
from training import options as train_options
from training.command_line import (
    Parser,
    is_installed,
    output_folder,
    positive,
    positive_float,
)
from training.errors import WRONG_USAGE, RunError, UsageError, exit_code
from training.metrics import read_curve
from training.optimizers import OPTIMIZERS

REPO = Path(__file__).resolve().parent.parent
BASELINE = "torch-fp32"
DOCS = REPO / "docs"
PER_RUN_OPTIONS = ("--optimizer", "--seed", "--out", "--resume")  # compare.py sets them
CALIBRATION_STEPS = 20
MIN_STEPS = 50  # fewer say nothing about an optimizer


class Result(NamedTuple):
    """The runs of one optimizer, one for each seed.

    Attributes:
        curves: held-out loss by step, in nats per byte.
        state_bytes: bytes of optimizer state per parameter.
    """

    curves: list[dict[int, float]]
    state_bytes: float


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: compare(*parse_args(argv)))


def compare(args: argparse.Namespace, train_args: list[str]) -> int:
    names = args.optimizers or [name for name in OPTIMIZERS if is_available(name)]
    names = [BASELINE, *(name for name in names if name != BASELINE)]
    if args.budget is not None:
        runs = math.ceil(len(names) * args.seeds / args.jobs)
        train_args = [*train_args, "--steps", str(steps_within_budget(args, runs, train_args))]
    # Runs with the same arguments and the same content of --config share a folder.
    content = "" if args.config is None else Path(args.config).read_text()
    key = "\0".join([*train_args, content]).encode()
    folder = args.out / hashlib.sha256(key).hexdigest()[:10]
    has_failed = threading.Event()

    def run(name: str, seed: int) -> None:
        if has_failed.is_set():
            return
        try:
            run_train(folder / f"{name}-{seed}", name, seed, train_args, args.jobs > 1)
        except BaseException:
            has_failed.set()
            raise

    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(run, name, seed) for seed in range(args.seeds) for name in names]
        for job in tqdm(jobs, unit="run"):
            job.result()
    results = {name: read_result(folder, name, args.seeds) for name in names}
    options = [*(["--optimizers", *args.optimizers] if args.optimizers else []), *train_args]
    command = shlex.join(["python", "launch/compare.py", "--seeds", str(args.seeds), *options])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    text = f"{table(results)}\n\nRepeat with `{command}`; this was on {device}."
    print(text)
    if args.docs:
        write_docs(DOCS, args.model_name, results, text)
    return 0


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return this script's arguments, and the list of those for ``train.py``."""
    parser = Parser("compare.py", __doc__)
    parser.add_argument(
        "--seeds", type=positive, default=6, help="runs of each optimizer (default: 6)"
    )
    parser.add_argument(
        "--optimizers",
        nargs="+",
        choices=OPTIMIZERS,
        metavar="NAME",
        help=f"optimizers to compare, of {', '.join(OPTIMIZERS)}; {BASELINE} always runs, as the "
        "baseline (default: all that are installed and run on this device)",
    )
    parser.add_argument(
        "--budget",
        type=positive_float,
        metavar="MINUTES",
        help="choose --steps of train.py so that all runs together take about this many minutes",
    )
    parser.add_argument(
        "--jobs",
        type=positive,
        default=1,
        help="runs at the same time; if more than one, each has one CPU thread (default: 1)",
    )
    parser.add_argument(
        "--out",
        type=output_folder,
        default=Path("runs/compare"),
        help="folder of all runs (default: runs/compare)",
    )
    parser.add_argument(
        "--docs", action="store_true", help="write the table and the plot into docs/"
    )
    args, train_args = parser.parse_known_args(argv)
    given = {argument.split("=")[0] for argument in train_args}
    for option in PER_RUN_OPTIONS:
        if option in given:
            raise UsageError(
                f"{option} is set for each run: use --optimizers, --seeds and --out; see --help."
            )
    if args.budget is not None and "--steps" in given:
        raise UsageError("--budget chooses --steps: give one of them.")
    for name in args.optimizers or ():
        reason = OPTIMIZERS[name].unavailable_reason(torch.cuda.is_available())
        if reason is not None:
            raise UsageError(f"--optimizers {name} {reason}: leave it out.")
    if args.docs and not is_installed("matplotlib"):
        raise UsageError("--docs needs the package matplotlib: install it.")
    parsed = train_options.parse_args(train_args)  # reports wrong options of train.py now
    args.config, args.model_name = parsed.config, train_options.model_name(parsed)
    return args, train_args


def is_available(name: str) -> bool:
    """Return True if an optimizer runs on this machine; else print the reason."""
    reason = OPTIMIZERS[name].unavailable_reason(torch.cuda.is_available())
    if reason is not None:
        print(f"without {name}: it {reason}", file=sys.stderr)
    return reason is None


def steps_within_budget(args: argparse.Namespace, runs: int, train_args: list[str]) -> int:
    """Return the steps per run with which ``runs`` consecutive runs fit into ``--budget``.

    Two short baseline runs separate the time per step from the start-up time.
    """
    seconds = []
    for steps in (1, 1 + CALIBRATION_STEPS):
        start = time.perf_counter()
        path = args.out / "calibration" / str(steps)
        # The default, about twelve evaluations in a run, would be one after each of these steps.
        eval_every = ["--eval-every", str(1 + CALIBRATION_STEPS)]
        calibration_args = [*eval_every, *train_args, "--steps", str(steps)]
        shutil.rmtree(path, ignore_errors=True)  # of an earlier comparison: it would resume
        run_train(path, BASELINE, 0, calibration_args, args.jobs > 1)
        seconds.append(time.perf_counter() - start)
    per_step = max(seconds[1] - seconds[0], 1e-3) / CALIBRATION_STEPS
    steps = int((args.budget * 60 / runs - seconds[0]) / per_step)
    if steps < MIN_STEPS:
        raise UsageError(
            f"--budget {args.budget:g} leaves {max(steps, 0)} steps for each of the runs, but at "
            f"least {MIN_STEPS} are needed: give more minutes, fewer --seeds or a smaller --preset."
        )
    print(f"{steps} steps in each run", file=sys.stderr)
    return steps


def run_train(
    path: Path, optimizer: str, seed: int, train_args: list[str], single_thread: bool
) -> None:
    """Run ``train.py`` in one process. Skip a finished run."""
    if (path / "finished").exists():
        return
    path.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(REPO / "launch" / "train.py"), "--optimizer", optimizer]
    command += ["--seed", str(seed), "--out", str(path), "--no-progress", "--save-every", "0"]
    command += train_args
    env = {**os.environ, "OMP_NUM_THREADS": "1"} if single_thread else None
    with (path / "log.txt").open("w") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=env).returncode
    if code != 0:
        errors = re.findall(r"^error: (.*)$", (path / "log.txt").read_text(), re.MULTILINE)
        reason = errors[0] if errors else f"train.py ended with exit code {code}"
        message = f"a run of --optimizer {optimizer} failed: {reason} (log: {path / 'log.txt'})"
        raise UsageError(message) if code == WRONG_USAGE else RunError(message)
    (path / "finished").touch()


def read_result(folder: Path, name: str, seeds: int) -> Result:
    """Read the runs of one optimizer."""
    paths = [folder / f"{name}-{seed}" for seed in range(seeds)]
    curves = [dict(read_curve(path / "metrics.jsonl", "held_out_loss")) for path in paths]
    found = re.search(r"([\d.]+) per parameter", (paths[0] / "log.txt").read_text())
    assert found is not None, "train.py prints the bytes of state per parameter"
    return Result(curves, float(found[1]))


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """Return the mean and its standard error, None for a single value."""
    if len(values) == 1:
        return values[0], None
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def with_error(values: list[float], sign: str = "") -> str:
    mean, error = mean_and_error(values)
    return f"{mean:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")


def bytes_per_param(name: str, result: Result) -> tuple[int, float]:
    """Return the bytes per parameter of the weight and of the optimizer state."""
    return OPTIMIZERS[name].weight_dtype.itemsize, result.state_bytes


def table(results: dict[str, Result]) -> str:
    """Return a Markdown table of mean held-out losses and their gaps to fp32, paired by seed."""
    losses = {
        name: [curve[max(curve)] for curve in result.curves] for name, result in results.items()
    }
    rows = [
        "| optimizer | weight + state, B per parameter | held-out loss (nats a byte) "
        "| gap to fp32, paired by seed | gap of each seed |",
        "|---|--:|---|---|---|",
    ]
    for name, values in losses.items():
        gaps = [a - b for a, b in zip(values, losses[BASELINE], strict=True)]
        cells = [
            OPTIMIZERS[name].label,
            f"{sum(bytes_per_param(name, results[name])):.2f}",
            with_error(values),
            "" if name == BASELINE else with_error(gaps, "+"),
            "" if name == BASELINE else " ".join(f"{gap:+.4f}" for gap in gaps),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def write_docs(docs: Path, model: str, results: dict[str, Result], text: str) -> None:
    """Write the table and the plot into the model's section of the docs."""
    begin, end = (f"<!-- compare {model}: {edge} -->" for edge in ("begin", "end"))
    write_between_markers(docs / "quality.md", begin, end, text)
    plot(results, docs / "img" / f"quality_{model}.png")


def plot(results: dict[str, Result], path: Path) -> None:
    """Plot the held-out loss and the gap to fp32, with their ranges over seeds, and memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(4, 4, 3))
    base = results[BASELINE].curves
    steps = sorted(base[0])
    for index, (name, result) in enumerate(results.items()):
        color = "black" if name == BASELINE else f"C{index - 1}"
        label = OPTIMIZERS[name].label
        losses = [[curve[step] for curve in result.curves] for step in steps]
        gaps = [
            [a[step] - b[step] for a, b in zip(result.curves, base, strict=True)] for step in steps
        ]
        shown = [(left, losses)] if name == BASELINE else [(left, losses), (middle, gaps)]
        for axes, values in shown:
            axes.plot(steps, list(map(statistics.mean, values)), color=color, label=label)
            axes.fill_between(
                steps, list(map(min, values)), list(map(max, values)), color=color, alpha=0.2
            )
        weight, state = bytes_per_param(name, result)
        right.barh(label, weight, color=color)
        right.barh(label, state, left=weight, color=color, alpha=0.5)
    middle.axhline(0.0, color="black", linewidth=0.8)
    ylabel = "held-out loss (nats a byte)"
    left.set(xlabel="step", ylabel=ylabel, title="held-out loss, range over seeds")
    title = f"paired over {len(base)} seed(s), range over seeds"
    middle.set(xlabel="step", ylabel="gap to fp32 AdamW", title=title)
    right.set(xlabel="bytes per parameter: weight, state")
    right.invert_yaxis()
    left.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
