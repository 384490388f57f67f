"""The state of one optimizer step whose updates run inside the backward pass: a *round*."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

import torch
from torch import Tensor

from ..kernels import Hyperparams
from .clip import PreviousStepClip


class RoundState(Enum):
    """The progress of the current step."""

    IDLE = auto()  # no parameter was updated since the last step()
    RUNNING = auto()  # parameters were updated, and step() has yet to end the round
    FAILED = auto()  # a backward pass has ended early


@dataclass
class Round:
    """The hyper-parameters of a step, read at its first final gradient, and its progress since."""

    lrs: list[float | None]  # see :func:`sharded_bf16_adamw.schedule.scheduled_lrs`
    group_hypers: list[Hyperparams]  # as read from the groups
    hypers: list[Hyperparams]  # the same, but with the learning rates of the schedule
    clip: PreviousStepClip | None = None
    taken: set[Tensor] = field(default_factory=set)  # parameters updated or in the batch
    updated: int = 0
    backward_passes: set[int] = field(default_factory=set)  # autograd's ids of unfinished passes
    streams: set[torch.cuda.Stream] = field(default_factory=set)  # that have run updates

    def wait_for_streams(self) -> None:
        """Make the current stream wait for the updates, which ran on the gradients' streams."""
        for stream in self.streams:
            torch.cuda.current_stream(stream.device).wait_stream(stream)
        self.streams.clear()
