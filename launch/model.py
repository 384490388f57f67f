"""A small modern GPT over bytes: RMSNorm, rotary embeddings, SwiGLU, causal attention, untied embeddings.

Shapes use ``B`` sequences, ``T`` tokens, ``D`` the model's width, ``H`` heads of ``D / H``, and ``V = 256`` byte values.

Weights may be stored in any dtype; activations are bfloat16. Each weight is cast where it is used, which costs nothing for bfloat16
weights and lets fp32 master weights run a bf16 forward without autocast.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F  # noqa: N812  # its usual name

VOCABULARY = 256
COMPUTE_DTYPE = torch.bfloat16
INIT_STD = 0.02


@dataclass(frozen=True)
class Config:
    """A model size, with training settings that suit it. ``batch_size`` counts sequences over all ranks."""

    layers: int
    dim: int
    heads: int
    ffn: int
    seq_len: int
    batch_size: int
    steps: int
    lr: float

    @property
    def parameters(self) -> int:
        """The number of parameters, from the shapes alone."""
        block = 4 * self.dim**2 + 3 * self.dim * self.ffn + 2 * self.dim
        return self.layers * block + 2 * VOCABULARY * self.dim + self.dim


PRESETS = {
    "nano": Config(
        layers=2, dim=64, heads=2, ffn=176, seq_len=128, batch_size=16, steps=1_500, lr=1e-3
    ),
    "tiny": Config(
        layers=4, dim=128, heads=4, ffn=352, seq_len=128, batch_size=24, steps=600, lr=3e-3
    ),
    "small": Config(
        layers=8, dim=512, heads=8, ffn=1408, seq_len=512, batch_size=48, steps=5_000, lr=1e-3
    ),
    "medium": Config(
        layers=24, dim=1024, heads=16, ffn=2816, seq_len=1024, batch_size=96, steps=20_000, lr=6e-4
    ),
    "1b": Config(
        layers=16, dim=2048, heads=16, ffn=8192, seq_len=2048, batch_size=240, steps=50_000, lr=3e-4
    ),
    "3b": Config(
        layers=28,
        dim=3072,
        heads=24,
        ffn=8192,
        seq_len=4096,
        batch_size=240,
        steps=100_000,
        lr=2e-4,
    ),
    "8b": Config(
        layers=32,
        dim=4096,
        heads=32,
        ffn=14336,
        seq_len=4096,
        batch_size=480,
        steps=100_000,
        lr=2e-4,
    ),
}


def has_fast_bf16(device: torch.device) -> bool:
    """Whether products of bfloat16 matrices run on the hardware. CPUs that lack the instructions emulate them ten times slower."""
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()


class Linear(nn.Linear):
    """``x @ weight.T`` without a bias, in the dtype of ``x``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        if not has_fast_bf16(
            x.device
        ):  # the same product: exact terms, added up in fp32, the sum rounded to bfloat16
            return F.linear(x.float(), weight.float()).to(x.dtype)
        return F.linear(x, weight)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation of the last dimension, in the dtype of ``x``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), eps=1e-5)


class Embedding(nn.Embedding):
    """One row of ``weight`` for each byte, cast to the compute dtype."""

    def __init__(self, dim: int) -> None:
        super().__init__(VOCABULARY, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight.to(COMPUTE_DTYPE))


class Attention(nn.Module):
    """Causal multi-head attention with rotary position embeddings. ``(B, T, D) -> (B, T, D)``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_dim = config.dim // config.heads
        self.query = Linear(config.dim, config.dim)
        self.key = Linear(config.dim, config.dim)
        self.value = Linear(config.dim, config.dim)
        self.output = Linear(config.dim, config.dim)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(
            rotate(q, rotation), rotate(k, rotation), v, is_causal=True
        )
        return self.output(y.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """The gated feed-forward network. ``(B, T, D) -> (B, T, D)``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate = Linear(config.dim, config.ffn)
        self.up = Linear(config.dim, config.ffn)
        self.down = Linear(config.ffn, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One pre-norm transformer layer, and the unit that FSDP shards and gathers. ``(B, T, D) -> (B, T, D)``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim)
        self.ffn = SwiGLU(config)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation)
        return x + self.ffn(self.ffn_norm(x))


class GPT(nn.Module):
    """Bytes to next-byte logits: int64 ``(B, T)`` to bfloat16 ``(B, T, V)``.

    Build it under ``torch.device("meta")``, shard it, call ``to_empty(device=...)`` and then ``init_weights``: so no rank ever holds
    more than its own shard and one whole parameter.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim)
        self.head = Linear(config.dim, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        rotation = rotations(tokens.shape[1], self.config.dim // self.config.heads, tokens.device)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, rotation)
        return self.head(self.norm(x))

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill the parameters, in place: the same values for every sharding, world size and dtype (up to its rounding).

        Each parameter has its own generator, seeded by ``seed`` and its name, so that its values do not depend on the others. They are
        drawn on the parameter's device; CPU and CUDA draw different ones.
        """
        for name, parameter in self.named_parameters():
            full = torch.ones(parameter.shape, dtype=torch.float32, device=parameter.device)
            if parameter.ndim > 1:
                mixed = zlib.crc32(
                    f"{seed}.{name}".encode()
                )  # CPU generators ignore all but the low 32 bits of a seed
                generator = torch.Generator(parameter.device).manual_seed(mixed)
                full.normal_(0.0, self._std(name), generator=generator)
            if isinstance(parameter, DTensor):
                full = distribute_tensor(
                    full, parameter.device_mesh, parameter.placements, src_data_rank=None
                )
            parameter.copy_(full)

    def _std(self, name: str) -> float:
        """Weights that write to the residual stream start smaller, so that its variance does not grow with depth (GPT-2)."""
        writes_to_residual = name.endswith(("attention.output.weight", "ffn.down.weight"))
        return INIT_STD / math.sqrt(2 * self.config.layers) if writes_to_residual else INIT_STD


def rotations(
    length: int, head_dim: int, device: torch.device, base: float = 10_000.0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding (Su et al., arXiv:2104.09864), each ``(T, head_dim / 2)`` in the compute dtype."""
    frequencies = base ** -(
        torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    )
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)
    return angles.cos().to(COMPUTE_DTYPE), angles.sin().to(COMPUTE_DTYPE)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs ``(x[i], x[i + half])`` of queries or keys by their position's angles. ``(B, H, T, D / H)``."""
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
