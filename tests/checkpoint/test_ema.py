"""The average of the weights in checkpoints: resharded, exported, present or not."""

from __future__ import annotations

import pytest
import torch
from bits import same_bits
from distributed import run_ranks
from torch import nn

from sharded_bf16_adamw import EMA, AdamW_BF16, export_fp32, import_fp32, load, save
from sharded_bf16_adamw.checkpoint.__main__ import main

from .layouts import BY_NAME, everything, train
from .trainings import read_folder, true_values

CASES = [("FSDP1", 2), ("FSDP1 use_orig_params", 3), ("FSDP2", 3), ("FSDP2 + TP", 2)]
CASES += [("ZeRO-2", 2), ("single", 1)]


def trained(seed=0, with_ema=True, steps=3):
    module, optimizer = BY_NAME["single"].build(1, seed)
    ema = EMA(module, optimizer, decay=0.5) if with_ema else None
    for _ in range(steps):
        train(module, optimizer, 1)
        if ema is not None:
            ema.update()
    return module, optimizer, ema


def averages(module, optimizer):
    return {name: optimizer.state[p]["ema"].clone() for name, p in module.named_parameters()}


def reshard_worker(rank, world, root, name):
    module, optimizer = BY_NAME[name].build(world, 7)
    ema = EMA(module, optimizer, decay=0.5)
    load(f"{root}/first", module, optimizer)
    loaded = everything(module, optimizer)
    train(module, optimizer, 1)
    ema.update()
    save(f"{root}/{name}", 4, module, optimizer)
    return loaded, everything(module, optimizer)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Return a folder with a checkpoint in ``first``, and the saved values."""
    root = tmp_path_factory.mktemp("ema")
    module, optimizer, _ = trained()
    save(root / "first", 3, module, optimizer)
    return root, everything(module, optimizer)[0]


@pytest.mark.parametrize(("name", "world"), CASES)
def test_average_reshards(first, name, world):
    root, expected = first
    results = run_ranks(world, reshard_worker, str(root), name)
    for (values, options), saved in results:
        assert {k for k in values if k.endswith(".ema")} == {
            k for k in expected if k.endswith(".ema")
        }
        assert all(torch.equal(values[key], expected[key]) for key in expected)
        assert all(each["ema_updates"] == 3 for each in options.values())
        assert same_bits(saved, results[0][1])
    module, optimizer, _ = trained(seed=9, steps=0)
    load(root / name, module, optimizer)
    found, _ = everything(module, optimizer)
    resaved = results[0][1][0]
    assert any(not torch.equal(resaved[key], expected[key]) for key in expected if "ema" in key)
    assert same_bits({key: found[key] for key in resaved}, resaved)
    assert optimizer.param_groups[0]["ema_updates"] == 4


def test_checkpoint_with_and_without_average(tmp_path):
    module, optimizer, _ = trained()
    save(tmp_path / "with", 3, module, optimizer)
    plain = trained(with_ema=False)[:2]
    save(tmp_path / "without", 3, *plain)
    module, optimizer, ema = trained(seed=5)
    with pytest.raises(ValueError, match=r"missing key .*\.ema.*build EMA\(model, optimizer\)"):
        load(tmp_path / "without", module, optimizer)
    with pytest.raises(ValueError, match=r"unexpected .*\.ema.*build EMA\(model, optimizer\)"):
        load(tmp_path / "with", *trained(seed=5, with_ema=False)[:2])
    load(tmp_path / "without", module, optimizer, strict=False)
    assert not any("ema" in state for state in optimizer.state.values())
    ema.update()
    for name, average in averages(module, optimizer).items():
        assert torch.equal(average, module.get_parameter(name)), name


def test_parameter_saved_without_state_starts_its_average_at_the_loaded_weight(tmp_path):
    def build(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).bfloat16()
        return model, AdamW_BF16(model.parameters(), lr=1e-2)

    model, optimizer = build(0)
    model[0].requires_grad_(False)
    EMA(model, optimizer)
    save(tmp_path, 0, model, optimizer)
    other, optimizer = build(1)
    ema = EMA(other, optimizer)
    load(tmp_path, other, optimizer)
    ema.update()
    for p, loaded in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, loaded)
        assert torch.equal(optimizer.state[loaded]["ema"], p)


def test_export_of_the_average(tmp_path, capsys):
    module, optimizer, _ = trained()
    module.register_buffer("table", torch.ones(3))
    save(tmp_path / "run", 3, module, optimizer)
    expected = averages(module, optimizer)
    export_fp32(tmp_path / "run", tmp_path / "out", ema=True)
    found = read_folder(tmp_path / "out")
    assert torch.equal(found.pop("table"), torch.ones(3))
    assert found.keys() == expected.keys()
    for name, average in expected.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], average.float()), name
    assert not torch.equal(found["up.weight"], true_values(module, optimizer)["up.weight"])
    arguments = ["export", str(tmp_path / "run"), str(tmp_path / "bf16"), "--dtype", "bfloat16"]
    assert main([*arguments, "--ema"]) == 0
    assert "average of" in capsys.readouterr().out
    found = read_folder(tmp_path / "bf16")
    assert all(torch.equal(found[name], average) for name, average in expected.items())


def test_imported_weights_start_a_new_average(tmp_path):
    module, optimizer, _ = trained()
    export_fp32(save(tmp_path / "run", 3, module, optimizer), tmp_path / "out")
    other, optimizer, _ = trained(seed=4)
    import_fp32(tmp_path / "out", other, optimizer)
    for name, average in averages(other, optimizer).items():
        assert torch.equal(average, module.get_parameter(name)), name


def test_export_without_an_average_is_an_error(tmp_path):
    save(tmp_path / "run", 3, *trained(with_ema=False)[:2])
    with pytest.raises(ValueError, match="has no average of the weights"):
        export_fp32(tmp_path / "run", tmp_path / "out", ema=True)
    assert not (tmp_path / "out").exists()
