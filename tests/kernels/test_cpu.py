"""The native CPU backend has the reference's bits on each instruction set and number of threads."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import bits
import pytest
import torch
from bits import random_bits
from torch import Tensor

from sharded_bf16_adamw.kernels import cpu, reference

from .tables import table_of, take_step

BF16, F32 = torch.bfloat16, torch.float32
HYPER = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
DTYPES = [(BF16, BF16), (BF16, F32), (F32, F32), (F32, BF16)]  # parameter, gradient
assert_same_bits = partial(bits.assert_same_bits, any_nan=True)
LENGTHS = [*range(41), 63, 64, 65, 1000, 70_001]


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """Restore the number of threads, the instruction set and the denormal mode."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)
    cpu.select_isa(None)


def training_values(
    n: int, dtype: torch.dtype, generator: torch.Generator, scale: float, offset: int = 0
) -> Tensor:
    return (torch.randn(n + offset, generator=generator) * scale).to(dtype)[offset:]


class Problem:
    """Columns of tensors for one step: values as in training, or ``wild``, random bits.

    ``copy`` returns an equal problem whose tensors have the same alignments.
    """

    def __init__(
        self,
        lengths: list[int],
        p_dtype: torch.dtype,
        g_dtype: torch.dtype,
        *,
        wild: bool,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.columns: list[list[Tensor | None]] = [[], [], [], [], []]  # g, p, m, v, c
        for i, n in enumerate(lengths):
            for k, (column, scale) in enumerate(
                zip(self.columns, [1e-3, 0.05, 1e-3, 1e-6, 1e-5], strict=True)
            ):
                dtype, offset = (g_dtype if k == 0 else p_dtype), (i * 5 + k) % 7
                if k == 4 and p_dtype == F32:
                    column.append(None)
                elif wild:
                    column.append(random_bits(n, dtype, generator, offset))
                else:
                    x = training_values(n, dtype, generator, scale, offset)
                    column.append(x.abs_() if k == 3 else x)
        self.steps = [torch.tensor(float(i % 3 * 999)) for i in range(len(lengths))]

    def copy(self) -> Problem:
        twin = object.__new__(Problem)
        twin.columns = [
            [None if x is None else _copy_with_offset(x) for x in column] for column in self.columns
        ]
        twin.steps = [step.clone() for step in self.steps]
        return twin

    def step(self, back_end: ModuleType = cpu, times: int = 1, **arguments: object) -> Problem:
        grads, *states = self.columns
        table = table_of(back_end, *states, self.steps)
        for _ in range(times):
            take_step(table, grads, **(HYPER | arguments))
        return self

    def tensors(self) -> list[Tensor | None]:
        return [x for column in self.columns for x in column] + list(self.steps)


def _copy_with_offset(x: Tensor) -> Tensor:
    offset = x.storage_offset()
    return torch.empty(len(x) + offset, dtype=x.dtype)[offset:].copy_(x)


def test_this_machine_has_an_instruction_set() -> None:
    assert cpu.unavailable_reason() is None
    assert cpu.supported_isas()[0] == "baseline"


@pytest.mark.parametrize("wild", [False, True], ids=["training values", "any bits"])
@pytest.mark.parametrize(("p_dtype", "g_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("isa", cpu.supported_isas())
def test_bits_are_those_of_the_reference(
    isa: str, p_dtype: torch.dtype, g_dtype: torch.dtype, wild: bool
) -> None:
    cpu.select_isa(isa)
    problem = Problem(LENGTHS, p_dtype, g_dtype, wild=wild)
    expected = problem.copy().step(reference)
    assert_same_bits(problem.step().tensors(), expected.tensors())


@pytest.mark.parametrize("isa", cpu.supported_isas())
@pytest.mark.parametrize(
    "arguments",
    [
        {"maximize": True},
        {"grad_scale": torch.tensor(0.3)},
        {"grad_scale": torch.tensor(float("nan")), "maximize": True},
        {"grad_scale": torch.tensor(float("inf"))},
        {"grad_scale": torch.tensor(2.5)},
        {"lr": torch.tensor(1e-4), "weight_decay": 0.0},
        {"lr": 0.0, "eps": 0.0},
        {"lr": float("nan")},
        {"lr": 1e300, "beta1": 0.0, "beta2": 0.5},
        {"found_inf": torch.tensor(0.0)},
    ],
    ids=lambda arguments: "-".join(f"{k}={float(v)}" for k, v in arguments.items()),
)
def test_arguments_act_as_in_the_reference(isa: str, arguments: dict[str, object]) -> None:
    cpu.select_isa(isa)
    for p_dtype, g_dtype in DTYPES:
        for wild in (False, True):
            problem = Problem([1, 33, 0, 5000], p_dtype, g_dtype, wild=wild)
            expected = problem.copy().step(reference, **arguments)
            assert_same_bits(problem.step(**arguments).tensors(), expected.tensors())


@pytest.mark.parametrize("isa", cpu.supported_isas())
@pytest.mark.parametrize("t", [1, 2, 1000, 2**20, 2**24])
def test_subnormal_and_tied_values(isa: str, t: int) -> None:
    """The parameter and v have all 65536 patterns; m, g and c are tiny.

    So there are sums that tie, cancel or are subnormal.
    """
    cpu.select_isa(isa)
    problem = Problem([2**16], BF16, BF16, wild=True)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(BF16)
    tiny = (torch.arange(2**16) % 512).to(torch.int16).view(BF16)
    problem.columns = [
        [tiny.clone()],
        [every.clone()],
        [tiny.flip(0)],
        [every.flip(0).contiguous()],
        [tiny.clone()],
    ]
    problem.steps = [torch.tensor(float(t - 1))]
    expected = problem.copy().step(reference, lr=1e-20)
    assert_same_bits(problem.step(lr=1e-20).tensors(), expected.tensors())


def test_threads_do_not_change_bits() -> None:
    problem = Problem([300_001, *[7] * 300, 1000, 40_000, 100_000], BF16, BF16, wild=False)
    expected = problem.copy().step(reference)
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        assert_same_bits(problem.copy().step().tensors(), expected.tensors())


def test_sum_of_squares_is_independent_of_threads_and_instruction_set() -> None:
    generator = torch.Generator().manual_seed(1)
    for dtype in (BF16, F32):
        grads = [
            training_values(n, dtype, generator, 1e-3, offset=n % 5)
            for n in (400_001, 31, 0, 1, 33, 40_000, 250_000)
        ]
        results = set()
        for isa in cpu.supported_isas():
            cpu.select_isa(isa)
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                total = cpu.grad_sum_sq(grads)
                assert total.shape == () and total.dtype == torch.float64
                results.add(total.item())
        assert len(results) == 1
        assert results.pop() == pytest.approx(reference.grad_sum_sq(grads).item(), rel=1e-13)


@pytest.mark.parametrize("isa", cpu.supported_isas())
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_sum_of_squares_counts_each_element_once(isa: str, dtype: torch.dtype) -> None:
    """fp64 adds these powers of two exactly: a missed or repeated element changes the sum."""
    cpu.select_isa(isa)
    for n in [*range(70), 32_767, 32_768, 32_769]:
        x = torch.full((n + 3,), 8.0, dtype=dtype)
        x[3:] = 2.0
        assert cpu.grad_sum_sq([x[3:]]).item() == 4.0 * n
    grid = torch.arange(12.0).reshape(3, 4).to(dtype)
    assert cpu.grad_sum_sq([grid.t(), grid[:, ::2], grid[1:]]).item() == 506 + 220 + 492
    largest = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).tiny], dtype=dtype)
    assert cpu.grad_sum_sq([largest]).item() == torch.finfo(dtype).max ** 2


