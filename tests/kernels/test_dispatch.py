"""Memory layouts, dtypes, empty calls and sums of squares, for every backend of CPU tensors."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bits import same_bits

from sharded_bf16_adamw import kernels

from . import layout_checks
from .backends import cpu_backends, update_of
from .tables import take_step

CHECKS = [
    pytest.param(check, id=name)
    for name, check in vars(layout_checks).items()
    if name.startswith("check_")
]


@pytest.fixture(params=cpu_backends())
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("check", CHECKS)
def test_layout(check, backend):
    check(update_of(backend))


def test_reference_is_a_backend():
    assert "reference" in kernels.BACKENDS


def test_no_parameters(backend):
    update_of(backend)(*([[]] * 6), lr=1.0, beta1=0.9, beta2=0.9, eps=1e-8, weight_decay=0.0)


def test_unknown_backend():
    row = [[torch.ones(1).bfloat16()] for _ in range(5)]
    with pytest.raises(ValueError, match=r"Invalid backend: 'fast'.*reference"):
        update_of("fast")(
            *row, [torch.zeros(())], lr=1.0, beta1=0.9, beta2=0.9, eps=1e-8, weight_decay=0.0
        )


@pytest.mark.parametrize(
    ("backend", "device"), [("native", "cuda"), ("native", "meta"), ("triton", "cpu")]
)
def test_backend_for_another_device_is_refused(backend, device, monkeypatch):
    """Reading addresses of another device's memory would crash the process."""
    monkeypatch.setattr(kernels.backend, "check_backend", lambda backend: None)
    with pytest.raises(ValueError, match=f"backend '{backend}' cannot read tensors on {device}"):
        kernels.backend.backend_module(torch.device(device), backend)
    assert kernels.backend.backend_module(torch.device(device), "reference") is kernels.reference


