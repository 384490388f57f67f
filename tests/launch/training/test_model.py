"""training/model.py: shapes, causality, sizes, and an initialization without layout or dtype."""

from __future__ import annotations

import distributed
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F  # noqa: N812  # its usual name
from training import model
from training.model import GPT, PRESETS, Config
from training.strategies import STRATEGIES

SMALL = Config(layers=2, dim=24, heads=3, ffn=40, seq_len=16, batch_size=4, steps=10, lr=1e-3)


def build(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> GPT:
    with torch.device("meta"):
        gpt = GPT(SMALL).to(dtype)
    gpt.to_empty(device="cpu")
    gpt.init_weights(seed)
    return gpt


def test_forward_returns_bfloat16_logits_for_each_byte_value():
    logits = build()(torch.randint(0, 256, (3, 16)))
    assert logits.shape == (3, 16, 256)
    assert logits.dtype == torch.bfloat16


def test_attention_is_causal():
    gpt = build()
    before = torch.randint(0, 256, (2, 16))
    after = before.clone()
    after[:, 9] = (after[:, 9] + 1) % 256
    changed = (gpt(before) != gpt(after)).any(dim=-1)
    assert not changed[:, :9].any()
    assert changed[:, 9:].all(), "every later position attends to the changed byte"


def test_attention_depends_on_positions():
    """Without rotary embeddings, one causal layer ignores the order of earlier bytes."""
    one_layer = Config(**{**vars(SMALL), "layers": 1})
    gpt = GPT(one_layer)
    gpt.init_weights(0)
    tokens = torch.arange(16)[None]
    swapped = tokens.clone()
    swapped[0, [2, 5]] = tokens[0, [5, 2]]
    attention = gpt.blocks[0].attention
    for layer in (attention.query, attention.key, attention.output):
        layer.weight.data.mul_(100)  # so that attention is not uniform
    difference = (gpt(tokens)[0, -1] - gpt(swapped)[0, -1]).abs().max()
    assert difference > 0.01


def test_rotation_preserves_norms_and_depends_only_on_distance(monkeypatch):
    monkeypatch.setattr(model, "COMPUTE_DTYPE", torch.float64)
    q, k = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    cos_sin = model.rotary_cos_sin(32, 8, torch.device("cpu"))
    qs, ks = (model.apply_rotary_emb(x.expand(1, 1, 32, 8), cos_sin)[0, 0] for x in (q, k))
    torch.testing.assert_close(qs.norm(dim=-1), q.norm().expand(32))
    products = qs @ ks.T
    torch.testing.assert_close(products[3, 1], products[30, 28], atol=1e-5, rtol=0)
    assert (products[3, 1] - products[3, 2]).abs() > 1e-3


@pytest.mark.parametrize("name", PRESETS)
def test_preset_counts_its_parameters(name):
    with torch.device("meta"):
        gpt = GPT(PRESETS[name])
    assert sum(p.numel() for p in gpt.parameters()) == PRESETS[name].num_params


@pytest.mark.parametrize(("name", "billions"), [("1b", 1.07), ("3b", 3.17), ("8b", 7.79)])
def test_large_presets_have_the_size_of_their_names(name, billions):
    assert PRESETS[name].num_params / 1e9 == pytest.approx(billions, abs=0.01)


def test_initialization_depends_on_seed_and_parameter():
    first, again, other = (dict(build(seed=s).named_parameters()) for s in (0, 0, 1))
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name])
        assert torch.equal(parameter, other[name]) == (parameter.ndim == 1)
    assert not torch.equal(
        first["blocks.0.attention.query.weight"], first["blocks.0.attention.key.weight"]
    )


def test_bfloat16_initialization_is_the_float32_one_rounded():
    fp32 = dict(build(torch.float32).named_parameters())
    for name, parameter in build().named_parameters():
        assert torch.equal(parameter, fp32[name].bfloat16())


def test_initialization_is_smaller_for_weights_that_write_to_the_residual():
    gpt = GPT(PRESETS["tiny"])
    gpt.init_weights(0)
    block = gpt.blocks[0]
    for weight, std in (
        (block.ffn.up.weight, 0.02),
        (block.ffn.down.weight, 0.02 / 8**0.5),
        (block.attention.output.weight, 0.02 / 8**0.5),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.03)


def test_float32_weights_run_a_bfloat16_forward_and_get_float32_gradients():
    tokens = torch.randint(0, 256, (2, 16))
    bf16, fp32 = build(), build(torch.float32)
    assert torch.equal(bf16(tokens), fp32(tokens))
    for gpt in (bf16, fp32):
        F.cross_entropy(gpt(tokens).float().flatten(0, 1), tokens.flatten()).backward()
        assert all(p.grad is not None and p.grad.dtype == p.dtype for p in gpt.parameters())


def test_linear_without_bfloat16_instructions_computes_the_same_product(monkeypatch):
    layer = model.Linear(64, 32).bfloat16()
    layer.weight.data.normal_()
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    exact = x.double() @ layer.weight.double().T
    for fast in (True, False):
        monkeypatch.setattr(model, "has_fast_bf16", lambda device, fast=fast: fast)
        y = layer(x)
        assert y.dtype == torch.bfloat16
        # one rounding to bfloat16
        torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-4)


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
def test_initialization_is_the_same_for_every_strategy(strategy, world_size):
    single = dict(build().named_parameters())
    for weights in distributed.run_ranks(world_size, initial_weights, strategy):
        assert weights.keys() == single.keys()
        assert all(torch.equal(weights[name], single[name]) for name in single)
