"""Plain data in JSON and back without loss: tuples stay tuples, and tensors of a few elements (a learning rate) stay tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_TUPLE, _TENSOR = "__tuple__", "__tensor__"


def encode(value: Any) -> Any:
    """What JSON can hold, for a value made of None, bool, int, float, str, lists, tuples, dicts with str keys, and small tensors.

    ``(0.9, 0.95)`` becomes ``{"__tuple__": [0.9, 0.95]}``; a float32 scalar tensor ``{"__tensor__": 0.1, "dtype": "float32"}``.

    Raises:
        TypeError: there is something else in it.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, tuple):
        return {_TUPLE: [encode(item) for item in value]}
    if isinstance(value, Tensor):
        return {_TENSOR: value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: encode(item) for key, item in value.items()}
    raise TypeError(f"{type(value).__name__} is not plain data")


def decode(value: Any) -> Any:
    """Inverse of :func:`encode`.

    Raises:
        ValueError: it is not what :func:`encode` makes.
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if isinstance(value, dict):
        if _TUPLE in value:
            return tuple(decode(item) for item in value[_TUPLE])
        if _TENSOR in value:
            dtype = getattr(torch, str(value.get("dtype")), None)
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{value.get('dtype')} is no dtype of torch")
            return torch.tensor(value[_TENSOR], dtype=dtype, device="cpu")
        return {key: decode(item) for key, item in value.items()}
    return value


def as_tensor(value: Any) -> Tensor:
    """A tensor as it is, and anything else as one on the CPU. torch's own moves even tensors to the default device."""
    return value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
