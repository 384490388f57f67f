"""Parameter groups without parameters."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from distributed import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from sharded_bf16_adamw import (
    AdamW_BF16,
    ZeRO,
    convert_fp32,
    gather_full_state_dict,
    import_fp32,
    load,
    save,
    scatter_full_state_dict,
)
from sharded_bf16_adamw.checkpoint.groups import match_groups
from sharded_bf16_adamw.checkpoint.manifest import read_manifest

from .two_layers import layers, take_steps, wrapped


@pytest.mark.parametrize(
    ("current", "saved", "expected"),
    [
        ([["a"], []], [["a"], []], [0, 1]),
        ([[], ["a"]], [[], ["a"]], [0, 1]),
        ([["a"], ["b"], []], [["a", "b"], []], [0, 0, 1]),
        ([["a"], []], [["a"]], [0, None]),
        ([["a"]], [["a"], []], [0]),
        ([[], ["a"], []], [["a"], []], [None, 0, None]),
        ([["a"], []], [["a"], ["b"]], [0, 1]),
    ],
)
def test_empty_group_is_matched_by_its_index(current, saved, expected):
    assert match_groups(current, saved) == expected


def grouped(model: nn.Module, decay: float, sharding: Any = None) -> AdamW_BF16:
    params = list(model.parameters())
    return AdamW_BF16(
        [
            {"params": [], "weight_decay": decay},
            {"params": params},
            {"params": [], "weight_decay": 2 * decay},
        ],
        lr=1e-2,
        sharding=sharding,
    )


def decays(optimizer: AdamW_BF16) -> list[float]:
    return [group["weight_decay"] for group in optimizer.param_groups]


def test_options_of_empty_groups_are_restored(tmp_path):
    model = layers()
    optimizer = grouped(model, 0.25)
    take_steps(model, optimizer)
    path = save(tmp_path / "run", 1, model, optimizer)
    fresh = layers(seed=1)
    for restore in (
        lambda resumed: load(path, fresh, resumed),
        lambda resumed: scatter_full_state_dict(
            fresh, resumed, gather_full_state_dict(model, optimizer)
        ),
        lambda resumed: import_fp32(
            model.float().state_dict(), fresh, resumed, optimizer.state_dict()
        ),
    ):
        resumed = grouped(fresh, 0.5)
        restore(resumed)
        assert decays(resumed) == [0.25, 0.01, 0.5]
        assert [group["schedule_step"] for group in resumed.param_groups] == [3, 3, 3]
    converted = convert_fp32(
        model.state_dict(), tmp_path / "converted", gather_full_state_dict(model, optimizer)
    )
    assert [len(group.params) for group in read_manifest(converted).groups] == [0, 4, 0]
    one = AdamW_BF16(fresh.parameters(), lr=1e-2)
    load(path, fresh, one)
    assert len(one.param_groups) == 1
    one.add_param_group({"params": [], "weight_decay": 0.75, "schedule_step": 0})
    load(path, fresh, one)
    assert decays(one) == [0.01, 0.75] and one.param_groups[1]["schedule_step"] == 3


def empty_groups_worker(rank: int, world: int, root: str) -> list[Any]:
    warnings.simplefilter("ignore")
    found = []
    for layout in ("DDP", "FSDP2", "ZeRO-2", "FSDP1", "FSDP1 use_orig_params"):
        sharding = ZeRO(init_device_mesh("cpu", (world,))) if layout == "ZeRO-2" else None
        model, _, _ = wrapped(layout, world, seed=0) if sharding is None else (layers(), None, None)
        optimizer = grouped(model, 0.25, sharding)
        take_steps(model, optimizer)
        save(f"{root}/{layout}", 1, model, optimizer)
        full = gather_full_state_dict(model, optimizer)
        optimizer = grouped(
            model, 0.5, None if sharding is None else ZeRO(init_device_mesh("cpu", (world,)))
        )
        load(f"{root}/{layout}", model, optimizer)
        found.append(decays(optimizer))
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        scatter_full_state_dict(model, optimizer, full)
        found.append(decays(optimizer))
    return found


def test_empty_groups_under_every_layout(tmp_path):
    for found in run_ranks(2, empty_groups_worker, str(tmp_path)):
        assert found == [[0.25, 0.01, 0.5]] * 10
