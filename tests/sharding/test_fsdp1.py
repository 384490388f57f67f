"""FSDP1: norms and the guard over its shard groups, its state through torch's own API, and uses that must be refused."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy

from sharded_bf16_adamw import AdamW_BF16, load, save
from sharded_bf16_adamw.sharding import fsdp1
from sharded_bf16_adamw.sharding.fsdp1 import full_optimizer_state_dict

from .strategy_cases import BY_NAME, CLIP, Layers, Wrapped, backward, collect, make_batch, make_optimizer, single_process

BF16 = torch.bfloat16


def wrap(module, use_orig_params=True, mesh=None, **options):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # FSDP1 is deprecated
        return FullyShardedDataParallel(module, device_mesh=mesh, use_orig_params=use_orig_params, device_id=torch.device("cpu"), **options)


def wrapped(use_orig_params, strategy="FULL_SHARD"):
    return BY_NAME[f"FSDP1 {strategy}, use_orig_params={use_orig_params}"].wrap(Layers(), dist.get_world_size())


def train(model, optimizer, steps):
    for step in steps:
        backward(model, make_batch(step))
        optimizer.step(zero_grad=True)


def same(a, b):
    return a.keys() == b.keys() and all(
        a[name].keys() == b[name].keys() and all(torch.equal(a[name][key], b[name][key]) for key in a[name]) for name in a
    )


# ------------------------------------------------------------------------------------------------------------ norm and guard


def one_element_worker(rank, world, nonfinite):
    """One weight over all ranks: only rank 0 has it, and the others have no gradient."""
    model = wrap(nn.Linear(1, 1, bias=False).to(BF16))
    optimizer = AdamW_BF16(model.parameters(), lr=1e-2, skip_nonfinite=True)
    model(torch.full((1, 1), float("nan") if nonfinite else 3.0, dtype=BF16)).sum().backward()
    held = [p.numel() for p in model.parameters()]
    has_gradient = [p.grad is not None for p in model.parameters()]
    norm = optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    return held, has_gradient, norm.item(), optimizer.skipped_steps


def test_ranks_without_any_element_take_part_in_the_norm():
    results = run_ranks(3, one_element_worker, False)
    assert results == [([1], [True], 3.0, 0), ([0], [False], 3.0, 0), ([0], [False], 3.0, 0)]


def test_ranks_without_any_element_learn_of_a_nan():
    assert [skipped for _, _, _, skipped in run_ranks(3, one_element_worker, True)] == [1, 1, 1]


def guard_worker(rank, world, use_orig_params, strategy):
    """The second step's NaN is in one row of one weight alone, so on one rank of those that shard."""
    model = wrapped(use_orig_params, strategy)
    optimizer = AdamW_BF16(model.module.parameters(), lr=1e-2, skip_nonfinite=True)
    train(model, optimizer, [0])
    before = collect(model.module, optimizer)
    batch = make_batch(1)
    batch["wide"][1][:, 7] = float("nan")
    backward(model, batch)
    nan_here = any(p.grad is not None and bool(p.grad.isnan().any()) for p in model.module.parameters())
    optimizer.step(zero_grad=True)
    unchanged = same(collect(model.module, optimizer), before)
    train(model, optimizer, [2])
    return nan_here, unchanged, optimizer.skipped_steps, same(collect(model.module, optimizer), before)


@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize(("world", "strategy"), [(3, "FULL_SHARD"), (4, "HYBRID_SHARD"), (2, "NO_SHARD")])
def test_one_ranks_nan_makes_every_rank_skip(world, strategy, use_orig_params):
    results = run_ranks(world, guard_worker, use_orig_params, strategy)
    if strategy != "NO_SHARD":
        assert not all(nan_here for nan_here, *_ in results)
    assert [rest for _, *rest in results] == [[True, 1, False]] * world


