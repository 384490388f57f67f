"""Names, strategy and parameters in a checkpoint."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from distributed import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sharded_bf16_adamw import (
    AdamW_BF16,
    gather_full_state_dict,
    import_fp32,
    load,
    save,
    scatter_full_state_dict,
)
from sharded_bf16_adamw.checkpoint.manifest import read_manifest
from sharded_bf16_adamw.sharding.dtensor import to_local

from .layouts import BY_NAME, everything, train

# ----------------------------------------------------------------------------------------- strategy


def strategy_worker(rank: int, world: int, root: str, name: str) -> str:
    return read_manifest(save(f"{root}/{name}", 0, *BY_NAME[name].build(world, seed=0))).strategy


@pytest.mark.parametrize(
    ("name", "world", "strategy"),
    [
        ("single", 1, "not sharded"),
        ("DDP", 2, "DistributedDataParallel"),
        ("FSDP1", 2, "FullyShardedDataParallel FULL_SHARD use_orig_params=False"),
        ("FSDP2", 2, "fully_shard, mesh (2,) (Shard(dim=0),)"),
        ("FSDP2 + TP", 2, "fully_shard, mesh (1, 2) ('data', 'tensor') "),
        ("ZeRO-1", 2, "DistributedDataParallel, ZeRO stage 1, mesh (2,)"),
        ("ZeRO-2", 2, "ZeRO stage 2, mesh (2,)"),
    ],
)
def test_manifest_describes_the_sharding(name, world, strategy, tmp_path):
    for found in run_ranks(world, strategy_worker, str(tmp_path), name):
        assert found.startswith(strategy) and (found == strategy or name == "FSDP2 + TP")


# ----------------------------------------------------------------------- parameters of other models


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).bfloat16()


def test_optimizer_of_other_parameters_is_refused(tmp_path):
    model = linear()
    own = list(model.parameters())
    good = save(tmp_path, 1, model, AdamW_BF16(own, lr=0.1))
    raw = nn.Parameter(torch.ones(3, 7, dtype=torch.bfloat16))
    with_extra = AdamW_BF16([{"params": own}, {"params": [raw]}], lr=0.1)
    of_other_model = AdamW_BF16(linear().parameters(), lr=0.1)
    for optimizer, message in (
        (
            with_extra,
            "the optimizer holds parameter 4 (shape (3, 7)), which is not a parameter of "
            "this model; pass",
        ),
        (
            of_other_model,
            "the optimizer holds parameter 0 (shape (4, 3)), which is not a parameter of "
            "this model (nor are 3 more); pass",
        ),
    ):
        for call in (
            lambda o: save(tmp_path, 2, model, o),
            lambda o: load(tmp_path, model, o),
            lambda o: gather_full_state_dict(model, o),
        ):
            with pytest.raises(ValueError, match="^" + re.escape(message)):
                call(optimizer)
            assert not optimizer.state
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", good.name]


def refused_worker(rank: int, world: int, root: str) -> str:
    """Add a foreign parameter on one rank only; the other rank must not block."""
    module, optimizer = BY_NAME["FSDP2"].build(world, seed=0)
    if rank == 1:
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(5, dtype=torch.bfloat16))]})
    with pytest.raises(
        ValueError,
        match=r"the optimizer holds parameter 6 \(shape \(5,\)\), which is not a parameter of "
        r"this model",
    ) as caught:
        save(root, 1, module, optimizer)
    return str(caught.value)


def test_optimizer_of_other_parameters_is_refused_on_all_ranks(tmp_path):
    first, second = run_ranks(2, refused_worker, str(tmp_path))
    assert first == second and not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------- wrappers


class FabricModule(nn.Module):
    """Lightning Fabric's wrapper: it holds two modules, and has the state dict of the plain one."""

    def __init__(self, forward_module: nn.Module, original_module: nn.Module) -> None:
        super().__init__()
        self._forward_module, self._original_module = forward_module, original_module

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_module(x)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._original_module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._original_module.load_state_dict(*args, **kwargs)


def fabric(module: nn.Module) -> FabricModule:
    return FabricModule(
        module, module.module if isinstance(module, DistributedDataParallel) else module
    )


def same(found: Any, expected: Any) -> bool:
    return found[1] == expected[1] and all(
        torch.equal(found[0][key], value) for key, value in expected[0].items()
    )


def fabric_worker(rank: int, world: int, root: str) -> None:
    single, single_optimizer = BY_NAME["single"].build(1, seed=4)
    for name in ("DDP", "FSDP1 use_orig_params", "FSDP2", "ZeRO-2"):
        module, optimizer = BY_NAME[name].build(world, seed=0)
        train(fabric(module), optimizer, 2)
        expected = everything(module, optimizer)
        save(f"{root}/{name}", 2, fabric(module), optimizer)
        load(f"{root}/{name}", single, single_optimizer)
        assert same(everything(single, single_optimizer), expected), name
        full = gather_full_state_dict(fabric(module), optimizer)
        assert rank or "up.weight" in full["state"]
        train(module, optimizer, 1)
        assert not same(everything(module, optimizer), expected), name
        load(f"{root}/{name}", fabric(module), optimizer)
        assert same(everything(module, optimizer), expected), name
        for state in optimizer.state.values():
            for value in state.values():
                to_local(value).zero_()
        scatter_full_state_dict(fabric(module), optimizer, full)
        assert same(everything(module, optimizer), expected), name
        weights = {key: value.float() + 1 for key, value in single.state_dict().items()}
        import_fp32(weights, fabric(module), optimizer)
        found, _ = everything(module, optimizer)
        assert all(
            torch.equal(value.bfloat16(), found[key].bfloat16()) for key, value in weights.items()
        )


def test_names_do_not_depend_on_lightning_fabric(tmp_path):
    run_ranks(2, fabric_worker, str(tmp_path))


def test_tied_weights_are_imported_by_any_name_into_a_wrapped_module():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)).bfloat16()
    model[1].weight = model[0].weight
    optimizer = AdamW_BF16(model.parameters(), lr=0.1)
    import_fp32(
        {"0.weight": torch.full((3, 3), 2.0), "1.weight": torch.full((3, 3), 2.0)},
        fabric(model),
        optimizer,
    )
    assert (model[0].weight == 2).all()
    import_fp32({"1.weight": torch.full((3, 3), 3.0)}, fabric(model), optimizer)
    assert (model[0].weight == 3).all()


class Ensemble(nn.Module):
    """A user's module with a submodule of the wrapper's name, and another submodule."""

    def __init__(self) -> None:
        super().__init__()
        self._forward_module = nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)


def test_module_with_other_submodules_is_not_a_wrapper(tmp_path):
    model = Ensemble().bfloat16()
    path = save(tmp_path, 1, model, AdamW_BF16(model.parameters(), lr=0.1))
    assert set(read_manifest(path).groups[0].params) == {
        name for name, _ in model.named_parameters()
    }
