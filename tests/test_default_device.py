"""Internal tensors ignore ``torch.set_default_device``; on "meta" they would have no values."""

from collections.abc import Iterator

import pytest
import torch
from small_optimizers import BF16, equal, give_gradients, snapshot
from torch import nn

import sharded_bf16_adamw as sba
from sharded_bf16_adamw import AdamW_BF16
from sharded_bf16_adamw.kernels import device_memory, reference


@pytest.fixture(params=["cpu", "meta"])
def default_device(request: pytest.FixtureRequest) -> Iterator[str]:
    torch.set_default_device(request.param)
    yield request.param
    torch.set_default_device(None)


def make() -> tuple[nn.Module, AdamW_BF16]:
    with torch.device("cpu"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 4, dtype=BF16), nn.LayerNorm(4))
    return model, AdamW_BF16(model.parameters(), lr=1e-2, skip_nonfinite=True)


def clipped_steps(model: nn.Module, optimizer: AdamW_BF16) -> None:
    for seed in range(3):
        with torch.device("cpu"):
            give_gradients(model.parameters(), seed)
        norm = optimizer.clip_grad_norm_(0.5)
        assert norm.device.type == "cpu" and norm > 0.5
        optimizer.step()


def test_steps_and_checkpoints_ignore_the_default_device(default_device: str, tmp_path) -> None:
    model, optimizer = make()
    clipped_steps(model, optimizer)
    assert optimizer.skipped_steps == 0
    sba.save(tmp_path / "saved", 3, model, optimizer)
    loaded_model, loaded = make()
    sba.load(tmp_path / "saved", loaded_model, loaded)
    full = sba.gather_full_state_dict(model, optimizer)
    scattered_model, scattered = make()
    scattered_model.load_state_dict(model.state_dict())
    sba.scatter_full_state_dict(scattered_model, scattered, full)
    sba.export_fp32(tmp_path / "saved", tmp_path / "exported")
    imported_model, imported = make()
    sba.import_fp32(tmp_path / "exported", imported_model, imported)
    sba.convert_fp32(tmp_path / "exported", tmp_path / "converted")
    expected = snapshot_without_default_device()
    for each in (optimizer, loaded, scattered):
        assert equal(snapshot(each), expected)
    for param, (weight, *_) in zip(imported_model.parameters(), expected, strict=True):
        assert torch.equal(param, weight)


def snapshot_without_default_device() -> list[list[torch.Tensor]]:
    with torch.device("cpu"):
        model, optimizer = make()
        clipped_steps(model, optimizer)
        return snapshot(optimizer)


def test_host_tensors_of_the_kernels_ignore_the_default_device(default_device: str) -> None:
    cpu = torch.device("cpu")
    assert device_memory.chunk_map([5, 0, 9], 4).tolist() == [
        [0, 0],
        [0, 1],
        [1, 0],
        [2, 0],
        [2, 1],
        [2, 2],
    ]
    assert device_memory.DeviceArray((1, 2), cpu).upload_if_changed([[3, 4]]).tolist() == [[3, 4]]
    with torch.device("cpu"):
        expected = reference.step_key(7)
    assert reference.step_key(7) == expected
