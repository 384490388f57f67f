"""Import weights and AdamW states of other trainings, into a live model or as a new checkpoint."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..kernels.reference import lowbias32, stochastic_round
from ..names import has_fsdp1
from ..optimizer import AdamW_BF16
from ..pair import split
from .blocks import local_blocks
from .diff import find_mismatch, raise_mismatches
from .directory import latest
from .export import Progress
from .extra_state import is_wrapper_subclass
from .groups import match_groups
from .import_formats import WeightsSource, open_optimizer_state, open_weights
from .manifest import as_tensor
from .optimizer_state import (
    check_model_and_optimizer,
    init_frozen_states,
    init_state,
    rollback_new_state,
)
from .rank_errors import (
    call_on_rank_0_via_store,
    check_group,
    known_on_other_ranks,
    raise_on_all_ranks,
)
from .rank_names import RankNames
from .saving import save
from .ties import bitwise_equal, find_ties
from .torch_state_dict import (
    set_sharded_model_state,
    set_sharded_optimizer_state,
    sharded_model_state,
    sharded_optimizer_state,
)

MOMENTS = ("exp_avg", "exp_avg_sq")
# The options of torch.optim.AdamW that mean the same in AdamW_BF16.
HYPERPARAMS = ("lr", "betas", "eps", "weight_decay", "maximize")
_Path = str | os.PathLike[str]


def round_moment(x: Tensor) -> Tensor:
    """Round a float32 moment to bfloat16 stochastically, by the rule of the kernels.

    The random bits are a hash of the value's own bits. So the result is the same on every run and
    for every sharding, and over many values the mean error is zero. Values that bfloat16 holds
    stay.
    """
    return stochastic_round(x, lowbias32(x.view(torch.int32)) & 0xFFFF)


@torch.no_grad()
def import_fp32(
    source: _Path | Mapping[str, Tensor],
    model: nn.Module,
    optimizer: AdamW_BF16,
    optimizer_state: _Path | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    *,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Replace a model's weights and optimizer states by those of a training in another precision.

    Collective: every rank of ``group`` calls it, and reads its own part of each tensor from
    ``source``, one tensor at a time.

    A bfloat16 parameter becomes ``p``, the weight rounded to nearest, and ``correction``, the
    rounded remainder (see :mod:`sharded_bf16_adamw.checkpoint.export` for the bound). A frozen one
    has a correction only if ``optimizer_state`` has a state of it. Moments are rounded
    stochastically, with bits that depend on the values alone. So the bits are the same for every
    sharding strategy and number of ranks.

    Args:
        source: a safetensors file, a directory of them with an index, a torch file, or a state
            dict. Floating dtypes are converted. It has every tensor of the model's state dict by
            name (one of several tied names is enough), and no others than other ranks have
            (pipeline stages, experts).
        model: the module, wrapped or not.
        optimizer: the optimizer of its parameters.
        optimizer_state: the state of a ``torch.optim.AdamW`` in any floating dtype: a torch file or
            a dict. It is keyed by integers, in the order of this optimizer's groups and parameters,
            or by names, as FSDP and ``get_optimizer_state_dict`` return it. Its lr, betas, eps,
            weight_decay and maximize are taken over. An optimizer with a schedule keeps the
            schedule and continues it at the state's step. None: moments and steps start at zero,
            and hyper-parameters stay.
        progress: called with the number of bytes of each tensor filled.
        group: the ranks that hold the model, if several models share a job; None for all ranks.

    Raises:
        ValueError: a missing key, an unexpected key, a size mismatch, tied names with different
            values, or a file that is damaged or of another kind. Nothing is changed.
        RuntimeError: a rank cannot find or read a file, and nothing is changed. Or it failed while
            filling, and the model is now part old, part new, as the message says.

    Examples:
        >>> import torch
        >>> from sharded_bf16_adamw import AdamW_BF16, import_fp32
        >>> model = torch.nn.Linear(2, 1, bias=False).bfloat16()
        >>> optimizer = AdamW_BF16(model.parameters(), lr=1e-3)
        >>> import_fp32({"weight": torch.tensor([[1.0, 1.001]])}, model, optimizer)
        >>> model.weight.float().tolist()
        [[1.0, 1.0]]
        >>> f"{optimizer.state[model.weight]['correction'][0, 1].item():.5f}"
        '0.00100'
    """
    doing = "cannot import"
    check_group(group)
    with raise_on_all_ranks(doing, group):
        check_model_and_optimizer("import_fp32(source, model, optimizer)", model, optimizer)
        if not isinstance(optimizer, AdamW_BF16):
            raise ValueError(
                f"optimizer must be an AdamW_BF16, but it is of type {type(optimizer).__name__}; "
                "build one"
            )
        weights = open_weights(source)
        opened = None if optimizer_state is None else open_optimizer_state(optimizer_state)
        names = RankNames(model, optimizer)
    names.number_experts()
    names.adopt_stages(weights.infos)
    imported_state: dict[str, Any] = {}
    imported_groups: list[dict[str, Any]] = []
    with rollback_new_state(optimizer):
        with raise_on_all_ranks(doing, group):
            init_state(optimizer)
            optimizer_part = sharded_optimizer_state(model, optimizer)
            own_groups = [_with_saved_names(own, names) for own in optimizer_part["param_groups"]]
            ties = find_ties(model, names)
            if opened is not None:
                imported_state, imported_groups = _file_under_ties(
                    *_key_by_name(opened, own_groups),
                    ties,
                    weights.ties,
                    {name for own in own_groups for name in own["params"]},
                )
        with raise_on_all_ranks(doing, group):
            if not imported_state.keys() <= set(map(names.to_saved, optimizer_part["state"])):
                init_frozen_states(model, optimizer, imported_state, imported_state, names.to_saved)
                optimizer_part = sharded_optimizer_state(model, optimizer)
            model_part = sharded_model_state(model)
            own_weights = {names.to_saved(name): tensor for name, tensor in model_part.items()}
            own_states = {
                names.to_saved(name): state for name, state in optimizer_part["state"].items()
            }
        weights_elsewhere = known_on_other_ranks(set(weights.infos) - own_weights.keys(), group)
        states_elsewhere = known_on_other_ranks(set(imported_state) - own_states.keys(), group)
        with raise_on_all_ranks(doing, group):
            source_name = _names_in_source(weights, ties, own_weights, weights_elsewhere)
            if opened is not None:
                for name in states_elsewhere:
                    del imported_state[name]
                _check_states(imported_state, own_states)
                matched_groups = _matched_groups(own_groups, imported_groups)
    with raise_on_all_ranks("cannot import, and the model is now part old, part new", group):
        for name, tensor in own_weights.items():
            if isinstance(tensor, Tensor):
                _fill_weight(tensor, weights, source_name[name])
                _report(progress, tensor)
        for name, state in own_states.items():
            for state_name, tensor in state.items():
                if state_name == "correction":
                    _fill_correction(tensor, weights, source_name[name])
                elif state_name == "ema":  # starts at the new weights
                    _fill_weight(tensor, weights, source_name[name])
                else:
                    _fill_state(tensor, imported_state.get(name, {}).get(state_name))
                _report(progress, tensor)
        if opened is not None:
            for live, shown, own, imported in zip(
                optimizer.param_groups,
                optimizer_part["param_groups"],
                own_groups,
                matched_groups,
                strict=True,
            ):
                step = _max_step(imported_state, own["params"] or imported_state)
                _set_hyperparams(live, imported, step)
                names_keys = ("params", "param_names")
                shown.update({key: value for key, value in live.items() if key not in names_keys})
    if has_fsdp1(model):
        set_sharded_model_state(model, model_part)
        set_sharded_optimizer_state(model, optimizer, optimizer_part)


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
    """Write a new checkpoint from weights of another training, without the model's code.

    Holds the model in memory. In a distributed run every rank may call it, or rank 0 alone. Rank 0
    reads and writes, and waits for no other rank. The others return once it is done, and raise if
    it failed.

    Args:
        source: as for :func:`import_fp32`.
        root: directory for the checkpoints of a run, which must not have one yet. The step of the
            new one is that of ``optimizer_state``.
        optimizer_state: as for :func:`import_fp32`.
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
        ValueError: as for :func:`import_fp32`, or a pattern matches no name.
        RuntimeError: as for :func:`save`; on other ranks than 0 also for every other error of rank
            0.

    Examples:
        >>> import torch
        >>> from sharded_bf16_adamw import convert_fp32
        >>> convert_fp32({"layer.weight": torch.ones(2, 2)}, "checkpoints", lr=1e-3).name
        'step-00000000'
    """
    arguments = (source, root, optimizer_state, fp32, buffers, progress, hyperparameters)
    return Path(call_on_rank_0_via_store("convert_fp32", root, lambda: str(_convert(*arguments))))


