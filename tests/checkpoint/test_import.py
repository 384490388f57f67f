"""Imports give equal bits under every layout; unfit or unsafe files are refused."""

from __future__ import annotations

import os
import pickle
from typing import Any

import pytest
import torch
from distributed import run_ranks

from sharded_bf16_adamw import convert_fp32, import_fp32, load
from sharded_bf16_adamw.checkpoint import importing
from sharded_bf16_adamw.checkpoint.import_matching import key_states_by_name
from sharded_bf16_adamw.checkpoint.reader import CheckpointReader

from .layouts import BY_NAME, LAYOUTS, everything, train
from .trainings import expected_states, fp32_training, named_state, trained, written


def import_worker(
    rank: int, world: int, folder: str, state_file: str
) -> list[tuple[str, dict[str, torch.Tensor], dict[str, Any]]]:
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
        assert len(results) == 8
        for layout, values, options in results:
            assert values.keys() == expected.keys()
            for key, value in expected.items():
                assert torch.equal(values[key], value), (layout, world, key)
            group = options["precise.weight"]
            assert (group["lr"], group["betas"], group["schedule_step"]) == (4e-3, (0.8, 0.95), 4)
            assert group["scheduled_lr"] is None, "this group brought its own lr"
            assert options["up.weight"]["scheduled_lr"] == options["up.weight"]["lr"] == 2e-3


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
        assert not values["up.weight.correction"].any() and torch.equal(
            values["up.weight"], model.up.weight
        )


def test_import_without_optimizer_state_zeroes_states_and_keeps_hyperparameters(tmp_path):
    model, optimizer = fp32_training()
    module, ours = trained()
    before = [
        {key: value for key, value in group.items() if key != "params"}
        for group in ours.param_groups
    ]
    import_fp32(model.state_dict(), module, ours)
    values, _ = everything(module, ours)
    expected = expected_states(model, optimizer)
    for key, value in values.items():
        if key.endswith((".exp_avg", ".exp_avg_sq", ".step")):
            assert not value.any(), key
        else:
            assert torch.equal(value, expected[key]), key
    assert [
        {key: value for key, value in group.items() if key != "params"}
        for group in ours.param_groups
    ] == before


def test_converted_checkpoint_loads_with_the_imported_values(tmp_path):
    model, optimizer = fp32_training()
    folder = written(
        tmp_path / "weights",
        {**model.state_dict(), "table": torch.arange(3), "scale": torch.ones(2)},
    )
    state = named_state(model, optimizer)
    path = convert_fp32(folder, tmp_path / "run", state, fp32=["precise.*"], buffers=["scale"])
    assert path == tmp_path / "run" / "step-00000004"
    module, ours = LAYOUTS[0].build(1, seed=9)
    module.register_buffer("table", torch.zeros(3, dtype=torch.int64))
    module.register_buffer("scale", torch.zeros(2))
    load(tmp_path / "run", module, ours)
    values, options = everything(module, ours)
    for key, value in expected_states(model, optimizer).items():
        assert torch.equal(values[key], value), key
    assert torch.equal(values["table"], torch.arange(3)) and options["precise.weight"]["lr"] == 4e-3
    with pytest.raises(FileExistsError, match="run already has a checkpoint"):
        convert_fp32(folder, tmp_path / "run", state)


def test_conversion_refuses_numbers_for_names_of_unknown_order(tmp_path):
    """Layers of one shape would get one another's moments."""
    weights = {f"layers.{index}.weight": torch.full((2, 2), float(index)) for index in range(11)}
    params = [torch.nn.Parameter(weight) for weight in weights.values()]
    optimizer = torch.optim.AdamW(params)
    for index, param in enumerate(params):
        param.grad = torch.full((2, 2), float(index))
    optimizer.step()
    path = convert_fp32(weights, tmp_path / "ordered", optimizer.state_dict())
    moments = CheckpointReader(path).read("optimizer.state.layers.10.weight.exp_avg")
    assert torch.equal(moments, torch.ones(2, 2))
    folder = written(tmp_path / "weights", weights)  # layers.10 before layers.2
    with pytest.raises(ValueError, match="by integers, and with safetensors their order"):
        convert_fp32(folder, tmp_path / "run", optimizer.state_dict())
    groups = [{"params": params[::2]}, {"params": params[1::2]}]
    several = torch.optim.AdamW(groups).state_dict()
    with pytest.raises(ValueError, match="by integers, and with several parameter groups"):
        convert_fp32(weights, tmp_path / "run", several)


