"""The timing of ``benchmark.py``, interleaved: every contender takes one turn a round, so that what disturbs the machine disturbs them
all, and only times of the same round are compared."""

from __future__ import annotations

import gc
import math
import random
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.optimizers import Contender, Runner, Shapes

Times = dict[str, list[float]]  # seconds a step, by contender and round
MIN_ROUNDS = 5
MEMORY_SHARE = 0.7  # of what is free
LONG = 0.05  # seconds: a step that walks more memory than caches hold
SETTLE = 0.002  # seconds before a turn: an OpenMP pool's threads go on spinning for about that long, on cores that the next one needs


def parse_size(text: str) -> list[tuple[int, ...]]:
    """Shapes of ``128M`` (one tensor of 128 * 2^20 elements) or ``1000x256K`` (1000 tensors).

    Raises:
        ValueError: the text is no size.
    """
    match = re.fullmatch(r"(?:([0-9]+)x)?([0-9]+)([KMB]?)", text)
    if match is None or int(match[2]) == 0 or match[1] == "0":
        raise ValueError(
            f"Invalid size: {text!r}; write a number of elements such as 128M (K, M, B: powers of 1024) or 1000x1000"
        )
    numel = int(match[2]) << {"": 0, "K": 10, "M": 20, "B": 30}[match[3]]
    return [(numel,)] * int(match[1] or 1)


def batches(
    contenders: list[Contender], numel: int, free: float
) -> tuple[list[list[Contender]], list[Contender]]:
    """Split the contenders into batches that fit into memory together.

    The first contender (ours) is in every batch, and each batch holds the ceilings that its members are measured against.

    Args:
        contenders: ours first.
        numel: elements of all parameters.
        free: bytes.

    Returns:
        The batches, and the contenders that do not fit even alone with the first.
    """
    budget = MEMORY_SHARE * free
    by_key = {c.key: c for c in contenders}

    def with_needs(members: list[Contender]) -> list[Contender]:
        keys = {contenders[0].key} | {
            key
            for c in [contenders[0], *members]
            for key in (c.key, c.on, c.ceiling)
            if key in by_key
        }
        return [c for c in contenders if c.key in keys]

    def fits(members: list[Contender]) -> bool:
        return sum(c.memory for c in with_needs(members)) * numel <= budget

    result: list[list[Contender]] = []
    too_large = []
    current: list[Contender] = []
    for contender in contenders:
        if not fits([contender]):
            too_large.append(contender)
        elif contender not in with_needs(current) or not current:
            if current and not fits([*current, contender]):
                result.append(with_needs(current))
                current = []
            current.append(contender)
    return [*result, *([with_needs(current)] if current else [])], too_large


def free_memory(device: torch.device) -> int:
    """Bytes that new tensors can take."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            return next(
                int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")
            )
    except (OSError, StopIteration):
        return 8 << 30


def measure_size(
    contenders: list[Contender],
    shapes: Shapes,
    device: torch.device,
    *,
    rounds: int,
    seconds: float,
    turn: float,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Time all contenders on parameters of ``shapes``.

    Args:
        contenders: ours first.
        rounds, seconds: stop a batch after so many rounds, or after so much time and ``MIN_ROUNDS``.
        turn: a turn takes as many steps as fill these seconds, at least one; one that is not timed comes first, unless it takes long.
        report: told what is going on.

    Returns:
        ``{"batches": [Times], "failures": {key: why it was not measured}}``. Every batch has its own times of ours.
    """
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    slow = [c for c in contenders if numel > c.most]
    groups, too_large = batches(
        [c for c in contenders if c not in slow], numel, free_memory(device)
    )
    failures = {c.key: "not measured: a step would take seconds" for c in slow}
    failures |= {
        c.key: f"not measured: {c.memory * numel / 2**30:.1f} GiB beside ours do not fit into memory"
        for c in too_large
    }
    measured = []
    for number, group in enumerate(groups):
        runners: dict[str, Runner] = {}
        for contender in group:
            if contender.key not in failures:
                try:
                    runners[contender.key] = _made(contender, shapes, device, runners)
                except Exception as error:
                    failures[contender.key] = why_failed(error, contender.package)
                    report(f"  {contender.label}: {failures[contender.key]}")
        report(f"  batch {number + 1} of {len(groups)}: {', '.join(runners)}")
        measured.append(
            measure(runners, device, failures, rounds=rounds, seconds=seconds, turn=turn)
        )
        runners.clear()
        gc.collect()
    return {"batches": measured, "failures": failures}


