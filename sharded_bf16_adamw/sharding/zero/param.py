"""Which rows of a replicated parameter a rank owns under ZeRO, and how rows lie in the buffers that ranks exchange.

Vocabulary:

* rows: slices of a parameter along its *shard dimension*: dimension 0, or another one where that is shorter than the number of ranks.
* chunk: ``ceil(rows / ranks)``; rank ``r`` owns rows ``r * chunk`` to ``(r + 1) * chunk``, the last ranks fewer or none. This is how
  DTensor's ``Shard`` cuts, so torch's checkpoint code knows where each row is.
* place: a ``(ranks, width)`` part of a buffer, where ``width`` is the elements of one chunk. Line ``r`` holds what rank ``r`` owns, with
  zeros behind if those are fewer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard


class Rows:
    """The rows of one parameter that this rank owns.

    Args:
        param: a plain parameter, whole on every rank.
        mesh: 1-D, or 2-D (replicate, shard): rows are spread over the last dimension.
    """

    def __init__(self, param: Tensor, mesh: DeviceMesh, name: str) -> None:
        self.param = param
        self.name = name
        self.form = (param.shape, param.dtype, param.device)  # what the layout depends on
        self._mesh = mesh
        axis = mesh.ndim - 1
        ranks, rank = mesh.size(axis), mesh.get_local_rank(axis)
        self._ranks = ranks
        self.dim = shard_dim(param.shape, ranks)
        size = 1 if self.dim is None else param.shape[self.dim]
        self._inner = (
            () if self.dim is None else (*param.shape[: self.dim], *param.shape[self.dim + 1 :])
        )
        self._row_numel = param.numel() // size if size else 0
        self.chunk = -(-size // ranks)
        self.width = self.chunk * self._row_numel
        self._full_ranks, self._rest = divmod(size, self.chunk) if self.chunk else (ranks, 0)
        self._start = min(rank * self.chunk, size)
        self._count = min((rank + 1) * self.chunk, size) - self._start

    @property
    def is_whole(self) -> bool:
        """Whether the parameter is a 0-dim one, which every rank updates."""
        return self.dim is None

    @property
    def is_even(self) -> bool:
        """Whether the parameter's memory is just its place: equal chunks one after the other."""
        return (
            self.dim == 0
            and self._rest == 0
            and self._full_ranks == self._ranks
            and self.param.is_contiguous()
        )

    def own(self, full: Tensor) -> Tensor:
        """This rank's rows of a tensor of the parameter's shape: a view."""
        return full if self.dim is None else full.narrow(self.dim, self._start, self._count)

    def as_dtensor(self, local: Tensor) -> DTensor:
        """A DTensor of the parameter's shape of which ``local`` is this rank's part."""
        placement = Replicate() if self.dim is None else Shard(self.dim)
        placements = (*[Replicate()] * (self._mesh.ndim - 1), placement)
        shape, stride = self.param.shape, self.param.stride()
        return DTensor.from_local(
            local, self._mesh, placements, run_check=False, shape=shape, stride=stride
        )

    def pack(self, full: Tensor, place: Tensor) -> None:
        """Copy a tensor of the parameter's shape into its place, which has its own dtype."""
        rows, lines = self._rows_of(full), self._lines_of(place)
        boundary = self._full_ranks * self.chunk
        lines[: self._full_ranks].copy_(
            rows[:boundary].unflatten(0, (self._full_ranks, self.chunk))
        )
        behind = self._full_ranks
        if self._rest:
            lines[behind, : self._rest].copy_(rows[boundary:])
            lines[behind, self._rest :].zero_()
            behind += 1
        lines[behind:].zero_()

    def unpack(self, place: Tensor, full: Tensor) -> None:
        """Inverse of :meth:`pack`."""
        rows, lines = self._rows_of(full), self._lines_of(place)
        boundary = self._full_ranks * self.chunk
        rows[:boundary].unflatten(0, (self._full_ranks, self.chunk)).copy_(
            lines[: self._full_ranks]
        )
        if self._rest:
            rows[boundary:].copy_(lines[self._full_ranks, : self._rest])

    def own_parts(self, full: Tensor, line: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return views of this rank's rows: in a tensor of the parameter's shape, and in its line of a place, 1-D of ``width``
        elements; and the rest of that line, if there is any."""
        numel = self._count * self._row_numel
        return self.own(full), self.own_of_line(line), line[numel:] if numel < self.width else None

    def own_of_line(self, line: Tensor) -> Tensor:
        """This rank's rows, in the parameter's dimensions, as a view of its line of a place."""
        rows = line[: self._count * self._row_numel].view(self._count, *self._inner)
        assert self.dim is not None
        return rows.movedim(0, self.dim)

    def _rows_of(self, full: Tensor) -> Tensor:
        assert self.dim is not None
        return full.movedim(self.dim, 0)

    def _lines_of(self, place: Tensor) -> Tensor:
        return place.unflatten(1, (self.chunk, *self._inner))


def shard_dim(shape: torch.Size, ranks: int) -> int | None:
    """The first dimension with a row for every rank; else the longest; None for a 0-dim tensor."""
    if not shape:
        return None
    return next(
        (dim for dim, size in enumerate(shape) if size >= ranks),
        max(range(len(shape)), key=lambda dim: shape[dim]),
    )
