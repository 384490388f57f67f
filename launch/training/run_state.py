"""The state of a run that all parts of ``train.py`` share."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from sharded_bf16_adamw import PrecisionStats
from training.build import Schedule
from training.data import TokenDataset
from training.signals_and_watchdog import Supervisor
from training.spikes import SpikeFilter
from training.strategies import Strategy
from training.world import World


@dataclass
class Run:
    """A run of ``train.py``: model, optimizer, and the state of the training loop.

    Attributes:
        model: the model itself.
        wrapped_model: the result of the strategy's ``wrap``, such as DDP's module; call this one.
        num_params: number of elements of all parameters of the full model.
        supervisor: tells if a rank was asked to stop, and ends a run that hangs.
        spike_filter: finds outliers for ``--skip-spikes``.
        step: optimizer steps taken.
        evaluated_step: the last step after which the model was evaluated, -1 if there is none.
        held_out_loss: the loss of that evaluation.
        step_seconds: duration of each optimizer step of this process.
        loop_seconds: duration of each whole step of this process, without evaluations and saves.
        save_seconds: duration of the last save that training waited for.
        is_grace_noted: True once a note about a short ``--grace`` is printed.
        last_checkpoint: the last checkpoint that was saved or loaded.
        last_checkpoint_step: the step of ``last_checkpoint``, -1 if there is none.
        nonfinite_steps: steps whose loss or gradient norm was not finite.
        consecutive_nonfinite: such steps since the last finite one.
        last_is_finite: whether the last step's loss and norm, and its evaluation, were finite.
        precision: the last step's ``--precision-stats``, or None if they were not due.
    """

    args: argparse.Namespace
    world: World
    data: TokenDataset
    strategy: Strategy
    model: nn.Module
    wrapped_model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    num_params: int
    supervisor: Supervisor
    spike_filter: SpikeFilter
    step: int = 0
    evaluated_step: int = -1
    held_out_loss: float = math.nan
    step_seconds: list[float] = field(default_factory=list)
    loop_seconds: list[float] = field(default_factory=list)
    save_seconds: float = 0.0
    is_grace_noted: bool = False
    last_checkpoint: Path | None = None
    last_checkpoint_step: int = -1
    nonfinite_steps: int = 0
    consecutive_nonfinite: int = 0
    last_is_finite: bool = True
    precision: PrecisionStats | None = None

    @property
    def out_dir(self) -> Path:
        return Path(self.args.out)
