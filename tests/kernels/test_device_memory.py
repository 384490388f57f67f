"""Arrays on the device and captures by CUDA graphs, simulated on the CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from sharded_bf16_adamw.kernels import cuda, cuda_norm, device_memory
from sharded_bf16_adamw.kernels.device_memory import DeviceArray, NormScratch, double_bits
from sharded_bf16_adamw.kernels.grad_addresses import GradientAddresses
from sharded_bf16_adamw.kernels.reference import Hyperparams

from .tables import table_of, take_step

EAGER, OTHER, THIRD = [[1, 1], [0, 0]], [[2, 2], [0, 0]], [[3, 3], [0, 0]]


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Simulate a device: ``.now`` is True while a graph is captured.

    Pinned memory is plain memory, and copies to the device are plain copies.
    """
    state = SimpleNamespace(now=False, stream=1)
    empty, to = torch.empty, Tensor.to

    def on_cpu(function: Any) -> Any:
        def call(
            *shape: object, pin_memory: bool = False, device: object = "cpu", **options: object
        ) -> Tensor:
            assert not (pin_memory and state.now), (
                "no pinned memory can be allocated while a graph is captured"
            )
            return function(*shape, **options)  # type: ignore[no-any-return]

        return call

    monkeypatch.setattr(torch, "empty", on_cpu(empty))
    monkeypatch.setattr(torch, "zeros", on_cpu(torch.zeros))
    for module in (device_memory, cuda, cuda_norm):
        monkeypatch.setattr(module, "is_capturing", lambda device: state.now)
        monkeypatch.setattr(module, "upload", lambda host, device: host.clone())
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=state.stream)
    )
    monkeypatch.setattr(
        Tensor,
        "to",
        lambda x, device, **options: x.clone() if device is DEVICE else to(x, device, **options),
    )
    return state


class Device:
    type = "cuda"


DEVICE = Device()


def make() -> DeviceArray:
    return DeviceArray((2, 2), DEVICE)  # type: ignore[arg-type]


def test_uploaded_only_if_changed(capturing: SimpleNamespace) -> None:
    array = make()
    first = array.upload_if_changed(EAGER)
    assert array.upload_if_changed([list(row) for row in EAGER]) is first
    assert array.upload_if_changed(OTHER) is not first and first.tolist() == EAGER


def test_one_step_before_each_capture_is_enough(capturing: SimpleNamespace) -> None:
    """The gradients of the steps keep their addresses; each capture has other addresses."""
    array = make()
    for captured in (OTHER, THIRD):
        capturing.now = False
        array.upload_if_changed(EAGER)
        capturing.now = True
        assert array.upload_if_changed(captured).tolist() == captured
    assert [(on_device.tolist(), spare is not None) for on_device, spare in array.captured] == [
        (OTHER, True),
        (THIRD, True),
    ]
    capturing.now = False
    assert array.upload_if_changed(EAGER).tolist() == EAGER, "a graph has not filled its array yet"


def test_second_capture_without_a_step_is_refused(capturing: SimpleNamespace) -> None:
    array = make()
    array.upload_if_changed(EAGER)
    capturing.now = True
    array.upload_if_changed(OTHER)
    with pytest.raises(RuntimeError, match="no eager step has run since the last capt"):
        array.upload_if_changed(THIRD)


def test_captured_arrays_are_kept(capturing: SimpleNamespace) -> None:
    array = make()
    eager = array.upload_if_changed(EAGER)
    capturing.now = True
    assert array.upload_if_changed(EAGER) is eager
    capturing.now = False
    array.upload_if_changed(OTHER)
    assert any(kept is eager for kept, _ in array.captured) and eager.tolist() == EAGER


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_gradients_of_another_dtype_are_refused(dtype: torch.dtype) -> None:
    """The kernels would read their bits as bfloat16."""
    pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")
    addresses, grad = GradientAddresses([0, 0], torch.device("cpu")), torch.ones(8).bfloat16()
    addresses.upload([grad, grad])
    for _ in range(2):
        with pytest.raises(TypeError, match=f"a gradient has dtype {dtype}; only bfloat16"):
            addresses.upload([grad, grad.to(dtype)])