@pytest.mark.parametrize("argument", ["fp32", "buffers"])
def test_patterns_must_be_a_list_and_match_a_name(argument, tmp_path):
    weights = {
        "blocks.0.attention_norm.weight": torch.ones(2),
        "norm.weight": torch.ones(2),
        "head.weight": torch.ones(2, 2),
    }
    message = rf"^{argument} must be a list .* is the string '\*norm\*'; write \['\*norm\*'\]$"
    with pytest.raises(ValueError, match=message):
        convert_fp32(weights, tmp_path / "run", **{argument: "*norm*"})
    names = "blocks.0.attention_norm.weight, norm.weight"
    message = rf"^{argument}: the pattern '\*.norm.\*' matches no name; names look like {names}$"
    with pytest.raises(ValueError, match=message):
        convert_fp32(weights, tmp_path / "run", **{argument: ["*norm*", "*.norm.*"]})
    assert not (tmp_path / "run").exists()


def test_patterns_may_be_a_generator(tmp_path):
    weights = {
        "blocks.0.attention_norm.weight": torch.ones(2),
        "norm.weight": torch.ones(2),
        "head.weight": torch.ones(2, 2),
    }
    path = convert_fp32(weights, tmp_path / "run", fp32=(pattern for pattern in ["*norm*"]))
    infos = CheckpointReader(path).infos
    assert {name: infos[f"model.{name}"].dtype for name in weights} == {
        "blocks.0.attention_norm.weight": torch.float32,
        "norm.weight": torch.float32,
        "head.weight": torch.bfloat16,
    }


def weights_without(model, name):
    return {key: value for key, value in model.state_dict().items() if key != name}


def change_state(state, name, **changes):
    return {**state, "state": {**state["state"], name: {**state["state"][name], **changes}}}


def by_integers(named, more):
    """Return a named state keyed by integers, with more states."""
    number = {
        name: index
        for index, name in enumerate(
            name for group in named["param_groups"] for name in group["params"]
        )
    }
    groups = [
        {**group, "params": [number[name] for name in group["params"]]}
        for group in named["param_groups"]
    ]
    return {
        "state": {**{number[name]: values for name, values in named["state"].items()}, **more},
        "param_groups": groups,
    }


def test_groups_without_states_are_matched_by_name():
    imported = [{"params": ["b"], "lr": 1.0}, {"params": ["a"], "lr": 2.0}]
    current = [{"params": ["a"]}, {"params": ["b"]}]
    found = key_states_by_name({"state": {}, "param_groups": imported}, current)
    assert found == ({}, imported)


def test_conversion_refuses_weights_that_have_scales_of_their_own(tmp_path):
    quantised = torch.ones(2, 2).to(torch.float8_e4m3fn)
    weights = {"up.weight": quantised, "up.weight_scale_inv": torch.full((1, 1), 0.5)}
    message = "^up.weight is quantised to torch.float8_e4m3fn, and its scale is a tensor of its own"
    with pytest.raises(ValueError, match=message):
        convert_fp32(weights, tmp_path)
    assert not list(tmp_path.iterdir())


