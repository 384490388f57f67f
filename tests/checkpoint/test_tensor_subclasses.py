"""Quantised weights, and other subclasses of tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bits import same_bits
from distributed import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

from sharded_bf16_adamw import (
    AdamW_BF16,
    export_fp32,
    gather_full_state_dict,
    import_fp32,
    load,
    save,
    wait_for_save,
)

from .trainings import read_folder
from .two_layers import BF16, layers, states, take_steps


class Quantised(Tensor):
    """A tensor like torchao's: it consists of two others, and supports few operations."""

    @staticmethod
    def __new__(cls, data: Tensor, scale: Tensor) -> Quantised:
        return Tensor._make_wrapper_subclass(cls, data.shape, dtype=BF16, device=data.device)

    def __init__(self, data: Tensor, scale: Tensor) -> None:
        self.qdata, self.scale = data, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["qdata", "scale"], None

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], context: None, size: Any, stride: Any
    ) -> Quantised:
        return Quantised(inner["qdata"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (
            torch.ops.aten.detach.default,
            torch.ops.aten.view.default,
            torch.ops.aten.alias.default,
        ):
            return Quantised(args[0].qdata, args[0].scale)
        raise NotImplementedError(f"{func} of a quantised tensor")

    def __repr__(self) -> str:  # type: ignore[override]
        return "Quantised"


class LoRA(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        data = torch.randint(-128, 127, (4, 4), dtype=torch.int8, generator=generator)
        self.base = nn.Parameter(
            Quantised(data, torch.rand(4, generator=generator)), requires_grad=False
        )
        self.adapter = nn.Linear(4, 4).to(BF16)


def quantised(seed: int) -> tuple[LoRA, AdamW_BF16]:
    model = LoRA(seed)
    return model, AdamW_BF16(model.adapter.parameters(), lr=0.1)


@pytest.mark.parametrize("async_", [False, True])
def test_quantised_parameter_is_saved_and_loaded_by_its_parts(async_, tmp_path):
    model, optimizer = quantised(seed=0)
    save(tmp_path / "run", 1, model, optimizer, async_=async_)
    wait_for_save()
    fresh, fresh_optimizer = quantised(seed=1)
    base = fresh.base
    fresh_optimizer.state["epoch"] = 1  # an entry of no parameter
    load(tmp_path / "run", fresh, fresh_optimizer)
    assert (
        fresh.base is base
        and torch.equal(base.qdata, model.base.qdata)
        and torch.equal(base.scale, model.base.scale)
    )
    with pytest.raises(
        ValueError, match="base is a quantised tensor, and the checkpoint has its parts"
    ):
        export_fp32(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    gather_full_state_dict(model, optimizer)
    with pytest.raises(
        ValueError, match="base is a Quantised; import first, and quantise the model afterwards"
    ):
        import_fp32(
            {
                "base": torch.ones(4, 4),
                "adapter.weight": torch.ones(4, 4),
                "adapter.bias": torch.ones(4),
            },
            model,
            optimizer,
        )


def test_quantised_parameter_does_not_load_into_a_plain_one(tmp_path):
    save(tmp_path, 1, *quantised(seed=0))
    plain = LoRA(0)
    plain.base = nn.Parameter(torch.ones(4, 4, dtype=BF16), requires_grad=False)
    with pytest.raises(
        ValueError, match=r"missing key model.base; unexpected key model.base:qdata"
    ):
        load(tmp_path, plain, AdamW_BF16(plain.adapter.parameters(), lr=0.1))


def test_plain_parameter_does_not_load_into_a_quantised_one_with_a_state(tmp_path):
    plain = LoRA(0)
    plain.base = nn.Parameter(torch.ones(4, 4, dtype=BF16), requires_grad=False)
    save(tmp_path, 1, plain, AdamW_BF16(plain.adapter.parameters(), lr=0.1))
    model, optimizer = quantised(seed=0)
    optimizer.state[model.base] = {"correction": torch.zeros(4, 4, dtype=BF16)}
    with pytest.raises(ValueError, match=r"missing key model.base:qdata; missing key model.base:"):
        load(tmp_path, model, optimizer)


class Named(Tensor):
    """A user's subclass with memory of its own."""


@pytest.mark.parametrize("async_", [False, True])
def test_tensor_subclass_is_saved_as_a_plain_tensor(async_, tmp_path):
    """A file that names the user's class would be refused by load()."""

    def build(seed: int) -> tuple[nn.Module, AdamW_BF16]:
        model = layers(seed)
        model.register_buffer("ids", torch.full((3,), float(seed)).as_subclass(Named))
        model[0].weight = nn.Parameter(model[0].weight.detach().as_subclass(Named))
        optimizer = AdamW_BF16(model.parameters(), lr=1e-2)
        take_steps(model, optimizer)
        return model, optimizer

    model, optimizer = build(seed=1)
    save(tmp_path / "run", 1, model, optimizer, async_=async_)
    fresh, resumed = build(seed=2)
    load(tmp_path / "run", fresh, resumed)
    assert (
        type(fresh.ids) is Named
        and torch.equal(fresh.ids, model.ids)
        and torch.equal(fresh[0].weight, model[0].weight)
    )
    assert same_bits(states(fresh, resumed), states(model, optimizer))
    assert len(read_folder(export_fp32(tmp_path / "run", tmp_path / "out"))) == 5


def dtensor_worker(rank: int, world: int, root: str) -> str:
    mesh = init_device_mesh("cpu", (world,))
    model = LoRA(0)
    model.base = nn.Parameter(
        DTensor.from_local(model.base.detach(), mesh, [Replicate()], run_check=False),
        requires_grad=False,
    )
    with pytest.raises(ValueError, match="DTensor of Quantised") as caught:
        save(root, 1, model, AdamW_BF16(model.adapter.parameters(), lr=0.1))
    return str(caught.value)


def test_sharded_quantised_parameter_is_refused(tmp_path):
    for message in run_ranks(2, dtensor_worker, str(tmp_path)):
        assert message.startswith(
            "base is a DTensor of Quantised, whose shards cannot be saved or loaded; leave "
            "the quantised module out"
        )
    assert not list(tmp_path.iterdir())
