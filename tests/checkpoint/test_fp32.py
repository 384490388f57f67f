"""Weights out as safetensors, weights and states of fp32 training in: how much survives, that bits do not depend on the sharding, and
that nothing wrong or foreign is read."""

from __future__ import annotations

import json
import math
import os
import pickle
from typing import Any

import pytest
import torch
from distributed import run_ranks
from torch import nn

from sharded_bf16_adamw import LR, AdamW_BF16, save
from sharded_bf16_adamw.checkpoint.fp32 import export_fp32, joined, split
from sharded_bf16_adamw.checkpoint.importing import convert_fp32, import_fp32, round_moment
from sharded_bf16_adamw.checkpoint.safetensors_io import INDEX, TensorInfo, find_safetensors, write_folder
from sharded_bf16_adamw.checkpoint.stored import StoredCheckpoint

from .layouts import LAYOUTS, Net, everything, train


def trained(steps=3, seed=0):
    module, optimizer = LAYOUTS[0].build(1, seed)
    train(module, optimizer, steps)
    return module, optimizer


def read_folder(folder):
    return {name: file.read(name) for name, file in find_safetensors(folder).items()}


def true_values(module, optimizer):
    return {name: weight for (name, _), (_, weight) in zip(module.named_parameters(), in_order(module, optimizer), strict=True)}


def in_order(module, optimizer):
    by_id = {id(param): (param, weight) for param, weight in optimizer.true_weights()}
    return [by_id[id(param)] for param in module.parameters()]


# --------------------------------------------------------------------------------------------------------- split and rounding


def random_floats(count=1 << 20):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(1 << 31), 1 << 31, (count,), generator=generator, dtype=torch.int64).to(torch.int32)
    x = bits.view(torch.float32)
    special = torch.tensor([0.0, -0.0, 1.0, 1e-45, -1e-40, 2.0**-126, 3.3895e38, 1 + 2**-8, 1 + 2**-9 + 2**-23])
    return torch.cat([special, x[x.isfinite() & (x.abs() <= 3.3895e38)]])


def test_sixteen_bits_survive():
    """The bound that the documentation states, over all bit patterns; and it is tight."""
    x = random_floats()
    error = (joined(*split(x)).double() - x.double()).abs()
    bound = 2.0**-17 * x.double().abs() + 2.0**-134
    assert bool((error <= bound).all())
    normal = x.abs() > 1e-30
    assert float((error / x.double().abs())[normal].max()) > 0.95 * 2.0**-17
    assert bool((split(x)[0].view(torch.int16) == x.bfloat16().view(torch.int16)).all()), "p is x rounded to nearest"


def test_values_that_bfloat16_cannot_hold():
    x = torch.tensor([math.inf, -math.inf, math.nan, 3.4e38])
    p, correction = split(x)
    assert p[0] == math.inf and p[1] == -math.inf and p[2].isnan() and p[3] == math.inf
    assert not correction.any()


def test_moments_are_rounded_without_bias_and_by_their_own_bits():
    """As DESIGN asks of every stochastic rounding: the mean error is zero, in all and in each decile of the discarded fraction."""
    x = torch.randn(1 << 20, generator=torch.Generator().manual_seed(1))
    rounded = round_moment(x)
    below = (x.view(torch.int32) & ~0xFFFF).view(torch.float32).double()
    step = ((x.view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32).double() - below
    fraction = (x.view(torch.int32) & 0xFFFF).double() / 65536
    up = (rounded.double() - below) / step
    assert set(up.unique().tolist()) == {0.0, 1.0}
    for low in range(-1, 10):
        chosen = (fraction * 10).int() == low if low >= 0 else torch.ones_like(fraction, dtype=torch.bool)
        variance = (fraction * (1 - fraction))[chosen].sum()
        assert abs(float((up - fraction)[chosen].sum() / variance.sqrt())) < 5
    order = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(2))
    assert torch.equal(round_moment(x[order]), rounded[order]), "no value's bits depend on its place"
    assert torch.equal(round_moment(x.bfloat16().float()), x.bfloat16()), "what bfloat16 holds stays"


# ---------------------------------------------------------------------------------------------------------------------- export


