"""bench/targets.py: checks of a run against the speed targets."""

from __future__ import annotations

from typing import Any

import pytest
from bench import targets
from bench.measure import parse_size


def run_of(results: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"machine": {"device": "cpu", "isa": "avx512"}, "results": results, **more}


def result_of(size: str, threads: int = 1, **times: float) -> dict[str, Any]:
    shapes = parse_size(size)
    rounds = {key.replace("_", "-"): [value] * 3 for key, value in times.items()}
    return {
        "size": size,
        "tensors": len(shapes),
        "numel": len(shapes) * shapes[0][0],
        "threads": threads,
        "batches": [rounds],
        "failures": {},
    }


# A result that meets a target, one that does not, and the start of the target's name.
CASES = [
    (
        result_of("16M", ours=1.0, ceiling_avx512=0.81),
        result_of("16M", ours=1.0, ceiling_avx512=0.79),
        ">= 80 % of the copy ceiling at 16M",
    ),
    (
        result_of("128M", ours_avx2=1.0, ceiling_avx2=0.35),
        result_of("128M", ours_avx2=1.0, ceiling_avx2=0.33, ceiling_avx512=0.9),
        ">= 34 % of the copy ceiling at 128M, AVX2",
    ),
    (
        result_of("16M", 2, ours=1.0, ceiling_avx512=0.91),
        result_of("16M", 2, ours=1.0, ceiling_avx512=0.89),
        ">= 90 % of",
    ),
    (
        result_of("1M", ours=1.0, torch_fused_fp32=1.81),
        result_of("1M", ours=1.0, torch_fused_fp32=1.79),
        ">= 1.8x as fast as torch",
    ),
    (
        result_of("128M", ours=1.0, deepspeed=1.61),
        result_of("128M", ours=1.0, deepspeed=1.59),
        ">= 1.6x as fast as DeepSpeed",
    ),
    (
        result_of("1000x1000", ours=1.0, torch_fused_fp32=2.21),
        result_of("1000x1000", ours=1.0, torch_fused_fp32=2.19),
        ">= 2.2x",
    ),
    (
        result_of("1000x1", ours=2.9e-4),
        result_of("1000x1", ours=3.1e-4, ours_kernel=1e-5),
        "<= 0.3 us a tensor: the whole step()",
    ),
    (
        result_of("1000x1", ours_kernel=2.9e-4),
        result_of("1000x1", ours=1e-5, ours_kernel=3.1e-4),
        "<= 0.3 us a tensor: the kernel call",
    ),
    (
        result_of("16M", ours=1.0, ours_clip=1.149),
        result_of("16M", ours=1.0, ours_clip=1.151),
        "clip_grad_norm_ + step <= 1.15x",
    ),
    (
        result_of("16M", ours=1.0, ours_precision_sample=1.49),
        result_of("16M", ours=1.0, ours_precision=1.4, ours_precision_sample=1.51),
        "precision_stats of a sample + step <= 1.5x",
    ),
]


@pytest.mark.parametrize(("better", "worse", "name"), CASES)
def test_target_is_met_missed_or_not_measured(
    better: dict[str, Any], worse: dict[str, Any], name: str
) -> None:
    for results, met in (([better], True), ([worse], False), ([], None)):
        judged = [t for t in targets.targets(run_of(results)) if t.name.startswith(name)]
        if met is None:
            assert judged and all(t.met is None for t in judged)
        else:
            assert [t.met for t in judged if t.met is not None] == [met]


def test_clipping_target_shows_the_cost_of_reading() -> None:
    run = run_of([result_of("16M", ours=1.0, ours_clip=1.2, ours_reading=1.17)])
    measured = [t for t in targets.targets(run) if t.met is not None]
    figures = [t.figure for t in measured if t.name.startswith("clip_grad_norm_")]
    assert figures == ["1.200x; merely reading the gradients before the step takes 1.170x"]


def test_targets_distinguish_numbers_of_threads() -> None:
    two = result_of("16M", 2, ours=1.0, ceiling_avx512=0.5)
    one = result_of("16M", 1, ours=1.0, ceiling_avx512=0.95)
    run = run_of([two, one])
    shares = {t.name: t.figure for t in targets.targets(run) if t.met is not None}
    assert list(shares.values()) == ["95.0 %", "50.0 %"]
    assert all(("two threads" in name) == (figure == "50.0 %") for name, figure in shares.items())


def test_fsdp2_targets() -> None:
    for ratios, met in (((5.1, 4.9), [True, False]), ((4.9, 5.1), [False, True])):
        by_name = dict(zip(("torch", "torch clip with our step"), ratios, strict=True))
        run = run_of([], fsdp2={"ratios": by_name, "clip_ratio": 9.0})
        assert [t.met for t in targets.targets(run) if "FSDP2" in t.name] == met


def test_gpu_targets() -> None:
    results = [
        result_of(
            "1B", 16, ours=1.0, ceiling=0.91, torch_fused_fp32_grads=1.9, ours_precision_sample=1.4
        ),
        result_of("1000x1000", 16, ours=1.0, optimi=6.0),
    ]
    checks = [{"name": "bits", "passed": False, "detail": "differ"}]
    run = {"machine": {"device": "cuda", "isa": None}, "results": results, "gpu_checks": checks}
    met = {t.name: t.met for t in targets.targets(run)}
    assert met[">= 90 % of the copy ceiling at 1B, GPU"] is True
    copies = "torch fused fp32 + copies of weights and gradients"
    assert met[f">= 2.0x as fast as {copies} at 1B"] is False
    assert met[">= 5.0x as fast as optimi at 1000x1000"] is True
    assert met[">= 5.0x as fast as flashoptim at 1000x1000"] is None
    assert met["precision_stats of a sample + step <= 1.5x the step at 1B"] is True
    assert met["bits"] is False
