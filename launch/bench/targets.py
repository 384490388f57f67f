"""Speed targets of the project, and the check of a run of ``benchmark.py step`` against them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from bench.measure import parse_size, ratio, times_of


@dataclass(frozen=True)
class Target:
    """A target and its measured figure; ``met`` is None if the run has not measured it."""

    name: str
    figure: str
    met: bool | None

    def __str__(self) -> str:
        mark = {True: "met", False: "NOT MET", None: "not measured"}[self.met]
        return f"[{mark:>12}] {self.name}" + (f": {self.figure}" if self.figure else "")


def targets(run: dict[str, Any]) -> list[Target]:
    """Check a run, the dictionary that the benchmark writes as JSON."""
    return _cpu_targets(run) if run["machine"]["device"] == "cpu" else _cuda_targets(run)


def _cpu_targets(run: dict[str, Any]) -> list[Target]:
    selected = run["machine"]["isa"]

    def ours(isa: str) -> str:
        return "ours" if isa == selected else f"ours-{isa}"

    found = [
        _share(
            run,
            size,
            threads=1,
            key=ours(isa),
            ceiling=f"ceiling-{isa}",
            least=least,
            how=f"{name}, one thread",
        )
        for isa, least, name in (("avx512", 80.0, "AVX-512"), ("avx2", 34.0, "AVX2"))
        for size in ("16M", "128M")
    ]
    found.append(
        _share(
            run,
            "16M",
            threads=2,
            key="ours",
            ceiling=f"ceiling-{selected}",
            least=90.0,
            how="two threads",
        )
    )
    fused = "torch fused fp32 + bf16 copy of the weights"
    deepspeed = "DeepSpeedCPUAdam fp32 + bf16 copy of the weights"
    for key, least, name in (("torch-fused-fp32", 1.8, fused), ("deepspeed", 1.6, deepspeed)):
        found += [
            _times_as_fast(run, size, threads=1, key=key, least=least, other=name)
            for size in ("1M", "16M", "128M")
        ]
    found.append(
        _times_as_fast(run, "1000x1000", threads=1, key="torch-fused-fp32", least=2.2, other=fused)
    )
    found.append(_overhead(run, "ours-kernel", "the kernel call, with cached pointers,", 0.3))
    found.append(_overhead(run, "ours", "the whole step()", 0.3))
    found += [_clip(run, size, 1) for size in ("1M", "16M", "128M")]
    found += [_precision(run, size, 1) for size in ("16M", "128M")]
    fsdp2 = run.get("fsdp2")
    for key, step in (
        ("torch", "torch.optim.AdamW.step"),
        ("torch clip with our step", "the same step"),
    ):
        name = (
            "clip_grad_norm_ + step >= 5x as fast as torch.nn.utils.clip_grad_norm_ + "
            f"{step}: FSDP2, 2 ranks, 100 parameters"
        )
        if fsdp2 is None:
            found.append(Target(name, "add --fsdp2", None))
        else:
            found.append(Target(name, f"{fsdp2['ratios'][key]:.1f}x", fsdp2["ratios"][key] >= 5.0))
    return found


def _cuda_targets(run: dict[str, Any]) -> list[Target]:
    copies = "torch fused fp32 + copies of weights and gradients"
    found = [_share(run, "1B", threads=None, key="ours", ceiling="ceiling", least=90.0, how="GPU")]
    pairs = [(size, "torch-fused-fp32-grads", 2.0, copies) for size in ("128M", "1B")]
    pairs += [("1000x1000", key, 5.0, key) for key in ("optimi", "flashoptim")]
    found += [
        _times_as_fast(run, size, threads=None, key=key, least=least, other=other)
        for size, key, least, other in pairs
    ]
    found += [_clip(run, size, None) for size in ("16M", "128M", "1B")]
    found += [_precision(run, size, None) for size in ("128M", "1B")]
    return found + [
        Target(check["name"], check["detail"], check["passed"])
        for check in run.get("gpu_checks", [])
    ]


def _result(run: dict[str, Any], size: str, threads: int | None) -> dict[str, Any]:
    """Return the result of a size, or an empty one; ``threads`` None matches any number."""
    shapes = parse_size(size)
    wanted = (len(shapes), len(shapes) * shapes[0][0])
    for result in run["results"]:
        if (result["tensors"], result["numel"]) == wanted and threads in (None, result["threads"]):
            return result
    return {"batches": [], "failures": {}}


def _share(
    run: dict[str, Any],
    size: str,
    *,
    threads: int | None,
    key: str,
    ceiling: str,
    least: float,
    how: str,
) -> Target:
    name = f">= {least:.0f} % of the copy ceiling at {size}, {how}"
    share = ratio(_result(run, size, threads), ceiling, key)
    if share is None:
        return Target(name, "", None)
    return Target(name, f"{100 * share:.1f} %", 100 * share >= least)


def _times_as_fast(
    run: dict[str, Any], size: str, *, threads: int | None, key: str, least: float, other: str
) -> Target:
    name = f">= {least}x as fast as {other} at {size}" + (", one thread" if threads == 1 else "")
    result = _result(run, size, threads)
    found = ratio(result, key, "ours")
    if found is None:
        return Target(name, result["failures"].get(key, ""), None)
    return Target(name, f"{found:.2f}x", found >= least)


def _overhead(run: dict[str, Any], key: str, what: str, most: float) -> Target:
    name = f"<= {most} us a tensor: {what} on 1000 tensors of one element, one thread"
    result = _result(run, "1000x1", 1)
    if not times_of(result, key):
        return Target(name, "", None)
    others = {"": key, "torch fused ": "torch-fused-bf16", "torch foreach ": "torch-foreach-bf16"}
    per_tensor = {label: times_of(result, other) for label, other in others.items()}
    micros = {
        label: 1e6 * statistics.median(times) / result["tensors"]
        for label, times in per_tensor.items()
        if times
    }
    figure = ", ".join(f"{label}{value:.2f} us" for label, value in micros.items())
    return Target(name, figure, micros[""] <= most)


def _clip(run: dict[str, Any], size: str, threads: int | None) -> Target:
    suffix = ", one thread" if threads == 1 else ""
    name = f"clip_grad_norm_ + step <= 1.15x the step at {size}{suffix}"
    result = _result(run, size, threads)
    found = ratio(result, "ours-clip", "ours")
    if found is None:
        return Target(name, "", None)
    reading = ratio(result, "ours-reading", "ours")
    floor = ""
    if reading is not None:
        floor = f"; merely reading the gradients before the step takes {reading:.3f}x"
    return Target(name, f"{found:.3f}x{floor}", found <= 1.15)


def _precision(run: dict[str, Any], size: str, threads: int | None) -> Target:
    suffix = ", one thread" if threads == 1 else ""
    name = f"precision_stats of a sample + step <= 1.5x the step at {size}{suffix}"
    found = ratio(_result(run, size, threads), "ours-precision-sample", "ours")
    if found is None:
        return Target(name, "", None)
    return Target(name, f"{found:.2f}x", found <= 1.5)
