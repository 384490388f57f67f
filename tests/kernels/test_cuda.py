"""Tests that need a GPU: bits, launches, host syncs, CUDA graphs, more than 2^31 elements."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from sharded_bf16_adamw import AdamW_BF16
from sharded_bf16_adamw.kernels import cuda, reference
from sharded_bf16_adamw.kernels.device_memory import NormScratch

pytestmark = pytest.mark.skipif(
    cuda.unavailable_reason() is not None,
    reason=f"no GPU to test on: {cuda.unavailable_reason()}",
)
pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")

from . import triton_checks, triton_norm_checks  # noqa: E402 (they import Triton)
from .tables import table_of, take_step  # noqa: E402
from .triton_checks import BF16, FP32, HYPER, differing  # noqa: E402

SHAPES = [(1000, 512), (333,), (0,), (1,), (4096, 1024)]


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Make any call that waits for the device raise."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def kernels_in(function: Any) -> list[str]:
    """Return the names of the kernels that a call launches, without copies and fills of the driver.

    Repeats an empty profile, because the profiler sometimes loses all events.
    """
    function()  # compiles and uploads what is new
    names: list[str] = []
    for _ in range(3):
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            function()
            torch.cuda.synchronize()
        on_device = [
            event.name
            for event in profile.events()
            if event.device_type == torch.autograd.DeviceType.CUDA
        ]
        names = [
            name for name in on_device if not name.startswith(("Memcpy", "Memset", "Context Sync"))
        ]
        if names:
            break
    return names


def random_grads(seed: int, dtype: torch.dtype = BF16) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    return [torch.randn(shape, generator=generator, device="cuda").to(dtype) for shape in SHAPES]


class Model:
    """Random parameters on the device with fresh states."""

    def __init__(self) -> None:
        self.params = random_grads(0)
        self.states = [[torch.zeros_like(p) for p in self.params] for _ in range(3)]
        self.steps = [torch.zeros((), device="cuda") for _ in self.params]
        self.table = table_of(cuda, self.params, *self.states, self.steps)  # type: ignore[arg-type]
        self.scratch = NormScratch()

    def tensors(self) -> list[Tensor]:
        return [*self.params, *self.states[0], *self.states[1], *self.states[2], *self.steps]


@pytest.mark.parametrize("name", triton_checks.CASES)
def test_same_bits_as_the_reference(name: str) -> None:
    assert triton_checks.differences(name, "cuda") == []


@pytest.mark.parametrize("name", triton_checks.PRECISION_CASES)
def test_precision_sums_are_those_of_the_reference(name: str) -> None:
    assert triton_checks.precision_differences(name, "cuda") == []


def test_precision_stats_do_not_wait_for_the_device_and_refuse_a_capture() -> None:
    params = [torch.nn.Parameter(p) for p in random_grads(0)]
    optimizer = AdamW_BF16(params, lr=1e-3)
    for step in range(3):
        for p, grad in zip(params, random_grads(step), strict=True):
            p.grad = grad
        optimizer.clip_grad_norm_(1.0)
        if step == 1:
            with no_host_sync():
                optimizer.precision_stats()
                optimizer.precision_stats(fraction=0.25)
        optimizer.step()
    for p, grad in zip(params, random_grads(3), strict=True):
        p.grad = grad
    with (
        torch.cuda.graph(torch.cuda.CUDAGraph()),
        pytest.raises(RuntimeError, match="call it outside of the capture"),
    ):
        optimizer.precision_stats()


def test_norm_and_clip() -> None:
    pairs = triton_norm_checks.norms("cuda")
    assert {name: found for name, (found, _) in pairs.items()} == {
        name: wanted for name, (_, wanted) in pairs.items()
    }


def test_norm_is_repeatable() -> None:
    grads = random_grads(1, FP32)
    first = cuda.grad_sum_sq(grads)
    assert all(torch.equal(cuda.grad_sum_sq(grads), first) for _ in range(20))
    assert torch.equal(cuda.grad_sum_sq([g.clone() for g in grads]), first)


def test_more_than_2_to_31_elements() -> None:
    n = 2**31 + 6144 * 3 + 77
    if torch.cuda.mem_get_info()[0] < 6 * 2 * n:
        pytest.skip(f"needs {6 * 2 * n / 2**30:.0f} GiB of free GPU memory")
    large = [torch.empty(n, dtype=BF16, device="cuda").normal_(0, 0.02) for _ in range(5)]
    large[3].abs_()
    parts = [
        slice(0, 10000),
        slice(2**30 - 5000, 2**30 + 5000),
        slice(2**31 - 5000, 2**31 + 5000),
        slice(n - 10000, n),
    ]
    p, g, m, v, c = ([x[part].cpu() for part in parts] for x in large)
    take_step(table_of(reference, p, m, v, c, [torch.zeros(()) for _ in parts]), g, **HYPER)  # type: ignore[arg-type]
    take_step(
        table_of(
            cuda, [large[0]], [large[2]], [large[3]], [large[4]], [torch.zeros((), device="cuda")]
        ),
        [large[1]],
        **HYPER,
    )
    for name, actual, expected in zip("pgmvc", large, (p, g, m, v, c), strict=True):
        assert differing(name, [actual[part] for part in parts], expected) == []
    large[1].fill_(1.0)
    assert float(cuda.grad_sum_sq([large[1]])) == n


def test_one_launch_a_step_and_two_with_clipping() -> None:
    model, grads = Model(), random_grads(1)

    def clipped() -> None:
        _, coefficient, found_inf = cuda.norm_and_clip_coefficient(grads, 1.0, model.scratch)
        take_step(model.table, grads, **HYPER, grad_scale=coefficient, found_inf=found_inf)

    assert kernels_in(lambda: take_step(model.table, grads, **HYPER)) == ["adamw_kernel"]
    assert (
        kernels_in(
            lambda: take_step(model.table, [g.clone().detach() for g in grads], **HYPER)
        ).count("adamw_kernel")
        == 1
    )
    assert kernels_in(clipped) == ["norm_kernel", "adamw_kernel"]
    sum_sq = cuda.grad_sum_sq(grads)
    assert kernels_in(lambda: cuda.clip_coefficient(sum_sq, 1.0)) == ["clip_kernel"]


def test_no_host_sync() -> None:
    model, grads = Model(), random_grads(1)
    moved = [g.clone() for g in grads]
    lr = torch.tensor(1e-3, device="cuda")
    cuda.norm_and_clip_coefficient(grads, 1.0, model.scratch)
    with no_host_sync():
        for some in (grads, grads, moved, grads):
            _, coefficient, found_inf = cuda.norm_and_clip_coefficient(some, 1.0, model.scratch)
            cuda.clip_coefficient(cuda.grad_sum_sq(some, model.scratch), 1.0)
            take_step(model.table, some, **HYPER, grad_scale=coefficient, found_inf=found_inf)
            take_step(model.table, some, **HYPER | {"lr": lr})
    assert [float(step) for step in model.steps] == [8.0] * len(SHAPES)
    with (
        no_host_sync(),
        pytest.raises(RuntimeError, match="synchroniz"),
    ):  # so the debug mode does detect a sync
        float(lr)


def test_gradients_at_new_addresses() -> None:
    """New gradients have new addresses, as after zero_grad(set_to_none=True).

    Earlier gradients stay alive, so that no gradient gets the address of another.
    """
    fixed, moving = Model(), Model()
    grads, kept = random_grads(1), []
    for seed in range(6):
        for g, new in zip(grads, random_grads(seed), strict=True):
            g.copy_(new)
        kept.append([g.clone() for g in grads])
        take_step(fixed.table, grads, **HYPER)
        take_step(moving.table, kept[-1], **HYPER)  # no wait: many uploads are in flight
    assert differing("after", moving.tensors(), fixed.tensors()) == []


def test_found_inf_skips_on_the_device() -> None:
    model, grads = Model(), random_grads(1)
    take_step(model.table, grads, **HYPER)
    before = [x.clone() for x in model.tensors()]
    grads[0].view(-1)[123] = float("nan")
    _, coefficient, found_inf = cuda.norm_and_clip_coefficient(grads, 1.0)
    take_step(model.table, grads, **HYPER, grad_scale=coefficient, found_inf=found_inf)
    assert differing("after", model.tensors(), before) == []


def clipped_step(model: Model, grads: list[Tensor], lr: Tensor) -> None:
    _, coefficient, found_inf = cuda.norm_and_clip_coefficient(grads, 1.0, model.scratch)
    take_step(model.table, grads, **HYPER | {"lr": lr}, grad_scale=coefficient, found_inf=found_inf)


@pytest.mark.parametrize("moved", [False, True], ids=["same addresses", "new addresses"])
def test_graph_replays_equal_eager_steps(moved: bool) -> None:
    eager, captured = Model(), Model()
    warm = random_grads(1)
    static = [g.clone() for g in warm] if moved else warm
    lr = torch.tensor(1e-3, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        clipped_step(captured, warm, lr)
    torch.cuda.current_stream().wait_stream(stream)
    clipped_step(eager, warm, lr)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        clipped_step(captured, static, lr)
    for seed in range(5):
        for g, new in zip(static, random_grads(seed), strict=True):
            g.copy_(new)
        lr.mul_(0.9)
        clipped_step(eager, static, lr)
        graph.replay()
        if seed == 2:  # steps outside the graph and the graph do not affect each other
            other = random_grads(17)
            clipped_step(eager, other, lr)
            clipped_step(captured, other, lr)
    assert differing("after", captured.tensors(), eager.tensors()) == []


def test_each_capture_needs_only_a_step_before() -> None:
    eager, captured = Model(), Model()
    warm, lr = random_grads(1), torch.tensor(1e-3, device="cuda")
    graphs = []
    for seed in (2, 3):
        for model in (captured, eager):
            clipped_step(model, warm, lr)  # the gradients' addresses are the same each time
        static = random_grads(seed)
        graphs.append((torch.cuda.CUDAGraph(), static))
        with torch.cuda.graph(graphs[-1][0]):
            clipped_step(captured, static, lr)
    for graph, static in graphs:
        graph.replay()
        clipped_step(eager, static, lr)
    assert differing("after", captured.tensors(), eager.tensors()) == []


def test_one_graph_captures_two_clipped_models_of_equal_shapes() -> None:
    eager, captured = [Model(), Model()], [Model(), Model()]
    warm, lr = random_grads(1), torch.tensor(1e-3, device="cuda")
    for model in (*eager, *captured):
        clipped_step(model, warm, lr)
    static = [random_grads(2), random_grads(3)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for model, grads in zip(captured, static, strict=True):
            clipped_step(model, grads, lr)
    for _ in range(3):
        graph.replay()
        for model, grads in zip(eager, static, strict=True):
            clipped_step(model, grads, lr)
    for a, b in zip(captured, eager, strict=True):
        assert differing("after", a.tensors(), b.tensors()) == []


def test_capture_without_a_step_before_is_refused() -> None:
    model, grads = Model(), random_grads(1)
    with (
        pytest.raises(RuntimeError, match="take an eager step of the same parameters before"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        table_of(cuda, model.params, *model.states, model.steps)  # type: ignore[arg-type]
    with (
        pytest.raises(RuntimeError, match="take an eager step of the same parameters before"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        cuda.grad_sum_sq([g[:0] for g in grads])
