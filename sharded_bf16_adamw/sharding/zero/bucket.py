"""Parameters exchanged together: one collective for a few large or many small ones."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..collectives import CheckedWork
from .param import Rows
from .reduce_scatter import MeanOnItsWay, all_gather_start, all_reduce_mean


class Bucket:
    """Gradients on their way out, and weights on their way back. All members have one dtype and device.

    Args:
        members: in the order in which their gradients are expected.
        dtype: of the gradients on the wire.
        result_dtype: of their mean.
    """

    def __init__(
        self, members: list[Rows], mesh: DeviceMesh, dtype: torch.dtype, result_dtype: torch.dtype
    ) -> None:
        self.members = members
        self._mesh = mesh
        self._dtype = dtype
        self._result_dtype = result_dtype
        self._ranks = mesh.size(mesh.ndim - 1)
        self._filled: dict[
            Rows, Tensor
        ] = {}  # each member's place, of those that have brought a gradient
        self._lines: Tensor | None = None  # (ranks, sum of widths)
        self.sent = 0  # how many times since the ranks last agreed

    @property
    def is_pending(self) -> bool:
        """Whether there is a gradient that has not been sent."""
        return bool(self._filled)

    @property
    def is_complete(self) -> bool:
        """Whether all trainable members have brought their gradients."""
        return self.is_pending and all(
            rows in self._filled or not rows.param.requires_grad for rows in self.members
        )

    def add(self, rows: Rows, grad: Tensor) -> None:
        """Take a member's gradient, of the parameter's shape; a second one is added to the first."""
        if self._is_place_itself(rows, grad):
            self._lines = grad.detach().view(self._ranks, -1)
            self._filled[rows] = self._lines
            return
        if self._lines is None:
            self._lines = self._new_lines()
        place = self._places(self._lines)[rows]
        if rows in self._filled:
            second = torch.empty_like(place)
            rows.pack(grad, second)
            place.add_(second)
        else:
            rows.pack(grad, place)
            self._filled[rows] = place

    def send(self) -> MeanOnItsWay:
        """Start reducing what was added; members without a gradient on this rank send zeros. The bucket is then empty."""
        lines = self._lines if self._lines is not None else self._new_lines()
        for rows, place in self._places(lines).items():
            if rows not in self._filled:
                place.zero_()
        self._lines = None
        self._filled = {}
        self.sent += 1
        return MeanOnItsWay(lines, self._mesh, self._result_dtype)

    def own_rows(self, line: Tensor) -> dict[Rows, Tensor]:
        """Each member's rows of this rank, as views of its line of the bucket."""
        widths = [rows.width for rows in self.members]
        return {
            rows: rows.own_of_line(part)
            for rows, part in zip(self.members, line.split(widths), strict=True)
        }

    def _new_lines(self) -> Tensor:
        width = sum(rows.width for rows in self.members)
        return torch.empty(self._ranks, width, dtype=self._dtype, device=self.members[0].form[2])

    def _places(self, lines: Tensor) -> dict[Rows, Tensor]:
        return dict(
            zip(self.members, lines.split([rows.width for rows in self.members], 1), strict=True)
        )

    def _is_place_itself(self, rows: Rows, grad: Tensor) -> bool:
        """Whether the gradient can be sent from where it lies."""
        return (
            len(self.members) == 1
            and not self._filled
            and grad.dtype == self._dtype
            and rows.is_even
            and grad.is_contiguous()
        )


class WholeBucket(Bucket):
    """0-dim parameters: they have no rows to spread, so all ranks reduce and update them alike. Sending waits for all ranks."""

    def add(self, rows: Rows, grad: Tensor) -> None:
        value = grad.detach().to(self._dtype, copy=True)
        self._filled[rows] = self._filled[rows] + value if rows in self._filled else value

    def send(self) -> MeanOnItsWay:
        zero = torch.zeros((), dtype=self._dtype, device=self.members[0].form[2])
        values = torch.stack([self._filled.get(rows, zero) for rows in self.members])
        self._filled = {}
        self.sent += 1
        return _WholeMean(values, self._mesh, self._result_dtype)

    def own_rows(self, line: Tensor) -> dict[Rows, Tensor]:
        return dict(zip(self.members, line, strict=True))


class _WholeMean(MeanOnItsWay):
    def __init__(self, values: Tensor, mesh: DeviceMesh, dtype: torch.dtype) -> None:
        all_reduce_mean(values, mesh)
        self._mean = values.to(dtype)
        self._second_work = None

    def wait(self) -> Tensor:
        assert self._mean is not None
        return self._mean


def gather_weights(buckets: list[list[Rows]], mesh: DeviceMesh, max_in_flight: int) -> None:
    """Give every rank the rows that other ranks have updated, bucket by bucket."""
    axis = mesh.ndim - 1
    ranks, group = mesh.size(axis), mesh.get_group(axis)
    if ranks == 1:
        return
    in_flight: list[tuple[list[Rows], Tensor | None, CheckedWork]] = []
    for bucket in buckets:
        if len(in_flight) == max_in_flight:
            _receive(*in_flight.pop(0))
        first = bucket[0].param.detach()
        if len(bucket) == 1 and bucket[0].is_even:
            in_flight.append(
                (
                    bucket,
                    None,
                    all_gather_start(first.view(-1), bucket[0].own(first).reshape(-1), group),
                )
            )
            continue
        line = torch.empty(
            sum(rows.width for rows in bucket), dtype=first.dtype, device=first.device
        )
        _pack_own(bucket, line)
        lines = torch.empty(ranks, line.numel(), dtype=line.dtype, device=line.device)
        in_flight.append((bucket, lines, all_gather_start(lines.view(-1), line, group)))
    for item in in_flight:
        _receive(*item)


def _pack_own(bucket: list[Rows], line: Tensor) -> None:
    """Copy this rank's rows of all members to its line of the bucket: on a GPU in a few launches, not one for each member."""
    places = line.split([rows.width for rows in bucket])
    parts = [
        rows.own_parts(rows.param.detach(), place)
        for rows, place in zip(bucket, places, strict=True)
    ]
    torch._foreach_copy_(
        [of_line for _, of_line, _ in parts], [of_param for of_param, _, _ in parts]
    )
    if padding := [rest for _, _, rest in parts if rest is not None]:
        torch._foreach_zero_(padding)


def _receive(bucket: list[Rows], lines: Tensor | None, work: CheckedWork) -> None:
    work.wait()
    if lines is None:  # it came in where it belongs
        torch.autograd.graph.increment_version([rows.param for rows in bucket])
        return
    for rows, place in zip(bucket, lines.split([rows.width for rows in bucket], 1), strict=True):
        rows.unpack(place, rows.param.detach())


def split_by_size(members: Iterable[Rows], bucket_bytes: int) -> list[list[Rows]]:
    """Cut a sequence into buckets of up to ``bucket_bytes`` of weights (a larger parameter has its own), each of one dtype, device and
    wholeness, in the order in which they become complete."""
    open_buckets: dict[object, tuple[list[Rows], int]] = {}
    result = []
    for rows in members:
        kind, size = (
            (rows.param.dtype, rows.param.device, rows.is_whole),
            rows.param.numel() * rows.param.element_size(),
        )
        bucket, filled = open_buckets.pop(kind, ([], 0))
        if bucket and filled + size > bucket_bytes:
            result.append(bucket)
            bucket, filled = [], 0
        open_buckets[kind] = ([*bucket, rows], filled + size)
    return result + [bucket for bucket, _ in open_buckets.values()]
