"""Parameters that are frozen, or taken out of their group, keep their state in checkpoints."""

from __future__ import annotations

import warnings

import pytest
import torch
from bits import same_bits
from distributed import run_ranks
from torch import nn

from sharded_bf16_adamw import (
    AdamW_BF16,
    export_fp32,
    gather_full_state_dict,
    import_fp32,
    load,
    save,
    scatter_full_state_dict,
)
from sharded_bf16_adamw.bf16_split import split
from sharded_bf16_adamw.checkpoint.manifest import read_manifest

from .trainings import read_folder
from .two_layers import BF16, layers, states, take_steps, trained, wrapped


def freeze(model: nn.Sequential) -> None:
    model[0].requires_grad_(False)


def test_checkpoint_keeps_state_of_frozen_parameter(tmp_path):
    """The correction is part of the weight, and training may unfreeze the parameter."""
    model, optimizer = trained()
    freeze(model)
    take_steps(model, optimizer)
    expected = states(model, optimizer)
    assert (
        expected["0.weight.correction"].any()
        and expected["0.weight.step"] == 3
        and expected["1.weight.step"] == 6
    )
    path = save(tmp_path / "run", 1, model, optimizer)
    fresh = layers(seed=1)
    freeze(fresh)
    resumed = AdamW_BF16(fresh.parameters(), lr=1e-2)
    load(path, fresh, resumed)
    assert same_bits(states(fresh, resumed), expected)
    true = {id(param): weight for param, weight in optimizer.true_weights()}
    again = {id(param): weight for param, weight in resumed.true_weights()}
    exported = read_folder(export_fp32(path, tmp_path / "out"))
    for (name, param), other in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(true[id(param)], again[id(other)]) and torch.equal(
            exported[name], true[id(param)]
        )
    for one, its_optimizer in ((model, optimizer), (fresh, resumed)):
        one[0].requires_grad_(True)
        take_steps(one, its_optimizer)
    assert same_bits(states(fresh, resumed), states(model, optimizer))


def test_gather_scatter_and_import_keep_state_of_frozen_parameter():
    model, optimizer = trained()
    freeze(model)
    full = gather_full_state_dict(model, optimizer)
    fresh = layers(seed=1)
    freeze(fresh)
    resumed = AdamW_BF16(fresh.parameters(), lr=1e-2)
    scatter_full_state_dict(fresh, resumed, full)
    assert same_bits(states(fresh, resumed), states(model, optimizer))
    fresh_optimizer = AdamW_BF16(fresh.parameters(), lr=1e-2)
    weights = {name: value.float() for name, value in model.state_dict().items()}
    import_fp32(
        weights,
        fresh,
        fresh_optimizer,
        {**full, "state": {k: dict(v) for k, v in full["state"].items()}},
    )
    state = fresh_optimizer.state[fresh[0].weight]
    assert state["step"] == 3
    assert torch.equal(state["exp_avg"], optimizer.state[model[0].weight]["exp_avg"])


def test_refused_load_creates_no_state_for_frozen_parameter(tmp_path):
    save(tmp_path, 1, *trained())
    fresh = nn.Sequential(*layers(seed=1), nn.Linear(1, 1)).to(BF16)
    freeze(fresh)
    optimizer = AdamW_BF16(fresh.parameters(), lr=1e-2)
    with pytest.raises(ValueError, match="another model"):
        load(tmp_path, fresh, optimizer)
    assert not optimizer.state


def test_checkpoint_keeps_state_of_parameter_removed_from_its_group(tmp_path):
    model, optimizer = trained()
    optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][2:]
    order = list(optimizer.state)
    path = save(tmp_path / "run", 1, model, optimizer)
    assert list(optimizer.state) == order and len(optimizer.param_groups) == 1
    assert read_manifest(path).groups[0].params == ["1.weight", "1.bias"]
    fresh = layers(seed=1)
    resumed = AdamW_BF16(fresh.parameters(), lr=1e-2)
    resumed.param_groups[0]["params"] = resumed.param_groups[0]["params"][2:]
    load(path, fresh, resumed)
    assert same_bits(states(fresh, resumed), states(model, optimizer))
    again, whole = trained()
    true = {id(param): weight for param, weight in whole.true_weights()}
    exported = read_folder(export_fp32(path, tmp_path / "out"))
    for name, param in again.named_parameters():
        assert torch.equal(exported[name], true[id(param)]), name
    assert list(gather_full_state_dict(model, optimizer)["state"]) == ["1.weight", "1.bias"]
    scatter_full_state_dict(fresh, resumed, gather_full_state_dict(model, optimizer))
    for one, its_optimizer in ((model, optimizer), (fresh, resumed)):
        its_optimizer.param_groups[0]["params"] = list(one.parameters())
        take_steps(one, its_optimizer)
    assert same_bits(states(fresh, resumed), states(model, optimizer))


