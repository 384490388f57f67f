"""Loading into a model or optimizer that differs from the saved one."""

from __future__ import annotations

import re

import pytest
import torch
from distributed import run_ranks
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from sharded_bf16_adamw import LR, AdamW_BF16, load, save

from .layouts import BY_NAME, train


def trained(model: nn.Module, **options: object) -> tuple[nn.Module, AdamW_BF16]:
    model = model.to(torch.bfloat16)
    optimizer = AdamW_BF16(model.parameters(), **options)
    for step in range(3):
        for index, param in enumerate(model.parameters()):
            param.grad = torch.full_like(param, 0.1 * (index + step + 1))
        optimizer.step(zero_grad=True)
    return model, optimizer


class Model(nn.Module):
    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def test_strict_false_loads_what_fits_and_lists_mismatches(tmp_path):
    saved, saved_optimizer = trained(
        Model(same=linear(3, 4), other=linear(3, 4), gone=linear(2, 2))
    )
    save(tmp_path, 3, saved, saved_optimizer, extra={"a": 1})
    model, optimizer = trained(
        Model(same=linear(3, 4), other=linear(5, 4), new=linear(2, 3)), lr=0.5
    )
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    moments = {
        name: optimizer.state[param]["exp_avg"].clone() for name, param in model.named_parameters()
    }
    with pytest.raises(ValueError, match="is of another model or optimizer"):
        load(tmp_path, model, optimizer)
    loaded = load(tmp_path, model, optimizer, strict=False)
    assert loaded.extra == {"a": 1}
    assert loaded.step == 3 and loaded.path == tmp_path / "step-00000003"
    params = dict(model.named_parameters())
    assert torch.equal(params["same.weight"], saved.same.weight)
    for key, value in optimizer.state[params["same.weight"]].items():
        assert torch.equal(value, saved_optimizer.state[saved.same.weight][key])
    for name in ("other.weight", "new.weight"):
        assert torch.equal(params[name], before[name])
        assert torch.equal(optimizer.state[params[name]]["exp_avg"], moments[name])
    assert (
        optimizer.param_groups[0]["weight_decay"] == saved_optimizer.param_groups[0]["weight_decay"]
    )
    listed = "\n".join(loaded.mismatches)
    for sentence in (
        "size mismatch for model.other.weight: saved as (4, 3), but (4, 5) in the model",
        "missing key model.new.weight",
        "unexpected key model.gone.weight",
        "unexpected key optimizer.state.gone.weight.exp_avg",
    ):
        assert sentence in listed
    assert "same.weight" not in listed
    optimizer.zero_grad()
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.state[params["same.weight"]]["step"] == 4


def test_weight_without_saved_correction_gets_a_zero_correction(tmp_path):
    """The old correction belongs to other weights."""
    saved = Model(a=linear(3, 4)).to(torch.bfloat16)
    plain = torch.optim.AdamW(saved.parameters(), lr=1e-3)
    saved.a.weight.grad = torch.ones_like(saved.a.weight)
    plain.step()
    save(tmp_path, 1, saved, plain)
    model, optimizer = trained(Model(a=linear(3, 4)), lr=1e-3)
    assert optimizer.state[model.a.weight]["correction"].any()
    loaded = load(tmp_path, model, optimizer, strict=False)
    assert loaded.mismatches == ["missing key optimizer.state.a.weight.correction"]
    assert (
        torch.equal(model.a.weight, saved.a.weight)
        and not optimizer.state[model.a.weight]["correction"].any()
    )
    assert torch.equal(
        optimizer.state[model.a.weight]["exp_avg"], plain.state[saved.a.weight]["exp_avg"]
    )


def two_groups(model: nn.Module, first: float, second: float) -> AdamW_BF16:
    a, b = model.parameters()
    return AdamW_BF16(
        [{"params": [a], "weight_decay": first}, {"params": [b], "weight_decay": second}], lr=1e-3
    )


