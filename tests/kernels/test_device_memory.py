"""Arrays on the device, with a CUDA device and its captures played on the CPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from sharded_bf16_adamw.kernels import device_memory
from sharded_bf16_adamw.kernels.device_memory import DeviceArray

EAGER, OTHER, THIRD = [[1, 1], [0, 0]], [[2, 2], [0, 0]], [[3, 3], [0, 0]]


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """``.now``: whether a graph is captured. Pinned memory is plain memory here, and copies to the device are copies."""
    state = SimpleNamespace(now=False)
    empty, to = torch.empty, Tensor.to
    monkeypatch.setattr(device_memory, "is_capturing", lambda device: state.now)
    monkeypatch.setattr(device_memory, "upload", lambda host, device: host.clone())

    def empty_of(*shape: object, pin_memory: bool = False, **options: object) -> Tensor:
        assert not (pin_memory and state.now), "no pinned memory can be allocated while a graph is captured"
        return empty(*shape, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch, "empty", empty_of)
    monkeypatch.setattr(Tensor, "to", lambda x, device, **options: x.clone() if device is DEVICE else to(x, device, **options))
    return state


DEVICE = SimpleNamespace(type="cuda")


def make() -> DeviceArray:
    return DeviceArray((2, 2), DEVICE)  # type: ignore[arg-type]


def test_uploaded_only_where_it_changed(capturing: SimpleNamespace) -> None:
    array = make()
    first = array.holding(EAGER)
    assert array.holding([list(row) for row in EAGER]) is first
    assert array.holding(OTHER) is not first and first.tolist() == EAGER


def test_a_step_before_each_capture_is_enough(capturing: SimpleNamespace) -> None:
    """Also where the gradients of those steps lie at one place, and those of each capture elsewhere."""
    array = make()
    for captured in (OTHER, THIRD):
        capturing.now = False
        array.holding(EAGER)
        capturing.now = True
        assert array.holding(captured).tolist() == captured
    assert [(on_device.tolist(), spare is not None) for on_device, spare in array.captured] == [(OTHER, True), (THIRD, True)]
    capturing.now = False
    assert array.holding(EAGER).tolist() == EAGER, "a graph has not filled its array yet"


def test_a_second_capture_without_a_step_is_refused(capturing: SimpleNamespace) -> None:
    array = make()
    array.holding(EAGER)
    capturing.now = True
    array.holding(OTHER)
    with pytest.raises(RuntimeError, match="take a step like it before each capture"):
        array.holding(THIRD)


def test_what_a_graph_reads_is_kept(capturing: SimpleNamespace) -> None:
    array = make()
    eager = array.holding(EAGER)
    capturing.now = True
    assert array.holding(EAGER) is eager
    capturing.now = False
    array.holding(OTHER)
    assert any(kept is eager for kept, _ in array.captured) and eager.tolist() == EAGER
