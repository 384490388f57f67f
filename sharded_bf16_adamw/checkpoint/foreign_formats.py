"""Weights and optimizer state from elsewhere, of which nothing is executed: safetensors, or torch files with ``weights_only=True``."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .blocks import Block
from .odd_values import is_wrapper
from .safetensors_io import TensorInfo, find_safetensors

TORCH_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt"}
_WEIGHTS_KEYS = ("model", "state_dict", "model_state_dict")
_OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict", "optim")


class Source(Protocol):
    """Tensors by name, read when asked for.

    Attributes:
        infos: the shape and dtype of each.
        ties: names that are one tensor, as far as the source says so.
    """

    infos: dict[str, TensorInfo]
    ties: list[list[str]]

    def read(self, name: str, block: Block) -> Tensor:
        """A block of a tensor, in CPU memory."""


class _Safetensors:
    def __init__(self, path: Path) -> None:
        self._files = find_safetensors(path)
        self.infos = {name: file.infos[name] for name, file in self._files.items()}
        self.ties: list[
            list[str]
        ] = []  # a file holds each name once, and its writer left out the others or copied

    def read(self, name: str, block: Block) -> Tensor:
        return self._files[name].read(name, *block)


class _Tensors:
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.infos = {
            name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
        }
        classes: dict[Any, list[str]] = {}
        for name, tensor in tensors.items():
            if (
                tensor.numel()
                and tensor.layout == torch.strided
                and not tensor.is_meta
                and not is_wrapper(tensor)
            ):
                place = (
                    tensor.device,
                    tensor.data_ptr(),
                    tensor.dtype,
                    tensor.shape,
                    tensor.stride(),
                )
                classes.setdefault(place, []).append(name)
        self.ties = [names for names in classes.values() if len(names) > 1]

    def read(self, name: str, block: Block) -> Tensor:
        return block.of(self._tensors[name].detach()).cpu()


def open_weights(source: str | os.PathLike[str] | Mapping[str, Tensor]) -> Source:
    """Open a state dict of weights.

    Args:
        source: a safetensors file, a folder of them with an index, a torch file (``.pt``, ``.pth``, ``.bin``, ``.ckpt``) of a state dict
            or of a dict with one under ``"model"``, ``"state_dict"`` or ``"model_state_dict"``, or a state dict itself.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is damaged, or something else.
    """
    if isinstance(source, Mapping):
        what, content = "the source", cast(Any, source)
    elif Path(source).suffix in TORCH_SUFFIXES:
        what, content = str(source), load_torch_file(source)
    else:
        return _Safetensors(Path(source))
    for key in _WEIGHTS_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(value, Tensor) for value in content.values())
    ):
        raise ValueError(
            f"{what} holds no state dict of tensors, neither itself nor under {', '.join(_WEIGHTS_KEYS)}"
        )
    _refuse_shards(what, content)
    return _Tensors(content)


def open_optimizer_state(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Open the state dict of a ``torch.optim.AdamW``: keyed by integers, or a full one keyed by parameter names.

    Args:
        source: a torch file of it or of a dict with it under ``"optimizer"``, ``"optimizer_state_dict"`` or ``"optim"``, or such a dict.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is damaged, or something else.
    """
    content = source if isinstance(source, Mapping) else load_torch_file(source)
    what = "the optimizer state" if isinstance(source, Mapping) else str(source)
    for key in _OPTIMIZER_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not _is_optimizer_state(content):
        raise ValueError(
            f'{what} holds no optimizer state dict, which has "state" and "param_groups"'
        )
    for values in content["state"].values():
        _refuse_shards(what, values)
    return dict(content)


def _is_optimizer_state(content: Any) -> bool:
    if not isinstance(content, Mapping) or not {"state", "param_groups"} <= content.keys():
        return False
    state, groups = content["state"], content["param_groups"]
    return (
        isinstance(state, Mapping)
        and all(isinstance(values, Mapping) for values in state.values())
        and isinstance(groups, list)
        and bool(groups)
        and all(
            isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in groups
        )
    )


def load_torch_file(path: str | os.PathLike[str]) -> Any:
    """What ``torch.save`` wrote, mapped rather than read where its format allows. Only tensors and plain data are loaded.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, is damaged, or holds other objects.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format from before torch 1.6 cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is no torch file, or holds objects other than tensors and plain data, which are not loaded"
        ) from error
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(
            f"{path} is no torch file, or is damaged ({type(error).__name__})"
        ) from error


def _refuse_shards(what: str, tensors: Mapping[str, Any]) -> None:
    """Which part of a tensor they are is known to their own process group alone."""
    for name, value in tensors.items():
        if isinstance(value, DTensor):
            raise ValueError(
                f"{what}: {name} is a shard of a tensor; gather the full state dict first"
            )
