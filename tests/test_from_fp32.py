"""from_fp32: conversion of a model to bfloat16 that keeps what rounding drops."""

import pytest
import torch
from small_optimizers import BF16
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sharded_bf16_adamw import AdamW_BF16, param_groups


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(40, 16)
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embedding.weight
        self.out = nn.Linear(16, 8)
        self.register_buffer("index", torch.arange(3))


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_true_weights_are_the_float32_weights_up_to_16_bits():
    model = Model()
    expected, params = weights_of(model), dict(model.named_parameters())
    optimizer = AdamW_BF16.from_fp32(model, lr=1e-3)
    assert dict(model.named_parameters()) == params  # the same objects
    assert model.head.weight is model.embedding.weight
    true = dict(optimizer.true_weights())
    for name, p in params.items():
        assert p.dtype == BF16 and torch.equal(p, expected[name].bfloat16())
        assert ((true[p] - expected[name]).abs() <= 2.0**-17 * expected[name].abs()).all()
    assert not torch.equal(true[model.out.weight], model.out.weight.float())
    assert model.norm.running_mean.dtype == BF16 and model.index.dtype == torch.int64
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_names_that_match_stay_float32_and_groups_made_before_hold():
    model = Model()
    expected = weights_of(model)
    groups = param_groups(model, {"bias": {"weight_decay": 0.0}})
    optimizer = AdamW_BF16.from_fp32(model, groups, keep_fp32=r"^norm\.", lr=1e-3, weight_decay=0.1)
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {"norm.weight", "norm.bias"}
    assert model.norm.running_var.dtype == torch.float32
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1]
    true = dict(optimizer.true_weights())
    assert torch.equal(true[model.norm.weight], expected["norm.weight"])
    assert "correction" not in optimizer.state[model.norm.weight]
    assert optimizer.state[model.out.bias]["correction"].any()


def test_frozen_and_left_out_parameters_are_rounded_without_state():
    model = Model()
    model.out.bias.requires_grad_(False)
    optimizer = AdamW_BF16.from_fp32(model, [model.out.weight, model.out.bias], lr=1e-3)
    assert list(optimizer.state) == [model.out.weight]
    assert model.out.bias.dtype == model.embedding.weight.dtype == BF16


def test_huge_values_have_no_infinite_correction():
    model = nn.ParameterList([torch.tensor([3.4e38, torch.inf, torch.nan, 1.0])])
    optimizer = AdamW_BF16.from_fp32(model, lr=1e-3)
    assert torch.equal(optimizer.state[model[0]]["correction"], torch.zeros(4, dtype=BF16))


def steps(model, optimizer, count):
    """Move all weights by about ``lr`` down in each step."""
    for _ in range(count):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()


def test_first_steps_reach_the_model_at_once():
    """The model sees p alone, which moves once the true weight has crossed half a bf16 step.

    After bfloat16() all weights start in the middle and wait alike. With the remainders they are
    spread over the step, so that p moves by the right amount on average, as float32 weights do.
    """
    generator = torch.Generator().manual_seed(0)
    start = 1.1 + 0.8 * torch.rand(1 << 14, generator=generator)
    lr, count = 2.0**-12, 8  # a bf16 step of the weights is 2^-7: 8 steps are a quarter of it
    lag = {}
    for way in ("from_fp32", "bfloat16"):
        model = nn.ParameterList([start.clone()])
        if way == "from_fp32":
            optimizer = AdamW_BF16.from_fp32(model, lr=lr, weight_decay=0.0)
        else:
            optimizer = AdamW_BF16(model.bfloat16().parameters(), lr=lr, weight_decay=0.0)
        first = model[0].detach().float().clone()
        steps(model, optimizer, count)
        lag[way] = 1 - (first - model[0].float()).mean().item() / (lr * count)
    assert lag["bfloat16"] == 1.0
    assert abs(lag["from_fp32"]) < 0.05


def test_training_stays_closer_to_float32_than_after_bfloat16():
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(4096, generator=generator)
    results = {}
    for way in ("float32", "from_fp32", "bfloat16"):
        model = nn.ParameterList([start.clone()])
        if way == "from_fp32":
            optimizer = AdamW_BF16.from_fp32(model, lr=1e-4)
        else:
            model = model.bfloat16() if way == "bfloat16" else model
            optimizer = AdamW_BF16(model.parameters(), lr=1e-4)
        steps(model, optimizer, 5)
        results[way] = next(weight for _, weight in optimizer.true_weights())
    error = {way: (w - results["float32"]).norm().item() for way, w in results.items()}
    assert error["from_fp32"] < error["bfloat16"] / 50


def test_what_cannot_be_converted_is_an_error_and_unchanged():
    model = Model()
    before = weights_of(model)
    for options, message in (
        ({"keep_fp32": "nothing"}, "matches no parameter or buffer"),
        ({"keep_fp32": "("}, "is not a regular expression"),
        ({"keep_fp32": "."}, "no parameter is left to convert"),
    ):
        with pytest.raises(ValueError, match=message):
            AdamW_BF16.from_fp32(model, lr=1e-3, **options)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with pytest.raises(ValueError, match=r"as it was before model\.bfloat16"):
        AdamW_BF16.from_fp32(model.bfloat16(), lr=1e-3)
    with pytest.raises(ValueError, match=r"Invalid sharding: .*; give ZeRO\(mesh\)"):
        AdamW_BF16.from_fp32(Model(), lr=1e-3, sharding=object())


def test_wrapped_by_ddp_is_an_error():
    wrapped = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = Model()
    with pytest.raises(ValueError, match=r"call from_fp32\(\) before DistributedDataParallel"):
        AdamW_BF16.from_fp32(wrapped, lr=1e-3)


def test_gradients_are_dropped():
    model = Model()
    model.out.weight.grad = torch.ones_like(model.out.weight)
    AdamW_BF16.from_fp32(model, lr=1e-3)
    assert model.out.weight.grad is None
