"""Collectives for metadata on the CPU, by which ranks agree before they communicate gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ...profiling import profiler_range
from ..collectives import new_cpu_group, timeout_of
from ..comm_errors import CheckedWork, comm_errors

OPERATION = "agreeing on what to exchange"  # for messages
BYTE_OVERFLOW = 255  # stands for a value that does not fit into a byte


class HostCollectives:
    """Collectives for metadata between all ranks of a mesh, in a gloo group of their own.

    They wait for no device. Thanks to their own group, ranks may run them in different orders
    relative to the bucket reductions.

    Attributes:
        ranks: the global ranks of the mesh, ascending.
        group: the process group.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.ranks: list[int] = sorted(mesh.mesh.flatten().tolist())
        self._first = int(mesh.mesh.flatten()[0])
        self._is_single = len(self.ranks) == 1
        timeout = timeout_of(mesh.get_group(0), torch.device(mesh.device_type))
        with comm_errors(OPERATION, self.ranks):
            self.group = new_cpu_group(self.ranks, timeout)

    def any_rank(self, condition: bool) -> bool:
        """Return whether the condition holds on any rank.

        For a single number gloo's all-reduce sends the fewest messages. On 32 ranks it takes half
        as long as the all-to-all of :meth:`_all_reduce_max_as`.
        """
        if self._is_single:
            return condition
        result = torch.tensor([condition], dtype=torch.int64, device="cpu")
        self._run(dist.all_reduce, result, op=dist.ReduceOp.MAX)
        return bool(result.item())

    def all_reduce_max(
        self,
        values: Sequence[int],
        problem: str | None = None,
        error: type[Exception] = RuntimeError,
    ) -> list[int]:
        """Return the element-wise maximum over ranks. Every rank passes equally many values.

        Raises:
            error: on every rank, with all problems, if any rank has a ``problem``.
        """
        result, problems = self.all_reduce_max_and_problems(values, problem)
        if problems is not None:
            raise error(problems)
        return result

    def all_reduce_max_and_problems(
        self, values: Sequence[int], problem: str | None
    ) -> tuple[list[int], str | None]:
        """Return the element-wise maximum over ranks, and all ranks' problems in one sentence."""
        any_problem, *result = self._all_reduce_max([problem is not None, *values])
        if not any_problem:
            return result, None
        first_rank: dict[str, int] = {}
        for rank, text in zip(self.ranks, self.all_gather_object(problem), strict=True):
            if text is not None:
                first_rank.setdefault(text, rank)
        return result, "; ".join(f"on rank {rank}, {text}" for text, rank in first_rank.items())

    def are_equal(self, values: Sequence[int]) -> list[bool]:
        """Return for each value whether it is equal on all ranks."""
        count = len(values)
        # The maximum of ~value gives the minimum. Unlike -value, it always fits into 64 bits.
        extremes = self.all_reduce_max([*values, *[~value for value in values]])
        return [
            highest == ~lowest
            for highest, lowest in zip(extremes[:count], extremes[count:], strict=True)
        ]

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return the value of each rank, in the order of ``ranks``."""
        if self._is_single:
            return [value]
        values = [None] * len(self.ranks)
        with profiler_range("ZeRO::consensus"), comm_errors(OPERATION, self.ranks):
            dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast_from_first(self, values: Sequence[int]) -> list[int]:
        """Return the values of the first rank of the mesh."""
        tensor = torch.tensor(values, dtype=torch.int64, device="cpu")
        if not self._is_single:
            self._run(dist.broadcast, tensor, src=self._first)
        return tensor.tolist()

    def _run(self, collective: Callable[..., Any], *tensors: Tensor, **options: Any) -> None:
        with profiler_range("ZeRO::consensus"):
            CheckedWork(OPERATION, collective, *tensors, group=self.group, **options).wait()

    def _all_reduce_max(self, values: Sequence[int]) -> list[int]:
        """Send one byte per value, which is enough for flags. If any overflows, send eight."""
        if self._is_single:
            return list(values)
        as_bytes = [value if 0 <= value < BYTE_OVERFLOW else BYTE_OVERFLOW for value in values]
        result = self._all_reduce_max_as(torch.uint8, as_bytes)
        return self._all_reduce_max_as(torch.int64, values) if BYTE_OVERFLOW in result else result

    def _all_reduce_max_as(self, dtype: torch.dtype, values: Sequence[int]) -> list[int]:
        """Send the values to all ranks by an all-to-all, and take the maximum locally.

        Gloo's ring all-reduce takes many times as long for a few hundred bytes, because it has
        ``2 * (ranks - 1)`` consecutive steps. If ranks pass different numbers of values, gloo ends
        the process, so the number must depend only on agreed data.
        """
        to_ranks = torch.tensor(values, dtype=dtype, device="cpu").repeat(len(self.ranks), 1)
        of_ranks = torch.empty_like(to_ranks)
        self._run(dist.all_to_all_single, of_ranks, to_ranks)
        return of_ranks.amax(0).tolist()