def test_groups_may_be_divided_otherwise_if_their_options_agree(tmp_path):
    model = Model(a=linear(3, 4), b=linear(4, 2)).to(torch.bfloat16)
    save(tmp_path, 1, model, two_groups(model, 0.25, 0.25))
    optimizer = AdamW_BF16(model.parameters(), lr=1e-2)
    load(tmp_path, model, optimizer)
    assert (
        optimizer.param_groups[0]["weight_decay"] == 0.25
        and optimizer.param_groups[0]["lr"] == 1e-3
    )
    save(tmp_path, 2, model, two_groups(model, 0.25, 0.5))
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(
        ValueError,
        match=r"weight_decay was saved as 0.25 for a.weight and as 0.5 for b.weight, but one gr",
    ):
        load(tmp_path, model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    load(tmp_path, model, optimizer, strict=False)
    assert optimizer.param_groups[0]["weight_decay"] == 0.25


def test_group_options_keep_their_types(tmp_path):
    """Tuples, a tensor lr and infinity do. The schedule continues at the saved position."""
    model, optimizer = trained(
        Model(a=linear(3, 4)), lr=torch.tensor(0.1), betas=(0.8, 0.95), eps=1e-30
    )
    optimizer.param_groups[0]["mine"] = [float("inf"), None, (1, "x")]
    save(tmp_path, 1, model, optimizer)
    fresh = AdamW_BF16(model.parameters(), lr=torch.tensor(0.5))
    fresh.param_groups[0]["mine"] = None
    load(tmp_path, model, fresh)
    group = fresh.param_groups[0]
    assert (
        isinstance(group["lr"], torch.Tensor)
        and group["lr"].dtype == torch.float32
        and group["lr"] == torch.tensor(0.1)
    )
    assert (
        group["betas"] == (0.8, 0.95)
        and group["eps"] == 1e-30
        and group["mine"] == [float("inf"), None, (1, "x")]
    )
    scheduled = AdamW_BF16(model.parameters(), lr_function=LR(lr=1.0, preheat_steps=10))
    load(tmp_path, model, scheduled)
    assert scheduled.param_groups[0]["schedule_step"] == 3
    model.a.weight.grad = torch.zeros_like(model.a.weight)
    scheduled.step()
    assert scheduled.param_groups[0]["lr"] == LR(lr=1.0, preheat_steps=10)(3), (
        "the schedule comes from the code, its position from the checkpoint"
    )


def test_torch_scheduler_resumes_after_a_load(tmp_path):
    """A scheduler writes ``initial_lr`` into the groups. One built at a later epoch reads it."""
    model, optimizer = trained(Model(a=linear(3, 4)), lr=0.1)
    scheduler = CosineAnnealingLR(optimizer, 10)
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    save(tmp_path, 4, model, optimizer)
    for fresh in (
        AdamW_BF16(model.parameters(), lr=0.5),
        AdamW_BF16(model.parameters(), lr=torch.tensor(0.5)),
    ):
        load(tmp_path, model, fresh)
        resumed = CosineAnnealingLR(fresh, 10, last_epoch=4 - 1)
        assert resumed.base_lrs == scheduler.base_lrs == [0.1]
        assert resumed.get_last_lr()[0] == pytest.approx(scheduler.get_last_lr()[0])


def options_worker(rank: int, world: int, root: str) -> None:
    for name in ("DDP", "FSDP1", "FSDP1 use_orig_params", "FSDP2", "ZeRO-2"):
        module, optimizer = BY_NAME[name].build(world, seed=0)
        train(module, optimizer, 1)
        for index, group in enumerate(optimizer.param_groups):
            group["initial_lr"], group["mine"] = 0.5 + index, ("x", index)
        save(f"{root}/{name}", 1, module, optimizer)
        module, optimizer = BY_NAME[name].build(world, seed=1)
        load(f"{root}/{name}", module, optimizer)
        found = [(group.get("initial_lr"), group.get("mine")) for group in optimizer.param_groups]
        assert found == [(0.5, ("x", 0)), (1.5, ("x", 1))], name


def test_options_only_in_the_checkpoint_are_loaded_under_every_strategy(tmp_path):
    run_ranks(2, options_worker, str(tmp_path))


def test_options_only_in_the_checkpoint_are_loaded_if_they_agree_within_a_group(tmp_path):
    model = Model(a=linear(3, 4), b=linear(4, 2)).to(torch.bfloat16)
    optimizer = two_groups(model, 0.25, 0.25)
    optimizer.param_groups[0]["mine"] = 1
    save(tmp_path, 1, model, optimizer)
    whole = AdamW_BF16(model.parameters(), lr=1e-2)
    load(tmp_path, model, whole)
    assert whole.param_groups[0]["mine"] == 1
    optimizer.param_groups[1]["mine"] = 2
    save(tmp_path, 2, model, optimizer)
    whole = AdamW_BF16(model.parameters(), lr=1e-2)
    load(tmp_path, model, whole)
    assert "mine" not in whole.param_groups[0], (
        "the saved values disagree, and the optimizer has no such option"
    )
    whole.param_groups[0]["mine"] = 3
    with pytest.raises(
        ValueError,
        match=r"mine was saved as 1 for a.weight and as 2 for b.weight, but one group of this",
    ):
        load(tmp_path, model, whole)


def test_parameter_no_longer_in_the_optimizer_loads_its_weight_without_a_state(tmp_path):
    saved, saved_optimizer = trained(Model(a=linear(3, 4), b=linear(4, 2)))
    save(tmp_path, 3, saved, saved_optimizer)
    model = Model(a=linear(3, 4), b=linear(4, 2)).to(torch.bfloat16)
    optimizer = AdamW_BF16(model.b.parameters(), lr=0.5)
    sentence = (
        "unexpected state of a.weight: this optimizer has no state for it; add the parameter to a "
        "group"
    )
    with pytest.raises(
        ValueError,
        match=f"another model or optimizer: {re.escape(sentence)}; build .* with strict=False",
    ):
        load(tmp_path, model, optimizer)
    assert load(tmp_path, model, optimizer, strict=False).mismatches == [sentence]
    assert torch.equal(model.a.weight, saved.a.weight)
    assert torch.equal(model.b.weight, saved.b.weight)
    assert not optimizer.state.get(model.a.weight)
    for key, value in optimizer.state[model.b.weight].items():
        assert torch.equal(value, saved_optimizer.state[saved.b.weight][key])
    assert optimizer.param_groups[0]["lr"] == saved_optimizer.param_groups[0]["lr"]


def test_load_copies_into_existing_memory(tmp_path):
    """A second copy of the optimizer's state would double its memory."""
    model, optimizer = trained(Model(a=linear(3, 4)), lr=0.1)
    save(tmp_path, 1, model, optimizer)
    places = {key: value.data_ptr() for key, value in optimizer.state[model.a.weight].items()}
    load(tmp_path, model, optimizer)
    assert {
        key: value.data_ptr() for key, value in optimizer.state[model.a.weight].items()
    } == places
