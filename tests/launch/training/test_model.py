"""launch/model.py: shapes, causality, sizes, and an initialisation that no layout or dtype changes."""

from __future__ import annotations

import distributed
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F  # noqa: N812  # its usual name
from training.model import GPT, PRESETS, Config
from training.strategies import STRATEGIES

SMALL = Config(layers=2, dim=24, heads=3, ffn=40, seq_len=16, batch_size=4, steps=10, lr=1e-3)


def build(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> GPT:
    with torch.device("meta"):
        gpt = GPT(SMALL).to(dtype)
    gpt.to_empty(device="cpu")
    gpt.init_weights(seed)
    return gpt


def test_logits_have_a_row_for_each_byte_value_in_bfloat16():
    logits = build()(torch.randint(0, 256, (3, 16)))
    assert logits.shape == (3, 16, 256)
    assert logits.dtype == torch.bfloat16


def test_no_position_sees_a_later_byte():
    gpt = build()
    before = torch.randint(0, 256, (2, 16))
    after = before.clone()
    after[:, 9] = (after[:, 9] + 1) % 256
    changed = (gpt(before) != gpt(after)).any(dim=-1)
    assert not changed[:, :9].any()
    assert changed[:, 9:].all(), "every later position attends to the changed byte"


def test_attention_depends_on_positions():
    """Without rotary embeddings, a causal model cannot tell two orders of the bytes before the last one, in one layer."""
    one_layer = Config(**{**vars(SMALL), "layers": 1})
    gpt = GPT(one_layer)
    gpt.init_weights(0)
    tokens = torch.arange(16)[None]
    swapped = tokens.clone()
    swapped[0, [2, 5]] = tokens[0, [5, 2]]
    gpt.blocks[0].attention.query.weight.data.mul_(
        100
    )  # attention that prefers some positions over others
    gpt.blocks[0].attention.key.weight.data.mul_(100)
    gpt.blocks[0].attention.output.weight.data.mul_(100)
    difference = (gpt(tokens)[0, -1] - gpt(swapped)[0, -1]).abs().max()
    assert difference > 0.01


def test_rotation_keeps_lengths_and_depends_on_distance_alone(monkeypatch):
    monkeypatch.setattr(model, "COMPUTE_DTYPE", torch.float64)
    q, k = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    rotation = model.rotations(32, 8, torch.device("cpu"))
    qs, ks = (model.rotate(x.expand(1, 1, 32, 8), rotation)[0, 0] for x in (q, k))
    torch.testing.assert_close(qs.norm(dim=-1), q.norm().expand(32))
    products = qs @ ks.T
    torch.testing.assert_close(products[3, 1], products[30, 28], atol=1e-5, rtol=0)
    assert (products[3, 1] - products[3, 2]).abs() > 1e-3


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_parameters_that_it_says(name):
    with torch.device("meta"):
        gpt = GPT(PRESETS[name])
    assert sum(p.numel() for p in gpt.parameters()) == PRESETS[name].parameters


@pytest.mark.parametrize(("name", "billions"), [("1b", 1.07), ("3b", 3.17), ("8b", 7.79)])
def test_big_presets_are_as_big_as_their_names(name, billions):
    assert PRESETS[name].parameters / 1e9 == pytest.approx(billions, abs=0.01)


def test_initialisation_depends_on_the_seed_and_the_parameter():
    first, again, other = (dict(build(seed=s).named_parameters()) for s in (0, 0, 1))
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name])
        assert torch.equal(parameter, other[name]) == (parameter.ndim == 1)
    assert not torch.equal(
        first["blocks.0.attention.query.weight"], first["blocks.0.attention.key.weight"]
    )


def test_bfloat16_weights_start_as_the_float32_ones_rounded():
    fp32 = dict(build(torch.float32).named_parameters())
    for name, parameter in build().named_parameters():
        assert torch.equal(parameter, fp32[name].bfloat16())


def test_residual_writers_start_smaller():
    gpt = GPT(PRESETS["tiny"])
    gpt.init_weights(0)
    block = gpt.blocks[0]
    for weight, std in (
        (block.ffn.up.weight, 0.02),
        (block.ffn.down.weight, 0.02 / 8**0.5),
        (block.attention.output.weight, 0.02 / 8**0.5),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.03)


def test_float32_weights_give_the_bfloat16_forward_and_float32_gradients():
    tokens = torch.randint(0, 256, (2, 16))
    bf16, fp32 = build(), build(torch.float32)
    assert torch.equal(bf16(tokens), fp32(tokens))
    for gpt in (bf16, fp32):
        F.cross_entropy(gpt(tokens).float().flatten(0, 1), tokens.flatten()).backward()
        assert all(p.grad is not None and p.grad.dtype == p.dtype for p in gpt.parameters())


def test_cpus_without_bfloat16_instructions_compute_the_same_product(monkeypatch):
    layer = model.Linear(64, 32).bfloat16()
    layer.weight.data.normal_()
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    exact = x.double() @ layer.weight.double().T
    for fast in (True, False):
        monkeypatch.setattr(model, "has_fast_bf16", lambda device, fast=fast: fast)
        y = layer(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(
            y.double(), exact, rtol=2**-8, atol=1e-4
        )  # one rounding to bfloat16


def initial_weights(rank: int, world_size: int, strategy: str) -> dict[str, torch.Tensor]:
    mesh = init_device_mesh("cpu", (world_size,))
    with torch.device("meta"):
        gpt = GPT(SMALL).to(torch.bfloat16)
    STRATEGIES[strategy].shard(gpt, mesh)
    gpt.to_empty(device="cpu")
    gpt.init_weights(0)
    STRATEGIES[strategy].wrap(gpt, mesh)
    assert any(isinstance(p, DTensor) for p in gpt.parameters()) == (strategy == "fsdp2")
    return {
        n: p.detach().full_tensor() if isinstance(p, DTensor) else p.detach().clone()
        for n, p in gpt.named_parameters()
    }


@pytest.mark.parametrize(("strategy", "world_size"), [("ddp", 2), ("fsdp2", 1), ("fsdp2", 3)])
def test_every_strategy_starts_from_the_same_weights(strategy, world_size):
    single = dict(build().named_parameters())
    for weights in distributed.run_ranks(world_size, initial_weights, strategy):
        assert weights.keys() == single.keys()
        assert all(torch.equal(weights[name], single[name]) for name in single)
