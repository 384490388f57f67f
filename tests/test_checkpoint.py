"""Sharded checkpoints: bitwise under any world size, and unchanged state on errors."""

import json
import math
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from test_distributed import collect, fsdp2, make_model, train_on_given_gradients
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sharded_bf16_adamw import LR, AdamW_BF16, latest, load, save
from sharded_bf16_adamw.checkpoint.directory import unique_suffix
from sharded_bf16_adamw.checkpoint.tensor_writer import TensorWriter


def wrap(model, strategy):
    return {"single": lambda m: m, "ddp": DistributedDataParallel, "fsdp2": fsdp2}[strategy](model)


def by_plain_name(result):
    return {key.removeprefix("module."): value for key, value in result.items()}


def new_optimizer(model):
    return AdamW_BF16(
        model.parameters(), lr_function=LR(lr=1e-2, preheat_steps=5), weight_decay=0.1
    )


def save_worker(rank, world, root, strategy):
    model = wrap(make_model(), strategy)
    optimizer = train_on_given_gradients(model, 7)
    save(root, 7, model, optimizer, extra={"position": 123})
    return by_plain_name(collect(model, optimizer)), optimizer.param_groups[0]["schedule_step"]


def load_worker(rank, world, root, strategy):
    torch.manual_seed(99)
    model = make_model()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7.0)
    model = wrap(model, strategy)
    optimizer = new_optimizer(model)
    assert load(root, model, optimizer).extra == {"position": 123}
    return by_plain_name(collect(model, optimizer)), optimizer.param_groups[0]["schedule_step"]


def run(strategy, world, worker, root):
    return run_ranks(world, worker, str(root), strategy)


LAYOUTS = [("single", 1), ("ddp", 2), ("fsdp2", 1), ("fsdp2", 2), ("fsdp2", 3), ("fsdp2", 4)]


@pytest.mark.parametrize("saved", LAYOUTS, ids=str)
def test_loads_bitwise_under_other_layouts_and_world_sizes(saved, tmp_path):
    """Each layout loads under another one, and one under all; test_any_to_any.py has more pairs."""
    expected = run(*saved, save_worker, tmp_path)[0]
    following = LAYOUTS[(LAYOUTS.index(saved) + 1) % len(LAYOUTS)]
    for layout in LAYOUTS if saved == ("fsdp2", 3) else [following]:
        for weights, position in run(*layout, load_worker, tmp_path):
            assert position == expected[1] == 7
            assert list(weights) == list(expected[0])
            for key, value in expected[0].items():
                assert torch.equal(weights[key], value), (layout, key)


def after_evaluation_worker(rank, world, root):
    """A forward without backward leaves FSDP2's root unsharded, with plain parameters."""
    model = fully_shard(make_model().to(torch.bfloat16))
    optimizer = train_on_given_gradients(model, 2)
    expected = frozen_copy(model, optimizer)
    for _ in range(2):
        with torch.no_grad():
            model(torch.ones(1, 6, dtype=torch.bfloat16))
        save(root, 2, model, optimizer)
    model.reshard()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
            optimizer.state[p]["exp_avg"].zero_()
        model(torch.ones(1, 6, dtype=torch.bfloat16))
    load(root, model, optimizer)
    assert_unchanged(expected, model, optimizer)


def test_saves_and_loads_after_an_evaluation(tmp_path):
    run_ranks(2, after_evaluation_worker, str(tmp_path))


def trained(steps=3, width=4):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 4), nn.Linear(4, 2)).to(torch.bfloat16)
    return model, train_on_given_gradients(model, steps)


def frozen_copy(model, optimizer):
    return {key: value.clone() for key, value in collect(model, optimizer).items()}


def assert_unchanged(before, model, optimizer):
    after = collect(model, optimizer)
    assert list(after) == list(before) and all(
        torch.equal(after[key], value) for key, value in before.items()
    )


def test_without_torch_distributed(tmp_path):
    assert not dist.is_initialized()
    model, optimizer = trained()
    expected = frozen_copy(model, optimizer)
    path = save(tmp_path, 3, model, optimizer, extra={"a": [1, 2]})
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(zero_grad=True)
    assert load(path, model, optimizer).extra == {"a": [1, 2]}
    assert_unchanged(expected, model, optimizer)


def test_random_state_is_restored(tmp_path):
    model, optimizer = trained()
    save(tmp_path, 1, model, optimizer)
    expected = torch.rand(5)
    load(tmp_path, model, optimizer)
    assert torch.equal(torch.rand(5), expected)


def test_latest_is_the_newest_and_keep_removes_the_oldest(tmp_path):
    model, optimizer = trained()
    assert latest(tmp_path) is None
    for step in (1, 2, 10):
        save(tmp_path, step, model, optimizer, keep=2)
        assert latest(tmp_path) == tmp_path / f"step-{step:08d}"
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [
        "step-00000002",
        "step-00000010",
    ]
    (tmp_path / "LATEST").unlink()
    assert latest(tmp_path) == tmp_path / "step-00000010"