def test_export_is_the_true_weight_and_the_safetensors_package_reads_it(tmp_path):
    module, optimizer = trained()
    path = save(tmp_path / "run", 3, module, optimizer)
    assert export_fp32(tmp_path / "run", tmp_path / "out", max_shard_bytes=400) == tmp_path / "out"
    found, expected = read_folder(tmp_path / "out"), true_values(module, optimizer)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], weight), name
    assert not torch.equal(found["up.weight"], module.up.weight.float()), "the corrections must count for something here"
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == 4 * sum(param.numel() for param in module.parameters())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    safetensors = pytest.importorskip("safetensors.torch")
    theirs = {name: value for file in files for name, value in safetensors.load_file(tmp_path / "out" / file).items()}
    assert theirs.keys() == expected.keys() and all(torch.equal(theirs[name], expected[name]) for name in theirs)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [*files, INDEX]
    assert path.is_dir()


def test_export_of_the_stored_weights_alone(tmp_path):
    module, optimizer = trained()
    save(tmp_path / "run", 3, module, optimizer)
    export_fp32(tmp_path / "run", tmp_path / "out", dtype=torch.bfloat16)
    found = read_folder(tmp_path / "out")
    for name, param in module.named_parameters():
        assert found[name].dtype == param.dtype and torch.equal(found[name], param), name
    assert [p.name for p in sorted((tmp_path / "out").iterdir())] == ["model-00001-of-00001.safetensors", INDEX]


def sharded_save_worker(rank: int, world: int, root: str) -> dict[str, torch.Tensor]:
    module, optimizer = next(layout for layout in LAYOUTS if layout.name == "FSDP2 + TP").build(world, 0)
    train(module, optimizer, 2)
    save(root, 2, module, optimizer)
    return everything(module, optimizer)[0]


def test_export_joins_what_two_meshes_sharded(tmp_path):
    values = run_ranks(4, sharded_save_worker, str(tmp_path / "run"))[0]
    assert max(len(blocks) for blocks in StoredCheckpoint(tmp_path / "run").blocks.values()) == 4
    export_fp32(tmp_path / "run", tmp_path / "out")
    for name, found in read_folder(tmp_path / "out").items():
        correction = values.get(f"{name}.correction")
        expected = values[name].float() if correction is None else joined(values[name], correction)
        assert torch.equal(found, expected), name


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.gain = nn.Parameter(torch.ones(4))
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.register_buffer("count", torch.tensor(7))


def trained_tied():
    torch.manual_seed(0)
    model = Tied().bfloat16()
    optimizer = AdamW_BF16(model.parameters(), lr=1e-4)
    for _ in range(2):
        for param in model.parameters():
            param.grad = torch.ones_like(param) if param.requires_grad else None
        optimizer.step()
    return model, optimizer


def test_tied_weights_are_exported_alike_and_frozen_ones_and_buffers_as_they_are(tmp_path):
    model, optimizer = trained_tied()
    save(tmp_path / "run", 2, model, optimizer)
    export_fp32(tmp_path / "run", tmp_path / "out")
    found = read_folder(tmp_path / "out")
    assert torch.equal(model.gain, model.frozen), "one that a mere comparison of values would take for tied"
    assert torch.equal(found["first.weight"], dict(in_order(model, optimizer))[model.first.weight])
    assert torch.equal(found["second.weight"], found["first.weight"])
    assert not torch.equal(found["gain"], found["frozen"]) and torch.equal(found["frozen"], torch.ones(4))
    assert found["count"] == 7 and found["count"].dtype == torch.int64
    other = Tied().bfloat16()
    names = {name: found[name] for name in found if name != "second.weight"}  # Hugging Face leaves out the second of two tied names
    import_fp32(names, other, AdamW_BF16(other.parameters(), lr=1e-4))
    assert other.second.weight is other.first.weight and torch.equal(other.first.weight, found["first.weight"].bfloat16())


def test_export_holds_one_tensor_at_a_time(tmp_path, monkeypatch):
    """Counted, not timed: what ``read`` has given out and is still alive."""
    import gc
    import weakref

    module, optimizer = trained()
    save(tmp_path / "run", 3, module, optimizer)
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0
    original = StoredCheckpoint.read

    def read(self, key):
        nonlocal most
        tensor = original(self, key)
        alive.add(tensor)
        gc.collect()
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(StoredCheckpoint, "read", read)
    export_fp32(tmp_path / "run", tmp_path / "out")
    assert most == 2, "a weight and its correction"


