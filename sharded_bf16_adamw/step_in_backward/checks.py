"""Checks of options and of misuse. Each raises before it changes anything, and tells the remedy."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from ..gradients import GroupGrads
from ..kernels import Hyperparams, is_capturing
from ..sharding.dtensor import shard_groups
from ..sharding.fsdp1 import is_flattened
from ..sharding.model_parallel import ModelParallel
from ..sharding.zero.config import ZeRO
from ..sharding.zero.param_checks import is_wrapped_by_ddp
from ..step_plan import hyperparams_of
from ..torch_types import is_dtensor
from ..validation import name_in_group, param_name
from .clip import ClipInBackward

# --------------------------------------------------------------------------------------- options


def check_options(
    step_in_backward: bool, skip_nonfinite: bool, clip: ClipInBackward | None
) -> None:
    """Raise ValueError if other options are incompatible with ``step_in_backward``."""
    if not step_in_backward:
        if clip is not None:
            raise ValueError(
                "clip_in_backward is for step_in_backward=True; without it call "
                "optimizer.clip_grad_norm_(max_norm) before step()"
            )
        return
    if skip_nonfinite:
        raise ValueError(
            "step_in_backward=True and skip_nonfinite=True are both given; the last gradient can "
            "turn out infinite after other parameters were updated, so a step cannot be skipped as "
            "a whole; choose one"
        )


def check_zero_options(
    zero: ZeRO, parallel: ModelParallel | None, clip: ClipInBackward | None
) -> None:
    """Raise ValueError if other options are incompatible with ``step_in_backward`` and ZeRO."""
    if zero.stage == 1:
        raise ValueError(
            "step_in_backward=True and ZeRO(stage=1) are both given; DDP averages the gradients of "
            "stage 1 after the hooks of step_in_backward have used them, so use ZeRO(stage=2) on "
            "the plain module, or leave step_in_backward out"
        )
    if zero.overlap_gather:
        raise ValueError(
            "step_in_backward=True and ZeRO(overlap_gather=True) are both given; with "
            "step_in_backward the weights are gathered behind the backward pass already, so leave "
            "overlap_gather out"
        )
    if isinstance(parallel, ModelParallel) and parallel.experts:
        raise ValueError(
            "step_in_backward=True, sharding=ZeRO(...) and experts of ModelParallel are all given; "
            "experts beside ZeRO are updated only in step(), so leave step_in_backward out"
        )
    if clip is not None and clip.by == "param":
        raise ValueError(
            "ZeRO shards each gradient, so its own norm would take a collective for each "
            "parameter; use ClipInBackward(max_norm, by='previous_step')"
        )


def check_groups(groups: list[dict[str, Any]], clip: ClipInBackward | None) -> None:
    """Raise ValueError unless all parameters can be updated inside the backward pass."""
    for group in groups:
        if group["capturable"]:
            raise ValueError(
                "capturable=True and step_in_backward=True are both given; the hooks read learning "
                "rates on the host, which a CUDA graph does not replay, so choose one"
            )
        for index, param in enumerate(group["params"]):
            if is_flattened(param):
                raise ValueError(
                    f"parameter {param_name(group, index)} belongs to FullyShardedDataParallel "
                    "(FSDP1), which reduces gradients after the hooks of step_in_backward=True "
                    "have used them; use fully_shard (FSDP2), or leave step_in_backward out"
                )
            if clip is not None and clip.by == "param" and shard_groups(param):
                raise ValueError(
                    f"parameter {param_name(group, index)} is sharded, so its own norm would take "
                    "a collective for each parameter; use ClipInBackward(max_norm, "
                    "by='previous_step')"
                )


# ---------------------------------------------------------------------------------------- misuse


def check_backward_mode(device: torch.device) -> None:
    """Raise RuntimeError inside a CUDA graph's capture and under compiled autograd."""
    if is_capturing(device):
        raise RuntimeError(
            "a CUDA graph captures a backward pass of AdamW_BF16(step_in_backward=True), which "
            "reads learning rates on the host; build the optimizer without the option"
        )
    compiled_autograd = sys.modules.get("torch._dynamo.compiled_autograd")
    if compiled_autograd is not None and compiled_autograd.in_compiled_autograd_region:
        raise RuntimeError(
            "compiled autograd runs this backward pass, and step_in_backward=True cannot detect "
            "its end; turn torch._dynamo.config.compiled_autograd off, or leave the option out"
        )


def check_not_ddp(params: Iterable[Tensor]) -> None:
    """Raise RuntimeError if DistributedDataParallel averages the parameters' gradients."""
    if is_wrapped_by_ddp(params):
        raise RuntimeError(
            "the model is wrapped by DistributedDataParallel, which averages gradients "
            "after the hooks of step_in_backward=True have used them; use fully_shard "
            "(FSDP2), or build AdamW_BF16 without step_in_backward"
        )


def check_taken_once(gradients: list[GroupGrads], taken: set[Tensor]) -> None:
    """Raise RuntimeError if a parameter was updated already and has another gradient."""
    for group, params, _ in gradients:
        for param in params:
            if param in taken:
                raise RuntimeError(
                    f"parameter {name_in_group(group, param)} was updated in the backward pass and "
                    "has another gradient in .grad; set that to None, and accumulate gradients "
                    "before the last backward pass of a step"
                )


def check_hyperparams_kept(groups: list[dict[str, Any]], before: list[Hyperparams]) -> None:
    """Raise RuntimeError if the groups' hyper-parameters are no longer those of ``before``."""
    now = list(map(hyperparams_of, groups))
    if len(now) != len(before) or any(map(_differs, now, before)):
        raise RuntimeError(
            "hyper-parameters in param_groups were changed between a backward pass that used "
            "the old ones and step(); restore them, and change them after step()"
        )


def _differs(a: Hyperparams, b: Hyperparams) -> bool:
    """Compare without a device sync: the same tensor object counts as unchanged."""
    return any(
        x is not y and (isinstance(x, Tensor) or isinstance(y, Tensor) or x != y)
        for x, y in zip(a, b, strict=True)
    )


def second_gradient_message(name: str, num_passes: int) -> str:
    """Return the error of a second gradient in one step, with ``num_passes`` unfinished passes."""
    message = (
        f"parameter {name} got a second gradient before step(), after the first "
        "was used; step_in_backward=True takes one backward pass a step, so run earlier ones "
        "inside optimizer.accumulate(), and pass use_reentrant=False to checkpoint() around a "
        "weight that is used several times"
    )
    if num_passes > 1:
        message += "; if an earlier backward pass has raised, call optimizer.abandon_step() first"
    return message


def failure_message(caller: str, updated: int, params: Collection[Tensor]) -> str:
    """Return the error of a call after a failed pass that had updated ``updated`` parameters."""
    if not updated:
        return (
            f"{caller} was called after a backward pass that raised before any parameter was "
            "updated; call zero_grad() and repeat the backward pass"
        )
    message = (
        f"{caller} was called after a backward pass that raised when {updated} of "
        f"{len(params)} parameters were updated, so the weights are a mix of two steps; "
    )
    if not any(is_dtensor(param) for param in params):
        return message + (
            "call optimizer.abandon_step(), then load a checkpoint into model and optimizer"
        )
    from torch.distributed.fsdp import FSDPModule

    if not hasattr(FSDPModule, "reset_iter_state"):  # torch 2.11
        return message + (
            "FSDP2 of this torch cannot go on after that: restart the processes and load a "
            "checkpoint"
        )
    return message + (
        "call reset_iter_state() of the root FSDP2 module, optimizer.abandon_step(), then load "
        "a checkpoint into model and optimizer"
    )
