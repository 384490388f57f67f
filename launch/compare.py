"""Compare optimizers over seeds: held-out losses, and the paired gaps to fp32 AdamW.

    python launch/compare.py --seeds 6 --jobs 2

Runs ``train.py`` once per optimizer and seed; finished runs in ``--out`` are not repeated. Prints
a table. With ``--docs`` also writes it into ``docs/quality.md``, and plots the losses beside it.
Other arguments go to ``train.py``.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.markers import write_between_markers
from tqdm import tqdm
from training.metrics import read_curve

REPO = Path(__file__).resolve().parent.parent
LABELS = {
    "torch-fp32": "torch.optim.AdamW, fp32 weights",
    "bf16": "AdamW_BF16 (ours)",
    "torch-bf16": "torch.optim.AdamW, bf16 weights",
}
STYLES = {"torch-fp32": ("black", "-"), "bf16": ("tab:blue", "--"), "torch-bf16": ("tab:red", "-")}
BEGIN, END = "<!-- compare:begin -->", "<!-- compare:end -->"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument(
        "--jobs", type=int, default=1, help="concurrent runs, of one thread each if more than one"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument(
        "--docs", action="store_true", help="write the table and the plot into docs/"
    )
    args, train_args = parser.parse_known_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [
            pool.submit(train, args.out, optimizer, seed, train_args, args.jobs > 1)
            for seed in range(args.seeds)
            for optimizer in LABELS
        ]
        for job in tqdm(jobs, unit="run"):
            job.result()
    curves = {
        optimizer: [held_out_curve(args.out, optimizer, seed) for seed in range(args.seeds)]
        for optimizer in LABELS
    }
    command = " ".join(["python launch/compare.py", f"--seeds {args.seeds}", *train_args])
    text = f"{table(curves)}\n\nRepeat with `{command}`."
    print(text)
    if args.docs:
        write_between_markers(REPO / "docs" / "quality.md", BEGIN, END, text)
        plot(curves, REPO / "docs" / "img" / "quality.png")


def run_dir(out: Path, optimizer: str, seed: int) -> Path:
    return out / f"{optimizer}-{seed}"


def train(out: Path, optimizer: str, seed: int, train_args: list[str], one_thread: bool) -> None:
    """Run ``train.py`` in one process, unless the run is finished."""
    path = run_dir(out, optimizer, seed)
    if (path / "finished").exists():
        return
    path.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(REPO / "launch" / "train.py"), "--optimizer", optimizer]
    command += ["--seed", str(seed), "--out", str(path), "--no-progress", "--save-every", "0"]
    command += train_args
    env = {**os.environ, "OMP_NUM_THREADS": "1"} if one_thread else None
    with (path / "log.txt").open("w") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=env).returncode
    if code != 0:
        raise SystemExit(f"{' '.join(command)} failed; see {path / 'log.txt'}")
    (path / "finished").touch()


def held_out_curve(out: Path, optimizer: str, seed: int) -> dict[int, float]:
    """Return a run's held-out loss by step."""
    return dict(read_curve(run_dir(out, optimizer, seed) / "metrics.jsonl", "held_out_loss"))


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    if len(values) == 1:
        return values[0], math.nan
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def table(curves: dict[str, list[dict[int, float]]]) -> str:
    """Return a Markdown table: mean held-out loss, and the gap to fp32 paired by seed."""
    losses = {
        optimizer: [curve[max(curve)] for curve in runs] for optimizer, runs in curves.items()
    }
    rows = [
        "| optimizer | held-out loss (nats a byte) | gap to fp32, paired by seed "
        "| gap of each seed |",
        "|---|---|---|---|",
    ]
    for optimizer, values in losses.items():
        mean, error = mean_and_error(values)
        cells = ["", ""]
        if optimizer != "torch-fp32":
            gaps = [a - b for a, b in zip(values, losses["torch-fp32"], strict=True)]
            gap, gap_error = mean_and_error(gaps)
            cells = [f"{gap:+.4f} ± {gap_error:.4f}", " ".join(f"{g:+.4f}" for g in gaps)]
        rows.append(f"| {LABELS[optimizer]} | {mean:.4f} ± {error:.4f} | {cells[0]} | {cells[1]} |")
    return "\n".join(rows)


def plot(curves: dict[str, list[dict[int, float]]], path: Path) -> None:
    """Plot the mean held-out loss over steps, and the gap to fp32, which shows the difference."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    base = curves["torch-fp32"]
    steps = sorted(base[0])
    for name, (color, style) in STYLES.items():
        means = [statistics.mean(c[s] for c in curves[name]) for s in steps]
        left.plot(steps, means, style, color=color, label=LABELS[name])
        if name != "torch-fp32":
            gaps = [[a[s] - b[s] for a, b in zip(curves[name], base, strict=True)] for s in steps]
            gap, error = zip(*map(mean_and_error, gaps), strict=True)
            right.errorbar(steps, gap, error, color=color, fmt=style, capsize=2, label=LABELS[name])
    right.axhline(0.0, color="black", linewidth=0.8)
    ylabel = "held-out loss (nats a byte)"
    left.set(xlabel="step", ylabel=ylabel, title="small GPT on Python sources")
    title = f"paired over {len(base)} seeds, with standard errors"
    right.set(xlabel="step", ylabel="gap to fp32 AdamW", title=title)
    left.legend()
    right.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