def _convert(
    source: _Path | Mapping[str, Tensor],
    root: _Path,
    optimizer_state: _Path | Mapping[str, Any] | None,
    fp32: Iterable[str],
    buffers: Iterable[str],
    progress: Progress | None,
    hyperparams: dict[str, Any],
) -> Path:
    if latest(root) is not None:
        raise FileExistsError(f"{root} has a checkpoint already; give another directory")
    weights = open_weights(source)
    fp32 = _checked_patterns("fp32", fp32, weights)
    buffers = _checked_patterns("buffers", buffers, weights)
    state = None if optimizer_state is None else open_optimizer_state(optimizer_state)
    model = nn.Module()
    params: dict[str, nn.Parameter] = {}  # by the first of several tied names
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
        else:
            dtype = torch.float32 if _matches(name, fp32) else torch.bfloat16
            param = params.get(first_of.get(name, name))
            if param is None or param.dtype != dtype:
                param = nn.Parameter(torch.empty(info.shape, dtype=dtype, device="cpu"))
            params.setdefault(first_of.get(name, name), param)
            module.register_parameter(leaf, param)
    optimizer = AdamW_BF16(_build_param_groups(model, state), **{"lr": 1e-3, **hyperparams})
    import_fp32(source, model, optimizer, state, progress)
    step = max((int(values["step"]) for values in optimizer.state.values()), default=0)
    return save(root, step, model, optimizer)