@pytest.mark.parametrize("isa", cpu.supported_isas())
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_sum_of_squares_propagates_inf_and_nan(isa: str, dtype: torch.dtype) -> None:
    cpu.select_isa(isa)
    for at in (0, 1, 31, 32, 70_000):
        grads = [torch.ones(10, dtype=dtype), torch.ones(70_001, dtype=dtype)]
        grads[1][at] = float("-inf")
        assert cpu.grad_sum_sq(grads).item() == float("inf")
        grads[1][at] = float("nan")
        assert cpu.grad_sum_sq(grads).isnan()


@pytest.mark.parametrize("found_inf", [1.0, float("inf"), float("nan")])
def test_found_inf_leaves_everything_unchanged(found_inf: float) -> None:
    problem = Problem([100, 3], BF16, BF16, wild=False)
    before = problem.copy()
    problem.step(found_inf=torch.tensor(found_inf))
    assert_same_bits(problem.tensors(), before.tensors())


def test_empty_tensors_only_increment_the_step() -> None:
    problem = Problem([0, 0], BF16, BF16, wild=False).step(times=3)
    assert [step.item() for step in problem.steps] == [3.0, 1002.0]
    take_step(table_of(cpu, [], [], [], [], []), [], **HYPER)
    assert cpu.grad_sum_sq([]).item() == 0.0