def test_saving_a_step_again_replaces_it(tmp_path):
    model, optimizer = trained()
    save(tmp_path, 5, model, optimizer, extra={"run": 1})
    save(tmp_path, 5, model, optimizer, extra={"run": 2})
    assert load(tmp_path, model, optimizer).extra == {"run": 2}


def test_unfinished_save_is_not_found(tmp_path):
    """A killed run leaves a partial folder."""
    model, optimizer = trained()
    good = save(tmp_path, 1, model, optimizer)
    partial = tmp_path / f".partial-step-00000002{unique_suffix()}"
    partial.mkdir()
    (partial / "__0_0.distcp").write_bytes(b"x")
    assert latest(tmp_path) == good
    assert save(tmp_path, 2, model, optimizer) == latest(tmp_path)
    assert not list(tmp_path.glob(".partial-*"))


def test_parameters_without_gradient_load_at_step_0(tmp_path):
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)}).to(torch.bfloat16)
    optimizer = new_optimizer(model)
    for p in model["used"].parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(zero_grad=True)
    save(tmp_path, 1, model, optimizer)
    fresh = new_optimizer(model)
    load(tmp_path, model, fresh)
    keys = optimizer.state[model["used"].weight].keys()
    for name, p in model.named_parameters():
        assert fresh.state[p].keys() == keys
        for key, value in fresh.state[p].items():
            expected = (
                optimizer.state[p][key] if name.startswith("used") else torch.zeros_like(value)
            )
            assert torch.equal(value, expected), (name, key)


def test_saving_before_the_first_step_takes_no_step(tmp_path):
    torch.manual_seed(0)
    a = nn.Linear(3, 3).to(torch.bfloat16)
    optimizer = new_optimizer(a)
    weight = a.weight.detach().clone()
    save(tmp_path, 0, a, optimizer)
    other = nn.Linear(3, 3).to(torch.bfloat16)
    resumed = new_optimizer(other)
    load(tmp_path, other, resumed)
    assert torch.equal(a.weight, weight) and torch.equal(other.weight, weight)
    assert resumed.param_groups[0]["schedule_step"] == 0
    for state in [*optimizer.state.values(), *resumed.state.values()]:
        assert state["step"] == 0


def test_missing_checkpoint_is_an_error(tmp_path):
    model, optimizer = trained()
    with pytest.raises(
        FileNotFoundError,
        match=f"there is no checkpoint at {tmp_path}/nowhere; give the folder of a checkpoint",
    ):
        load(tmp_path / "nowhere", model, optimizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: nn.Sequential(nn.Linear(9, 4), nn.Linear(4, 2)),
            r"size mismatch for model.0.weight: saved as \(4, 4\), but \(4, 9\) in the model",
        ),
        (lambda m: nn.Sequential(*m, nn.Linear(2, 2)), "missing key model.2.weight"),
        (lambda m: nn.Sequential(m[0]), "unexpected key model.1.weight"),
        (
            lambda m: m.to(torch.float32),
            "dtype mismatch for model.0.weight: saved as torch.bfloat16, "
            "but torch.float32 in the model",
        ),
    ],
)
def test_checkpoint_of_another_model_is_refused(change, message, tmp_path):
    model, optimizer = trained()
    save(tmp_path, 3, model, optimizer)
    other = change(model).to(torch.float32 if "float32 in the model" in message else torch.bfloat16)
    other_optimizer = train_on_given_gradients(other, 2)
    before = frozen_copy(other, other_optimizer)
    with pytest.raises(
        ValueError, match=f"the checkpoint .* is of another model or optimizer: .*{message}"
    ):
        load(tmp_path, other, other_optimizer)
    assert_unchanged(before, other, other_optimizer)


def test_checkpoint_of_another_optimizer_is_refused(tmp_path):
    model, _ = trained()
    save(tmp_path, 3, model, torch.optim.AdamW(model.parameters()))
    optimizer = new_optimizer(model)
    with pytest.raises(ValueError, match=r"missing key optimizer.state.0.weight.correction"):
        load(tmp_path, model, optimizer)
    assert not optimizer.state


def test_torch_optimizer_is_saved_and_loaded(tmp_path):
    model, _ = trained()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = frozen_copy(model, optimizer)
    save(tmp_path, 1, model, optimizer)
    optimizer.step()
    load(tmp_path, model, optimizer)
    assert_unchanged(before, model, optimizer)


def test_extra_must_be_plain_data(tmp_path):
    model, optimizer = trained()
    with pytest.raises(ValueError, match="extra must be plain data that JSON can hold"):
        save(tmp_path, 1, model, optimizer, extra={"f": print})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([1, 2], "extra must be a dict of plain data, but it is of type list; put it into a dict"),
        (0, "extra must be a dict of plain data, but it is of type int; put it into a dict"),
        (
            {1: (1, 2)},
            r"extra is {1: \(1, 2\)} but would come back as {'1': \[1, 2\]}; use strings as keys",
        ),
        (
            {"a": [0, ({2: 3},)]},
            r"extra\['a'\]\[1\]\[0\] is {2: 3} but would come back as {'2': 3}; use strings "
            r"as keys",
        ),
        (
            {"a": {None: 1, "null": 2}},
            r"extra\['a'\] is {None: 1, 'null': 2} but would come back as {'null': 2}",
        ),
    ],
)
def test_extra_that_json_changes_is_refused(extra, message, tmp_path):
    model, optimizer = trained()
    with pytest.raises(ValueError, match=message):
        save(tmp_path, 1, model, optimizer, extra=extra)
    assert not list(tmp_path.iterdir())


