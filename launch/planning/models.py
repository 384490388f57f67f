"""Models to plan for: presets of ``train.py`` and Hugging Face configurations."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from training.errors import UsageError
from training.model import GPT, PRESETS, Config, Linear

# Models of these types have the layers of training.model.GPT: no biases, two norms, a gated MLP.
MODEL_TYPES = ("llama", "mistral")
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama-like model, and the sequence length to plan for by default."""

    layers: int
    dim: int
    ffn: int
    heads: int
    kv_heads: int
    vocab_size: int
    is_tied: bool = False
    seq_len: int = 4096


LLAMA_8B = Shape(32, 4096, 14336, 32, 8, 128256)
LLAMA_70B = Shape(80, 8192, 28672, 64, 8, 128256)


def from_preset(name: str) -> Shape:
    """Return the shape of a preset of ``train.py``.

    Examples:
        >>> from_preset("nano").dim
        64
    """
    config = PRESETS[name]
    return Shape(
        layers=config.layers,
        dim=config.dim,
        ffn=config.ffn,
        heads=config.heads,
        kv_heads=config.heads,
        vocab_size=config.vocab_size,
        seq_len=config.seq_len,
    )


def from_config(path: Path) -> Shape:
    """Read the ``config.json`` of a Llama-like Hugging Face model.

    Raises:
        UsageError: the file cannot be read, lacks a size, or describes another architecture.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"--config {path} cannot be read ({error.strerror}): give a config.json."
        ) from None
    except ValueError as error:
        raise UsageError(f"--config {path} is not JSON ({error}): give a config.json.") from None
    if not isinstance(config, dict):
        raise UsageError(f"--config {path} holds no JSON object: give a config.json.")
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise UsageError(
            f"--config {path} has model_type = {model_type!r}: only {' and '.join(MODEL_TYPES)}, "
            "with the layers of Llama, can be planned."
        )
    dim, ffn, layers, heads, vocab_size = (_size(path, config, key) for key in SIZES)
    key = "num_key_value_heads"  # null or missing without grouped-query attention
    kv_heads = _size(path, {key: config.get(key) or heads}, key)
    has_biases = config.get("attention_bias") or config.get("mlp_bias")
    head_dim = config.get("head_dim") or dim // heads
    if has_biases or head_dim * heads != dim or heads % kv_heads:
        raise UsageError(
            f"--config {path} describes biases or heads that do not make up the width: "
            "only models with the layers of Llama can be planned."
        )
    is_tied = bool(config.get("tie_word_embeddings", False))
    return Shape(layers, dim, ffn, heads, kv_heads, vocab_size, is_tied)


def _size(path: Path, config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise UsageError(
            f"--config {path} has {key} = {value!r}, not a positive integer: "
            "give the config.json of a Llama-like model."
        )
    return value


def build(shape: Shape, layers: int, dtype: torch.dtype) -> GPT:
    """Build the model with ``layers`` layers on the meta device, which takes no memory.

    Examples:
        >>> sum(p.numel() for p in build(LLAMA_8B, 32, torch.bfloat16).parameters())
        8030261248
    """
    with torch.device("meta"):
        config = Config(
            layers=layers,
            dim=shape.dim,
            heads=shape.heads,
            ffn=shape.ffn,
            vocab_size=shape.vocab_size,
            # Only training uses these.
            **{"seq_len": 0, "batch_size": 0, "steps": 0, "lr": 0},
        )
        model = GPT(config)
        width = shape.kv_heads * shape.dim // shape.heads
        for block in model.blocks:
            block.attention.key = Linear(shape.dim, width)  # type: ignore[union-attr]
            block.attention.value = Linear(shape.dim, width)  # type: ignore[union-attr]
    model.to(dtype)
    if shape.is_tied:
        model.head.weight = model.embedding.weight
    return model
