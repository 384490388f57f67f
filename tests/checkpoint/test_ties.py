"""Save tied weights and load them untied, and the reverse, in every layout."""

from __future__ import annotations

import re
import warnings
import zlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bits import same_bits
from distributed import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from sharded_bf16_adamw import (
    AdamW_BF16,
    ModelParallel,
    ZeRO,
    convert_fp32,
    export_fp32,
    gather_full_state_dict,
    import_fp32,
    load,
    save,
    scatter_full_state_dict,
)
from sharded_bf16_adamw.checkpoint.manifest import read_manifest
from sharded_bf16_adamw.checkpoint.ties import merge_ties

from .trainings import read_folder

NAMES = ("emb.weight", "head.weight", "more.weight")


class LM(nn.Module):
    """Three matrices of one shape; those in ``tied`` are one parameter."""

    def __init__(self, tied: tuple[int, ...] = (), seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.emb, self.head, self.more = (
            nn.Embedding(16, 8),
            nn.Linear(8, 16, bias=False),
            nn.Linear(8, 16, bias=False),
        )
        layers = (self.emb, self.head, self.more)
        for index in tied[1:]:
            layers[index].weight = layers[tied[0]].weight
        self.bfloat16()

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.emb(tokens)
        return self.head(hidden) + self.more(torch.tanh(hidden))


def build(
    tied: tuple[int, ...], seed: int = 0, frozen: tuple[int, ...] = ()
) -> tuple[LM, AdamW_BF16]:
    model = LM(tied, seed)
    for index in frozen:
        (model.emb, model.head, model.more)[index].weight.requires_grad_(False)
    return model, AdamW_BF16(model.parameters(), lr=1e-2)


def take_steps(model: nn.Module, optimizer: AdamW_BF16, steps: int = 4) -> None:
    for step in range(steps):
        tokens = torch.randint(0, 16, (4, 5), generator=torch.Generator().manual_seed(step))
        model(tokens).float().square().mean().backward()
        optimizer.step(zero_grad=True)


def values_of(model: LM, optimizer: AdamW_BF16) -> dict[str, list[Tensor]]:
    """Return the weight and the state of each name."""
    weights = dict(
        zip(NAMES, (model.emb.weight, model.head.weight, model.more.weight), strict=True)
    )
    return {
        name: [p.detach().clone(), *(v.clone() for v in optimizer.state.get(p, {}).values())]
        for name, p in weights.items()
    }


TIES = [(), (0, 1), (0, 2), (1, 2), (0, 1, 2), (2, 1)]


@pytest.mark.parametrize("saved", TIES)
def test_each_name_gets_its_saved_values_or_the_load_is_refused(saved, tmp_path):
    """Load between all sets of ties: a name that was tied has the shared values."""
    model, optimizer = build(saved)
    take_steps(model, optimizer)
    path = save(tmp_path, 4, model, optimizer)
    expected = values_of(model, optimizer)
    for current in TIES:
        other, other_optimizer = build(current, seed=1)
        before = values_of(other, other_optimizer)
        if set(current) <= set(saved) or not current:
            load(path, other, other_optimizer)
            found = values_of(other, other_optimizer)
            assert same_bits(found, expected), current
            take_steps(other, other_optimizer, 1)
        else:
            first = NAMES[min(current)]
            different = next(
                NAMES[index]
                for index in sorted(current)[1:]
                if not {index, min(current)} <= set(saved)
            )
            tied = f"{first} and {different} are tied in the model"
            sentence = f"{tied} but were saved with different weights"
            with pytest.raises(ValueError, match=re.escape(sentence)):
                load(path, other, other_optimizer)
            assert same_bits(values_of(other, other_optimizer), before)
            loaded = load(path, other, other_optimizer, strict=False)
            assert any(sentence in line for line in loaded.mismatches)
            found = values_of(other, other_optimizer)
            assert same_bits(found[first], expected[first]) and same_bits(
                found[different], expected[first]
            ), current


def test_manifest_records_ties(tmp_path):
    assert read_manifest(save(tmp_path, 1, *build((2, 0)))).ties == [["emb.weight", "more.weight"]]
    assert read_manifest(save(tmp_path, 2, *build(()))).ties == []


def equal_but_untied() -> tuple[LM, AdamW_BF16]:
    model, optimizer = build(())
    take_steps(model, optimizer)
    with torch.no_grad():
        model.head.weight.copy_(model.emb.weight)
        for key, value in optimizer.state[model.head.weight].items():
            value.copy_(optimizer.state[model.emb.weight][key])
    return model, optimizer


def test_untied_but_equal_values_load_into_tied_weights(tmp_path):
    model, optimizer = equal_but_untied()
    save(tmp_path, 1, model, optimizer)
    tied, tied_optimizer = build((0, 1), seed=1)
    load(tmp_path, tied, tied_optimizer)
    assert same_bits(
        values_of(tied, tied_optimizer)["head.weight"], values_of(model, optimizer)["emb.weight"]
    )


@pytest.mark.parametrize("key", ["step", "exp_avg", "exp_avg_sq", "correction"])
def test_equal_weights_with_different_states_do_not_load_into_tied_ones(key, tmp_path):
    model, optimizer = equal_but_untied()
    optimizer.state[model.head.weight][key] += 1
    save(tmp_path, 1, model, optimizer)
    with pytest.raises(
        ValueError,
        match=r"emb.weight and head.weight are tied in the model but .* different optimizer",
    ):
        load(tmp_path, *build((0, 1), seed=1))


def test_equal_weights_trained_and_frozen_do_not_load_into_tied_ones(tmp_path):
    model, optimizer = build((), frozen=(1,))
    take_steps(model, optimizer)
    with torch.no_grad():
        model.head.weight.copy_(model.emb.weight)
    save(tmp_path, 1, model, optimizer)
    with pytest.raises(
        ValueError,
        match=r"emb.weight and head.weight are tied .* states: one was trained and the other",
    ):
        load(tmp_path, *build((0, 1), seed=1))


def test_tied_weight_loads_into_a_frozen_one_with_its_correction(tmp_path):
    model, optimizer = build((0, 1))
    take_steps(model, optimizer)
    save(tmp_path, 1, model, optimizer)
    untied, untied_optimizer = build((), seed=1, frozen=(1,))
    load(tmp_path, untied, untied_optimizer)
    assert same_bits(values_of(untied, untied_optimizer), values_of(model, optimizer))


def without_record(path: Any) -> None:
    """Remove the record of ties, as in a checkpoint of an older version."""
    manifest = read_manifest(path)
    manifest.ties = None
    content = manifest.to_bytes().replace(b' "ties": null,\n', b"")
    blank = content.rpartition(b'"checksum": "')[0] + b'"checksum": "00000000"\n}\n'
    (path / "manifest.json").write_bytes(
        blank.replace(b'"checksum": "00000000"', b'"checksum": "%08x"' % zlib.crc32(blank))
    )
    assert read_manifest(path).ties is None


def test_checkpoints_without_a_record_of_ties_load(tmp_path):
    model, optimizer = build((0, 1))
    take_steps(model, optimizer)
    path = save(tmp_path, 1, model, optimizer)
    without_record(path)
    tied, tied_optimizer = build((0, 1), seed=1)
    load(path, tied, tied_optimizer)
    assert same_bits(values_of(tied, tied_optimizer), values_of(model, optimizer))
    exported = read_folder(export_fp32(path, tmp_path / "out"))
    true = next(weight for param, weight in optimizer.true_weights() if param is model.emb.weight)
    assert torch.equal(exported["head.weight"], true) and torch.equal(exported["emb.weight"], true)
    model, optimizer = build((), frozen=(1,))
    take_steps(model, optimizer)
    path = save(tmp_path, 2, model, optimizer)
    without_record(path)
    with pytest.raises(
        ValueError,
        match=r"emb.weight and head.weight are tied in the model but .* different weights",
    ):
        load(path, tied, tied_optimizer)


def test_export_uses_recorded_ties_and_not_equal_bits(tmp_path):
    model, optimizer = build((), frozen=(1,))
    take_steps(model, optimizer)
    with torch.no_grad():
        model.head.weight.copy_(model.emb.weight)
    save(tmp_path / "run", 1, model, optimizer)
    exported = read_folder(export_fp32(tmp_path / "run", tmp_path / "out"))
    assert torch.equal(exported["head.weight"], model.head.weight.float()), (
        "head.weight has no correction"
    )
    assert not torch.equal(exported["emb.weight"], exported["head.weight"])


# ------------------------------------------------------------------------------------------- import


def test_import_into_tied_weights_requires_equal_values():
    source = {name: value.float() for name, value in LM((), seed=5).state_dict().items()}
    tied, optimizer = build((0, 1))
    before = values_of(tied, optimizer)
    with pytest.raises(
        ValueError, match=r"emb.weight and head.weight are tied in the model but differ in the"
    ):
        import_fp32(source, tied, optimizer)
    assert same_bits(values_of(tied, optimizer), before)
    source["head.weight"] = source["emb.weight"].clone()
    import_fp32(source, tied, optimizer)
    assert torch.equal(tied.emb.weight, source["emb.weight"].bfloat16())


def fp32_run(tied: tuple[int, ...]) -> tuple[nn.Module, torch.optim.AdamW, dict[str, Any]]:
    """Train in float32 and return the optimizer state keyed by names, too."""
    model = LM(tied, seed=5).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        tokens = torch.randint(0, 16, (4, 5), generator=torch.Generator().manual_seed(step))
        model(tokens).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    names = [name for name, _ in model.named_parameters()]
    state = {names[key]: value for key, value in optimizer.state_dict()["state"].items()}
    groups = [
        {**group, "params": [names[key] for key in group["params"]]}
        for group in optimizer.state_dict()["param_groups"]
    ]
    return model, optimizer, {"state": state, "param_groups": groups}


def test_state_of_tied_weights_is_imported_into_each_untied_one():
    model, _, state = fp32_run((0, 1))
    untied, optimizer = build((), seed=1)
    import_fp32(model.state_dict(), untied, optimizer, state)
    found = values_of(untied, optimizer)
    assert (
        same_bits(found["head.weight"], found["emb.weight"])
        and optimizer.state[untied.head.weight]["step"] == 3
    )
    assert optimizer.state[untied.head.weight]["exp_avg"].any()


def test_states_of_untied_weights_are_imported_into_a_tied_one_if_equal():
    model, _, state = fp32_run(())
    model.head.weight.data.copy_(model.emb.weight)
    tied, optimizer = build((0, 1), seed=1)
    with pytest.raises(
        ValueError,
        match=r"emb.weight and head.weight are tied in the model, but the optimizer states",
    ):
        import_fp32(model.state_dict(), tied, optimizer, state)
    state["state"]["head.weight"] = {
        key: value.clone() for key, value in state["state"]["emb.weight"].items()
    }
    import_fp32(model.state_dict(), tied, optimizer, state)
    assert optimizer.state[tied.head.weight]["step"] == 3
    only_other = {
        **state,
        "state": {name: value for name, value in state["state"].items() if name != "emb.weight"},
    }
    import_fp32(model.state_dict(), tied, optimizer, only_other)
    assert optimizer.state[tied.head.weight]["step"] == 3


def test_conversion_keeps_ties(tmp_path):
    model, _, state = fp32_run((0, 1))
    path = convert_fp32(model.state_dict(), tmp_path, state)
    assert read_manifest(path).ties == [["emb.weight", "head.weight"]]
    for current in ((), (0, 1)):
        load(path, *build(current, seed=1))


def test_conversion_finds_the_group_of_a_parameter_by_any_of_its_names(tmp_path):
    model, _, state = fp32_run((0, 1))
    states = {"head.weight": state["state"]["emb.weight"], "more.weight": {}}
    states["more.weight"] = state["state"]["more.weight"]
    (group,) = state["param_groups"]
    groups = [{**group, "params": ["more.weight"]}, {**group, "params": ["head.weight"], "lr": 0.5}]
    path = convert_fp32(model.state_dict(), tmp_path, {"state": states, "param_groups": groups})
    saved = read_manifest(path).groups
    assert [(group.params, group.options["lr"]) for group in saved] == [
        (["more.weight"], 1e-2),
        (["emb.weight"], 0.5),
    ]


def test_sets_of_ties_that_a_later_one_connects_are_merged():
    pairs = [["a", "b"], ["c", "d"], ["x", "y"], ["b", "c"]]
    assert merge_ties([pairs]) == [["a", "b", "c", "d"], ["x", "y"]]


def test_scatter_refuses_a_state_of_other_ties():
    for saved, current in (((0, 1), ()), ((), (0, 1))):
        model, optimizer = build(saved)
        take_steps(model, optimizer, 1)
        full = gather_full_state_dict(model, optimizer)
        with pytest.raises(ValueError, match="the full state is of another model or optimizer"):
            scatter_full_state_dict(*build(current, seed=1), full)


# ------------------------------------------------------------------------------------------ buffers


class Buffers(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2, bias=False).bfloat16()
        self.register_buffer("a", torch.arange(4.0))
        self.register_buffer("b", self.a.view(4) if tied else torch.arange(4.0) + 1)


def test_buffers_that_share_memory_are_tied(tmp_path):
    tied, untied = Buffers(True), Buffers(False)
    path = save(tmp_path / "tied", 1, tied, AdamW_BF16(tied.parameters(), lr=0.1))
    assert read_manifest(path).ties == [["a", "b"]]
    save(tmp_path / "untied", 1, untied, AdamW_BF16(untied.parameters(), lr=0.1))
    load(tmp_path / "tied", untied, AdamW_BF16(untied.parameters(), lr=0.1))
    assert torch.equal(untied.b, torch.arange(4.0))
    with pytest.raises(
        ValueError, match="a and b are tied in the model but were saved with different weights"
    ):
        load(tmp_path / "untied", tied, AdamW_BF16(tied.parameters(), lr=0.1))


# ------------------------------------------------------------------------------------------ layouts


def wrapped(
    layout: str, tied: tuple[int, ...], world: int, seed: int
) -> tuple[nn.Module, AdamW_BF16]:
    model: nn.Module = LM(tied, seed)
    mesh = init_device_mesh("cpu", (world,))
    sharding = None
    if layout == "DDP":
        model = DistributedDataParallel(model)
    elif layout == "FSDP2":
        model = fully_shard(model, mesh=mesh)
    elif layout == "ZeRO-2":
        sharding = ZeRO(mesh)
    else:
        model = FullyShardedDataParallel(
            model,
            device_mesh=mesh,
            device_id=torch.device("cpu"),
            use_orig_params=layout == "FSDP1 use_orig_params",
        )
    return model, AdamW_BF16(model.parameters(), lr=1e-2, sharding=sharding)


LAYOUTS = ("DDP", "FSDP2", "ZeRO-2", "FSDP1", "FSDP1 use_orig_params")


def layouts_worker(rank: int, world: int, root: str) -> list[str]:
    """Load each layout's checkpoint into one process and into that layout, tied and untied."""
    warnings.simplefilter("ignore")
    failed = []
    for layout in LAYOUTS:
        folder = f"{root}/{layout}"
        model, optimizer = wrapped(layout, (0, 1), world, seed=0)
        take_steps(model, optimizer, 2)
        path = save(f"{folder}/there", 2, model, optimizer)
        if read_manifest(path).ties != [["emb.weight", "head.weight"]]:
            failed.append(f"{layout}: ties")
        for current in ((0, 1), ()):
            plain, plain_optimizer = build(current, seed=1)
            load(path, plain, plain_optimizer)
            found = values_of(plain, plain_optimizer)
            if not same_bits(found["head.weight"], found["emb.weight"]):
                failed.append(f"{layout}, {current}: load into one process")
            model, optimizer = wrapped(layout, current, world, seed=2)
            load(path, model, optimizer)
            back = save(f"{folder}/back {current}", 2, model, optimizer)
            again, again_optimizer = build(current, seed=3)
            load(back, again, again_optimizer)
            if not same_bits(values_of(again, again_optimizer), found):
                failed.append(f"{layout}, {current}: load into the layout")
        try:
            model, optimizer = wrapped(layout, (1, 2), world, seed=2)
            load(path, model, optimizer)
            failed.append(f"{layout}: no error")
        except ValueError as error:
            if "head.weight and more.weight are tied in the model" not in str(error):
                failed.append(f"{layout}: {error}")
    return failed


def test_ties_may_change_under_every_layout(tmp_path):
    assert run_ranks(2, layouts_worker, str(tmp_path)) == [[], []]


def staged(
    tied: tuple[int, ...], rank: int, seed: int, frozen: tuple[int, ...] = ()
) -> tuple[LM, AdamW_BF16]:
    """Build a pipeline stage with the names of the other stage and other values."""
    model, _ = build(tied, seed + 10 * rank, frozen)
    return model, AdamW_BF16(
        model.parameters(), lr=1e-2, model_parallel=ModelParallel(pp=dist.group.WORLD)
    )


def stages_worker(rank: int, world: int, root: str) -> list[Any]:
    model, optimizer = staged((0, 1), rank, seed=0)
    take_steps(model, optimizer, 2)
    path = save(root, 2, model, optimizer)
    expected = values_of(model, optimizer)
    found: list[Any] = [read_manifest(path).ties]
    for of_stages, frozen in (
        (((), ()), ()),
        (((), (0, 1)), ()),
        (((), ()), (1,)),
        (((0, 1), ()), (0, 1, 2)),
    ):
        stage, stage_optimizer = staged(of_stages[rank], rank, 1, frozen)
        load(path, stage, stage_optimizer)
        loaded = values_of(stage, stage_optimizer)
        found.append(same_bits(loaded, expected))
    with pytest.raises(
        ValueError, match=r"head.weight@pp1 and more.weight@pp1 are tied in the model"
    ) as caught:
        load(path, *staged((1, 2) if rank else (0, 1), rank, seed=1))
    return [*found, str(caught.value)]


def test_ties_within_pipeline_stages(tmp_path):
    """Also if only one stage has changed its ties."""
    first, second = run_ranks(2, stages_worker, str(tmp_path))
    assert first == second and first[1:5] == [True] * 4
    assert first[0] == [[f"emb.weight@pp{stage}", f"head.weight@pp{stage}"] for stage in (0, 1)]
