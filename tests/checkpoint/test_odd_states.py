"""Frozen and removed parameters, empty groups, extra states and tensor subclasses."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from bits import same_bits
from distributed import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel

from sharded_bf16_adamw import (
    AdamW_BF16,
    ZeRO,
    convert_fp32,
    export_fp32,
    gather_full_state_dict,
    import_fp32,
    load,
    save,
    scatter_full_state_dict,
    wait_for_save,
)
from sharded_bf16_adamw.checkpoint.groups import match_groups
from sharded_bf16_adamw.checkpoint.manifest import read_manifest

from .trainings import read_folder

BF16 = torch.bfloat16


def layers(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(BF16)


def take_steps(model: nn.Module, optimizer: AdamW_BF16, steps: int = 3) -> None:
    for step in range(steps):
        model(torch.full((2, 4), 1.0 + step, dtype=BF16)).float().square().sum().backward()
        optimizer.step(zero_grad=True)


def trained(seed: int = 0) -> tuple[nn.Sequential, AdamW_BF16]:
    model = layers(seed)
    optimizer = AdamW_BF16(model.parameters(), lr=1e-2)
    take_steps(model, optimizer)
    return model, optimizer


def states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    named = dict(model.named_parameters())
    return {
        f"{name}.{key}": value.clone()
        for name, p in named.items()
        for key, value in optimizer.state.get(p, {}).items()
    }


def freeze(model: nn.Sequential) -> None:
    model[0].requires_grad_(False)


# ------------------------------------------------------------------------------------------- frozen


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
    assert fresh_optimizer.state[fresh[0].weight]["step"] == 3


def test_refused_load_creates_no_state_for_frozen_parameter(tmp_path):
    save(tmp_path, 1, *trained())
    fresh = nn.Sequential(*layers(seed=1), nn.Linear(1, 1)).to(BF16)
    freeze(fresh)
    optimizer = AdamW_BF16(fresh.parameters(), lr=1e-2)
    with pytest.raises(ValueError, match="another model"):
        load(tmp_path, fresh, optimizer)
    assert not optimizer.state


def wrapped(layout: str, world: int, seed: int) -> tuple[nn.Module, list[nn.Module], AdamW_BF16]:
    """Return the model, its two layers and the optimizer."""
    inner = layers(seed)
    own = list(inner)
    model: nn.Module = inner
    mesh = init_device_mesh("cpu", (world,))
    if layout == "DDP":
        model = DistributedDataParallel(inner)
    elif layout == "FSDP2":
        for layer in inner:
            fully_shard(layer, mesh=mesh)
        model = fully_shard(inner, mesh=mesh)
    elif layout.startswith("FSDP1"):
        options: Any = {
            "device_mesh": mesh,
            "device_id": torch.device("cpu"),
            "use_orig_params": layout != "FSDP1",
        }
        for index in range(2):
            inner[index] = own[index] = FullyShardedDataParallel(inner[index], **options)
        model = FullyShardedDataParallel(inner, **options)
    sharding = ZeRO(mesh) if layout == "ZeRO-2" else None
    return model, own, AdamW_BF16(model.parameters(), lr=1e-2, sharding=sharding)


def stop_training(layer: nn.Module, optimizer: AdamW_BF16, how: str) -> None:
    layer.requires_grad_(how != "frozen")
    if how == "removed":
        own = {id(param) for param in layer.parameters()}
        group = optimizer.param_groups[0]
        group["params"] = [param for param in group["params"] if id(param) not in own]


def frozen_worker(rank: int, world: int, root: str, how: str) -> list[str]:
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
        stop_training(own[0], optimizer, how)
        load(f"{root}/{layout}", model, optimizer)
        save(f"{root}/{layout} again", 1, model, optimizer)
        fresh = layers(seed=3)
        fresh_optimizer = AdamW_BF16(fresh.parameters(), lr=1e-2)
        load(f"{root}/{layout} again", fresh, fresh_optimizer)
        if not same_bits(states(fresh, fresh_optimizer), expected):
            failed.append(f"{layout}: load")
    return failed


@pytest.mark.parametrize("how", ["frozen", "removed"])
def test_parameter_no_longer_trained_keeps_its_state_under_every_layout(how, tmp_path):
    assert run_ranks(2, frozen_worker, str(tmp_path), how) == [[], []]


# --------------------------------------------------------------------- in no group, of no parameter


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
    whole = {id(param): weight for param, weight in trained()[1].true_weights()}
    exported = read_folder(export_fp32(path, tmp_path / "out"))
    assert [exported[name].sum() for name, _ in model.named_parameters()] == [
        weight.sum() for weight in whole.values()
    ]
    assert list(gather_full_state_dict(model, optimizer)["state"]) == ["1.weight", "1.bias"]
    scatter_full_state_dict(fresh, resumed, gather_full_state_dict(model, optimizer))
    for one, its_optimizer in ((model, optimizer), (fresh, resumed)):
        its_optimizer.param_groups[0]["params"] = list(one.parameters())
        take_steps(one, its_optimizer)
    assert same_bits(states(fresh, resumed), states(model, optimizer))


def test_state_of_foreign_tensor_is_not_saved(tmp_path):
    """accelerate's swap of parameters leaves such a state."""
    model, optimizer = trained()
    expected = states(model, optimizer)
    optimizer.state[torch.ones(3)] = {"step": torch.ones(()), "exp_avg": torch.ones(3)}
    path = save(tmp_path, 1, model, optimizer)
    fresh = layers(seed=1)
    resumed = AdamW_BF16(fresh.parameters(), lr=1e-2)
    load(path, fresh, resumed)
    assert same_bits(states(fresh, resumed), expected)
    load(path, model, optimizer)
    assert len(optimizer.state) == 5 and same_bits(states(model, optimizer), expected)
    assert len(gather_full_state_dict(model, optimizer)["state"]) == 4
    assert list(optimizer.state_dict()["state"]) == [0, 1, 2, 3] and len(optimizer.state) == 5


