"""FSDP1: optimizer state through torch's functions, in full, and in checkpoints."""

from __future__ import annotations

import warnings

import pytest
from bits import same_bits
from distributed import run_ranks
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from sharded_bf16_adamw import gather_full_state_dict, load, save

from .fsdp1_cases import train, wrapped
from .strategy_cases import BY_NAME, Layers, Wrapped, collect, make_optimizer


def full_state_worker(rank, world, use_orig_params, strategy):
    model = wrapped(use_orig_params, strategy)
    optimizer = make_optimizer(model)
    train(model, optimizer, range(5))
    return gather_full_state_dict(model.module, optimizer).get("state")


@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize("strategy", ["FULL_SHARD", "NO_SHARD"])
def test_rank_0_gathers_the_full_state(use_orig_params, strategy):
    model = Wrapped(Layers())
    optimizer = make_optimizer(model)
    train(model, optimizer, range(5))
    expected = collect(model.module, optimizer)
    for states in expected.values():
        del states["weights"]
    gathered, other = run_ranks(2, full_state_worker, use_orig_params, strategy)
    assert same_bits(gathered, expected) and other is None


def reload_worker(rank, world, use_orig_params, options):
    """Copy states to a new optimizer by torch's functions; training continues equally."""
    model = wrapped(use_orig_params)
    optimizer = make_optimizer(model)
    train(model, optimizer, range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        weights = get_model_state_dict(model.module, options=options)
        states = get_optimizer_state_dict(model.module, optimizer, options=options)
        resumed = wrapped(use_orig_params)
        resumed_optimizer = make_optimizer(resumed)
        set_model_state_dict(resumed.module, weights, options=options)
        set_optimizer_state_dict(resumed.module, resumed_optimizer, states, options=options)
    equal_at_once = same_bits(
        collect(resumed.module, resumed_optimizer), collect(model.module, optimizer)
    )
    for both in ((model, optimizer), (resumed, resumed_optimizer)):
        train(*both, range(3, 6))
    return equal_at_once, same_bits(
        collect(resumed.module, resumed_optimizer), collect(model.module, optimizer)
    )


@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        StateDictOptions(),
        StateDictOptions(flatten_optimizer_state_dict=True),
        StateDictOptions(full_state_dict=True),
    ],
    ids=["sharded", "sharded and flattened", "full"],
)
def test_state_reloads_through_torch_functions(use_orig_params, options):
    assert run_ranks(2, reload_worker, use_orig_params, options) == [(True, True)] * 2


def checkpoint_worker(rank, world, folder, name, action):
    model = BY_NAME[name].wrap(Layers(), world)
    optimizer = make_optimizer(model)
    if action == "save":
        train(model, optimizer, range(3))
        save(folder, 3, model.module, optimizer)
    else:
        load(folder, model.module, optimizer)
    return collect(model.module, optimizer)


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_checkpoints_between_fsdp1_and_fsdp2_on_other_world_sizes(tmp_path, use_orig_params):
    name = f"FSDP1 FULL_SHARD, use_orig_params={use_orig_params}"
    expected, *_ = run_ranks(3, checkpoint_worker, tmp_path / "1", name, "save")
    single = Wrapped(Layers())
    optimizer = make_optimizer(single)
    train(single, optimizer, range(3))
    assert same_bits(expected, collect(single.module, optimizer))
    for result in run_ranks(2, checkpoint_worker, tmp_path / "1", "FSDP2", "load"):
        assert same_bits(result, expected)
    run_ranks(2, checkpoint_worker, tmp_path / "2", "FSDP2", "save")
    for result in run_ranks(4, checkpoint_worker, tmp_path / "2", name, "load"):
        assert same_bits(result, expected)
