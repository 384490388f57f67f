"""Interleaved timing of optimizers.

Every contender takes one turn per round, so that other load on the machine affects all of them.
Only times of the same round are compared.
"""

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
from training.world import synchronize

from bench.optimizers import Contender, Runner, Shapes

Times = dict[str, list[float]]  # seconds per step, by contender and round
MIN_ROUNDS = 5
MEMORY_SHARE = 0.7  # of the free memory
LONG_STEP = 0.05  # seconds; longer steps read more than caches hold, so they need no warm-up
# Seconds between turns. After a turn, the threads of an OpenMP pool spin for about this time on the
# cores that the next turn needs.
SETTLE_S = 0.002


def parse_size(text: str) -> list[tuple[int, ...]]:
    """Return the shapes of ``128M`` (one tensor of 128 * 2^20 elements) or ``1000x256K``.

    Raises:
        ValueError: the text is not a size.
    """
    match = re.fullmatch(r"(?:([0-9]+)x)?([0-9]+)([KMB]?)", text)
    if match is None or int(match[2]) == 0 or match[1] == "0":
        raise ValueError(
            f"Invalid size: {text!r}; write a number of elements such as 128M "
            "(K, M, B: powers of 1024) or 1000x1000"
        )
    numel = int(match[2]) << {"": 0, "K": 10, "M": 20, "B": 30}[match[3]]
    return [(numel,)] * int(match[1] or 1)


def split_by_memory(
    contenders: list[Contender], numel: int, free: float
) -> tuple[list[list[Contender]], list[Contender]]:
    """Split the contenders into batches that fit into memory together.

    The first contender (ours) is in every batch. Each batch also has the ceilings that its members
    are compared with.

    Args:
        contenders: ours first.
        numel: elements of all parameters.
        free: bytes of free memory.

    Returns:
        The batches, and the contenders that do not even fit together with the first alone.
    """
    budget = MEMORY_SHARE * free
    by_key = {c.key: c for c in contenders}

    def with_needs(members: list[Contender]) -> list[Contender]:
        needed = {contenders[0].key}
        for c in [contenders[0], *members]:
            needed |= {key for key in (c.key, c.runs_on, c.ceiling) if key in by_key}
        return [c for c in contenders if c.key in needed]

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
    """Return the bytes that new tensors can take."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            available = next(line for line in lines if line.startswith("MemAvailable"))
        return int(available.split()[1]) * 1024
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
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Time all contenders on parameters of ``shapes``.

    Args:
        contenders: ours first.
        shapes: of the parameters.
        device: of the parameters.
        rounds: stop a batch after this many rounds.
        seconds: start no further round of a batch after this time, but run ``MIN_ROUNDS``.
        turn: minimum seconds of a turn, which times one or more steps. An untimed step comes first
            unless steps are long.
        log: called with progress messages.

    Returns:
        ``{"batches": [Times], "failures": {key: reason}}``. Every batch times the first contender.
    """
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    slow = [c for c in contenders if numel > c.max_numel]
    fast = [c for c in contenders if numel <= c.max_numel]
    batches, too_large = split_by_memory(fast, numel, free_memory(device))
    failures = {c.key: "not measured: a step would take seconds" for c in slow}
    for c in too_large:
        gib = c.memory * numel / 2**30
        failures[c.key] = f"not measured: {gib:.1f} GiB beside ours do not fit into memory"
    measured = []
    for number, batch in enumerate(batches):
        runners: dict[str, Runner] = {}
        for contender in batch:
            if contender.key not in failures:
                try:
                    runners[contender.key] = _make_runner(contender, shapes, device, runners)
                except Exception as error:
                    failures[contender.key] = failure_reason(error, contender.package)
                    log(f"  {contender.label}: {failures[contender.key]}")
        log(f"  batch {number + 1} of {len(batches)}: {', '.join(runners)}")
        times = measure(runners, device, failures, rounds=rounds, seconds=seconds, turn=turn)
        measured.append(times)
        runners.clear()
        gc.collect()
    return {"batches": measured, "failures": failures}


def _make_runner(
    contender: Contender, shapes: Shapes, device: torch.device, others: dict[str, Runner]
) -> Runner:
    """Allocate a contender's tensors and take the first step, which may compile."""
    if contender.runs_on is None:
        runner = contender.make(shapes, device)
    elif contender.runs_on in others:
        runner = contender.make(shapes, device, others[contender.runs_on].optimizer)
    else:
        raise LookupError(f"it runs on the tensors of {contender.runs_on}, which failed")
    _take_turn(runner, 1, device, warm=False)
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
    """Time each runner once per round, after two warm-up rounds.

    A runner that raises is removed, and the reason is added to ``failures``. The order is random in
    each round: in a fixed or rotating order, a runner would always follow the same other runner and
    find the caches as that one left them.
    """
    repeats: dict[str, int] = {}
    warm: dict[str, bool] = {}
    order = random.Random(0)
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
            for key in order.sample(list(times), len(times)):
                try:
                    is_warm = warm.get(key, False)
                    elapsed = _take_turn(runners[key], repeats.get(key, 1), device, warm=is_warm)
                except Exception as error:
                    failures[key] = failure_reason(error, None)
                    del times[key]
                    continue
                if round_ < 0:
                    repeats[key] = max(1, math.ceil(turn / elapsed))
                    warm[key] = repeats[key] > 1 or elapsed < LONG_STEP
                else:
                    times[key].append(elapsed)
    finally:
        gc.enable()
    return times


def _take_turn(runner: Runner, repeats: int, device: torch.device, *, warm: bool) -> float:
    """Return the seconds per step.

    With ``warm``, an untimed step first fills the caches, as between consecutive steps.
    """
    runner.before()
    if warm:
        runner.step()
    synchronize(device)
    if device.type == "cpu" and torch.get_num_threads() > 1:
        time.sleep(SETTLE_S)
    start = time.perf_counter()
    for _ in range(repeats):
        runner.step()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def failure_reason(error: Exception, package: str | None) -> str:
    """Return the reason as one short line for a table."""
    if isinstance(error, ModuleNotFoundError) and package is not None:
        missing = error.name or package
        if missing.partition(".")[0] in {package, package.removeprefix("torch-")}:
            return "not installed"
        return f"failed: it needs the package {missing}"
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"failed: {first_line[:120]}"


def times_of(result: dict[str, Any], key: str) -> list[float]:
    """Return a contender's seconds per step by round, from its first batch; [] if not measured."""
    return next((times[key] for times in result["batches"] if times.get(key)), [])


def ratio(result: dict[str, Any], key: str, to: str) -> float | None:
    """Return the median over rounds of ``key``'s time over ``to``'s; None if no batch has both."""
    for times in result["batches"]:
        if times.get(key) and times.get(to):
            return statistics.median(a / b for a, b in zip(times[key], times[to], strict=True))
    return None
