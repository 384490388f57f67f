"""Reporters of a run: each gets the values that ``train.py`` reports, by name and step.

The reporter of ``metrics.jsonl`` is in metrics.py, that of the picture in picture.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from training.command_line import is_installed
from training.errors import UsageError
from training.metrics import MetricsFile
from training.options import model_name
from training.picture import Picture
from training.run_state import Run
from training.world import call_on_rank_0_only

# Values that the progress line shows, and their names in it.
SHOWN = {
    "loss": "loss",
    "lr": "lr",
    "grad_norm": "norm",
    "tokens_per_s": "tokens_per_s",
    "held_out_loss": "held_out",
}


class Reporter(Protocol):
    """A destination for the values of a run.

    Attributes:
        name: the reporter's name in a note about its failure.
    """

    name: str

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Report values as of ``step``, the number of optimizer steps taken."""

    def close(self, failed: bool) -> None:
        """End the report; ``failed`` is True if the run ended with an error."""


class Reporters:
    """Several reporters as one, and a context manager that closes them.

    An error of a reporter does not end training. The first one of each is printed as a note.
    """

    def __init__(self, *reporters: Reporter) -> None:
        self.reporters = reporters
        self._noted: set[str] = set()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for reporter in self.reporters:
            message = f"training goes on, but its values from step {step} on may be lost"
            with self._errors_noted(reporter, message):
                reporter.log(step, values)

    def __enter__(self) -> Reporters:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        message = "its last values may be lost"
        for reporter in self.reporters:
            with self._errors_noted(reporter, message):
                reporter.close(error_type is not None)

    @contextmanager
    def _errors_noted(self, reporter: Reporter, consequence: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # libraries raise errors of any type
            if reporter.name not in self._noted:
                _note(reporter.name, error, consequence)
            self._noted.add(reporter.name)


def open_reporters(run: Run) -> Reporters:
    """Return the reporters of this rank: all on rank 0, none on the others. Collective.

    Raises:
        UsageError: on all ranks, if ``metrics.jsonl`` cannot be written.
    """
    return call_on_rank_0_only(_open_all, run) or Reporters()


def _open_all(run: Run) -> Reporters:
    args, out_dir = run.args, run.out_dir
    path = out_dir / "metrics.jsonl"
    try:
        reporters: list[Reporter] = [MetricsFile(path, run.step, run.evaluated_step == run.step)]
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written ({error.strerror}): make it writable, free space, or give "
            "another --out."
        ) from error

    def add(name: str, make: Callable[[], Reporter]) -> None:
        try:
            reporters.append(make())
        except Exception as error:  # libraries raise errors of any type
            message = "training goes on without it"
            _note(name, error, message)

    if args.progress:
        add(Progress.name, lambda: Progress(run.step, args.steps, args.print_every))
    if args.tensorboard or (args.tensorboard is None and is_installed("tensorboard")):
        add(TensorBoard.name, lambda: TensorBoard(out_dir / "tensorboard", run.step))
    if args.wandb is not None:
        add(WandB.name, lambda: WandB(args.wandb, out_dir, run.step, vars(args)))
    title = f"{model_name(args)}, --optimizer {args.optimizer}"
    reporters.append(Picture(path, out_dir / "metrics.png", title))
    return Reporters(*reporters)


def _note(name: str, error: Exception, consequence: str) -> None:
    reason = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    reason = reason.splitlines()[0].rstrip(".")
    with suppress(OSError):  # stderr itself may fail
        below_bar = "\n" if sys.stderr.isatty() else ""
        print(f"{below_bar}note: {name}: {reason}; {consequence}", file=sys.stderr)


class Progress:
    """Progress on stderr: a bar on a terminal, else a line every ``print_every`` steps."""

    name = "progress"

    def __init__(self, start: int, steps: int, print_every: int) -> None:
        self._steps, self._print_every = steps, print_every
        self._shown: dict[str, str] = {}
        self._bar = self._make_bar(start) if sys.stderr.isatty() else None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._shown |= {
            shown: f"{values[name]:.4g}" for name, shown in SHOWN.items() if name in values
        }
        is_step = "loss" in values
        if self._bar is not None:
            self._bar.set_postfix(self._shown, refresh=False)
            self._bar.update(is_step)
        elif is_step and (step % self._print_every == 0 or step == self._steps):
            shown = "  ".join(f"{name} {value}" for name, value in self._shown.items())
            print(f"step {step}/{self._steps}  {shown}", file=sys.stderr, flush=True)

    def close(self, failed: bool) -> None:
        if self._bar is not None:
            self._bar.close()

    def _make_bar(self, start: int) -> Any:
        try:
            from tqdm import tqdm
        except ImportError:
            print("no progress bar: tqdm is not installed", file=sys.stderr)
            return None
        return tqdm(total=self._steps, initial=start, unit="step", dynamic_ncols=True)


class TensorBoard:
    """Event files in a folder; hides the values of steps after ``start`` that are in it already."""

    name = "TensorBoard"

    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start + 1 if start else 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        self._writer.close()


class WandB:
    """A W&B run. A resumed run continues it: its id is in ``wandb-run.txt``."""

    name = "W&B"

    def __init__(self, project: str, out_dir: Path, start: int, config: dict[str, Any]) -> None:
        import wandb

        # By default a finished job waits for W&B as long as the network is down.
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "60")
        path = out_dir / "wandb-run.txt"
        run_id = path.read_text().strip() if start and path.exists() else None
        self._run = wandb.init(
            project=project,
            name=out_dir.resolve().name,
            dir=str(out_dir),
            id=run_id,
            resume="allow",
        )
        path.write_text(self._run.id)
        self._run.config.update(config, allow_val_change=True)
        # A resumed run may repeat steps, and W&B's own step counter would drop those.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