WRONG = {
    "missing": (
        lambda m, s: (weights_without(m, "up.bias"), s),
        "weights to import are of another model: missing key up.bias",
    ),
    "unexpected": (
        lambda m, s: ({**m.state_dict(), "x": torch.ones(1)}, s),
        "unexpected key x",
    ),
    "shape": (
        lambda m, s: ({**m.state_dict(), "up.bias": torch.ones(5)}, s),
        r"size mismatch for up.bias: saved as \(5,\), but \(12,\) in the model",
    ),
    "dtype": (
        lambda m, s: ({**m.state_dict(), "up.bias": torch.ones(12).int()}, s),
        "dtype mismatch for up.bias: saved as torch.int32, but torch.bfloat16 in the model",
    ),
    "no weights": (
        lambda m, s: ({"epoch": 3}, s),
        r"the source holds no state dict of tensors, .*\(epoch is of type int\); give",
    ),
    "no state": (lambda m, s: (m.state_dict(), {"state": {}}), "holds no optimizer state dict"),
    "state is a list": (
        lambda m, s: (m.state_dict(), {**s, "state": [1]}),
        "holds no optimizer state dict",
    ),
    "no groups": (
        lambda m, s: (m.state_dict(), {**s, "param_groups": []}),
        "holds no optimizer state dict",
    ),
    "group without parameters": (
        lambda m, s: (m.state_dict(), {**s, "param_groups": [{"lr": 1.0}]}),
        "holds no optimizer state dict",
    ),
    "state of no group": (
        lambda m, s: (m.state_dict(), by_integers(s, {99: {}})),
        "has a state of parameter 99, which is in none of its groups",
    ),
    "unknown state": (
        lambda m, s: (m.state_dict(), {**s, "state": {"x": {}}}),
        "unexpected parameter x",
    ),
    "state of SGD": (
        lambda m, s: (m.state_dict(), change_state(s, "up.bias", exp_avg=None)),
        "missing key up.bias.exp_avg",
    ),
    "state shape": (
        lambda m, s: (m.state_dict(), change_state(s, "up.bias", exp_avg_sq=torch.ones(2))),
        r"size mismatch for up.bias.exp_avg_sq: saved as \(2,\), but \(12,\) in the model",
    ),
    "groups": (
        lambda m, s: (m.state_dict(), {"state": {0: {}}, "param_groups": [{"params": [0, 1]}]}),
        r"has parameter groups of sizes \[2\], but this optimizer has \[\d+, \d+\]",
    ),
    "groups by name": (
        lambda m, s: (m.state_dict(), {**s, "param_groups": s["param_groups"][:1]}),
        "has all of precise.weight",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_import_refuses_a_source_that_does_not_fit_and_changes_nothing(case):
    change, message = WRONG[case]
    model, optimizer = fp32_training()
    source, state = change(model, named_state(model, optimizer))
    module, ours = trained()
    before = everything(module, ours)
    with pytest.raises(ValueError, match=message):
        import_fp32(source, module, ours, state)
    after = everything(module, ours)
    assert before[1] == after[1] and all(
        torch.equal(after[0][key], value) for key, value in before[0].items()
    )
    module, ours = LAYOUTS[0].build(1, seed=9)
    with pytest.raises(ValueError, match=message):
        import_fp32(source, module, ours, state)
    assert not ours.state, "no states may be left"


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
        arguments = (
            (tmp_path / name, module, ours)
            if as_what == "weights"
            else (module.state_dict(), module, ours, tmp_path / name)
        )
        with pytest.raises(ValueError, match=f"{name} is not a torch file, or "):
            import_fp32(*arguments)
    assert not (tmp_path / "evil").exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert (tmp_path / "evil").exists(), "the test needs a file that executes code"


def missing_file_worker(rank: int, world: int, folder: str, what: str) -> list[str]:
    """Import while rank 1 lacks the file. FSDP1 gathers states, and rank 0 must not block there."""
    messages = []
    for layout in ("FSDP1", "FSDP2"):
        module, optimizer = BY_NAME[layout].build(world, 0)
        paths = {"weights": folder, "state": f"{folder}/../optimizer.pt"}
        paths[what] += "" if rank == 0 else "/elsewhere"
        with pytest.raises(RuntimeError) as caught:
            import_fp32(paths["weights"], module, optimizer, paths["state"])
        messages.append(str(caught.value))
        assert not optimizer.state
    return messages


@pytest.mark.parametrize("what", ["weights", "state"])
def test_file_missing_on_one_rank_is_an_error_on_all(what, tmp_path):
    model, optimizer = fp32_training()
    folder = written(tmp_path / "weights", model.state_dict())
    torch.save(named_state(model, optimizer), tmp_path / "optimizer.pt")
    for messages in run_ranks(2, missing_file_worker, str(folder), what):
        assert all("on rank 1" in message and "elsewhere" in message for message in messages)


def halfway_worker(rank: int, world: int, what: str) -> list[str]:
    """Rank 1 fails once tensors have been filled."""

    def fail(*args: Any, **options: Any) -> None:
        if rank == 1:
            raise ValueError("out of luck")

    module, optimizer = BY_NAME["FSDP1"].build(world, 0)
    weights = {name: value.float() for name, value in fp32_training()[0].state_dict().items()}
    with pytest.MonkeyPatch.context() as patched:
        if what == "write back":
            patched.setattr(importing, "set_sharded_optimizer_state", fail)
        progress = fail if what == "fill" else None
        with pytest.raises(RuntimeError) as caught:
            import_fp32(weights, module, optimizer, progress=progress)
    return [str(caught.value)]


@pytest.mark.parametrize("what", ["fill", "write back"])
def test_import_that_fails_halfway_says_so_on_every_rank(what):
    for (message,) in run_ranks(2, halfway_worker, what):
        assert message.startswith(
            "the import failed halfway, so some weights are new and some are old; import again or "
            "load a checkpoint. The error: on rank 1, "
        )
        assert "out of luck" in message