def _made(
    contender: Contender, shapes: Shapes, device: torch.device, others: dict[str, Runner]
) -> Runner:
    """The contender with its tensors, after a first step, which makes states and may compile."""
    if contender.on is None:
        runner = contender.make(shapes, device)
    elif contender.on in others:
        runner = contender.make(shapes, device, others[contender.on].optimizer)
    else:
        raise LookupError(f"it runs on the tensors of {contender.on}, which failed")
    _turn(runner, 1, device, warm=False)
    return runner


def measure(
    runners: dict[str, Runner],
    device: torch.device,
    failures: dict[str, str],
    *,
    rounds: int,
    seconds: float,
    turn: float,
) -> Times:
    """Time each runner once a round, after two rounds to warm up. One that fails is dropped into ``failures``.

    The order is drawn anew each round: in a fixed one, even if it rotated, each would always find the caches that the same other left.
    """
    repeats: dict[str, int] = {}
    warm: dict[str, bool] = {}
    order_of = random.Random(0)
    times: Times = {key: [] for key in runners}
    deadline = math.inf
    gc.collect()
    gc.disable()
    try:
        for round_ in range(-2, rounds):
            if round_ == 0:
                deadline = time.perf_counter() + seconds
            if round_ >= MIN_ROUNDS and time.perf_counter() > deadline:
                break
            for key in order_of.sample(list(times), len(times)):
                try:
                    elapsed = _turn(
                        runners[key], repeats.get(key, 1), device, warm=warm.get(key, False)
                    )
                except Exception as error:
                    failures[key] = why_failed(error, None)
                    del times[key]
                    continue
                if round_ < 0:
                    repeats[key] = max(1, math.ceil(turn / elapsed))
                    warm[key] = repeats[key] > 1 or elapsed < LONG
                else:
                    times[key].append(elapsed)
    finally:
        gc.enable()
    return times


def _turn(runner: Runner, repeats: int, device: torch.device, *, warm: bool) -> float:
    """Seconds a step; if ``warm``, after one that is not timed, so that it finds the caches as steps find them that follow each other."""
    runner.before()
    if warm:
        runner.step()
    _synchronize(device)
    if device.type == "cpu" and torch.get_num_threads() > 1:
        time.sleep(SETTLE)
    start = time.perf_counter()
    for _ in range(repeats):
        runner.step()
    _synchronize(device)
    return (time.perf_counter() - start) / repeats


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def why_failed(error: Exception, package: str | None) -> str:
    """One short line for a table."""
    if isinstance(error, ModuleNotFoundError) and package is not None:
        missing = error.name or package
        known = {package, package.removeprefix("torch-")}
        return (
            "not installed"
            if missing.partition(".")[0] in known
            else f"failed: it needs the package {missing}"
        )
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"failed: {first_line[:120]}"


def times_of(result: dict[str, Any], key: str) -> list[float]:
    """Seconds a step of a contender in each round, of the first batch that has it; empty where it was not measured."""
    return next((times[key] for times in result["batches"] if times.get(key)), [])


def ratio(result: dict[str, Any], key: str, to: str) -> float | None:
    """How many times as long ``key`` takes as ``to``: the median over rounds of the ratios within a round. None where they never met."""
    for times in result["batches"]:
        if times.get(key) and times.get(to):
            return statistics.median(a / b for a, b in zip(times[key], times[to], strict=True))
    return None