def test_gradient_dtype_may_change_between_steps() -> None:
    problem = Problem([1000, 50], BF16, BF16, wild=False)
    grads, *states = problem.columns
    wide = [g.float() for g in grads]
    expected = problem.copy()
    expected_table = table_of(reference, *expected.columns[1:], expected.steps)
    table = table_of(cpu, *states, problem.steps)
    for batch in (grads, wide, [grads[0], wide[1]], grads):
        take_step(table, batch, **HYPER)
        take_step(expected_table, batch, **HYPER)
    assert_same_bits(problem.tensors(), expected.tensors())


def test_flush_denormal_mode_is_ignored_and_restored() -> None:
    problem = Problem([400_000, 9], BF16, BF16, wild=True)
    problem.columns[3][0].mul_(1e-37)  # type: ignore[union-attr]
    expected = problem.copy().step(reference)
    grads = [torch.full((300_000,), 1e-40)] * 2
    total = grads[0].double().square().sum().item() * 2
    assert torch.set_flush_denormal(True)
    torch.set_num_threads(17)  # more than any test before: new threads inherit this mode
    problem.step()
    sum_sq = cpu.grad_sum_sq(grads).item()
    still_flushing = (torch.tensor([1e-40]) * 1.0).item() == 0.0
    torch.set_flush_denormal(False)
    assert still_flushing
    assert sum_sq == pytest.approx(total, rel=1e-12)
    assert_same_bits(problem.tensors(), expected.tensors())


def test_forked_child_steps_after_its_parent() -> None:
    torch.set_num_threads(3)
    problem = Problem([300_000, 77], BF16, BF16, wild=False)
    expected = problem.copy().step(reference, times=2)
    problem.step()
    child = os.fork()
    if child == 0:  # no pytest in the child: the exit status is its result
        try:
            problem.step()
            # only the child's own helpers: fork copies no other thread
            tasks = Path("/proc/self/task")
            assert not tasks.exists() or len(list(tasks.iterdir())) == 3
            # torch's OpenMP threads, unlike ours, hang in a forked child
            torch.set_num_threads(1)
            assert_same_bits(problem.tensors(), expected.tensors())
            os._exit(0)
        except BaseException:
            os._exit(1)
    deadline = time.monotonic() + 60
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the forked child hangs")
    assert ended[1] == 0
    assert_same_bits(problem.step().tensors(), expected.tensors())


def test_several_threads_step_concurrently() -> None:
    torch.set_num_threads(3)
    problems = [
        Problem([200_003, *[50] * 20], BF16, BF16, wild=False, seed=seed) for seed in range(4)
    ]
    expected = [problem.copy().step(reference, times=5) for problem in problems]
    callers = [threading.Thread(target=problem.step, kwargs={"times": 5}) for problem in problems]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=120)
        assert not caller.is_alive()
    for problem, wanted in zip(problems, expected, strict=True):
        assert_same_bits(problem.tensors(), wanted.tensors())


