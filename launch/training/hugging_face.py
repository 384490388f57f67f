"""Causal language models and tokenizers in Hugging Face folders, through ``transformers``."""

from __future__ import annotations

import importlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from training.errors import UsageError

TOKENIZER_FILES = ("tokenizer*", "vocab*", "spiece.model", "tekken.json", "*.tiktoken")


def _transformers() -> Any:
    try:
        # not a plain import: mypy would take minutes to follow it
        return importlib.import_module("transformers")
    except ImportError:
        raise UsageError(
            "--model needs the transformers package: install it with pip install transformers."
        ) from None


def max_positions(folder: str) -> int | None:
    """Return ``max_position_embeddings`` of a folder's ``config.json``, or None if it has none."""
    try:
        value = json.loads(Path(folder, "config.json").read_text())["max_position_embeddings"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # read_config() reports a folder without a valid config
    return value if isinstance(value, int) else None


def read_config(folder: str, seq_len: int) -> Any:
    """Return the ``PretrainedConfig`` of a folder.

    Raises:
        UsageError: transformers is not installed or does not know the model, or the model has fewer
            than ``seq_len`` positions.
    """
    auto = _transformers().AutoConfig
    if not Path(folder, "config.json").is_file():
        raise UsageError(
            f"--model {folder} has no config.json: give the folder of a Hugging Face model."
        )
    try:
        config = auto.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise _unusable(folder, error) from error
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and seq_len > positions:
        raise UsageError(
            f"--seq-len {seq_len} is longer than the {positions} positions of --model {folder}: "
            "shorten it."
        )
    return config


def build(folder: str, config: Any, dtype: torch.dtype) -> nn.Module:
    """Build the causal language model of a config; it maps int64 tokens ``(B, T)`` to logits.

    Parameters have ``dtype`` and are on the meta device. Buffers have their values, since some are
    in no checkpoint, such as rotary frequencies. Float32 parameters run under bfloat16 autocast.
    """

    def to_meta(module: nn.Module, name: str, param: nn.Parameter) -> Any:
        if param.is_meta:
            return None  # a tied parameter, already replaced
        meta = torch.empty_like(param, dtype=dtype, device="meta")
        return nn.Parameter(meta, param.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)
    try:
        model = _transformers().AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, ImportError) as error:
        raise _unusable(folder, error) from error
    finally:
        handle.remove()
    forward = model.forward

    def logits(tokens: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=dtype == torch.float32):
            return forward(input_ids=tokens, use_cache=False).logits

    model.forward = logits  # a wrapper module would prefix the names in checkpoints
    return model


class FolderTokenizer:
    """The tokenizer in a model's folder. ``data.py`` adds ``eos_token_id``, if any, to each text.

    Raises:
        UsageError: the folder has no tokenizer that transformers can read.
    """

    def __init__(self, folder: str) -> None:
        auto = _transformers().AutoTokenizer
        try:
            # Without such a file transformers may build an empty tokenizer.
            if not any(match for name in TOKENIZER_FILES for match in Path(folder).glob(name)):
                raise FileNotFoundError(
                    "it has no tokenizer file"
                )  # transformers may build an empty one
            self._tokenizer = auto.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers raises errors of many types
            raise UsageError(
                f"--model {folder} has no tokenizer that transformers reads ({_line(error)}): "
                "give --data .bin files of token ids."
            ) from error
        self.vocab_size = len(self._tokenizer)
        self.eos_token_id = self._tokenizer.eos_token_id
        fast = getattr(self._tokenizer, "backend_tokenizer", None)
        content = folder if fast is None else fast.to_str()
        self.key = f"{zlib.crc32(content.encode()):08x}-{self.eos_token_id}"

    def encode(self, texts: list[str]) -> Sequence[Any]:
        encoded = self._tokenizer(texts, add_special_tokens=False, verbose=False)
        return encoded["input_ids"]


def _unusable(folder: str, error: Exception) -> UsageError:
    return UsageError(
        f"--model {folder} cannot be built by transformers as a causal language model "
        f"({_line(error)}): give another folder."
    )


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
