"""State of the training loop."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from sharded_bf16_adamw import PrecisionStats
from training.build import Schedule
from training.data import Text
from training.signals_and_watchdog import Supervisor
from training.spikes import SpikeFilter
from training.strategies import Strategy
from training.world import World


@dataclass
class Run:
    """State of the training loop.

    Attributes:
        parameters: their number in the full model.
        module: ``model`` as its strategy wraps it: the module to call.
        supervisor: knows whether the run shall stop, and ends a run that hangs.
        spikes: finds outliers for ``--skip-spikes``.
        step: optimizer steps taken.
        evaluated_step: the last step after which the model was evaluated, -1 before.
        held_out_loss: the loss of that evaluation.
        step_seconds: duration of each optimizer step of this process.
        loop_seconds: duration of each whole step of this process, without evaluations and saves.
        save_seconds: duration of the last save that training waited for.
        saved: the last checkpoint that was saved or loaded.
        saved_step: its step.
        nonfinite_steps: steps whose loss or gradient norm was not finite.
        consecutive_nonfinite: how many of them the last steps were, without a finite one between.
        last_is_finite: the last losses and the last gradient norm were finite.
        precision: statistics of the last step, if ``--precision-stats`` asked for them.
    """

    args: argparse.Namespace
    world: World
    text: Text
    strategy: Strategy
    model: nn.Module
    module: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    parameters: int
    supervisor: Supervisor
    spikes: SpikeFilter
    step: int = 0
    evaluated_step: int = -1
    held_out_loss: float = math.nan
    step_seconds: list[float] = field(default_factory=list)
    loop_seconds: list[float] = field(default_factory=list)
    save_seconds: float = 0.0
    saved: Path | None = None
    saved_step: int = -1
    nonfinite_steps: int = 0
    consecutive_nonfinite: int = 0
    last_is_finite: bool = True
    precision: PrecisionStats | None = None

    @property
    def out_dir(self) -> Path:
        return Path(self.args.out)