def test_export_refuses_to_overwrite_and_leaves_nothing_of_a_failure(tmp_path, monkeypatch):
    module, optimizer = trained()
    save(tmp_path / "run", 3, module, optimizer)
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="out exists already; give the name of a new folder"):
        export_fp32(tmp_path / "run", tmp_path / "out")

    def fails(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="No space left"):
        export_fp32(tmp_path / "run", tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_damaged_checkpoint_is_not_exported(tmp_path):
    module, optimizer = trained()
    path = save(tmp_path / "run", 3, module, optimizer)
    (file,) = path.glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"the checkpoint {path} cannot be used: {file.name} is not what was written"):
        export_fp32(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"dtype": torch.float16}, "Invalid dtype: torch.float16"), ({"max_shard_bytes": 0}, "Invalid max_shard_bytes: 0")],
)
def test_export_arguments(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_fp32(tmp_path, tmp_path / "out", **arguments)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint at"):
        export_fp32(tmp_path, tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------------------- import


def fp32_training(dtype=torch.float32, steps=4):
    """What somebody else trained: a model of ``dtype`` and a torch.optim.AdamW in two groups."""
    torch.manual_seed(3)
    model = Net().to(dtype)
    named = dict(model.named_parameters())
    groups = [[named[name] for name in named if "precise" not in name], [named[name] for name in named if "precise" in name]]
    optimizer = torch.optim.AdamW([{"params": params, "lr": 2e-3 * (1 + i)} for i, params in enumerate(groups)], betas=(0.8, 0.95))
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for name, param in named.items():
            param.grad = None if "unused" in name else torch.randn(param.shape, generator=generator).to(dtype)
        optimizer.step()
    return model, optimizer


def written(folder, weights):
    folder.mkdir()
    infos = {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in weights.items()}
    write_folder(folder, infos, lambda name: weights[name].detach(), 300)
    return folder


def expected_states(model, optimizer):
    """By the definition, element by element on whole tensors."""
    result = {}
    for name, param in model.named_parameters():
        ours = torch.float32 if "precise" in name else torch.bfloat16
        result[name] = param.detach().float() if ours == torch.float32 else param.detach().bfloat16()
        state = optimizer.state.get(param, {})
        for key in ("exp_avg", "exp_avg_sq"):
            value = state.get(key, torch.zeros_like(param)).float()
            result[f"{name}.{key}"] = value if ours == torch.float32 else round_moment(value)
        if ours == torch.bfloat16:
            result[f"{name}.correction"] = (param.detach().float() - param.detach().bfloat16().float()).bfloat16()
        result[f"{name}.step"] = torch.tensor(float(state.get("step", 0)))
    return result


def import_worker(rank: int, world: int, folder: str, state_file: str) -> list[tuple[str, dict[str, torch.Tensor], dict[str, Any]]]:
    results = []
    for layout in LAYOUTS:
        if world in layout.worlds:
            module, optimizer = layout.build(world, seed=9)
            train(module, optimizer, 1)
            import_fp32(folder, module, optimizer, state_file)
            results.append((layout.name, *everything(module, optimizer)))
            train(module, optimizer, 1)
            assert optimizer.param_groups[0]["schedule_step"] == 5
    return results


def test_import_gives_the_same_bits_under_every_layout(tmp_path):
    model, optimizer = fp32_training()
    folder = written(tmp_path / "weights", model.state_dict())
    torch.save(named_state(model, optimizer), tmp_path / "optimizer.pt")
    expected = expected_states(model, optimizer)
    world = 4
    for results in run_ranks(world, import_worker, str(folder), str(tmp_path / "optimizer.pt")):
        for layout, values, options in results:
            assert values.keys() == expected.keys()
            for key, value in expected.items():
                assert torch.equal(values[key], value), (layout, world, key)
            group = options["precise.weight"]
            assert (group["lr"], group["betas"], group["schedule_step"]) == (4e-3, (0.8, 0.95), 4)
            assert group["scheduled_lr"] is None, "this group brought its own lr"
            assert options["up.weight"]["scheduled_lr"] == options["up.weight"]["lr"] == 2e-3


def named_state(model, optimizer):
    """As FSDP and get_optimizer_state_dict(full_state_dict=True) give it."""
    name_of = {param: name for name, param in model.named_parameters()}
    state = {name_of[param]: values for param, values in optimizer.state.items()}
    groups = [{**group, "params": [name_of[param] for param in group["params"]]} for group in optimizer.param_groups]
    return {"state": state, "param_groups": groups}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("keyed_by", ["integers", "names"])
def test_import_of_torch_files(dtype, keyed_by, tmp_path):
    model, optimizer = fp32_training(dtype)
    state = optimizer.state_dict() if keyed_by == "integers" else named_state(model, optimizer)
    torch.save({"model": model.state_dict(), "optimizer": state}, tmp_path / "other.pt")
    module, ours = LAYOUTS[0].build(1, seed=9)
    import_fp32(tmp_path / "other.pt", module, ours, tmp_path / "other.pt")
    values, _ = everything(module, ours)
    for key, value in expected_states(model, optimizer).items():
        assert torch.equal(values[key], value), key
    if dtype == torch.bfloat16:
        assert not values["up.weight.correction"].any() and torch.equal(values["up.weight"], model.up.weight)


def test_import_without_optimizer_state_starts_afresh_and_keeps_hyper_parameters(tmp_path):
    model, optimizer = fp32_training()
    module, ours = trained()
    before = [{key: value for key, value in group.items() if key != "params"} for group in ours.param_groups]
    import_fp32(model.state_dict(), module, ours)
    values, _ = everything(module, ours)
    expected = expected_states(model, optimizer)
    for key, value in values.items():
        if key.endswith((".exp_avg", ".exp_avg_sq", ".step")):
            assert not value.any(), key
        else:
            assert torch.equal(value, expected[key]), key
    assert [{key: value for key, value in group.items() if key != "params"} for group in ours.param_groups] == before


def test_round_trip_through_import_save_and_export(tmp_path):
    """What comes out is what went in, to the precision that the pair of bfloat16 holds; float32 parameters exactly."""
    model, _ = fp32_training()
    module, ours = LAYOUTS[0].build(1, seed=9)
    import_fp32(model.state_dict(), module, ours)
    save(tmp_path / "run", 0, module, ours)
    export_fp32(tmp_path / "run", tmp_path / "out")
    for name, value in read_folder(tmp_path / "out").items():
        original = model.state_dict()[name].double()
        error = (value.double() - original).abs()
        assert bool((error <= (0 if "precise" in name else 2.0**-17) * original.abs()).all()), name
        assert name != "up.weight" or bool(error.any()), "a bound that rounding cannot miss shows nothing"


def test_conversion_without_the_models_code(tmp_path):
    model, optimizer = fp32_training()
    folder = written(tmp_path / "weights", {**model.state_dict(), "table": torch.arange(3), "scale": torch.ones(2)})
    state = named_state(model, optimizer)
    path = convert_fp32(folder, tmp_path / "run", state, fp32=["precise.*"], buffers=["scale"])
    assert path == tmp_path / "run" / "step-00000004"
    module, ours = LAYOUTS[0].build(1, seed=9)
    module.register_buffer("table", torch.zeros(3, dtype=torch.int64))
    module.register_buffer("scale", torch.zeros(2))
    from sharded_bf16_adamw import load

    load(tmp_path / "run", module, ours)
    values, options = everything(module, ours)
    for key, value in expected_states(model, optimizer).items():
        assert torch.equal(values[key], value), key
    assert torch.equal(values["table"], torch.arange(3)) and options["precise.weight"]["lr"] == 4e-3
    with pytest.raises(FileExistsError, match="run has a checkpoint already"):
        convert_fp32(folder, tmp_path / "run", state)


def weights_without(model, name):
    return {key: value for key, value in model.state_dict().items() if key != name}


def change_state(state, name, **changes):
    return {**state, "state": {**state["state"], name: {**state["state"][name], **changes}}}


WRONG = {
    "missing": (lambda m, s: (weights_without(m, "up.bias"), s), "weights to import are of another model: it has no up.bias"),
    "unexpected": (lambda m, s: ({**m.state_dict(), "x": torch.ones(1)}, s), "it has x, which is not here"),
    "shape": (lambda m, s: ({**m.state_dict(), "up.bias": torch.ones(5)}, s), r"up.bias has shape \(5,\) there but \(12,\) here"),
    "dtype": (
        lambda m, s: ({**m.state_dict(), "up.bias": torch.ones(12).int()}, s),
        "up.bias is torch.int32 there but torch.bfloat16 here",
    ),
    "no weights": (lambda m, s: ({"epoch": 3}, s), "the source holds no state dict of tensors"),
    "no state": (lambda m, s: (m.state_dict(), {"state": {}}), "holds no optimizer state dict"),
    "unknown state": (lambda m, s: (m.state_dict(), {**s, "state": {"x": {}}}), "it has a state of x, which is no parameter here"),
    "state of SGD": (lambda m, s: (m.state_dict(), change_state(s, "up.bias", exp_avg=None)), "it has no exp_avg of up.bias"),
    "state shape": (
        lambda m, s: (m.state_dict(), change_state(s, "up.bias", exp_avg_sq=torch.ones(2))),
        r"exp_avg_sq of up.bias has shape \(2,\) there but \(12,\) here",
    ),
    "groups": (
        lambda m, s: (m.state_dict(), {"state": {0: {}}, "param_groups": [{"params": [0, 1]}]}),
        r"has groups of \[2\] parameters but this optimizer has \[\d+, \d+\]",
    ),
    "groups by name": (lambda m, s: (m.state_dict(), {**s, "param_groups": s["param_groups"][:1]}), "has all of precise.weight"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_and_nothing_changes(case):
    change, message = WRONG[case]
    model, optimizer = fp32_training()
    source, state = change(model, named_state(model, optimizer))
    module, ours = trained()
    before = everything(module, ours)
    with pytest.raises(ValueError, match=message):
        import_fp32(source, module, ours, state)
    after = everything(module, ours)
    assert before[1] == after[1] and all(torch.equal(after[0][key], value) for key, value in before[0].items())


class Evil:
    def __reduce__(self):
        return (os.mkdir, (os.environ["EVIL_FOLDER"],))


@pytest.mark.parametrize("as_what", ["weights", "optimizer state"])
def test_no_pickle_is_executed(as_what, tmp_path, monkeypatch):
    monkeypatch.setenv("EVIL_FOLDER", str(tmp_path / "evil"))
    torch.save({"up.weight": torch.ones(1), "x": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    module, ours = trained(1)
    for name in ("evil.pt", "raw.pt"):
        arguments = (tmp_path / name, module, ours) if as_what == "weights" else (module.state_dict(), module, ours, tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} is no torch file, or "):
            import_fp32(*arguments)
    assert not (tmp_path / "evil").exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert (tmp_path / "evil").exists(), "the file must be able to do harm for this test to show anything"


def missing_file_worker(rank: int, world: int, folder: str) -> str:
    module, optimizer = next(layout for layout in LAYOUTS if layout.name == "FSDP2").build(world, 0)
    with pytest.raises(RuntimeError) as caught:
        import_fp32(folder if rank == 0 else folder + "/elsewhere", module, optimizer)
    return str(caught.value)


def test_file_that_one_rank_cannot_see_is_an_error_on_all(tmp_path):
    folder = written(tmp_path / "weights", fp32_training()[0].state_dict())
    messages = run_ranks(2, missing_file_worker, str(folder))
    assert all("on rank 1" in message and "elsewhere" in message for message in messages)


def test_imported_run_trains_on(tmp_path):
    """After the import our steps follow those of fp32 AdamW."""
    model, _ = fp32_training()
    module = Net()
    module.precise.bfloat16()
    ours = AdamW_BF16(module.parameters(), lr_function=LR(lr=1e-2))
    theirs = torch.optim.AdamW(model.parameters(), lr=1e-3)
    theirs.load_state_dict({"state": {}, "param_groups": theirs.state_dict()["param_groups"]})
    import_fp32(model.state_dict(), module, ours)
    for group in ours.param_groups:
        group["lr"] = 1e-3
        group["scheduled_lr"] = None
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for a, b in zip(module.parameters(), model.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=generator).bfloat16()
            b.grad = a.grad.float()
        ours.step()
        theirs.step()
    for (_, weight), b in zip(in_order(module, ours), model.parameters(), strict=True):
        assert float((weight - b.detach()).abs().max()) < 2e-4, "five steps of 1e-3 with moments of eight bits"