@pytest.mark.parametrize("kind", [AdamW_BF16, torch.optim.AdamW])
def test_entry_of_no_parameter_is_kept(kind, tmp_path):
    model = layers()
    optimizer = kind(model.parameters(), lr=1e-2)
    take_steps(model, optimizer) if kind is AdamW_BF16 else None
    optimizer.state["ema"] = {"decay": 0.5, "count": torch.tensor(3.0)}
    optimizer.state["epoch"] = 7
    fresh = layers(seed=1)
    resumed = kind(fresh.parameters(), lr=1e-2)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.state["epoch"] == 7 and resumed.state["ema"]["decay"] == 0.5
    resumed = kind(fresh.parameters(), lr=1e-2)
    load(save(tmp_path, 1, model, optimizer), fresh, resumed)
    assert resumed.state["epoch"] == 7 and resumed.state["ema"] == {
        "decay": 0.5,
        "count": torch.tensor(3.0),
    }
    assert optimizer.state["epoch"] == 7
    gather_full_state_dict(model, optimizer)
    if kind is AdamW_BF16:
        assert same_bits(states(fresh, resumed), states(model, optimizer))
        take_steps(fresh, resumed)


def test_entry_that_cannot_be_saved_is_named(tmp_path):
    for name, entry, sentence in (
        (
            "ema",
            torch.ones(2000),
            "optimizer.state['ema'] belongs to no parameter and holds a tensor of 2000 "
            "elements, which cannot",
        ),
        (
            7.5,
            1,
            "optimizer.state has an entry under 7.5, which cannot be saved; use a string as "
            "its key",
        ),
    ):
        model, optimizer = trained()
        optimizer.state[name] = entry
        with pytest.raises(ValueError, match="^" + re.escape(sentence)):
            save(tmp_path, 1, model, optimizer)
        optimizer.load_state_dict(optimizer.state_dict())


def test_load_state_dict_does_not_change_its_argument():
    _, optimizer = trained()
    optimizer.state["ema"] = {"count": torch.tensor(3.0)}
    given = optimizer.state_dict()
    _, other = trained(seed=1)
    other.load_state_dict(given)
    other.state["ema"]["count"] += 1
    assert given["state"]["ema"]["count"] == 3


# ------------------------------------------------------------------------------------- empty groups


