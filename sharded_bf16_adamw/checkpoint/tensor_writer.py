"""Write tensors as ``torch.save`` does, without calling it for each small tensor.

``torch.save`` takes 0.3 ms for a tensor of any size. Its outputs for two tensors of the same dtype
and shape differ only in the data, so the bytes around the data can be reused.
"""

from __future__ import annotations

import io
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.serialization import config

MAX_BYTES = 1 << 20  # of a small tensor; for larger ones 0.3 ms are negligible
_Kind = tuple[torch.dtype, torch.Size, tuple[int, ...], bool]


class Template(NamedTuple):
    """The bytes around a tensor's data in the output of ``torch.save``."""

    head: bytes
    tail: bytes


class TensorWriter:
    """A writer of tensors in CPU memory to a stream, by ``torch.save`` or by a template.

    Not thread-safe. The configuration of ``torch.save`` must not change between two calls.
    """

    def __init__(self) -> None:
        self._templates: dict[_Kind, Template | None] = {}  # None: only torch.save can write it
        self._seen_once: set[_Kind] = set()

    def write(self, tensor: Tensor, stream: Any) -> None:
        """Append ``tensor`` to ``stream``: the bytes of ``torch.save``, with minimal storage."""
        template = self._template(tensor) if is_small_and_plain(tensor) else None
        if template is None:
            torch.save(_with_minimal_storage(tensor), stream)
        else:
            stream.write(b"".join((template.head, _data(tensor).tobytes(), template.tail)))

    def _template(self, tensor: Tensor) -> Template | None:
        kind = tensor.dtype, tensor.size(), tensor.stride(), _is_storage_minimal(tensor)
        if kind not in self._templates:
            if kind not in self._seen_once:  # a template pays from the second tensor on
                self._seen_once.add(kind)
                return None
            self._templates[kind] = build_template(_with_minimal_storage(tensor))
        return self._templates[kind]


def build_template(tensor: Tensor) -> Template | None:
    """Return the template of tensors like ``tensor``, or None if there is none.

    ``torch.save`` is called for the tensor and for one in which every byte differs. There is a
    template if the outputs differ exactly where the data are.
    """
    data = _data(tensor)
    other = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
    if data.size:
        np.invert(data, out=_data(other))
    saved, saved_other = _saved(tensor), _saved(other)
    if len(saved) != len(saved_other):
        return None
    different = np.flatnonzero(
        np.frombuffer(saved, np.uint8) != np.frombuffer(saved_other, np.uint8)
    )
    start = int(different[0]) if different.size else len(saved)
    template = Template(saved[:start], saved[start + data.size :])
    reproduced = b"".join((template.head, data.tobytes(), template.tail)) == saved
    return template if reproduced and different.size == data.size else None


def without_crc32() -> AbstractContextManager[None]:
    """Return a context in which ``torch.save`` adds no checksum. The file has its own."""
    return config.patch("save.compute_crc32", False)  # type: ignore[attr-defined]


def _saved(tensor: Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue()


def is_small_and_plain(tensor: Tensor) -> bool:
    """Return True if ``tensor`` is small and on CPU, with nothing to save but its elements."""
    return (
        type(tensor) is Tensor
        and tensor.layout is torch.strided
        and tensor.is_cpu
        and not (tensor.is_quantized or tensor.is_nested or tensor.requires_grad)
        and tensor.nbytes <= MAX_BYTES
        and tensor.is_contiguous()
        and not (tensor.is_conj() or tensor.is_neg() or vars(tensor))
    )


def _data(tensor: Tensor) -> np.ndarray:
    """Return the bytes of a contiguous CPU tensor, sharing memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _is_storage_minimal(tensor: Tensor) -> bool:
    return tensor.untyped_storage().size() == tensor.nbytes


def _with_minimal_storage(tensor: Tensor) -> Tensor:
    """Return a tensor whose storage has only the tensor's own elements, as DCP saves it."""
    return tensor if _is_storage_minimal(tensor) else tensor.clone()