# ----------------------------------------------------------------------------------------- filling


def _fill_weight(tensor: Tensor, weights: WeightsSource, name: str) -> None:
    for block, local in local_blocks(tensor):
        x = weights.read(name, block)
        local.copy_(split(x.float())[0] if local.dtype == torch.bfloat16 else x)


def _fill_correction(tensor: Tensor, weights: WeightsSource, name: str) -> None:
    for block, local in local_blocks(tensor):
        local.copy_(split(weights.read(name, block).float())[1])


def _fill_state(tensor: Tensor, value: Any) -> None:
    for block, local in local_blocks(tensor):
        if value is None:
            local.zero_()
            continue
        x = block.view_in(as_tensor(value)).detach().float()
        local.copy_(round_moment(x) if local.dtype == torch.bfloat16 else x)


def _set_hyperparams(live: dict[str, Any], imported: dict[str, Any], step: int) -> None:
    for key in HYPERPARAMS:
        if key in imported:
            value = imported[key]
            if isinstance(live[key], Tensor):
                live[key].copy_(as_tensor(value))  # a captured graph reads lr from this memory
            else:
                live[key] = float(value) if isinstance(value, Tensor) else value
    if "weight_decay" in imported:  # torch's AdamW scales it by lr
        live["decouple_lr"] = imported.get("decouple_lr", False)
        live["max_lr"] = imported.get("max_lr")
    live["schedule_step"] = step
    if live["scheduled_lr"] is not None:
        live["scheduled_lr"] = live["lr"]