@pytest.mark.parametrize(
    ("here", "there", "expected"),
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
def test_empty_group_is_matched_by_its_index(here, there, expected):
    assert match_groups(here, there) == expected


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


# --------------------------------------------------------------------------- wrong on one rank only


def on_one_rank_worker(rank: int, world: int, root: str) -> list[str]:
    """Pass something else on the second rank; no rank blocks."""
    warnings.simplefilter("ignore")
    model, _, optimizer = wrapped("FSDP1 use_orig_params", world, seed=0)
    save(root, 1, model, optimizer)
    full = gather_full_state_dict(model, optimizer)
    weights = {name: torch.zeros(value.shape) for name, value in layers().state_dict().items()}
    plain = layers()
    wrong: list[tuple[Any, Any]] = [
        ("no model", optimizer),
        (model, None),
        (plain, optimizer),
        (model, AdamW_BF16(plain.parameters(), lr=1e-2)),
    ]
    calls = [
        lambda m, o: save(root, 2, m, o),
        lambda m, o: load(root, m, o),
        lambda m, o: gather_full_state_dict(m, o),
        lambda m, o: scatter_full_state_dict(m, o, full),
        lambda m, o: import_fp32(weights, m, o),
    ]
    said = []
    for arguments in wrong:
        for call in calls:
            try:
                call(*(arguments if rank == 1 else (model, optimizer)))
                said.append("nothing")
            except ValueError as error:
                said.append(str(error))
    try:
        import_fp32(
            weights, model, optimizer if rank == 0 else torch.optim.AdamW(model.parameters())
        )
    except ValueError as error:
        said.append(str(error))
    return said


def test_error_of_one_rank_is_raised_on_all_ranks(tmp_path):
    first, second = run_ranks(2, on_one_rank_worker, str(tmp_path))
    assert first == second and len(first) == 21
    for found, sentence in zip(
        [first[:5], first[5:10], first[10:15], first[15:20], first[20:]],
        [
            "model must be a torch.nn.Module, but it is of type str; the order of arguments is ",
            "optimizer must be a torch.optim.Optimizer, but it is of type NoneType; the "
            "order of arguments is ",
            "the optimizer holds parameter 0 (shape ",
            "the optimizer holds parameter 0 (shape (4, 4)), which is not a parameter of "
            "this model (nor are 3 more)",
            "optimizer must be an AdamW_BF16, but it is of type AdamW",
        ],
        strict=True,
    ):
        assert all(text.startswith(sentence) for text in found), found


# ------------------------------------------------------------------------------------- extra states


class History(nn.Module):
    """A module with an extra state: a tensor that grows, or another type while it is empty."""

    def __init__(self, values: list[float], empty: Any = None) -> None:
        super().__init__()
        self.layer, self.values, self.empty = nn.Linear(2, 2).to(BF16), values, empty

    def get_extra_state(self) -> Any:
        return torch.tensor(self.values) if self.values or self.empty is None else self.empty

    def set_extra_state(self, state: Any) -> None:
        self.values = state.tolist() if isinstance(state, Tensor) else []


@pytest.mark.parametrize("saved", [[], [1.0], [1.0, 2.0, 3.0]])
@pytest.mark.parametrize("here", [[], [5.0], [6.0, 7.0]])
@pytest.mark.parametrize("empty", [None, {"seen": "nothing"}])
def test_extra_state_is_restored_with_size_and_type_of_the_checkpoint(saved, here, empty, tmp_path):
    model = History(saved, empty)
    save(tmp_path, 1, model, AdamW_BF16(model.parameters(), lr=0.1))
    fresh = History(here, empty)
    load(tmp_path, fresh, AdamW_BF16(fresh.parameters(), lr=0.1))
    assert fresh.values == saved and torch.equal(fresh.layer.weight, model.layer.weight)


def test_missing_extra_state_is_a_mismatch(tmp_path):
    plain = nn.Sequential(nn.Linear(2, 2).to(BF16))
    save(tmp_path, 1, plain, AdamW_BF16(plain.parameters(), lr=0.1))
    model = nn.Sequential(nn.Linear(2, 2).to(BF16), History([1.0]))
    optimizer = AdamW_BF16(model[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"missing key model.1._extra_state"):
        load(tmp_path, model, optimizer)
    load(tmp_path, model, optimizer, strict=False)
    assert model[1].values == [1.0]


# -------------------------------------------------------------------------------- quantised tensors


class Quantised(Tensor):
    """A tensor as of torchao: made of two others, with few operations."""

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
    fresh_optimizer.state["epoch"] = 1  # not all of it is tensors
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
        ValueError, match="base is a Quantised; import first, and quantise the model then"
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
    for said in run_ranks(2, dtensor_worker, str(tmp_path)):
        assert said.startswith(
            "base is a DTensor of Quantised, whose shards cannot be saved or loaded; leave "
            "the quantised module out"
        )
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------- meta


def test_tensor_on_meta_device_is_named(tmp_path):
    good = save(tmp_path, 1, *trained())
    for make_meta in (
        lambda model: setattr(
            model[0],
            "weight",
            nn.Parameter(torch.ones(4, 4, dtype=BF16, device="meta"), requires_grad=False),
        ),
        lambda model: model[0].register_buffer("weight_scale", torch.ones(4, device="meta")),
    ):
        model = layers()
        make_meta(model)
        optimizer = AdamW_BF16(model[1].parameters(), lr=1e-2)
        for call in (
            lambda m=model, o=optimizer: save(tmp_path, 2, m, o),
            lambda m=model, o=optimizer: load(good, m, o),
            lambda m=model, o=optimizer: import_fp32({}, m, o),
        ):
            with pytest.raises(
                ValueError,
                match=r"^0\.weight(_scale)? is on the meta device and has no values; call "
                r"model.to_empty",
            ):
                call()
