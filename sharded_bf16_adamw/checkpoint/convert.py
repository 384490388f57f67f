"""Convert weights of another training run to a new checkpoint, without the model's code."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..optimizer import AdamW_BF16
from .directory import latest
from .export import Progress
from .import_formats import WeightsSource, open_optimizer_state, open_weights
from .import_matching import is_keyed_by_names
from .importing import import_fp32
from .rank_errors import call_on_rank_0_via_store
from .saving import save

_Path = str | os.PathLike[str]


def convert_fp32(
    source: _Path | Mapping[str, Tensor],
    root: _Path,
    optimizer_state: _Path | Mapping[str, Any] | None = None,
    *,
    fp32: Iterable[str] = (),
    buffers: Iterable[str] = (),
    progress: Progress | None = None,
    **hyperparameters: Any,
) -> Path:
    """Write a new checkpoint from weights of another training run, without the model's code.

    Holds the model in memory. In a distributed run, call it on every rank or on rank 0 alone. Rank
    0 does all the work and waits for no other rank. The others return when it is done, and raise if
    it failed. For one ``root``, call it either always on every rank or always on rank 0
    alone. Calls are matched by number: a rank's n-th call gets the result of rank 0's n-th call.

    Args:
        source: as for :func:`import_fp32`.
        root: directory for the checkpoints of a new run; it must not contain one yet. The
            checkpoint's step is that of ``optimizer_state``, or 0.
        optimizer_state: as for :func:`import_fp32`. Keyed by integers, it must have a single
            parameter group, and ``source`` must be a state dict: both then have the model's order.
        fp32: patterns (``["*norm*"]``) of the parameters that are float32 in the model. All others
            become bfloat16.
        buffers: patterns of the names that are buffers in the model. They keep their dtype, as do
            all tensors that are not floating point.
        progress: as for :func:`import_fp32`.
        **hyperparameters: lr, betas, eps, weight_decay, unless ``optimizer_state`` has them.

    Returns:
        The checkpoint's directory.

    Raises:
        FileExistsError: there is a checkpoint under ``root``.
        FileNotFoundError: ``source`` or ``optimizer_state`` does not exist.
        ValueError: as for :func:`import_fp32`, a pattern matches no name, or a weight is
            quantised to 8 bits (float8).
        RuntimeError: as for :func:`save`; on other ranks than 0, also for other errors of rank 0.

    Examples:
        >>> import torch
        >>> from sharded_bf16_adamw import convert_fp32
        >>> convert_fp32({"layer.weight": torch.ones(2, 2)}, "checkpoints", lr=1e-3).name
        'step-00000000'
    """

    def convert() -> str:
        if latest(root) is not None:
            raise FileExistsError(f"{root} already has a checkpoint; give another directory")
        weights = open_weights(source)
        fp32_patterns = _checked_patterns("fp32", fp32, weights)
        buffer_patterns = _checked_patterns("buffers", buffers, weights)
        state = None if optimizer_state is None else open_optimizer_state(optimizer_state)
        model = _build_model(weights, fp32_patterns, buffer_patterns)
        groups = _build_param_groups(model, state, weights.keeps_order)
        optimizer = AdamW_BF16(groups, **{"lr": 1e-3, **hyperparameters})
        import_fp32(source, model, optimizer, state, progress)
        step = max((int(values["step"]) for values in optimizer.state.values()), default=0)
        return str(save(root, step, model, optimizer))

    return Path(call_on_rank_0_via_store("convert_fp32", root, convert))


def _build_model(weights: WeightsSource, fp32: list[str], buffers: list[str]) -> nn.Module:
    """Build modules with an uninitialized parameter or buffer for each name in ``weights``.

    Raises:
        ValueError: a parameter is quantised to 8 bits.
    """
    model = nn.Module()
    params: dict[str, nn.Parameter] = {}  # by name, tied ones by their first name
    first_of = {name: tied[0] for tied in weights.ties for name in tied}
    for name, info in weights.infos.items():
        module = model
        *parents, leaf = name.split(".")
        for parent in parents:
            if parent not in dict(module.named_children()):
                module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        if not info.dtype.is_floating_point or _matches(name, buffers):
            module.register_buffer(leaf, torch.empty(info.shape, dtype=info.dtype, device="cpu"))
        elif info.dtype.itemsize == 1:
            raise ValueError(
                f"{name} is quantised to {info.dtype}, and its scale is a tensor of its own; "
                "dequantise the weights first"
            )
        else:
            dtype = torch.float32 if _matches(name, fp32) else torch.bfloat16
            param = params.get(first_of.get(name, name))
            if param is None or param.dtype != dtype:
                param = nn.Parameter(torch.empty(info.shape, dtype=dtype, device="cpu"))
            params.setdefault(first_of.get(name, name), param)
            module.register_parameter(leaf, param)
    return model


def _checked_patterns(argument: str, patterns: Iterable[str], weights: WeightsSource) -> list[str]:
    if isinstance(patterns, str):
        raise ValueError(
            f"{argument} must be a list of patterns, but it is the string {patterns!r}; write "
            f"[{patterns!r}]"
        )
    patterns = list(patterns)
    for pattern in patterns:
        if not any(_matches(name, [pattern]) for name in weights.infos):
            raise ValueError(
                f"{argument}: the pattern {pattern!r} matches no name; names look like "
                f"{', '.join([*weights.infos][:2])}"
            )
    return patterns


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _build_param_groups(
    model: nn.Module, state: dict[str, Any] | None, is_ordered: bool
) -> list[dict[str, Any]]:
    """Divide the model's parameters into the groups of the optimizer state.

    If the state is keyed by names, parameters that it does not name join the first group.

    Raises:
        ValueError: the state is keyed by integers, and it is unknown which parameters they are:
            the model is not ``is_ordered``, or there are several groups.
    """
    params = list(model.parameters())
    if state is None:
        return [{"params": params}]
    groups = [group["params"] for group in state["param_groups"]]
    if is_keyed_by_names(state["param_groups"]):
        by_name = dict(model.named_parameters(remove_duplicate=False))
        group_of = {
            by_name[name]: index
            for index, names in enumerate(groups)
            for name in names
            if name in by_name
        }
        divided: list[list[nn.Parameter]] = [[] for _ in groups]
        for param in params:
            divided[group_of.get(param, 0)].append(param)
        return [{"params": group} for group in divided]
    if not is_ordered or sum(map(bool, groups)) > 1:
        reason = "several parameter groups" if is_ordered else "safetensors"
        raise ValueError(
            f"the optimizer state names its parameters by integers, and with {reason} their order "
            "is unknown; give a state keyed by names, or import into the model by import_fp32()"
        )
    count = sum(map(len, groups))
    if count != len(params):
        raise ValueError(
            f"the optimizer state has {count} parameters, but the weights have {len(params)} that "
            "are not buffers; list the names of the model's buffers, and no others, in buffers="
        )
    remaining = iter(params)
    return [{"params": [next(remaining) for _ in group]} for group in groups]
