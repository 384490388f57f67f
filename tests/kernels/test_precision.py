"""The sums behind precision_stats: native kernels against the reference, runs, layouts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sharded_bf16_adamw import kernels
from sharded_bf16_adamw.kernels import PRECISION_SUMS, FusedAdamW, Runs, StepArgs, cpu, reference

from .backends import cpu_backends
from .precision_checks import mismatches, some_runs
from .tables import split, table_of
from .test_cpu import BF16, DTYPES, F32, HYPER, LENGTHS, Problem, assert_same_bits, settings

__all__ = ["settings"]  # an autouse fixture


def sums_of(
    back_end: object, problem: Problem, runs: Runs | None = None, **arguments: object
) -> Tensor:
    """Return the sums of two groups; the second ascends."""
    hyper, flags = split(HYPER | arguments)
    grads, *states = problem.columns
    groups = [i % 2 for i in range(len(grads))]
    table = table_of(back_end, *states, problem.steps, groups=groups)  # type: ignore[arg-type]
    args = StepArgs(grads, [hyper, hyper._replace(maximize=True)], **flags)  # type: ignore[arg-type]
    return table.precision_sums(args, runs)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "arguments", [{}, {"grad_scale": torch.tensor(0.3), "lr": 1e-8}], ids=["plain", "clipped"]
)
@pytest.mark.parametrize(("p_dtype", "g_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("isa", cpu.supported_isas())
def test_native_sums_are_those_of_the_reference(
    isa: str, p_dtype: torch.dtype, g_dtype: torch.dtype, arguments: dict[str, object]
) -> None:
    cpu.select_isa(isa)
    problem = Problem(LENGTHS, p_dtype, g_dtype, wild=False)
    before = problem.copy()
    found = sums_of(cpu, problem, **arguments)
    assert mismatches(found, sums_of(reference, problem, **arguments)) == []
    assert_same_bits(problem.tensors(), before.tensors())
    counts = dict(zip(PRECISION_SUMS, found[0].tolist(), strict=True))
    assert counts["updates"] > 0 and (p_dtype == F32 or 0 < counts["carried"] <= counts["lost"])
    assert p_dtype == F32 or not arguments or counts["carried"] < counts["lost"]


@pytest.mark.parametrize(("p_dtype", "g_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("isa", cpu.supported_isas())
def test_sums_of_runs_are_those_of_the_reference(
    isa: str, p_dtype: torch.dtype, g_dtype: torch.dtype
) -> None:
    cpu.select_isa(isa)
    problem = Problem(LENGTHS, p_dtype, g_dtype, wild=False)
    before = problem.copy()
    groups = [i % 2 for i in range(len(LENGTHS))]
    runs = some_runs(LENGTHS, groups)
    found = sums_of(cpu, problem, runs)
    assert mismatches(found, sums_of(reference, problem, runs)) == []
    assert found[:, 0].tolist() == [runs.counts[runs.rows == row].sum() for row in range(4)]
    assert_same_bits(problem.tensors(), before.tensors())


@pytest.mark.parametrize("back_end", [cpu, reference], ids=["native", "reference"])
def test_runs_of_whole_parameters_give_the_bits_of_all_elements(back_end: object) -> None:
    problem = Problem(LENGTHS, BF16, BF16, wild=False)
    runs = Runs.whole(LENGTHS, [i % 2 for i in range(len(LENGTHS))], 2)
    assert torch.equal(sums_of(back_end, problem, runs), sums_of(back_end, problem))


def test_no_runs() -> None:
    problem = Problem([40], BF16, BF16, wild=False)
    none = some_runs([0], [0])
    for back_end in (cpu, reference):
        assert torch.equal(sums_of(back_end, problem, none), torch.zeros(4, 12).double())


@pytest.mark.parametrize("isa", cpu.supported_isas())
@pytest.mark.parametrize("length", [1, 31, 33, 1000])
def test_padding_is_not_counted(isa: str, length: int) -> None:
    """An update of the padding's zeros would be 0 / 0."""
    cpu.select_isa(isa)
    for p_dtype, g_dtype in DTYPES:
        problem = Problem([length, 0], p_dtype, g_dtype, wild=False)
        found = sums_of(cpu, problem, eps=0.0)
        assert found.isfinite().all() and found[0, 0] == length and found[1].eq(0).all()
        assert mismatches(found, sums_of(reference, problem, eps=0.0)) == []


@pytest.mark.parametrize("isa", cpu.supported_isas())
def test_any_weight_and_correction(isa: str) -> None:
    """The parameter has every finite pattern, since each exponent has an ulp of its own."""
    cpu.select_isa(isa)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(BF16)
    every = every[every.isfinite()]
    problem = Problem([len(every)], BF16, BF16, wild=False)
    problem.columns[1] = [every]
    problem.columns[4] = [(every.float() * 2.0**-9).bfloat16()]
    assert mismatches(sums_of(cpu, problem), sums_of(reference, problem)) == []


def test_sums_do_not_depend_on_threads() -> None:
    problem = Problem([300_001, *[7] * 300, 1000, 100_000], BF16, BF16, wild=False)
    found = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        found.append(sums_of(cpu, problem))
    assert all(torch.equal(x, found[0]) for x in found)
    assert mismatches(found[0], sums_of(reference, problem)) == []


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_only_the_group_of_a_nonfinite_gradient_is_nan(value: float) -> None:
    problem = Problem([1000, 50], BF16, BF16, wild=False)
    problem.columns[0][0][7] = value  # type: ignore[index]
    found = sums_of(cpu, problem)
    assert mismatches(found, sums_of(reference, problem)) == []
    assert found[0].isnan().any() and found[1].isfinite().all()


@pytest.mark.parametrize("back_end", cpu_backends())
def test_layouts_of_memory(back_end: str) -> None:
    """Tensors with gaps or different strides are copied; the sums stay those of contiguous ones."""
    columns = Problem([4000, 600, 70], BF16, BF16, wild=False).columns
    steps = [torch.tensor(float(i)) for i in range(3)]
    plain: list[list[Tensor]] = [[x.reshape(10, -1) for x in c] for c in columns]  # type: ignore
    strided = [
        [x.t().contiguous().t() for x in plain[0]],  # the gradients
        [torch.stack([x, x], dim=2)[:, :, 0] for x in plain[1]],
        *plain[2:],
    ]
    hypers = [kernels.Hyperparams(1e-3, 0.9, 0.999, 1e-8, 0.1)] * 2
    for runs in (None, some_runs([4000, 600, 70], [0, 1, 0])):
        found = []
        for grads, *states in (plain, strided):
            table = FusedAdamW(*states, steps, groups=[0, 1, 0], backend=back_end)  # type: ignore
            found.append(table.precision_sums(StepArgs(grads, hypers), runs))
        assert mismatches(found[1], found[0]) == []
    assert [float(x) for x in steps] == [0.0, 1.0, 2.0]
