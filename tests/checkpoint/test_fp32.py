"""Precision of a float32 value as two bfloat16, of rounded moments, and of import and export."""

from __future__ import annotations

import math

import torch
from torch import nn

from sharded_bf16_adamw import LR, AdamW_BF16, save
from sharded_bf16_adamw.bf16_split import join, split
from sharded_bf16_adamw.checkpoint.export import export_fp32
from sharded_bf16_adamw.checkpoint.importing import import_fp32, round_moment

from .layouts import LAYOUTS, Net
from .trainings import fp32_training, in_order, read_folder


def random_floats(count=1 << 20):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(1 << 31), 1 << 31, (count,), generator=generator, dtype=torch.int64).to(
        torch.int32
    )
    x = bits.view(torch.float32)
    special = torch.tensor(
        [0.0, -0.0, 1.0, 1e-45, -1e-40, 2.0**-126, 3.3895e38, 1 + 2**-8, 1 + 2**-9 + 2**-23]
    )
    return torch.cat([special, x[x.isfinite() & (x.abs() <= 3.3895e38)]])


def test_split_keeps_sixteen_bits():
    """Test the documented bound over all bit patterns, and that it is tight."""
    x = random_floats()
    error = (join(*split(x)).double() - x.double()).abs()
    bound = 2.0**-17 * x.double().abs() + 2.0**-134
    assert bool((error <= bound).all())
    normal = x.abs() > 1e-30
    assert float((error / x.double().abs())[normal].max()) > 0.95 * 2.0**-17
    assert bool((split(x)[0].view(torch.int16) == x.bfloat16().view(torch.int16)).all()), (
        "p is x rounded to nearest"
    )


def test_split_of_values_beyond_bfloat16_has_no_correction():
    x = torch.tensor([math.inf, -math.inf, math.nan, 3.4e38])
    p, correction = split(x)
    assert p[0] == math.inf and p[1] == -math.inf and p[2].isnan() and p[3] == math.inf
    assert not correction.any()


def test_moments_are_rounded_without_bias_and_by_their_own_bits_alone():
    """The mean error is zero, overall and in each decile of the discarded fraction."""
    x = torch.randn(1 << 20, generator=torch.Generator().manual_seed(1))
    rounded = round_moment(x)
    below = (x.view(torch.int32) & ~0xFFFF).view(torch.float32).double()
    step = ((x.view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32).double() - below
    fraction = (x.view(torch.int32) & 0xFFFF).double() / 65536
    up = (rounded.double() - below) / step
    assert set(up.unique().tolist()) == {0.0, 1.0}
    for low in range(-1, 10):
        chosen = (
            (fraction * 10).int() == low
            if low >= 0
            else torch.ones_like(fraction, dtype=torch.bool)
        )
        variance = (fraction * (1 - fraction))[chosen].sum()
        assert abs(float((up - fraction)[chosen].sum() / variance.sqrt())) < 5
    order = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(2))
    assert torch.equal(round_moment(x[order]), rounded[order]), (
        "the random bits must not depend on the position"
    )
    assert torch.equal(round_moment(x.bfloat16().float()), x.bfloat16()), (
        "values that bfloat16 holds must stay"
    )


def test_import_save_export_round_trip_keeps_sixteen_bits(tmp_path):
    """float32 parameters come back exactly."""
    model, _ = fp32_training()
    module, ours = LAYOUTS[0].build(1, seed=9)
    import_fp32(model.state_dict(), module, ours)
    save(tmp_path / "run", 0, module, ours)
    export_fp32(tmp_path / "run", tmp_path / "out")
    exported = read_folder(tmp_path / "out")
    assert exported.keys() == model.state_dict().keys()
    for name, value in exported.items():
        original = model.state_dict()[name].double()
        error = (value.double() - original).abs()
        assert bool((error <= (0 if "precise" in name else 2.0**-17) * original.abs()).all()), name
        assert name != "up.weight" or bool(error.any()), "the test needs values that are rounded"


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


def test_export_of_tied_and_frozen_weights_and_buffers(tmp_path):
    model, optimizer = trained_tied()
    save(tmp_path / "run", 2, model, optimizer)
    export_fp32(tmp_path / "run", tmp_path / "out")
    found = read_folder(tmp_path / "out")
    assert torch.equal(model.gain, model.frozen), "equal values must not count as tied"
    assert torch.equal(found["first.weight"], dict(in_order(model, optimizer))[model.first.weight])
    assert torch.equal(found["second.weight"], found["first.weight"])
    assert not torch.equal(found["gain"], found["frozen"]) and torch.equal(
        found["frozen"], torch.ones(4)
    )
    assert found["count"] == 7 and found["count"].dtype == torch.int64
    other = Tied().bfloat16()
    # Hugging Face leaves out the second of two tied names.
    names = {name: found[name] for name in found if name != "second.weight"}
    import_fp32(names, other, AdamW_BF16(other.parameters(), lr=1e-4))
    assert other.second.weight is other.first.weight and torch.equal(
        other.first.weight, found["first.weight"].bfloat16()
    )


def test_imported_run_follows_fp32_adamw(tmp_path):
    model, _ = fp32_training()
    module = Net()
    module.precise.bfloat16()
    ours = AdamW_BF16(module.parameters(), lr_function=LR(lr=1e-2))
    reference = torch.optim.AdamW(model.parameters(), lr=1e-3)
    reference.load_state_dict({"state": {}, "param_groups": reference.state_dict()["param_groups"]})
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
        reference.step()
    for (_, weight), b in zip(in_order(module, ours), model.parameters(), strict=True):
        assert float((weight - b.detach()).abs().max()) < 2e-4, (
            "five steps of 1e-3 with moments of eight bits"
        )