def test_extra_is_restored_with_tuples_as_lists(tmp_path):
    model, optimizer = trained()
    extra = {
        "a": [1, 2.5, True, None, "x", {"": []}],
        "inf": math.inf,
        "mean": np.float64(0.5),
        "nan": math.nan,
        "big": 2**70,
    }
    given = {**extra, "betas": (0.9, (0.95, math.nan))}
    save(tmp_path, 1, model, optimizer, extra=given)
    loaded = load(tmp_path, model, optimizer).extra
    betas = loaded.pop("betas")
    assert betas[0] == 0.9 and isinstance(betas[1], list) and math.isnan(betas[1][1])
    assert math.isnan(loaded.pop("nan")) and math.isnan(extra.pop("nan")), "a NaN loss can be saved"
    assert loaded == extra and loaded["a"][2] is True


def wrong_arguments_worker(rank, world, root):
    model = DistributedDataParallel(make_model())
    optimizer = train_on_given_gradients(model, 1)
    messages = []
    for arguments in (
        (1, model, optimizer, [1]),
        ("1", model, optimizer),
        (1, *((model, optimizer) if rank == 0 else (optimizer, model))),
    ):
        with pytest.raises(ValueError, match="must be") as caught:
            save(root, *arguments)
        messages.append(str(caught.value))
    save(root, 1, model, optimizer)
    with pytest.raises(ValueError, match="must be") as caught:
        load(root, *((model, optimizer) if rank == 0 else (model, None)))
    return [*messages, str(caught.value)]


def test_wrong_arguments_are_refused_on_all_ranks(tmp_path):
    first, second = run_ranks(2, wrong_arguments_worker, str(tmp_path))
    assert first == second
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step-00000001"]


@pytest.mark.parametrize("keep", [0, "2", 1.5])
def test_keep_must_be_positive(keep, tmp_path):
    model, optimizer = trained()
    with pytest.raises(
        ValueError, match=f"Invalid keep: {keep!r}; it must be an integer of at least 1, or None"
    ):
        save(tmp_path, 1, model, optimizer, keep=keep)


@pytest.mark.parametrize("step", ["7", -1, 7.0, None])
def test_step_must_be_an_integer_that_is_not_negative(step, tmp_path):
    model, optimizer = trained()
    with pytest.raises(
        ValueError, match=f"^Invalid step: {step!r}; it must be an integer that is not negative$"
    ):
        save(tmp_path, step, model, optimizer)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", [np.int64(7), torch.tensor(7)], ids=["numpy", "torch"])
def test_step_may_be_an_integer_of_numpy_or_torch(step, tmp_path):
    model, optimizer = trained()
    assert save(tmp_path, step, model, optimizer, keep=np.int32(1)) == tmp_path / "step-00000007"
    assert load(tmp_path, model, optimizer).step == 7


def test_swapped_arguments_are_named_with_their_order(tmp_path):
    model, optimizer = trained()
    save_order, load_order = (
        f"the order of arguments is {call}"
        for call in (r"save\(root, step, model, optimizer\)", r"load\(path, model, optimizer\)")
    )
    with pytest.raises(
        ValueError,
        match=f"^model must be a torch.nn.Module, but it is of type AdamW_BF16; {save_order}$",
    ):
        save(tmp_path, 1, optimizer, model)
    with pytest.raises(
        ValueError,
        match="^optimizer must be a torch.optim.Optimizer, but it is of type NoneType; "
        f"{save_order}$",
    ):
        save(tmp_path, 1, model, None)
    assert not list(tmp_path.iterdir())
    save(tmp_path, 1, model, optimizer)
    with pytest.raises(
        ValueError,
        match=f"^model must be a torch.nn.Module, but it is of type AdamW_BF16; {load_order}$",
    ):
        load(tmp_path, optimizer, model)
    with pytest.raises(
        ValueError,
        match=f"^optimizer must be a torch.optim.Optimizer, but it is of type int; {load_order}$",
    ):
        load(tmp_path, model, 1)


def fails(*args):
    raise OSError(5, "Input/output error")


def failing_worker(rank, world, root):
    model = fsdp2(make_model())
    optimizer = train_on_given_gradients(model, 1)
    good = save(root, 1, model, optimizer)
    with (
        mock.patch.object(TensorWriter, "write", fails if rank == 1 else TensorWriter.write),
        pytest.raises(
            RuntimeError,
            match=r"cannot save the checkpoint .*: on rank 1, OSError: .*Input/output error",
        ),
    ):
        save(root, 2, model, optimizer)
    assert latest(root) == good
    return json.loads((good / "manifest.json").read_text())["step"]


def test_error_of_one_rank_is_raised_on_all_ranks(tmp_path):
    assert run_ranks(2, failing_worker, str(tmp_path)) == [1, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step-00000001"]
