"""Open weights and optimizer states of other training runs, without executing any code.

The formats are safetensors, and torch files with ``weights_only=True``.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor

from .blocks import Block
from .extra_state import is_wrapper_subclass
from .safetensors_io import TensorInfo, open_safetensors

TORCH_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt"}
_WEIGHTS_KEYS = ("model", "state_dict", "model_state_dict")
_OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict", "optim")


class WeightsSource(Protocol):
    """Tensors by name, read on demand.

    Attributes:
        infos: shape and dtype of each tensor.
        ties: sets of tied names, if the source records them.
        keeps_order: True if ``infos`` has the order of the module's parameters.
    """

    infos: dict[str, TensorInfo]
    ties: list[list[str]]
    keeps_order: bool

    def read(self, name: str, block: Block) -> Tensor:
        """Return a block of a tensor in CPU memory."""


class _SafetensorsSource:
    keeps_order = False  # writers sort the names

    def __init__(self, path: Path) -> None:
        self._files = open_safetensors(path)
        self.infos = {name: file.infos[name] for name, file in self._files.items()}
        # A file does not record ties: its writer left out all names but one, or copied the tensor.
        self.ties: list[list[str]] = []

    def read(self, name: str, block: Block) -> Tensor:
        return self._files[name].read(name, block)


class _StateDictSource:
    keeps_order = True

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.infos = {
            name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
        }
        names_of: dict[Any, list[str]] = {}
        for name, x in tensors.items():
            has_memory = x.numel() and x.layout == torch.strided and not x.is_meta
            if has_memory and not is_wrapper_subclass(x):
                identity = (x.device, x.data_ptr(), x.dtype, x.shape, x.stride())
                names_of.setdefault(identity, []).append(name)
        self.ties = [names for names in names_of.values() if len(names) > 1]

    def read(self, name: str, block: Block) -> Tensor:
        return block.view_in(self._tensors[name].detach()).cpu()


def open_weights(source: str | os.PathLike[str] | Mapping[str, Tensor]) -> WeightsSource:
    """Open a state dict of weights.

    Args:
        source: a safetensors file, a directory of them with an index, a torch file (``.pt``,
            ``.pth``, ``.bin``, ``.ckpt``), or a state dict. A torch file holds a state dict, or a
            dict with one under ``"model"``, ``"state_dict"`` or ``"model_state_dict"``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds something else.
    """
    if isinstance(source, Mapping):
        where, content = "the source", cast(Any, source)
    elif Path(source).suffix in TORCH_SUFFIXES:
        where, content = str(source), load_torch_file(source)
    else:
        return _SafetensorsSource(Path(source))
    content = _nested_dict(content, _WEIGHTS_KEYS)
    problem = _not_a_dict_of_tensors(content)
    if problem is not None:
        raise ValueError(
            f"{where} holds no state dict of tensors, neither itself nor under "
            f"{', '.join(_WEIGHTS_KEYS)} ({problem}); give the file of the weights"
        )
    refuse_shards(where, content)
    return _StateDictSource(content)


def open_optimizer_state(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Open the state dict of a ``torch.optim.AdamW``, keyed by integers or by parameter names.

    Args:
        source: a state dict or a torch file. Both may instead hold a dict with the state dict under
            ``"optimizer"``, ``"optimizer_state_dict"`` or ``"optim"``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds something else.
    """
    where = "the optimizer state" if isinstance(source, Mapping) else str(source)
    content = source if isinstance(source, Mapping) else load_torch_file(source)
    content = _nested_dict(content, _OPTIMIZER_KEYS)
    if not _is_optimizer_state(content):
        raise ValueError(
            f'{where} holds no optimizer state dict with "state" and "param_groups"; give the file '
            "of the optimizer"
        )
    for name, values in content["state"].items():
        refuse_shards(f"{where}: the state of {name}", values)
    return dict(content)


def load_torch_file(path: str | os.PathLike[str]) -> Any:
    """Load tensors and plain data that ``torch.save`` wrote, memory-mapped if possible.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a torch file, is damaged, or holds other objects.
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
            f"{path} is not a torch file, or holds objects other than tensors and plain data, "
            "which are not loaded; save a state dict of tensors"
        ) from error
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(
            f"{path} is not a torch file, or is damaged ({type(error).__name__}); get another copy"
        ) from error


def _nested_dict(content: Any, keys: tuple[str, ...]) -> Any:
    """Return the dict under the first of ``keys`` that holds a dict, else ``content``."""
    if not isinstance(content, Mapping):
        return content
    return next((content[key] for key in keys if isinstance(content.get(key), Mapping)), content)


def _not_a_dict_of_tensors(content: Any) -> str | None:
    """Return why ``content`` is not a dict of tensors, None if it is one."""
    if not isinstance(content, Mapping):
        return f"it is of type {type(content).__name__}"
    others = (
        f"{name} is of type {type(value).__name__}"
        for name, value in content.items()
        if not isinstance(value, Tensor)
    )
    return next(others, None) if content else "it is empty"


def _is_optimizer_state(content: Any) -> bool:
    if not isinstance(content, Mapping) or not {"state", "param_groups"} <= content.keys():
        return False
    state, groups = content["state"], content["param_groups"]
    return (
        isinstance(state, Mapping)
        and all(isinstance(values, Mapping) for values in state.values())
        and isinstance(groups, list)
        and bool(groups)
        and all(isinstance(g, Mapping) and isinstance(g.get("params"), list) for g in groups)
    )


def refuse_shards(where: str, tensors: Mapping[str, Any]) -> None:
    """Raise ValueError if a tensor is a DTensor or ShardedTensor: this rank has only a shard of it.

    Reading the full tensor would be collective.
    """
    for name, value in tensors.items():
        if isinstance(value, (DTensor, ShardedTensor)):
            raise ValueError(
                f"{where}: {name} is a shard of a tensor; gather the full state dict first"
            )
