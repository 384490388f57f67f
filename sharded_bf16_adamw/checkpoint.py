"""Sharded checkpoints of model and optimizer through torch.distributed.checkpoint (DCP), under parameter names (FQNs).

What is on disk does not depend on how model and optimizer were sharded, so it loads under any other layout and number of ranks::

    root/
        LATEST                 name of the newest complete checkpoint
        step-00000200/
            manifest.json      step, number of ranks, versions and the caller's extra data; written last
            .metadata          DCP: where each tensor's parts lie
            __0_0.distcp ...   DCP: one or more files a rank

Keys within: ``model.<fqn>``, ``optimizer.state.<fqn>.exp_avg``, ``optimizer.param_groups.<fqn>.lr`` and ``rng.<rank>``.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

FLATTENED = StateDictOptions(flatten_optimizer_state_dict=True)  # the form that reshards between every pair of strategies
LATEST = "LATEST"
MANIFEST = "manifest.json"


def save(
    root: str | os.PathLike[str],
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    extra: dict[str, Any] | None = None,
    keep: int | None = None,
) -> Path:
    """Save a checkpoint to ``root/step-<step>``. Collective: every rank calls it with the same arguments.

    The files are written to a temporary folder that is renamed into place when all ranks are done, so a run killed meanwhile leaves the
    previous checkpoint the latest.

    Args:
        root: folder of all checkpoints of a run, on a file system that every rank sees.
        step: position of the run, not negative.
        model: the module, wrapped by DDP or FSDP or not at all.
        optimizer: the optimizer of its parameters.
        extra: plain data (what JSON holds) of rank 0 that :func:`load` gives back, such as the position in the data.
        keep: how many checkpoints to keep, the newest first; None keeps all.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: ``keep`` is less than 1, or ``extra`` is not plain data.
        RuntimeError: a rank could not write; earlier checkpoints are untouched.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"Invalid keep: {keep}; it must be at least 1 or None")
    manifest = {"step": step, "world_size": _world_size(), "torch": torch.__version__, "extra": extra or {}}
    try:
        text = json.dumps(manifest, indent=1)
    except TypeError as error:
        raise ValueError(f"extra must be plain data that JSON can hold: {error}") from error
    root = Path(root)
    final = root / f"step-{step:08d}"
    partial = root / f".partial-{final.name}"
    with _errors_on_every_rank(f"cannot save the checkpoint {final}"):
        if _rank() == 0:
            root.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
    with _errors_on_every_rank(f"cannot save the checkpoint {final}"), _one_process_is_fine():
        if not optimizer.state:
            _init_state(optimizer)
        state = {**_state_dict(model, optimizer), **_rng_state()}
        dcp.save(state, checkpoint_id=partial, no_dist=not dist.is_initialized())
    with _errors_on_every_rank(f"cannot save the checkpoint {final}"):
        if _rank() == 0:
            (partial / MANIFEST).write_text(text)
            if final.exists():  # a run that was resumed from an earlier step comes by again
                shutil.rmtree(final)
            partial.rename(final)
            _replace_text(root / LATEST, final.name)
            for old in _complete_steps(root)[: -keep if keep else 0]:
                shutil.rmtree(old)
    return final