def _report(progress: Progress | None, tensor: Tensor) -> None:
    if progress is not None:
        progress(sum(local.nbytes for _, local in local_blocks(tensor)))


# -------------------------------------------------------------------------------- names and checks


def _names_in_source(
    weights: WeightsSource,
    ties: list[list[str]],
    own_weights: dict[str, Any],
    elsewhere: set[str],
) -> dict[str, str]:
    """Map each name of the model to its name in the source; they differ only for tied parameters.

    Args:
        weights: the source.
        ties: sets of names that are tied in the model.
        own_weights: this rank's tensors.
        elsewhere: names that only other ranks have.

    Raises:
        ValueError: source and model do not fit.
    """
    source_name = {name: name for name in own_weights}
    mismatches = []
    for tied in ties:
        own = [name for name in tied if name in own_weights]
        present = [name for name in own if name in weights.infos]
        source_name.update({name: present[0] for name in own if present})
        mismatches += [
            f"{present[0]} and {other} are tied in the model but differ in the source"
            for other in present[1:]
            if not _equal_in_source(weights, present[0], other, own_weights[own[0]])
        ]
    for name, tensor in own_weights.items():
        if not isinstance(tensor, Tensor):
            continue
        info = weights.infos.get(source_name[name])
        mismatch = find_mismatch(name, info, tuple(tensor.shape), None)
        if mismatch is None and is_wrapper_subclass(tensor):
            mismatch = (
                f"{name} is a {type(tensor).__name__} in the model, which cannot be imported into; "
                "quantise it afterwards"
            )
        elif info is not None and not (
            info.dtype.is_floating_point and tensor.dtype.is_floating_point
        ):
            mismatch = mismatch or find_mismatch(name, info, info.shape, tensor.dtype)
        mismatches += [] if mismatch is None else [mismatch]
    mismatches += [
        f"unexpected key {name}"
        for name in weights.infos
        if name not in own_weights and name not in elsewhere
    ]
    raise_mismatches("the weights to import are of another model", mismatches)
    return source_name


def _equal_in_source(weights: WeightsSource, first: str, other: str, tensor: Tensor) -> bool:
    """Return True if this rank's part of a tensor is the same under two names of the source."""
    if weights.infos[first] != weights.infos[other]:
        return False
    if weights.infos[first].shape != tuple(tensor.shape):
        return True  # the size mismatch is reported instead
    return all(
        bitwise_equal(weights.read(first, block), weights.read(other, block))
        for block, _ in local_blocks(tensor)
    )


