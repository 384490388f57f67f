"""Errors of torch's collectives that name the operation, its ranks, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@contextmanager
def comm_errors(operation: str, ranks: Sequence[int]) -> Iterator[None]:
    """Reword errors of a collective that starts or completes inside this context.

    Args:
        operation: names the collective in the message.
        ranks: the global ranks that take part.

    Raises:
        RuntimeError: in place of torch's error, which names neither the operation nor what to do.
        torch.OutOfMemoryError: unchanged.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError(
            f"{operation} between {_format_ranks(ranks)} failed on rank {dist.get_rank()}; most "
            "likely one of them has died or hangs, so look for the first error in their logs, "
            "then restart all ranks from the last checkpoint"
        ) from error


class CheckedWork:
    """A collective in flight: ``function(*args, group=group, async_op=True, **options)``.

    Args:
        operation: names the collective in messages.
        function: a collective of ``torch.distributed``.
        *args: positional arguments of ``function``.
        group: the process group.
        **options: further keyword arguments of ``function``.

    Raises:
        RuntimeError: the collective could not start; see :func:`comm_errors`.
    """

    def __init__(
        self,
        operation: str,
        function: Callable[..., Any],
        *args: Tensor,
        group: dist.ProcessGroup,
        **options: Any,
    ) -> None:
        self._operation = operation
        self._ranks = dist.get_process_group_ranks(group)
        with comm_errors(operation, self._ranks):
            self._work = function(*args, group=group, async_op=True, **options)

    def is_completed(self) -> bool:
        """Return True if the collective is done or has failed, so :meth:`wait` would not block."""
        return self._work.is_completed()

    def wait(self) -> None:
        """Wait for the collective. Gloo blocks this thread, NCCL the current stream."""
        with comm_errors(self._operation, self._ranks):
            self._work.wait()


def _format_ranks(ranks: Sequence[int]) -> str:
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"