def load(path: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load a checkpoint into ``model`` and ``optimizer``, whatever layout and number of ranks saved it. Collective.

    Restores weights, optimizer states and groups, and torch's random state for each rank that the saving run had too. Parameters that
    had no optimizer state when saved (they never had a gradient) have none afterwards.

    Args:
        path: a checkpoint's folder, or the ``root`` of a run, which stands for its latest.

    Returns:
        The ``extra`` that was saved.

    Raises:
        FileNotFoundError: there is no checkpoint at ``path``.
        ValueError: it belongs to another model: a parameter is missing, unexpected or of another shape or dtype. Nothing is changed.
        RuntimeError: a rank could not read it.
    """
    path = Path(path)
    if not (path / MANIFEST).exists():
        found = latest(path)
        if found is None:
            raise FileNotFoundError(f"there is no checkpoint at {path}; give the folder of a checkpoint or of a run that has saved one")
        path = found
    manifest = json.loads((path / MANIFEST).read_text())
    with _errors_on_every_rank(f"cannot load the checkpoint {path}"):
        saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    _check_same_tensors(path, saved, _prefixed("model.", get_model_state_dict(model)))
    had_state = bool(optimizer.state)
    _init_state(optimizer)
    try:
        state = _state_dict(model, optimizer)
        never_updated = {key: torch.zeros_like(value) for key, value in _states_not_saved(state, saved)}
        state = {key: value for key, value in state.items() if key not in never_updated}
        _check_same_tensors(path, saved, state)
    except ValueError:
        if not had_state:
            optimizer.state.clear()
        raise
    rng = {key: value for key, value in _rng_state().items() if key in saved}
    loaded = {**state, **rng}
    with _errors_on_every_rank(f"cannot load the checkpoint {path}"), _one_process_is_fine():
        dcp.load(loaded, checkpoint_id=path, no_dist=not dist.is_initialized())
    set_model_state_dict(model, _section("model.", loaded))
    set_optimizer_state_dict(model, optimizer, _section("optimizer.", {**loaded, **never_updated}), options=FLATTENED)
    _set_rng_state({key: loaded[key] for key in rng})
    return manifest["extra"]


def latest(root: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint under ``root``, or None."""
    root = Path(root)
    pointer = root / LATEST
    if pointer.exists():
        path = root / pointer.read_text().strip()
        if (path / MANIFEST).exists():
            return path
    complete = _complete_steps(root)
    return complete[-1] if complete else None


def _state_dict(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Everything of model and optimizer by its key on disk; the tensors are the live ones."""
    model_state = get_model_state_dict(model)  # first: it reshards what an evaluation left gathered, which the optimizer's relies on
    return {
        **_prefixed("model.", model_state),
        **_prefixed("optimizer.", get_optimizer_state_dict(model, optimizer, options=FLATTENED)),
    }


def _prefixed(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {prefix + key: value for key, value in state.items()}


def _section(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    """Inverse of :func:`_prefixed`, of the keys that have the prefix."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _init_state(optimizer: torch.optim.Optimizer) -> None:
    """Let ours make its state at step 0; for others torch takes a step with zero gradients, which counts."""
    init_state = getattr(optimizer, "init_state", None)
    if init_state is not None:
        init_state()


def _states_not_saved(state: dict[str, Any], saved: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The state entries of parameters of which the checkpoint has none at all: they never had a gradient."""
    saved_params = {key.rpartition(".")[0] for key in saved if key.startswith("optimizer.state.")}
    for key, value in state.items():
        if key.startswith("optimizer.state.") and key.rpartition(".")[0] not in saved_params:
            yield key, value


def _check_same_tensors(path: Path, saved: dict[str, Any], state: dict[str, Any]) -> None:
    """Raise ``ValueError`` unless the checkpoint holds each entry of ``state``, in its (global) shape and dtype."""
    problems = []
    for key, value in state.items():
        entry = saved.get(key)
        if entry is None:
            problems.append(f"it has no {key}")
        elif isinstance(value, Tensor) and isinstance(entry, TensorStorageMetadata):
            if entry.size != value.shape:
                problems.append(f"{key} has shape {tuple(entry.size)} there but {tuple(value.shape)} here")
            elif entry.properties.dtype != value.dtype:
                problems.append(f"{key} is {entry.properties.dtype} there but {value.dtype} here")
    sections = {key.partition(".")[0] for key in state}
    problems += [f"it has {key}, which is not here" for key in saved if key.partition(".")[0] in sections and key not in state]
    if problems:
        more = f" (and {len(problems) - 3} more differences)" if len(problems) > 3 else ""
        raise ValueError(
            f"the checkpoint {path} is of another model or optimizer: {'; '.join(problems[:3])}{more}; "
            "build the model and optimizer as they were when it was saved"
        )


def _rng_state() -> dict[str, Tensor]:
    """torch's random state on this rank."""
    state = {f"rng.{_rank()}.cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state[f"rng.{_rank()}.cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, Tensor]) -> None:
    """Inverse of :func:`_rng_state`."""
    for key, value in state.items():
        (torch.cuda.set_rng_state if key.endswith(".cuda") else torch.set_rng_state)(value)


def _complete_steps(root: Path) -> list[Path]:
    """The complete checkpoints under ``root``, oldest first."""
    return sorted(path.parent for path in root.glob(f"step-*/{MANIFEST}"))


def _replace_text(path: Path, text: str) -> None:
    """Replace a file's content at once: readers find the old text or the new."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text)
    os.replace(temporary, path)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    """Keep DCP from warning, at every save, that there is no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


@contextmanager
def _errors_on_every_rank(doing: str) -> Iterator[None]:
    """Raise a ``RuntimeError`` on every rank if the body failed on any, so that none goes on alone. Collective."""
    error: BaseException | None = None
    try:
        yield
    except (Exception, CheckpointException) as caught:  # DCP's is a BaseException
        error = caught
    reasons = [None if error is None else f"{type(error).__name__}: {error}".splitlines()[0]]
    if dist.is_initialized():
        reasons = [None] * _world_size()
        dist.all_gather_object(reasons, None if error is None else f"{type(error).__name__}: {error}".splitlines()[0])
    failed = {rank: reason for rank, reason in enumerate(reasons) if reason is not None}
    if failed:
        rank, reason = next(iter(failed.items()))
        raise RuntimeError(f"{doing}: on rank {rank}, {reason}") from error
