"""The shard of a replicated parameter that a rank owns under ZeRO, and its layout in buffers.

[Note: ZeRO tensors]
A parameter is sharded along its *shard dimension*: dimension 0, or another one if dimension 0 is
shorter than the number of ranks. As in ``torch.chunk`` and DTensor's ``Shard``, which torch's
checkpoint code expects, rank ``r`` owns the indices from ``r * shard_size`` up to
``(r + 1) * shard_size``, where ``shard_size = ceil(n / ranks)`` and ``n`` is the size of the shard
dimension. The last ranks own fewer or none.

* *local shard*: the elements that this rank owns, in the parameter's dimensions.
* *padded gradient*: ``(ranks, padded_shard_numel)``, a slice of a reduce-scatter input. Row ``r``
  holds the shard of rank ``r``, with the shard dimension first, padded with zeros at the end.
* *shard*: such a row, 1-D of ``padded_shard_numel`` elements.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class ParamSpec(NamedTuple):
    """The properties of a parameter that must not change once it is sharded."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, param: Tensor) -> ParamSpec:
        """Return the current spec of a parameter."""
        return cls(param.shape, param.dtype, param.device)

    def __str__(self) -> str:
        return f"{tuple(self.shape)} {self.dtype} on {self.device}"


class ZeroParam:
    """A replicated parameter and this rank's shard of it.

    Args:
        param: a plain parameter, replicated on all ranks.
        mesh: 1-D, or 2-D (replicate, shard).
        name: for messages.
    """

    def __init__(self, param: Tensor, mesh: DeviceMesh, name: str) -> None:
        self.param = param
        self.name = name
        self.spec = ParamSpec.of(param)
        self._mesh = mesh
        axis = mesh.ndim - 1
        ranks, rank = mesh.size(axis), mesh.get_local_rank(axis)
        self._ranks = ranks
        self.shard_dim = choose_shard_dim(param.shape, ranks)
        shape, dim = param.shape, self.shard_dim
        size = 1 if dim is None else shape[dim]
        self._inner_shape = () if dim is None else (*shape[:dim], *shape[dim + 1 :])
        self._inner_numel = param.numel() // size if size else 0
        self._shard_size = -(-size // ranks)
        self.padded_shard_numel = self._shard_size * self._inner_numel
        # After the full shards there is at most one short one; the remaining shards are empty.
        self._full_shards, self._short_size = (
            divmod(size, self._shard_size) if self._shard_size else (ranks, 0)
        )
        self._start = min(rank * self._shard_size, size)
        self._local_size = min((rank + 1) * self._shard_size, size) - self._start

    @property
    def is_replicated(self) -> bool:
        """Return True if the parameter is 0-dim, and so updated by every rank."""
        return self.shard_dim is None

    @property
    def is_even(self) -> bool:
        """Return True if the parameter's memory layout is already that of a padded gradient."""
        return (
            self.shard_dim == 0
            and self._short_size == 0
            and self._full_shards == self._ranks
            and self.param.is_contiguous()
        )

    def local_shard(self, full: Tensor) -> Tensor:
        """Return this rank's shard of a tensor of the parameter's shape, as a view."""
        if self.shard_dim is None:
            return full
        return full.narrow(self.shard_dim, self._start, self._local_size)

    def as_dtensor(self, local: Tensor) -> DTensor:
        """Wrap this rank's shard into a DTensor of the parameter's shape."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        placement = Replicate() if self.shard_dim is None else Shard(self.shard_dim)
        placements = (*[Replicate()] * (self._mesh.ndim - 1), placement)
        shape, stride = self.param.shape, self.param.stride()
        return DTensor.from_local(
            local, self._mesh, placements, run_check=False, shape=shape, stride=stride
        )

    def copy_in(self, full: Tensor, padded: Tensor) -> None:
        """Copy a tensor of the parameter's shape to a padded gradient of any dtype."""
        full, shards = self._shard_dim_first(full), self._unflatten(padded)
        count = self._full_shards
        boundary = count * self._shard_size
        shards[:count].copy_(full[:boundary].unflatten(0, (count, self._shard_size)))
        if self._short_size:
            shards[count, : self._short_size].copy_(full[boundary:])
            shards[count, self._short_size :].zero_()
            count += 1
        shards[count:].zero_()

    def copy_out(self, padded: Tensor, full: Tensor) -> None:
        """Copy ``padded`` to a tensor of the parameter's shape; inverse of :meth:`copy_in`."""
        full, shards = self._shard_dim_first(full), self._unflatten(padded)
        count = self._full_shards
        boundary = count * self._shard_size
        full[:boundary].unflatten(0, (count, self._shard_size)).copy_(shards[:count])
        if self._short_size:
            full[boundary:].copy_(shards[count, : self._short_size])

    def unpack_shard(self, shard: Tensor) -> Tensor:
        """Return the local shard as a view of a 1-D shard."""
        unpadded = shard[: self._local_size * self._inner_numel]
        assert self.shard_dim is not None
        return unpadded.view(self._local_size, *self._inner_shape).movedim(0, self.shard_dim)

    def padding(self, shard: Tensor) -> Tensor:
        """Return the padding of this rank's 1-D shard as a view, which may be empty."""
        return shard[self._local_size * self._inner_numel :]

    def _shard_dim_first(self, full: Tensor) -> Tensor:
        assert self.shard_dim is not None
        return full.movedim(self.shard_dim, 0)

    def _unflatten(self, padded: Tensor) -> Tensor:
        return padded.unflatten(1, (self._shard_size, *self._inner_shape))


def choose_shard_dim(shape: torch.Size, ranks: int) -> int | None:
    """Return the first dimension with size >= ``ranks``, else the longest; None if 0-dim."""
    if not shape:
        return None
    return next(
        (dim for dim, size in enumerate(shape) if size >= ranks),
        max(range(len(shape)), key=lambda dim: shape[dim]),
    )