# the column of (p, g, m, v, c, step) to replace, its replacement, and the message
WRONG = {
    "parameter dtype": (0, torch.Tensor.half, "parameter 1 has dtype torch.float16"),
    "float32 parameter with a correction": (
        0,
        torch.Tensor.float,
        "parameter 1 has dtype torch.float32 and a correction",
    ),
    "no correction": (4, lambda _: None, "parameter 1 has dtype torch.bfloat16 and no correction"),
    "state dtype": (
        3,
        torch.Tensor.float,
        "exp_avg_sq 1 has dtype torch.float32 but its parameter torch.bfloat16",
    ),
    "state size": (
        2,
        lambda x: x[:-1],
        "exp_avg 1 has 99 elements on cpu but its parameter 100 on cpu",
    ),
    "correction size": (
        4,
        lambda x: x[:-1],
        "correction 1 has 99 elements on cpu but its parameter 100",
    ),
    "gradient size": (
        1,
        lambda x: x[:-1],
        "gradient 1 has 99 elements on cpu but its parameter 100",
    ),
    "state device": (
        2,
        lambda x: x.to("meta"),
        "exp_avg 1 has 100 elements on meta but its parameter 100 on cpu",
    ),
    "gradient device": (
        1,
        lambda x: x.to("meta"),
        "gradient 1 has 100 elements on meta but its parameter 100 on cpu",
    ),
    "gradient dtype": (1, torch.Tensor.half, "a gradient has dtype torch.float16"),
    "gradient dtype, strided": (
        1,
        lambda x: x.double().repeat(2, 1).t()[:, 0],
        "a gradient has dtype torch.float64",
    ),
    "step device": (
        5,
        lambda x: x.to("meta"),
        "step 1 must be a 0-dim float32 tensor on cpu, but is .* on meta",
    ),
    "step dtype": (
        5,
        torch.Tensor.long,
        "step 1 must be a 0-dim float32 tensor on cpu, but is torch.int64",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_tensors_raise_before_anything_changes(backend, what):
    column, change, message = WRONG[what]
    rows = [[*layout_checks.typical(100, seed), torch.zeros(())] for seed in range(2)]
    before = [[x.clone() for x in row] for row in rows]
    given = [list(row) for row in rows]
    given[1][column] = change(given[1][column])
    with pytest.raises((TypeError, ValueError), match=message):
        update_of(backend)(
            *map(list, zip(*given, strict=True)),
            lr=1.0,
            beta1=0.9,
            beta2=0.9,
            eps=1e-8,
            weight_decay=0.0,
        )
    assert all(
        torch.equal(x, y)
        for row, old in zip(rows, before, strict=True)
        for x, y in zip(row, old, strict=True)
    )


def test_each_group_has_its_own_hyperparameters(backend):
    """One call has the same result as a call of the reference for each parameter."""
    hypers = [
        kernels.Hyperparams(1e-3, 0.9, 0.999, 1e-8, 0.1),
        kernels.Hyperparams(torch.tensor(3e-4), 0.8, 0.99, 1e-6, 0.0, maximize=True),
        kernels.Hyperparams(0.0, 0.9, 0.95, 1e-8, 0.1),
    ]
    # out of order, so that neighbours differ; the third state is not on the fast path
    groups = [0, 2, 1, 1, 0, 2, 1]
    states = [layout_checks.typical(512, seed) for seed in range(len(groups))]
    states[2] = states[2].map(lambda x: x.view(16, 32)[:, ::2])
    together, apart = ([state.map(torch.clone) for state in states] for _ in range(2))
    together[2] = states[2]
    counts = [[torch.tensor(float(group == 1)) for group in groups] for _ in range(2)]
    p, g, m, v, c = (list(column) for column in zip(*together, strict=True))
    table = kernels.FusedAdamW(p, m, v, c, counts[0], groups=groups, backend=backend)
    for _ in range(3):
        table.update_(kernels.StepArgs(g, hypers, torch.tensor(0.5)))
        for i, group in enumerate(groups):
            lists = [[x] for x in (*apart[i], counts[1][i])]
            hyper = hypers[group]._asdict()
            update_of("reference")(*lists, **hyper, grad_scale=torch.tensor(0.5))
    for a, b in zip(together, apart, strict=True):
        assert same_bits(a, b)
    assert counts[0] == counts[1]


def test_arguments_for_other_parameters_or_groups_are_errors(backend):
    (p, g, m, v, c), step = layout_checks.typical(8, 64), torch.zeros(())
    hyper = kernels.Hyperparams(1e-3, 0.9, 0.999, 1e-8, 0.1)
    table = kernels.FusedAdamW([p], [m], [v], [c], [step], groups=[2], backend=backend)
    for grads, hypers, message in (
        ([g, g], [hyper] * 3, "StepArgs.grads has 2 gradients for 1 parameters; pass one per par"),
        ([g], [hyper] * 2, "StepArgs.hypers has 2 entries for 3 groups; pass one per group"),
    ):
        for call in (table.update_, table.precision_sums):
            with pytest.raises(ValueError, match=message):
                call(kernels.StepArgs(grads, hypers))
    assert step == 0


def test_many_steps_of_one_object_equal_separate_calls(backend):
    """They do also if a gradient's layout or dtype changes between steps."""
    states = [
        layout_checks.typical(layout_checks.N, seed).map(lambda x: x.view(layout_checks.SHAPE))
        for seed in (68, 69)
    ]
    hyper = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
    lay = layout_checks.LAYOUTS["transposed"]
    once = [states[0].map(torch.clone), states[1].map(lay)]
    each = [state.map(torch.clone) for state in once]
    counts = [[torch.zeros(()) for _ in once] for _ in range(2)]
    p, _, m, v, c = (list(column) for column in zip(*once, strict=True))
    table = kernels.FusedAdamW(p, m, v, c, counts[0], backend=backend)
    for change in (torch.clone, lay, torch.Tensor.float, lambda g: lay(g).float(), torch.clone):
        grads = [change(state.g) for state in states]
        take_step(table, grads, **hyper)
        p, _, m, v, c = (list(column) for column in zip(*each, strict=True))
        kernels.adamw_bf16_(p, grads, m, v, c, counts[1], **hyper, backend=backend)
        for a, b in zip(once, each, strict=True):
            assert same_bits(a, b)
    assert [count.item() for count in counts[0]] == [5.0, 5.0]


def test_default_backend_equals_the_reference():
    """This holds whichever backend this machine's CPU has."""
    state = layout_checks.typical(5000, 65)
    chosen, reference = (
        layout_checks.stepped(update_of(name), state, 3) for name in (None, "reference")
    )
    assert same_bits(chosen, reference)


def test_chosen_backend_is_logged_once(monkeypatch):
    lines = []
    monkeypatch.setattr(
        kernels.backend.logger, "info", lambda text, *args: lines.append(text % args)
    )
    kernels.backend.backend_module.cache_clear()
    for _ in range(2):
        kernels.grad_sum_sq([torch.ones(3)], backend="reference")
    assert lines == ["AdamW_BF16 uses the reference backend on cpu"]


def test_float32_parameter_layouts(backend):
    """float32 parameters, gradients and moments may have any strides, each its own."""
    gen = torch.Generator().manual_seed(66)
    p, g, m, v = (torch.rand(layout_checks.SHAPE, generator=gen) for _ in range(4))
    hyper = {
        "lr": 1e-3,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "backend": backend,
    }
    flat = [x.flatten().clone() for x in (p, g, m, v)]
    kernels.adamw_bf16_(*([x] for x in flat), [None], [torch.zeros(())], **hyper)
    names = list(layout_checks.LAYOUTS)
    for i in range(len(names)):
        laid = [
            layout_checks.LAYOUTS[names[(i + j) % len(names)]](x)
            for j, x in enumerate((p, g, m, v))
        ]
        kernels.adamw_bf16_(*([x] for x in laid), [None], [torch.zeros(())], **hyper)
        assert all(
            torch.equal(a, b.view(layout_checks.SHAPE)) for a, b in zip(laid, flat, strict=True)
        ), names[i]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_grad_sum_sq(backend, dtype):
    """The sum over tensors of any layout and size has at least float32's precision."""
    gen = torch.Generator().manual_seed(67)
    grads = [
        torch.randn(shape, generator=gen).to(dtype)
        for shape in ((), (0,), (1,), (1023,), (65, 1031), layout_checks.SHAPE)
    ]
    grads += [lay(grads[-1]) for lay in layout_checks.LAYOUTS.values()]
    total = kernels.grad_sum_sq(grads, backend=backend)
    exact = sum(np.square(g.double().numpy()).sum() for g in grads)
    assert total.dtype == torch.float64 and total.shape == ()
    assert total.item() == pytest.approx(exact, rel=1e-6)


def test_grad_sum_sq_of_another_dtype(backend):
    with pytest.raises(TypeError, match="float16; only bfloat16 and float32"):
        kernels.grad_sum_sq([torch.ones(3), torch.ones(3).half()], backend=backend)


def test_grad_sum_sq_mixed(backend):
    grads = [torch.full((3,), 2.0), torch.full((5,), 3.0).bfloat16(), torch.empty(0)]
    assert kernels.grad_sum_sq(grads, backend=backend).item() == 57.0


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_grad_sum_sq_is_nonfinite_if_any_gradient_is(backend, value, dtype):
    """The non-finite guard of a step relies on this."""
    for position in (0, 1000, 69_999):
        g = torch.ones(70_000, dtype=dtype)
        g[position] = value
        assert not kernels.grad_sum_sq([torch.ones(3, dtype=dtype), g], backend=backend).isfinite()


class OnMPS(torch.Tensor):
    """A tensor that claims to be on a device without float64."""

    device = property(lambda self: torch.device("mps", 0))

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        if function is torch.Tensor.to and torch.device("cpu") in args:
            return result.as_subclass(torch.Tensor)
        if isinstance(result, cls) and result.as_subclass(torch.Tensor).dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support "
                "float64."
            )
        return result


def test_norm_and_clip_on_a_device_without_float64():
    plain = [
        torch.randn(70_000, generator=torch.Generator().manual_seed(4)).to(dtype)
        for dtype in (torch.bfloat16, torch.float32)
    ]
    grads = [grad.as_subclass(OnMPS) for grad in plain]
    with pytest.raises(TypeError, match="float64"):
        grads[0].double()
    total = kernels.grad_sum_sq(grads)
    assert type(total) is torch.Tensor and torch.equal(
        total, kernels.grad_sum_sq(plain, backend="reference")
    )
    for found, wanted in zip(
        kernels.norm_and_clip_coefficient(grads, 1.0),
        kernels.norm_and_clip_coefficient(plain, 1.0, backend="reference"),
        strict=True,
    ):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("has_double", [True, False])
def test_sums_of_an_xpu_need_float64(monkeypatch, has_double):
    kernels.double_device.cache_clear()
    monkeypatch.setattr(
        torch.xpu, "get_device_properties", lambda device: SimpleNamespace(has_fp64=has_double)
    )
    assert kernels.double_device(torch.device("xpu", 0)) == torch.device(
        "xpu:0" if has_double else "cpu"
    )
    kernels.double_device.cache_clear()