def _spin(stop: object) -> None:
    while not stop.is_set():  # type: ignore[attr-defined]
        sum(range(10_000))


def test_busy_cores_do_not_stop_a_step() -> None:
    context = multiprocessing.get_context("fork")
    stop = context.Event()
    busy = [
        context.Process(target=_spin, args=(stop,), daemon=True)
        for _ in range(2 * (os.cpu_count() or 1))
    ]
    for process in busy:
        process.start()
    try:
        torch.set_num_threads(4)
        problem = Problem([500_000], BF16, BF16, wild=False)
        expected = problem.copy().step(reference, times=3)
        assert_same_bits(problem.step(times=3).tensors(), expected.tensors())
    finally:
        stop.set()
        for process in busy:
            process.join()


def test_wrong_gradients_raise_before_anything_changes() -> None:
    problem = Problem([8], BF16, BF16, wild=False)
    before = problem.copy()
    (g, p, m, v, c), steps = (list(column) for column in problem.columns), problem.steps
    table = table_of(cpu, p, m, v, c, steps)
    for grads in ([g[0].half()], [g[0].double()]):
        with pytest.raises(TypeError, match="only bfloat16 and float32 gradients"):
            take_step(table, grads, **HYPER)
        with pytest.raises(TypeError, match="only bfloat16 and float32 gradients"):
            cpu.grad_sum_sq(grads)
    assert_same_bits(problem.tensors(), before.tensors())


def test_environment_selects_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for isa in cpu.supported_isas():
        monkeypatch.setenv(cpu.ISA_VARIABLE, isa)
        cpu.select_isa(None)
        assert cpu.unavailable_reason() is None and cpu.selected_isa() == isa
    monkeypatch.setenv(cpu.ISA_VARIABLE, "sse9")
    cpu.select_isa(None)
    with pytest.raises(
        ValueError, match="SHARDED_BF16_ADAMW_ISA is 'sse9'; choose one of baseline, avx2, avx512"
    ):
        cpu.unavailable_reason()
    monkeypatch.setattr(cpu, "supported_isas", lambda: ["baseline"])
    monkeypatch.setenv(cpu.ISA_VARIABLE, "avx512")
    with pytest.raises(
        ValueError, match="'avx512', which this processor lacks; choose one of baseline"
    ):
        cpu.unavailable_reason()
    monkeypatch.delenv(cpu.ISA_VARIABLE)
    assert cpu.unavailable_reason() is None and cpu.selected_isa() == "baseline"


@pytest.mark.parametrize("content", [None, b"not a library"])
def test_missing_library_has_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "_native.so"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(cpu, "LIBRARY", path)
    monkeypatch.setattr(cpu, "_library", None)
    monkeypatch.setattr(cpu, "_unavailable_reason", None)
    reason = cpu.unavailable_reason()
    assert cpu.supported_isas() == []
    assert (
        reason is not None and ("was not built" if content is None else "does not load") in reason
    )
    with pytest.raises(RuntimeError, match="the CPU backend is not available"):
        cpu.grad_sum_sq([torch.ones(1)])


def test_source_folder_without_the_library_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "setup.py").touch()
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "package" / "kernels" / "_native.so")
    monkeypatch.setattr(cpu, "_library", None)
    monkeypatch.setattr(cpu, "_unavailable_reason", None)
    reason = str(cpu.unavailable_reason())
    assert f"imports the package from its source folder {tmp_path}" in reason
    assert "compiler" not in reason


def test_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "ABI_VERSION", cpu.ABI_VERSION + 1)
    monkeypatch.setattr(cpu, "_library", None)
    monkeypatch.setattr(cpu, "_unavailable_reason", None)
    assert "another version" in str(cpu.unavailable_reason())
