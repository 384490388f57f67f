"""A small modern GPT: RMSNorm, rotary embeddings, SwiGLU, untied embeddings.

Shapes use ``B`` sequences, ``T`` tokens, model width ``D``, ``H`` heads of size ``D / H``, and
``V`` token ids, by default the 256 values of a byte.

Weights may have any dtype; activations are bfloat16. Each weight is cast where it is used. That is
free for bfloat16 weights, and lets fp32 master weights run a bf16 forward without autocast.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F  # noqa: N812  # its usual name

COMPUTE_DTYPE = torch.bfloat16
INIT_STD = 0.02


@dataclass(frozen=True)
class Config:
    """Model size and suitable training settings.

    ``batch_size`` is the global batch size, in sequences.
    """

    layers: int
    dim: int
    heads: int
    ffn: int
    seq_len: int
    batch_size: int
    steps: int
    lr: float
    vocab_size: int = 256

    @property
    def num_params(self) -> int:
        """Number of elements of all parameters, computed from their shapes."""
        block = 4 * self.dim**2 + 3 * self.dim * self.ffn + 2 * self.dim
        return self.layers * block + 2 * self.vocab_size * self.dim + self.dim


# layers, dim, heads, ffn, seq_len, batch_size, steps, lr
PRESETS = {
    "nano": Config(2, 64, 2, 176, 128, 16, 1_500, 1e-3),
    "tiny": Config(4, 128, 4, 352, 128, 24, 600, 3e-3),
    "mini": Config(6, 256, 4, 704, 256, 8, 2_000, 2e-3),
    "small": Config(8, 512, 8, 1408, 512, 48, 5_000, 1e-3),
    "medium": Config(24, 1024, 16, 2816, 1024, 96, 20_000, 6e-4),
    "1b": Config(16, 2048, 16, 8192, 2048, 240, 50_000, 3e-4),
    "3b": Config(28, 3072, 24, 8192, 4096, 240, 100_000, 2e-4),
    "8b": Config(32, 4096, 32, 14336, 4096, 480, 100_000, 2e-4),
}


def has_fast_bf16(device: torch.device) -> bool:
    """Return False for a CPU without AVX512-BF16, else True.

    Such a CPU emulates bfloat16 matrix products and the backward pass of attention, which takes ten
    times as long as in fp32.
    """
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()


class Linear(nn.Linear):
    """``x @ weight.T`` without a bias, in the dtype of ``x``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        if not has_fast_bf16(x.device):
            # Equal to a bf16 kernel: exact products, an fp32 sum, and one rounding.
            return F.linear(x.float(), weight.float()).to(x.dtype)
        return F.linear(x, weight)


class RMSNorm(nn.Module):
    """Root-mean-square normalization of the last dimension, in the dtype of ``x``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), eps=1e-5)


class Embedding(nn.Embedding):
    """Token embedding, cast to the compute dtype."""

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight.to(COMPUTE_DTYPE))


class Attention(nn.Module):
    """Causal multi-head attention with rotary embeddings: ``(B, T, D) -> (B, T, D)``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_dim = config.dim // config.heads
        self.query = Linear(config.dim, config.dim)
        self.key = Linear(config.dim, config.dim)
        self.value = Linear(config.dim, config.dim)
        self.output = Linear(config.dim, config.dim)

    def forward(self, x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        q, k = apply_rotary_emb(q, cos_sin), apply_rotary_emb(k, cos_sin)
        if not has_fast_bf16(x.device):
            q, k, v = q.float(), k.float(), v.float()
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).to(x.dtype)
        return self.output(y.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Gated feed-forward network: ``(B, T, D) -> (B, T, D)``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate = Linear(config.dim, config.ffn)
        self.up = Linear(config.dim, config.ffn)
        self.down = Linear(config.ffn, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Pre-norm transformer layer, the unit that FSDP shards: ``(B, T, D) -> (B, T, D)``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim)
        self.ffn = SwiGLU(config)

    def forward(self, x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos_sin)
        return x + self.ffn(self.ffn_norm(x))


class GPT(nn.Module):
    """Decoder: int64 tokens ``(B, T)`` to bfloat16 logits ``(B, T, V)``.

    Build it under ``torch.device("meta")``, shard it, call ``to_empty(device=...)``, then
    ``init_weights``. Then no rank allocates more than its own shards and one full parameter.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim)
        self.head = Linear(config.dim, config.vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        head_dim = self.config.dim // self.config.heads
        cos_sin = rotary_cos_sin(tokens.shape[1], head_dim, tokens.device)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cos_sin)
        return self.head(self.norm(x))

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Initialize the parameters in place, to the same values for every sharding and world size.

        Values of different dtypes differ only by rounding. Each parameter has its own generator,
        seeded by ``seed`` and the parameter's name, so its values do not depend on other
        parameters. The generator is on the parameter's device: CPU and CUDA draw different values.
        """
        for name, parameter in self.named_parameters():
            full = torch.ones(parameter.shape, dtype=torch.float32, device=parameter.device)
            if parameter.ndim > 1:  # weights of norms stay 1
                # A hash of 32 bits, since CPU generators ignore higher bits of a seed.
                hashed = zlib.crc32(f"{seed}.{name}".encode())
                generator = torch.Generator(parameter.device).manual_seed(hashed)
                full.normal_(0.0, self._std(name), generator=generator)
            if isinstance(parameter, DTensor):
                # Every rank has drawn the full tensor.
                full = distribute_tensor(
                    full, parameter.device_mesh, parameter.placements, src_data_rank=None
                )
            parameter.copy_(full)

    def _std(self, name: str) -> float:
        if name.endswith(("attention.output.weight", "ffn.down.weight")):
            # Keeps the variance of the residual stream from growing with depth (GPT-2).
            return INIT_STD / math.sqrt(2 * self.config.layers)
        return INIT_STD


def rotary_cos_sin(
    length: int, head_dim: int, device: torch.device, base: float = 10_000.0
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the rotary embedding (Su et al., arXiv:2104.09864).

    Each is ``(T, head_dim / 2)`` in the compute dtype.
    """
    even = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    frequencies = base ** -(even / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)
    return angles.cos().to(COMPUTE_DTYPE), angles.sin().to(COMPUTE_DTYPE)


def apply_rotary_emb(x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate pairs ``(x[i], x[i + half])`` of ``(B, H, T, D / H)`` by their position's angles."""
    cos, sin = cos_sin
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
