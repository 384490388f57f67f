"""Compare optimizers over seeds: the same training runs with each, their held-out losses, and the paired gaps to fp32 AdamW.

    python launch/compare.py --seeds 6 --jobs 2

runs ``train.py`` once for each optimizer and seed (finished runs in ``--out`` are not repeated), prints the table, and with
``--docs`` writes it between the markers of ``docs/quality.md`` and draws the loss curves beside it. Arguments that it does not know
go to ``train.py``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

REPO = Path(__file__).resolve().parent.parent
OPTIMIZERS = ("torch-fp32", "bf16", "torch-bf16")
LABELS = {
    "torch-fp32": "torch.optim.AdamW, fp32 weights",
    "bf16": "AdamW_BF16 (ours)",
    "torch-bf16": "torch.optim.AdamW, bf16 weights",
}
BEGIN, END = "<!-- compare:begin -->", "<!-- compare:end -->"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time, one thread each if more than one"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument(
        "--docs", action="store_true", help="write the table and the picture into docs/"
    )
    args, train_args = parser.parse_known_args()
    runs = [(optimizer, seed) for seed in range(args.seeds) for optimizer in OPTIMIZERS]
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [
            pool.submit(
                train, args.out / f"{optimizer}-{seed}", optimizer, seed, train_args, args.jobs > 1
            )
            for optimizer, seed in runs
        ]
        for job in tqdm(jobs, unit="run"):
            job.result()
    losses = {
        optimizer: [final_loss(args.out / f"{optimizer}-{seed}") for seed in range(args.seeds)]
        for optimizer in OPTIMIZERS
    }
    command = " ".join(["python launch/compare.py", f"--seeds {args.seeds}", *train_args])
    text = f"{table(losses)}\n\nRepeat with `{command}`."
    print(text)
    if args.docs:
        write_between_markers(REPO / "docs" / "quality.md", text)
        plot(args.out, args.seeds, REPO / "docs" / "img" / "quality.png")


def train(out: Path, optimizer: str, seed: int, train_args: list[str], one_thread: bool) -> None:
    """Run ``train.py`` in one process, unless its folder holds the finished run."""
    if (out / "finished").exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    own = [
        "--optimizer",
        optimizer,
        "--seed",
        str(seed),
        "--out",
        str(out),
        "--no-progress",
        "--save-every",
        "0",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if one_thread else None
    with (out / "log.txt").open("w") as log:
        command = [sys.executable, str(REPO / "launch" / "train.py"), *own, *train_args]
        if (
            subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment
            ).returncode
            != 0
        ):
            raise SystemExit(f"{' '.join(command)} failed; see {out / 'log.txt'}")
    (out / "finished").touch()


def curve(out: Path, key: str) -> list[tuple[int, float]]:
    """(step, value) of each line of a run's metrics that has ``key``; null, which stands for a value that is not finite, as NaN."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        (line["step"], math.nan if line[key] is None else line[key])
        for line in lines
        if key in line
    ]


def final_loss(out: Path) -> float:
    return curve(out, "held_out_loss")[-1][1]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(
        values
    ) > 1 else math.nan


def table(losses: dict[str, list[float]]) -> str:
    """A Markdown table: mean held-out loss, and the gap to fp32 paired by seed."""
    base = losses["torch-fp32"]
    rows = [
        "| optimizer | held-out loss (nats a byte) | gap to fp32, paired by seed | gap of each seed |",
        "|---|---|---|---|",
    ]
    for optimizer, values in losses.items():
        mean, error = mean_and_error(values)
        gaps = [value - reference for value, reference in zip(values, base, strict=True)]
        gap, gap_error = mean_and_error(gaps)
        cells = (
            ["", ""]
            if optimizer == "torch-fp32"
            else [f"{gap:+.4f} ± {gap_error:.4f}", " ".join(f"{g:+.4f}" for g in gaps)]
        )
        rows.append(f"| {LABELS[optimizer]} | {mean:.4f} ± {error:.4f} | {cells[0]} | {cells[1]} |")
    return "\n".join(rows)


def write_between_markers(path: Path, text: str) -> None:
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def plot(out: Path, seeds: int, path: Path) -> None:
    """Held-out loss over the steps, mean over seeds; and the gap to fp32, where the difference can be seen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    styles = {
        "torch-fp32": ("black", "-"),
        "bf16": ("tab:blue", "--"),
        "torch-bf16": ("tab:red", "-"),
    }
    curves = {
        name: [dict(curve(out / f"{name}-{seed}", "held_out_loss")) for seed in range(seeds)]
        for name in OPTIMIZERS
    }
    steps = sorted(curves["torch-fp32"][0])
    for name, (color, style) in styles.items():
        left.plot(
            steps,
            [statistics.mean(c[s] for c in curves[name]) for s in steps],
            style,
            color=color,
            label=LABELS[name],
        )
        if name != "torch-fp32":
            gaps = [
                [a[s] - b[s] for a, b in zip(curves[name], curves["torch-fp32"], strict=True)]
                for s in steps
            ]
            means, errors = zip(*map(mean_and_error, gaps), strict=True)
            right.errorbar(
                steps, means, errors, color=color, fmt=style, capsize=2, label=LABELS[name]
            )
    right.axhline(0.0, color="black", linewidth=0.8)
    left.set(
        xlabel="step", ylabel="held-out loss (nats a byte)", title="small GPT on Python sources"
    )
    right.set(
        xlabel="step",
        ylabel="gap to fp32 AdamW",
        title=f"paired over {seeds} seeds, with standard errors",
    )
    left.legend()
    right.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
