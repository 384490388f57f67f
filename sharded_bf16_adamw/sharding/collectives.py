"""The boundary to torch's collectives: where one fails because a rank is gone, the others say so in one sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@contextmanager
def exchange(what: str, ranks: Sequence[int]) -> Iterator[None]:
    """A context for a collective, its start or the wait for it. ``what`` names it in the message, ``ranks`` are the global ones in it.

    Raises:
        RuntimeError: from torch's own, which names neither the operation nor what to do.
    """
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"{what} between {_in_words(ranks)} failed on rank {dist.get_rank()}; most likely one of them has died or hangs, so look for "
            "the first error in their logs, then start all ranks again from the last checkpoint"
        ) from error


class Exchange:
    """A collective on its way: ``function(*args, group=group, async_op=True, **options)``. ``what`` names it in messages."""

    def __init__(self, what: str, function: Callable[..., Any], *args: Tensor, group: dist.ProcessGroup, **options: Any) -> None:
        self._what = what
        self._ranks = dist.get_process_group_ranks(group)
        with exchange(what, self._ranks):
            self._work = function(*args, group=group, async_op=True, **options)

    def is_completed(self) -> bool:
        """Whether :meth:`wait` would not wait: it is done, or has failed."""
        return self._work.is_completed()

    def wait(self) -> None:
        """Wait for it: on gloo this thread does, on NCCL the current stream."""
        with exchange(self._what, self._ranks):
            self._work.wait()


def device_for(group: dist.ProcessGroup, device: torch.device) -> torch.device:
    return device


def _in_words(ranks: Sequence[int]) -> str:
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"