def test_no_kernel_is_launched_if_a_gradient_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of the bfloat16 parameters would be launched before that of the float32 ones."""
    pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")
    from sharded_bf16_adamw.kernels import triton_adamw

    kernel = mock.MagicMock()
    monkeypatch.setattr(triton_adamw, "adamw_kernel", kernel)
    params = [torch.ones(8).bfloat16(), torch.ones(8)]
    corrections = [torch.zeros(8).bfloat16(), None]
    table = table_of(cuda, params, params, params, corrections, [torch.zeros(())] * 2)
    hyper = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0}
    with pytest.raises(TypeError, match=r"a gradient has dtype torch\.float16"):
        take_step(table, [params[0], params[1].half()], **hyper)
    assert not kernel.mock_calls
    take_step(table, [*params], **hyper)
    assert kernel.__getitem__.call_count == 2


# ----------------------------------------------------------------------------- scratch of the norm


def layout_of(scratch: NormScratch, *lengths: int) -> Any:
    pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")
    return cuda_norm._norm_layout(lengths, DEVICE, scratch)  # type: ignore[arg-type]


def memory(layout: Any) -> set[int]:
    return {layout.partials.data_ptr(), layout.done_counter.data_ptr()}


def test_owners_share_no_scratch(capturing: SimpleNamespace) -> None:
    """Kernels of two owners may overlap: on two streams, or in graphs replayed together."""
    first, second = NormScratch(), NormScratch()
    for scratch in (first, second):
        assert layout_of(scratch, 3, 5) is layout_of(scratch, 3, 5)
    assert not memory(layout_of(first, 3, 5)) & memory(layout_of(second, 3, 5))
    eager = memory(layout_of(first, 3, 5))
    capturing.stream = 2
    assert not memory(layout_of(first, 3, 5)) & eager, (
        "two streams of one owner share no scratch either"
    )
    capturing.now = True
    graphs = [memory(layout_of(scratch, 3, 5)) for scratch in (first, second)]
    assert not graphs[0] & graphs[1] and not graphs[0] & eager


def test_one_graph_captures_the_norms_of_two_owners(capturing: SimpleNamespace) -> None:
    """New addresses of the gradients need the pinned memory that each owner has reserved."""
    scratches = NormScratch(), NormScratch()
    warm, static = ([torch.ones(3), torch.ones(5)] for _ in range(2))
    for scratch in scratches:
        layout_of(scratch, 3, 5).grads.upload(warm)
    capturing.now = True
    for scratch in scratches:
        addresses, _ = layout_of(scratch, 3, 5).grads.upload(static)
        assert addresses[0].tolist() == [x.data_ptr() for x in static]
    with pytest.raises(RuntimeError, match="take an eager step of the same parameters before each"):
        layout_of(NormScratch(), 3, 5)


def test_old_scratch_is_released(capturing: SimpleNamespace) -> None:
    scratch = NormScratch()
    for length in range(3 * cuda_norm.MAX_LAYOUTS):
        layout_of(scratch, length)
    assert len(scratch.layouts) == cuda_norm.MAX_LAYOUTS


# ---------------------------------------------------------------------------------- learning rates


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_capture_refuses_a_learning_rate_that_it_would_freeze(
    capturing: SimpleNamespace, dtype: torch.dtype
) -> None:
    """An eager step reads any lr tensor; a captured one needs a tensor on the device."""
    device, hyper = (
        torch.device("cuda", 0),
        Hyperparams(torch.tensor(0.5, dtype=dtype), 0.9, 0.99, 1e-8, 0.0),
    )
    assert cuda._hyper_values(hyper, device)[0] == double_bits(0.5)
    capturing.now = True
    with pytest.raises(
        RuntimeError,
        match=rf"captures a step whose lr is {dtype} on cpu, .* float64 tensor on cuda:0",
    ):
        cuda._hyper_values(hyper, device)
    assert cuda._hyper_values(hyper._replace(lr=0.5), device)[0] == double_bits(0.5), (
        "a number is constant on purpose"
    )
