"""Functions that the Triton tests run in separate processes. They return plain data to compare."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import bits
import pytest
import torch
import triton
from bits import random_bits
from torch import Tensor

from sharded_bf16_adamw.kernels import Hyperparams, StepArgs, cuda, reference

from .precision_checks import mismatches, some_runs
from .tables import split, table_of, take_step

BF16, FP32 = torch.bfloat16, torch.float32
HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
OTHER_GROUP = Hyperparams(lr=2e-3, beta1=0.8, beta2=0.99, eps=1e-6, weight_decay=0.0)
# several chunks (1024) and a tail, empty, one, less than a chunk, two chunks, a chunk and a tail.
# The tails are short: each 128 elements of them cost as much as a chunk.
SIZES = (2300, 0, 1, 255, 2048, 1100)
# one element to either side of an iteration of the tail and of a chunk, and whole iterations
BORDERS = (127, 129, 1023, 1025, 1152, 2049)


@dataclass(frozen=True)
class Case:
    """A model and the arguments of its steps.

    Several updates need ``finite`` patterns: a NaN's payload is hashed, but not specified.
    """

    sizes: tuple[int, ...] = SIZES
    params: tuple[torch.dtype, ...] = (BF16,) * len(SIZES)
    grads: tuple[torch.dtype, ...] = (BF16,) * len(SIZES)
    steps: tuple[int, ...] = (0,) * len(SIZES)
    grad_offset: int = 0  # elements off a 16-byte boundary
    state_offset: int = 0
    finite: bool = False
    updates: int = 1
    hyper: dict[str, Any] = field(default_factory=lambda: HYPER)


def patterns(
    n: int, dtype: torch.dtype, generator: torch.Generator, offset: int = 0, finite: bool = False
) -> Tensor:
    """Return ``n`` random bit patterns, or values of many magnitudes if ``finite``."""
    if finite:
        x = torch.randn(n + offset, generator=generator) * torch.logspace(-9, 1, n + offset)
        return x.to(dtype)[offset:]
    return random_bits(n, dtype, generator, offset)


def model(case: Case) -> dict[str, list[Any]]:
    generator = torch.Generator().manual_seed(3)
    result: dict[str, list[Any]] = {
        name: [] for name in ("params", "exp_avgs", "exp_avg_sqs", "corrections", "steps")
    }
    for n, dtype, step in zip(case.sizes, case.params, case.steps, strict=True):
        p, m, v, c = (
            patterns(n, dtype, generator, case.state_offset, case.finite) for _ in range(4)
        )
        # not all negative: the square root would be NaN everywhere
        half = slice(0, n // 2) if not case.finite else slice(None)
        v[half] = v[half].abs()
        result["params"].append(p)
        result["exp_avgs"].append(m)
        result["exp_avg_sqs"].append(v)
        result["corrections"].append(c if dtype == BF16 else None)
        result["steps"].append(torch.tensor(float(step)))
    return result


def copied(x: Tensor | None, device: str = "cpu") -> Tensor | None:
    """Return a copy with the same offset from a 16-byte boundary."""
    if x is None:
        return None
    offset = x.storage_offset()
    return (
        torch.cat([x.new_zeros(offset), x]).to(device)[offset:]
        if x.dim()
        else x.to(device, copy=True)
    )


def differing(name: str, actual: list[Any], expected: list[Any]) -> list[str]:
    """Return a line for each tensor whose bits differ. NaN equals NaN."""
    return bits.differences(actual, expected, name, any_nan=True)


def differences(name: str, device: str = "cpu") -> list[str]:
    """Step a model of two groups by the kernel and by the reference.

    Returns:
        A line for each tensor that differs, or for another error.
    """
    from sharded_bf16_adamw.kernels import triton_adamw

    if device == "cpu":
        assert not isinstance(triton_adamw.adamw_kernel, triton.JITFunction), (
            "CPU tensors need the interpreter or an emulator"
        )
    case = CASES[name]
    expected = model(case)
    actual = {name: [copied(x, device) for x in column] for name, column in expected.items()}
    before = {name: [copied(x) for x in column] for name, column in expected.items()}
    hyper, flags = split(case.hyper)
    device_hyper, device_flags = split(
        {name: x.to(device) if isinstance(x, Tensor) else x for name, x in case.hyper.items()}
    )
    groups = [i // 2 % 2 for i in range(len(case.sizes))]
    table, reference_table = (
        table_of(cuda, **actual, groups=groups),
        table_of(reference, **expected, groups=groups),
    )  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(4)
    for _ in range(case.updates):
        grads = [
            patterns(n, d, generator, case.grad_offset, case.finite)
            for n, d in zip(case.sizes, case.grads, strict=True)
        ]
        device_grads: list[Any] = [copied(g, device) for g in grads]
        reference_table.update_(StepArgs(grads, [hyper, OTHER_GROUP], **flags))
        table.update_(StepArgs(device_grads, [device_hyper, OTHER_GROUP], **device_flags))
        lines = [line for x in actual for line in differing(x, actual[x], expected[x])] + differing(
            "grads", device_grads, grads
        )
        if lines:
            return lines
    found_inf = case.hyper.get("found_inf")
    changed = any(differing(x, actual[x], before[x]) for x in actual)
    if changed != (found_inf is None or bool(found_inf == 0)):
        return [f"changed: {changed}"]
    return []


ONE = [
    replace(Case(), params=(p,) * len(SIZES), grads=(g,) * len(SIZES))
    for p in (BF16, FP32)
    for g in (BF16, FP32)
]
MIXED = replace(
    Case(),
    params=(BF16, FP32, FP32, BF16, BF16, FP32),
    grads=(BF16, FP32, BF16, FP32, BF16, FP32),
    steps=(0, 1, 7, 999, 123456, 2**24 - 2),
    finite=True,
    updates=3,
)
# For cases of other arguments. A second update shows that the argument still holds.
MIXED_TWICE, MIXED_ONCE = replace(MIXED, updates=2), replace(MIXED, updates=1)
CASES = {
    "bf16": ONE[0],
    "bf16, fp32 gradients": ONE[1],
    "fp32, bf16 gradients": ONE[2],
    "fp32": ONE[3],
    "unaligned gradients": replace(ONE[0], grad_offset=1),
    "unaligned": replace(ONE[0], grad_offset=1, state_offset=3),
    "unaligned fp32 gradients": replace(ONE[1], grad_offset=3),
    "unaligned fp32": replace(ONE[3], state_offset=1),
    "unaligned fp32, bf16 gradients": replace(ONE[2], grad_offset=1, state_offset=3),
    "all unaligned, grad_scale": replace(
        ONE[1], grad_offset=1, state_offset=3, hyper=HYPER | {"grad_scale": torch.tensor(0.3)}
    ),
    "borders": replace(ONE[0], sizes=BORDERS),
    "borders, unaligned fp32 gradients": replace(ONE[1], sizes=BORDERS, grad_offset=1),
    "borders, fp32": replace(ONE[3], sizes=BORDERS),
    "several updates": replace(ONE[0], finite=True, updates=5),
    "mixed": MIXED,
    "maximize": replace(MIXED_TWICE, hyper=HYPER | {"maximize": True}),
    "grad_scale": replace(MIXED_TWICE, hyper=HYPER | {"grad_scale": torch.tensor(0.3)}),
    "grad_scale of zero, maximize": replace(
        ONE[0], hyper=HYPER | {"grad_scale": torch.tensor(0.0), "maximize": True}
    ),
    "grad_scale of NaN": replace(
        ONE[0], hyper=HYPER | {"grad_scale": torch.tensor(-1).int().view(FP32)}
    ),
    "found_inf": replace(MIXED, hyper=HYPER | {"found_inf": torch.tensor(1.0)}),
    "found_inf is NaN": replace(ONE[0], hyper=HYPER | {"found_inf": torch.tensor(math.nan)}),
    "found_inf is zero": replace(ONE[0], hyper=HYPER | {"found_inf": torch.tensor(0.0)}),
    "lr tensor": replace(MIXED_TWICE, hyper=HYPER | {"lr": torch.tensor(3e-4)}),
    "lr tensor in double": replace(
        MIXED_ONCE, hyper=HYPER | {"lr": torch.tensor([3e-4], dtype=torch.float64)}
    ),
    "zeros": replace(
        MIXED_ONCE, hyper={"lr": 0.0, "beta1": 0.0, "beta2": 0.0, "eps": 0.0, "weight_decay": 0.0}
    ),
    "betas near one": replace(MIXED_ONCE, hyper=HYPER | {"beta1": 0.99, "beta2": 0.9999999}),
    "lr without an fp32 equal": replace(
        MIXED_ONCE, hyper=HYPER | {"lr": 0.1 / 3, "weight_decay": 1 / 3}
    ),
}


# The sums of a NaN are NaN, so these cases are finite.
PRECISION_CASES = {
    **{name: CASES[name] for name in ("several updates", "mixed", "maximize", "grad_scale")},
    **{name: CASES[name] for name in ("zeros", "lr tensor", "lr without an fp32 equal")},
    **{
        name: replace(CASES[name], finite=True)
        for name in (
            "bf16, fp32 gradients",
            "fp32, bf16 gradients",
            "unaligned",
            "unaligned fp32 gradients",
            "unaligned fp32",
            "borders",
            "borders, fp32",
        )
    },
}


def precision_differences(name: str, device: str = "cpu") -> list[str]:
    """Compare the sums of a model of two groups, and of some runs in it, with the reference's.

    Returns:
        A line for each sum that differs, and for each tensor that has changed.
    """
    case = PRECISION_CASES[name]
    columns = model(case)
    generator = torch.Generator().manual_seed(4)
    grads = [
        patterns(n, d, generator, case.grad_offset, finite=True)
        for n, d in zip(case.sizes, case.grads, strict=True)
    ]
    hyper, flags = split(case.hyper)
    groups = [i // 2 % 2 for i in range(len(case.sizes))]
    args = StepArgs(grads, [hyper, OTHER_GROUP], **flags)  # type: ignore[arg-type]
    runs = some_runs(list(case.sizes), groups)
    table = table_of(reference, **columns, groups=groups)
    wanted = [table.precision_sums(args, selected) for selected in (None, runs)]
    actual = {name: [copied(x, device) for x in column] for name, column in columns.items()}
    device_grads: list[Any] = [copied(g, device) for g in grads]
    hyper, flags = split(
        {name: x.to(device) if isinstance(x, Tensor) else x for name, x in case.hyper.items()}
    )
    args = StepArgs(device_grads, [hyper, OTHER_GROUP], **flags)
    table = table_of(cuda, **actual, groups=groups)
    lines = []
    for selected, wanted_sums in zip((None, runs), wanted, strict=True):
        found = table.precision_sums(args, selected)
        lines += mismatches(found.cpu(), wanted_sums)
        # On a GPU the order of additions might differ between calls.
        if device != "cpu" and not torch.equal(found, table.precision_sums(args, selected)):
            lines.append("two calls differ")
    return lines + [line for x in actual for line in differing(x, actual[x], columns[x])]


def differences_beyond_32_bits() -> list[str]:
    """Step the last chunks of a tensor of more than 2^32 bytes. Unused pages take no memory."""
    n = 2**31 + 3 * 6144 + 77  # 6144 elements a program
    large = [torch.empty(n, dtype=BF16) for _ in range(5)]
    tail = slice(2**31, None)
    generator = torch.Generator().manual_seed(5)
    for x in large:
        x[tail] = patterns(n - 2**31, BF16, generator, finite=True)
    large[3][tail].abs_()
    p, g, m, v, c = ([x[tail].clone()] for x in large)
    take_step(table_of(reference, p, m, v, c, [torch.zeros(())]), g, **HYPER)
    table = table_of(cuda, [large[0]], [large[2]], [large[3]], [large[4]], [torch.zeros(())])
    group = table._by_dtype[0]
    assert group.chunk == 6144
    group.chunks = group.chunks[2**31 // group.chunk :]
    take_step(table, [large[1]], **HYPER)
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "corrections")
    lines = [
        line
        for name, x, y in zip(names, large, (p, g, m, v, c), strict=True)
        for line in differing(name, [x[tail]], y)
    ]
    return lines + (["the first element changed"] if large[2][:8].any() else [])


def host_side() -> dict[str, Any]:
    """Count launches and uploads over a few steps."""
    from sharded_bf16_adamw.kernels import device_memory, triton_adamw

    counts = {"launches": 0, "uploads": 0}
    variants: list[int] = []
    programs: list[int] = []
    kernel, upload = triton_adamw.adamw_kernel, device_memory.upload

    class Counted:
        def __getitem__(self, grid: Any) -> Any:
            counts["launches"] += 1
            programs.extend(grid)
            return lambda *args, **options: (
                variants.append(options["variant"]),
                kernel[grid](*args, **options),
            )

    def counted_upload(*args: Any) -> Tensor:
        counts["uploads"] += 1
        return upload(*args)

    triton_adamw.adamw_kernel, device_memory.upload, cuda.upload = (
        Counted(),
        counted_upload,
        counted_upload,
    )
    try:
        results: dict[str, Any] = {}
        columns = model(replace(Case(), finite=True))
        grads = [torch.ones(n, dtype=BF16) for n in SIZES]
        table = table_of(cuda, **columns)

        def step(name: str, grads: list[Tensor], **options: Any) -> None:
            counts.update(launches=0, uploads=0)
            programs.clear()
            take_step(table, grads, **HYPER, **options)
            results[name] = (counts["launches"], counts["uploads"])

        step("first", grads)
        step("again", grads)
        step("other hyper-parameters", grads, maximize=True)
        step("first hyper-parameters again", grads)
        step("other addresses", [g.clone() for g in grads])
        launched = {"all aligned": list(programs)}
        unaligned = [patterns(SIZES[0], BF16, torch.Generator(), 1), *grads[1:]]
        step("one unaligned", unaligned)
        launched["one unaligned"] = list(programs)
        step("one unaligned, again", unaligned)
        cuda.is_capturing = lambda device: True
        step("captured", unaligned)
        launched["one unaligned, while a graph is captured"] = list(programs)
        del results["captured"]
        results["programs"] = launched
        step("captured", [*grads[:3], patterns(SIZES[3], BF16, torch.Generator(), 1), *grads[4:]])
        del results["captured"]
        results["programs of a mixture that a graph captures first"] = list(programs)
        cuda.is_capturing = device_memory.is_capturing
        step("other dtype at the same addresses", [g.float() for g in grads])
        variants.clear()
        take_step(table_of(cuda, **model(CASES["unaligned"])), grads, **HYPER)
        results["variants"] = list(variants)
        only_empty = [torch.zeros(0, dtype=BF16)]
        table_of_empty = table_of(
            cuda, only_empty, only_empty, only_empty, list(only_empty), [torch.zeros(())]
        )
        take_step(table_of_empty, only_empty, **HYPER)
        results["step of an empty parameter"] = float(table_of_empty._tensors[-1])
        results["steps"] = [float(x) for x in columns["steps"]]
        results["counter"] = int(table._by_dtype[0].done_counter)
        return results
    finally:
        triton_adamw.adamw_kernel, device_memory.upload, cuda.upload = kernel, upload, upload


def graphs() -> dict[str, Any]:
    """Return how an optimizer behaves in simulated captures by CUDA graphs."""
    import gc
    import weakref

    from sharded_bf16_adamw import AdamW_BF16, grad_norm, step_plan
    from sharded_bf16_adamw.kernels import backend, cuda_norm, device_memory

    modules = (backend, step_plan, grad_norm, device_memory, cuda, cuda_norm)
    truth, known, reason_of = (
        device_memory.is_capturing,
        backend._BY_DEVICE,
        cuda.unavailable_reason,
    )

    def capture(capturing: bool) -> None:
        for module in modules:
            module.is_capturing = lambda device: capturing  # type: ignore[attr-defined]

    def refusal(function: Any) -> str:
        before = [p.detach().clone() for p in params]
        try:
            function()
        except RuntimeError as error:
            assert all(map(torch.equal, params, before))
            return str(error)
        return "no error"

    backend._BY_DEVICE, cuda.unavailable_reason = {"cpu": "triton"}, lambda device: None
    backend.backend_module.cache_clear()
    try:
        params = [torch.nn.Parameter(torch.ones(n, dtype=BF16)) for n in (8, 5, 3)]
        for p in params:
            p.grad = torch.ones_like(p)
        adamw = AdamW_BF16(params, lr=torch.tensor(1e-3), capturable=True)
        capture(True)
        results: dict[str, Any] = {
            "first step": refusal(adamw.step),
            "states after it": len(adamw.state),
        }
        capture(False)
        adamw.step()
        # so that the plan is no longer valid
        adamw.state[params[0]]["step"] = adamw.state[params[0]]["step"].clone()
        replaced = weakref.ref(adamw._step_plans.plans[0])
        adamw.step()
        gc.collect()
        results["a plan that no graph reads"] = replaced() is not None
        captured = weakref.ref(adamw._step_plans.plans[0])
        # the optimizer's defaults keep the first lr alive
        adamw.param_groups[0]["lr"] = torch.tensor(2e-3)
        adamw.step()
        capture(True)
        adamw.step()
        capture(False)
        lr = weakref.ref(adamw.param_groups[0]["lr"])
        adamw.param_groups[0]["lr"] = torch.tensor(1e-4)
        adamw.state[params[0]]["step"] = adamw.state[params[0]]["step"].clone()
        adamw.step()
        gc.collect()
        results["a plan that a graph reads"] = (
            captured() is not None and captured() not in adamw._step_plans.plans
        )
        results["the learning rate that it reads"] = lr() is not None
        clip = adamw._grad_norm.compute(adamw._grads.collect(adamw.param_groups), 1.0, None)
        # a capture would require an earlier call
        adamw._grad_norm.compute = lambda *args: clip  # type: ignore[method-assign]
        for clips, steps in ((False, True), (True, False), (True, True), (False, False)):
            capture(clips)
            adamw.clip_grad_norm_(1.0)
            capture(steps)
            results[f"clip captured: {clips}, step: {steps}"] = refusal(adamw.step)
        return results
    finally:
        backend._BY_DEVICE, cuda.unavailable_reason = known, reason_of
        backend.backend_module.cache_clear()
        for module in modules:
            module.is_capturing = truth  # type: ignore[attr-defined]


def signatures(target: str) -> list[tuple[str, str]]:
    """Compile the kernels of a few calls through the launcher, for a simulated device."""
    from sharded_bf16_adamw.kernels import triton_adamw, triton_norm, triton_precision

    from .triton_offline import pretend

    compiled: list[Any] = []

    class Warmed:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **options: compiled.append(
                self.kernel.warmup(*args, grid=grid, **options)
            )

    pretend(target)
    kernels = (
        (triton_adamw, "adamw_kernel"),
        (triton_precision, "precision_kernel"),
        (triton_norm, "norm_kernel"),
        (triton_norm, "clip_kernel"),
    )
    with pytest.MonkeyPatch.context() as patch:
        for module, name in kernels:
            patch.setattr(module, name, Warmed(getattr(module, name)))
        launch_all()
    return [(x.metadata.name, x.hash) for x in compiled]


def launch_all() -> None:
    """Launch each kernel with several sizes, numbers and optional arguments."""
    for n in (1, 16, 100):  # 1 and multiples of 16 are special to Triton
        rows = [torch.zeros(n, dtype=BF16) for _ in range(n)]
        table = table_of(cuda, rows, rows, rows, list(rows), [torch.zeros(()) for _ in rows])
        for lr in (1e-3, 0.0, 1.0):
            take_step(table, rows, **HYPER | {"lr": lr})
            take_step(
                table,
                rows,
                **HYPER,
                grad_scale=torch.ones(4)[n % 4],
                found_inf=torch.ones(4)[(n + 1) % 4],
                maximize=n == 1,
            )
        table.precision_sums(StepArgs(rows, [Hyperparams(**HYPER)]))
        cuda.norm_and_clip_coefficient(rows, float(n))
        cuda.clip_coefficient(cuda.grad_sum_sq(rows), 1.0)