def ignored_worker(rank, world, use_orig_params):
    """A parameter that FSDP ignores is a plain one that every rank holds, and counts once."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).to(BF16)
    ignored = model[1].weight
    model = wrap(model, use_orig_params, ignored_states=[ignored])
    model(torch.ones(1, 4, dtype=BF16))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    whole = 32 if use_orig_params else sum(p.numel() for p in model.parameters() if p is not ignored) * world + 16
    return AdamW_BF16(model.parameters(), lr=1e-2).clip_grad_norm_(1.0).item() ** 2, whole


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_ignored_parameters_count_once(use_orig_params):
    for squared, whole in run_ranks(2, ignored_worker, use_orig_params):
        assert squared == pytest.approx(whole, rel=1e-6)


def accumulation_worker(rank, world, use_orig_params):
    """Two micro-batches, the first in ``no_sync``; gradients are reduced in fp32."""
    precision = MixedPrecision(param_dtype=BF16, reduce_dtype=torch.float32)
    model = Layers()
    model = Wrapped(wrap(model, use_orig_params, auto_wrap_policy=lambda **_: True, mixed_precision=precision), rank, world)
    optimizer = make_optimizer(model)
    for step in range(5):
        batch = make_batch(step)
        first, second = ({name: (x[half], c[half]) for name, (x, c) in batch.items()} for half in (slice(0, 6), slice(6, 12)))
        with model.module.no_sync():
            backward(model, first)
        backward(model, second)
        optimizer.clip_grad_norm_(CLIP)
        optimizer.step(zero_grad=True)
    return collect(model.module, optimizer)


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_accumulated_and_mixed_precision_gradients_give_the_bits_of_one_process(use_orig_params):
    expected, _ = single_process(5)
    for result in run_ranks(2, accumulation_worker, use_orig_params):
        assert same(result, expected)


# --------------------------------------------------------------------------------------------------------------------- state


def full_state_worker(rank, world, use_orig_params, strategy):
    model = wrapped(use_orig_params, strategy)
    optimizer = make_optimizer(model)
    train(model, optimizer, range(5))
    offloaded = full_optimizer_state_dict(model.module, optimizer, cpu_offload=True)
    gathered = full_optimizer_state_dict(model.module, optimizer)
    return offloaded.get("state"), gathered["state"]


@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize("strategy", ["FULL_SHARD", "NO_SHARD"])
def test_full_state_is_right_and_on_rank_0_alone_where_offloaded(use_orig_params, strategy):
    model = Wrapped(Layers())
    optimizer = make_optimizer(model)
    train(model, optimizer, range(5))
    expected = collect(model.module, optimizer)
    for states in expected.values():
        del states["weights"]
    (offloaded, gathered), (nothing, other) = run_ranks(2, full_state_worker, use_orig_params, strategy)
    assert nothing is None
    assert same(offloaded, expected)
    assert same(gathered, expected) and same(other, expected)


def reload_worker(rank, world, use_orig_params, options):
    """States go to a new model and optimizer through torch's own functions, and training goes on with the same bits."""
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
    equal_at_once = same(collect(resumed.module, resumed_optimizer), collect(model.module, optimizer))
    for both in ((model, optimizer), (resumed, resumed_optimizer)):
        train(*both, range(3, 6))
    return equal_at_once, same(collect(resumed.module, resumed_optimizer), collect(model.module, optimizer))


@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize(
    "options",
    [StateDictOptions(), StateDictOptions(flatten_optimizer_state_dict=True), StateDictOptions(full_state_dict=True)],
    ids=["sharded", "sharded and flattened", "full"],
)
def test_state_reloads_through_torchs_api(use_orig_params, options):
    assert run_ranks(3, reload_worker, use_orig_params, options) == [(True, True)] * 3


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
def test_checkpoints_go_between_fsdp1_and_fsdp2_and_other_numbers_of_ranks(tmp_path, use_orig_params):
    name = f"FSDP1 FULL_SHARD, use_orig_params={use_orig_params}"
    expected, *_ = run_ranks(3, checkpoint_worker, tmp_path / "1", name, "save")
    single = Wrapped(Layers())
    optimizer = make_optimizer(single)
    train(single, optimizer, range(3))
    assert same(expected, collect(single.module, optimizer))
    for result in run_ranks(2, checkpoint_worker, tmp_path / "1", "FSDP2", "load"):
        assert same(result, expected)
    run_ranks(2, checkpoint_worker, tmp_path / "2", "FSDP2", "save")
    for result in run_ranks(4, checkpoint_worker, tmp_path / "2", name, "load"):
        assert same(result, expected)


