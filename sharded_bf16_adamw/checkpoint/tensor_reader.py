"""Read small tensors as ``torch.load`` does, without calling it for each of them.

The inverse of :mod:`.tensor_writer`: the bytes around a tensor's data determine its dtype and
shape. If they equal those of an earlier tensor, only the data have to be read.
"""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .tensor_writer import MAX_BYTES, Template, build_template, is_small_and_plain, without_crc32


class _Known(NamedTuple):
    """The bytes around the data of tensors of one dtype and shape."""

    template: Template
    dtype: torch.dtype
    size: torch.Size

    def parse(self, content: bytearray) -> Tensor | None:
        """Return the tensor in ``content``, sharing memory; None if the template does not match."""
        head, tail = self.template
        if not content.startswith(head) or not content.endswith(tail):
            return None
        count = self.size.numel()
        return torch.frombuffer(content, dtype=self.dtype, count=count, offset=len(head)).view(
            self.size
        )


class TensorReader:
    """A reader of tensors that ``torch.save`` wrote, by ``torch.load`` or by a template.

    Not thread-safe.
    """

    def __init__(self) -> None:
        self._known: defaultdict[int, list[_Known]] = defaultdict(list)  # by length in the file
        self._times_loaded: Counter[tuple[int, torch.dtype, torch.Size]] = Counter()

    def read(self, stream: Any, length: int) -> Tensor:
        """Return the tensor in ``stream``, a seekable view of ``length`` bytes, in CPU memory.

        Raises:
            EOFError: the stream ends within the tensor.
            Exception: any error of ``torch.load``, if the bytes are not a tensor.
        """
        if length > 2 * MAX_BYTES:  # avoids a second copy in memory
            return _load(stream)
        content = bytearray(length)
        if stream.readinto(content) != length:
            raise EOFError(f"the file ends within a tensor of {length} bytes")
        for known in self._known[length]:
            tensor = known.parse(content)
            if tensor is not None:
                return tensor
        tensor = _load(io.BytesIO(content))
        if tensor.numel() and is_small_and_plain(tensor):
            kind = length, tensor.dtype, tensor.size()
            self._times_loaded[kind] += 1
            if self._times_loaded[kind] == 2:  # a template pays from the second tensor on
                self._learn(tensor, content)
        return tensor

    def _learn(self, tensor: Tensor, content: bytearray) -> None:
        """Keep the template of tensors like ``tensor``, unless another torch wrote ``content``."""
        with without_crc32():
            template = build_template(tensor)
        if template is not None:
            known = _Known(template, tensor.dtype, tensor.size())
            if known.parse(content) is not None:
                self._known[len(content)].append(known)


def _load(stream: Any) -> Tensor:
    loaded: Tensor = torch.load(stream, map_location="cpu", weights_only=True)
    return loaded