def stop_training(layer: nn.Module, optimizer: AdamW_BF16, how: str) -> None:
    layer.requires_grad_(how != "frozen")
    if how == "removed":
        own = {id(param) for param in layer.parameters()}
        group = optimizer.param_groups[0]
        group["params"] = [param for param in group["params"] if id(param) not in own]


def frozen_worker(rank: int, world: int, root: str, how: str, steps: int) -> list[str]:
    """Load into an optimizer with states, or without if it has taken no ``steps``."""
    warnings.simplefilter("ignore")
    failed = []
    for layout in ("DDP", "FSDP2", "ZeRO-2", "FSDP1", "FSDP1 use_orig_params"):
        model, own, optimizer = wrapped(layout, world, seed=0)
        take_steps(model, optimizer)
        stop_training(own[0], optimizer, how)
        optimizer.state[torch.ones(3)] = {"step": torch.ones(()), "exp_avg": torch.ones(3)}
        save(f"{root}/{layout}", 1, model, optimizer)
        single = layers(seed=1)
        single_optimizer = AdamW_BF16(single.parameters(), lr=1e-2)
        stop_training(single[0], single_optimizer, how)
        load(f"{root}/{layout}", single, single_optimizer)
        expected = states(single, single_optimizer)
        if len(expected) != 16 or not expected["0.weight.correction"].any():
            failed.append(f"{layout}: save")
        model, own, optimizer = wrapped(layout, world, seed=2)
        take_steps(model, optimizer, steps)
        stop_training(own[0], optimizer, how)
        load(f"{root}/{layout}", model, optimizer)
        save(f"{root}/{layout} again", 1, model, optimizer)
        fresh = layers(seed=3)
        fresh_optimizer = AdamW_BF16(fresh.parameters(), lr=1e-2)
        load(f"{root}/{layout} again", fresh, fresh_optimizer)
        if not same_bits(states(fresh, fresh_optimizer), expected):
            failed.append(f"{layout}: load")
    return failed


@pytest.mark.parametrize(("how", "steps"), [("frozen", 1), ("removed", 0)])
def test_parameter_no_longer_trained_keeps_its_state_under_every_layout(how, steps, tmp_path):
    assert run_ranks(2, frozen_worker, str(tmp_path), how, steps) == [[], []]


def import_worker(rank: int, world: int, root: str) -> None:
    """Import weights that bfloat16 rounds, also for parameters that are in no group."""
    weights = {name: param.float() * 1.001 for name, param in layers(seed=5).named_parameters()}
    for layout in ("DDP", "FSDP2", "ZeRO-2", "FSDP1", "FSDP1 use_orig_params"):
        model, own, optimizer = wrapped(layout, world, seed=0)
        take_steps(model, optimizer)
        stop_training(own[0], optimizer, "removed")
        import_fp32(weights, model, optimizer)
        path = save(f"{root}/{layout}", 1, model, optimizer)
        single, single_optimizer = trained(seed=1)
        stop_training(single[0], single_optimizer, "removed")
        load(path, single, single_optimizer)
        for name, param in single.named_parameters():
            weight, correction = split(weights[name])
            assert torch.equal(param, weight), (layout, name)
            assert torch.equal(single_optimizer.state[param]["correction"], correction), layout
            assert not single_optimizer.state[param]["exp_avg"].any()


def test_import_replaces_corrections_of_removed_parameters(tmp_path):
    run_ranks(2, import_worker, str(tmp_path))