# -------------------------------------------------------------------------------------------------------------------- misuse


def built_too_early_worker(rank, world):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(BF16)
    optimizer = AdamW_BF16(model.parameters(), lr=1e-2)
    wrap_of_model = wrap(model, use_orig_params=False)
    wrap_of_model(torch.ones(1, 4, dtype=BF16)).sum().backward()
    with pytest.raises(
        RuntimeError, match=r"built before .*FullyShardedDataParallel.*; build AdamW_BF16\(model.parameters\(\)\) afterwards"
    ):
        optimizer.step()
    assert not optimizer.state


def test_optimizer_built_before_wrapping_is_refused_where_fsdp_replaces_the_parameters():
    run_ranks(2, built_too_early_worker)


def built_early_with_orig_params_worker(rank, world, stepped):
    """``use_orig_params=True`` keeps the parameter objects: an optimizer without state trains them, one with state of the old shapes
    must not."""
    model = nn.Linear(4, 4).to(BF16)
    optimizer = AdamW_BF16(model.parameters(), lr=1e-2)
    if stepped:
        model(torch.ones(1, 4, dtype=BF16)).sum().backward()
        optimizer.step(zero_grad=True)
    sharded = wrap(model)
    sharded(torch.ones(1, 4, dtype=BF16)).sum().backward()
    if stepped:
        with pytest.raises((RuntimeError, ValueError), match="shape"):
            optimizer.step()
        return None
    before = [p.detach().clone() for p in sharded.parameters()]
    optimizer.step()
    return [not torch.equal(a, b) for a, b in zip(before, sharded.parameters(), strict=True) if a.numel()]


def test_optimizer_built_before_wrapping_trains_where_fsdp_keeps_the_parameters():
    assert all(all(changed) and changed for changed in run_ranks(2, built_early_with_orig_params_worker, False))


def test_state_from_before_wrapping_is_refused():
    run_ranks(2, built_early_with_orig_params_worker, True)


def module_gone_worker(rank, world):
    model = wrap(nn.Linear(4, 4).to(BF16))
    model(torch.ones(1, 4, dtype=BF16)).sum().backward()
    params = list(model.parameters())
    optimizer = AdamW_BF16(params, lr=1e-2)
    del model
    gc.collect()
    with pytest.raises(RuntimeError, match="no live FSDP module holds it"):
        optimizer.clip_grad_norm_(1.0)


def test_a_norm_whose_ranks_are_unknown_is_an_error():
    run_ranks(2, module_gone_worker)


def lookup_worker(rank, world):
    """The walk over all objects happens once, not at every step."""
    model = wrap(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(BF16))
    optimizer = AdamW_BF16(model.parameters(), lr=1e-2)
    walks = []
    original, fsdp1._register_handles = fsdp1._register_handles, lambda: (walks.append(1), original())
    try:
        for _ in range(3):
            model(torch.ones(1, 4, dtype=BF16)).sum().backward()
            optimizer.clip_grad_norm_(1.0)
            optimizer.step(zero_grad=True)
    finally:
        fsdp1._register_handles = original
    return len(walks)


def test_modules_are_looked_up_once():
    assert run_ranks(2, lookup_worker) == [1, 1]


def hybrid_worker(rank, world):
    """Different groups in one optimizer: one model sharded over all ranks, one over pairs of them, each gradient element 1."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    models = [
        wrap(nn.Linear(8, 8, bias=False).to(BF16)),
        wrap(nn.Linear(6, 6, bias=False).to(BF16), mesh=mesh, sharding_strategy=ShardingStrategy.HYBRID_SHARD),
    ]
    for model in models:
        model(torch.ones(1, model.weight.shape[0] if model.weight.ndim > 1 else model.module.in_features, dtype=BF16)).sum().backward()
    optimizer = AdamW_BF16([p for model in models for p in model.parameters()], lr=1e-2)
    return optimizer.clip_grad_norm_(1.0).item()


def test_parameters_of_different_groups_count_once():
    assert run_ranks(4, hybrid_worker) == [10.0] * 4  # sqrt(8 * 8 + 6 * 6)