def _key_by_name(
    state_dict: dict[str, Any], own_groups: list[dict[str, Any]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return state and groups of an optimizer's state dict, keyed by parameter names."""
    state, groups = state_dict["state"], state_dict["param_groups"]
    if all(isinstance(key, str) for key in state) and state:
        return state, groups
    sizes = [len(group["params"]) for group in groups]
    own_sizes = [len(group["params"]) for group in own_groups]
    if sizes != own_sizes:
        raise ValueError(
            f"the optimizer state to import has groups of {sizes} parameters but this optimizer "
            f"has {own_sizes}; build it with the same groups, or export the state keyed by "
            "parameter names"
        )
    name_of = {
        key: name
        for group, own in zip(groups, own_groups, strict=True)
        for key, name in zip(group["params"], own["params"], strict=True)
    }
    unknown = [key for key in state if key not in name_of]
    if unknown:
        raise ValueError(
            f"the optimizer state to import has a state of {unknown[0]}, which is in none of its "
            "groups; export it again"
        )
    return (
        {name_of[key]: values for key, values in state.items()},
        [{**group, "params": [name_of[key] for key in group["params"]]} for group in groups],
    )


def _file_under_ties(
    state: dict[str, Any],
    groups: list[dict[str, Any]],
    ties: list[list[str]],
    source_ties: list[list[str]],
    own_params: set[str],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """File the states of tied parameters under the names in ``own_params``.

    Args:
        state: imported states by name.
        groups: imported groups.
        ties: sets of names that are tied in the model.
        source_ties: sets of names that are tied in the source.
        own_params: names of this optimizer's parameters.

    Raises:
        ValueError: names that are tied in the model have different states.
    """
    state = dict(state)
    params_of_groups = [set(group["params"]) for group in groups]
    for tied in source_ties:  # they share one state
        holder = next((name for name in tied if name in state), None)
        if holder is None:
            continue
        for name in own_params.intersection(tied):
            state.setdefault(name, state[holder])
            for params in params_of_groups:
                params.update([name] if holder in params else [])
    for first, *others in ties:
        for name in [name for name in others if name in state]:
            other_state = state.pop(name)
            if not _equal_states(state.setdefault(first, other_state), other_state):
                raise ValueError(
                    f"{first} and {name} are tied in the model but have different states to "
                    "import; untie them"
                )
            for params in params_of_groups:
                params.update([first] if name in params else [])
                params.discard(name)
    return state, [
        {**group, "params": sorted(params)}
        for group, params in zip(groups, params_of_groups, strict=True)
    ]


def _equal_states(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return a is b or all(
        bitwise_equal(as_tensor(a[key]), as_tensor(b[key]))
        for key in ("step", *MOMENTS)
        if key in a and key in b
    )


def _with_saved_names(group: dict[str, Any], names: RankNames) -> dict[str, Any]:
    return {**group, "params": list(map(names.to_saved, group["params"]))}


def _check_states(imported: dict[str, Any], own_states: dict[str, Any]) -> None:
    mismatches = [f"unexpected parameter {name}" for name in imported if name not in own_states]
    for name in imported.keys() & own_states.keys():
        for key in ("step", *MOMENTS):
            value = imported[name].get(key)
            saved = None if value is None else as_tensor(value)
            shape = () if key == "step" else tuple(own_states[name][key].shape)
            mismatch = find_mismatch(f"{name}.{key}", saved, shape, None)
            mismatches += [] if mismatch is None else [mismatch]
    raise_mismatches(
        "the optimizer state to import is of another model, or not of AdamW", mismatches
    )


def _matched_groups(
    own_groups: list[dict[str, Any]], imported_groups: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the imported group from which each own group takes its hyper-parameters."""
    matches = match_groups(
        [group["params"] for group in own_groups], [group["params"] for group in imported_groups]
    )
    for group, match in zip(own_groups, matches, strict=True):
        if group["params"] and match is None:
            raise ValueError(
                "no group of the optimizer state to import has all of "
                f"{', '.join(group['params'][:3])}...; build the same groups"
            )
    return [{} if match is None else imported_groups[match] for match in matches]


def _max_step(state: dict[str, Any], names: Iterable[str]) -> int:
    return max((int(state[name]["step"]) for name in names if name in state), default=0)


# ----------------------------------------------------------------------- conversion without a model


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


def _build_param_groups(model: nn.Module, state: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Divide the model's parameters into groups as in the optimizer state.

    Parameters that the state does not name join the first group.
    """
    params = dict(model.named_parameters())
    if state is None:
        return [{"params": list(params.values())}]
    groups = [group["params"] for group in state["param_groups"]]
    if all(isinstance(name, str) for names in groups for name in names):
        divided = [[params.pop(name) for name in names if name in params] for names in groups]
        divided[0] += params.values()
        return [{"params": group} for group in divided]
    count = sum(map(len, groups))
    if count != len(params):
        raise ValueError(
            f"the optimizer state is of {count} parameters but the weights have {len(params)}; "
            "name the buffers among them"
        )
    remaining = iter(params.values())
    return [{"params": [next(remaining) for _ in group]} for group in groups]
