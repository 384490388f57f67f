"""ZeRO with ``static_graph=True``: the same bits, no exchange on the host, and errors."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from distributed import run_ranks
from torch import nn

from sharded_bf16_adamw import AdamW_BF16

from . import loop_cases as loops
from .cases import (
    Linears,
    Parameters,
    assert_same_bits,
    backpressure_timeout,
    collect,
    consensus_calls,
    mean_gradients,
    mesh_of,
    mesh_with_timeout,
    new_optimizer,
    rank_gradients,
    shorten_timeout,
    traffic,
    train,
    zero,
)
from .loop_cases import ALL, FP32_SUMS, Loop, assert_loops_match, run_loops

# The first step records and broadcasts the order of gradients; the second has the final buckets.
STEPS_WITH_EXCHANGES, BROADCASTS = 2, 1


# -------------------------------------------------------------------------------- steady steps


def steady_worker(rank, world, stage, shape, static_graph):
    """Return (name, bytes of the tensor) of each collective of a steady step."""
    width = 16
    model = Linears(6, width)
    optimizer = new_optimizer(
        model,
        zero(
            stage,
            mesh_of(shape),
            bucket_size_mb=2 * width**2 * 2 / 2**20,
            static_graph=static_graph,
        ),
    )
    seen = []
    for _ in range(5):
        with traffic() as sent, consensus_calls() as exchanges:
            model(torch.ones(2, width, dtype=torch.bfloat16)).sum().backward()
            optimizer.clip_grad_norm_(1.0)
            optimizer.step(zero_grad=True)
        seen.append(sorted((name, size) for name, _, size in sent))
    assert seen[2] == seen[3] == seen[4]
    assert len(exchanges) == sum(name.startswith("consensus") for name, _ in seen[4])
    return seen[4]


@pytest.mark.parametrize(("stage", "shape"), [(1, (2,)), (2, (2,)), (1, (2, 2)), (2, (2, 2))])
def test_exchanges_of_a_steady_step(stage, shape):
    """Beyond buckets and the norm: none with ``static_graph`` or on one dimension, else 8 bytes."""
    world = torch.Size(shape).numel()
    dynamic = run_ranks(world, steady_worker, stage, shape, False)
    static = run_ranks(world, steady_worker, stage, shape, True)
    for sent, static_sent in zip(dynamic, static, strict=True):
        assert not any(name.startswith("consensus") for name, _ in static_sent)
        if stage == 2 and len(shape) == 1:
            assert [name for name, _ in sent] == [name for name, _ in static_sent]
            more = sum(size for _, size in sent) - sum(size for _, size in static_sent)
            assert more == 2 * world, "one number to each rank, with the last bucket"
        else:
            sent.remove(("consensus.all_reduce", 8))
            assert sent == static_sent


def always_unused(loop):
    for step in range(4):
        loop.backward(step, lambda rank: ALL - {"conv", "fp32", "scalar"})
        loop.step()


SCENARIOS = [
    always_unused,
    loops.unused_on_some_ranks,
    loops.several_backwards,
    loops.several_backwards_with_other_uses,
    loops.no_sync,
    loops.gradients_set_by_hand,
    loops.gradients_that_are_views,
    loops.memory_of_parameters_replaced,
    loops.state_reloaded,
    loops.closure,
    loops.clipped_before_and_after_the_last_backward,  # two reductions per step
]


def scenarios_worker(rank, world, options):
    def run(scenario, loop):
        with backpressure_timeout(0.05), consensus_calls() as exchanges:
            scenario(loop)
        reductions = 2 if scenario is SCENARIOS[-1] else 1
        if scenario is not loops.discarded_gradients:
            assert len(exchanges) == STEPS_WITH_EXCHANGES * reductions + BROADCASTS, exchanges

    new_loop = partial(Loop, world, {**options, "static_graph": True})
    return run_loops([*SCENARIOS, loops.discarded_gradients], new_loop, run)


@pytest.mark.parametrize(
    ("world", "options"),
    [(2, {}), pytest.param(4, FP32_SUMS, marks=pytest.mark.exhaustive)],
    ids=str,
)
def test_loops_that_keep_the_promise_match_single_process(world, options):
    expected = run_loops([*SCENARIOS, loops.discarded_gradients], partial(Loop, world))
    assert_loops_match(run_ranks(world, scenarios_worker, options), expected)


def stage_1_worker(rank, world):
    model = Parameters()
    optimizer = new_optimizer(model, zero(1, static_graph=True))
    norms = train(model, optimizer, 6, averaged=True, clip=0.5)
    return collect(model, optimizer), norms


def test_stage_1_matches_single_process():
    model = Parameters()
    optimizer = new_optimizer(model)
    expected_norms = train(model, optimizer, 6, averaged=True, clip=0.5)
    for weights, norms in run_ranks(3, stage_1_worker):
        assert norms == expected_norms
        assert_same_bits(weights, collect(model, optimizer))


def late_group_worker(rank, world, stage, between):
    """The group is added between two backward passes of a step, or before steps without any."""
    results = []
    for sharding in (zero(stage, static_graph=True), None):
        model = Parameters()
        optimizer = new_optimizer(model, sharding)
        late = nn.Parameter(torch.linspace(-1, 1, 30).bfloat16().view(10, 3))
        for step in range(8):
            grads = rank_gradients(step, 0, 1)
            rest = {"large": grads.pop("large")} if between and step == 4 else {}
            if between or step != 4:
                model(grads).backward()
            if step == 4:
                optimizer.add_param_group({"params": [("late", late)], "weight_decay": 0.5})
            if not between and step == 4:
                for _ in range(3):
                    optimizer.step()
                model(grads).backward()
            if rest:
                model(rest).backward()
            if step >= 4:
                (late * 0.5).sum().backward()
            with consensus_calls() as exchanges:
                optimizer.step()
                optimizer.zero_grad()
            model.zero_grad()
            late.grad = None
        assert not exchanges
        results.append([p.detach() for p in (*model.parameters(), late)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("between", [True, False])
@pytest.mark.parametrize("stage", [1, 2])
def test_added_group_is_agreed_on(stage, between):
    run_ranks(2, late_group_worker, stage, between)


def not_averaged_worker(rank, world):
    """The first gradients are zeros, which are equal although nobody averages them."""
    model = Parameters()
    optimizer = new_optimizer(model, zero(1, static_graph=True))
    model({name: torch.zeros_like(grad) for name, grad in mean_gradients(0).items()}).backward()
    optimizer.step(zero_grad=True)
    model(rank_gradients(0, rank, world)).backward()
    with pytest.raises(RuntimeError, match="gradients of parameter 'even' differ between ranks"):
        optimizer.step()


def test_stage_1_still_looks_for_ddp():
    run_ranks(2, not_averaged_worker)


# ------------------------------------------------------------------------- the promise is broken


def fewer(model, optimizer, grads):
    del grads["large"]
    model(grads).backward()


def more(model, optimizer, grads):
    model(grads | {"conv": mean_gradients(0)["conv"]}).backward()


def twice(model, optimizer, grads):
    model(grads).backward()
    model(grads).backward()


def no_backward(model, optimizer, grads):
    pass


def set_twice_by_hand(model, optimizer, grads):
    model(grads).backward()
    for name, grad in grads.items():
        model.get_parameter(name).grad = grad


def frozen(model, optimizer, grads):
    model.large.requires_grad_(False)
    model(grads).backward()


def other_dtype(model, optimizer, grads):
    model(grads).backward()
    model.large.data = model.large.data.float()


def stale(model, optimizer, grads):
    model(grads).backward()  # zero_grad() was not called before


BROKEN = [
    (2, fewer, "parameter 'large' has no gradient, but had one in the step before; with ZeRO"),
    (2, more, "parameter 'conv' has a gradient, but had none in the step before; with ZeRO"),
    (2, twice, r"gave parameter '\w+' 2 gradients to reduce, but 1 in the step before; with ZeRO"),
    (2, set_twice_by_hand, r"'\w+' 2 gradients to reduce, but 1 in the step before; with ZeRO"),
    (2, no_backward, "parameter '\\w+' has no gradient, but had one in the step before"),
    (2, frozen, "parameter 'large' has no gradient, but had one in the step before"),
    (2, other_dtype, "'large' was .*bfloat16.* and is now .*float32.*; with ZeRO"),
    (2, stale, "new gradients were accumulated onto gradients that the previous"),
    (1, fewer, "parameter 'large' has no gradient, but had one in the step before; with ZeRO"),
    (1, more, "parameter 'conv' has a gradient, but had none in the step before; with ZeRO"),
    (1, other_dtype, "'large' was .*bfloat16.* and is now .*float32.*; with ZeRO"),
]
IDS = [f"{stage}-{breaking.__name__}" for stage, breaking, _ in BROKEN]


def usual_gradients(step):
    return {name: grad for name, grad in mean_gradients(step).items() if name != "conv"}


def train_until_static(stage, mesh=None):
    """Return a model and its optimizer after three steps, in which ``conv`` was unused."""
    model = Parameters()
    optimizer = new_optimizer(model, zero(stage, mesh, static_graph=True))
    for step in range(1, 4):
        model(usual_gradients(step)).backward()
        optimizer.step(zero_grad=True)
    return model, optimizer


def broken_worker(rank, world, number):
    """Rank 1 breaks the promise; it sends nothing more, and rank 0 waits for it in vain."""
    stage, breaking, _ = BROKEN[number]
    mesh = mesh_with_timeout(60)
    model, optimizer = train_until_static(stage, mesh)
    with traffic() as promised:
        model(usual_gradients(4)).backward()
    optimizer.step(zero_grad=rank == 0 or breaking is not stale)
    shorten_timeout(optimizer, mesh)
    with traffic() as sent, backpressure_timeout(0.05):
        if rank == 1:
            breaking(model, optimizer, usual_gradients(5))
        else:
            model(usual_gradients(5)).backward()
    assert len(sent) <= len(promised), "nothing that the other rank does not expect"
    before = [p.detach().clone() for p in model.parameters()]
    with traffic() as sent, pytest.raises(RuntimeError) as caught:
        optimizer.step()
    if rank == 0:
        assert "failed on rank 0; most likely one of them has died or hangs" in str(caught.value)
        return None
    assert sent == []
    assert all(map(torch.equal, before, model.parameters()))
    return str(caught.value)


@pytest.mark.parametrize("number", range(len(BROKEN)), ids=IDS)
def test_broken_promise_is_an_error_on_its_rank_and_a_timeout_on_the_others(number):
    _, message = run_ranks(2, broken_worker, number)
    assert re.search(BROKEN[number][2], message), message


def idle_worker(rank, world):
    """Rank 1 never has a gradient, and once does not call ``zero_grad()``."""
    p = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    mesh = mesh_with_timeout(60)
    optimizer = AdamW_BF16([p], lr=0.5, weight_decay=0.0, sharding=zero(2, mesh, static_graph=True))
    for step in range(4):
        if rank == 0:
            p.sum().backward()
        optimizer.step(zero_grad=rank == 0 or step < 3)
    assert p.tolist() == [-2.0] * 4
    shorten_timeout(optimizer, mesh)
    if rank == 0:
        p.sum().backward()
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    return str(caught.value)


def test_idle_rank_without_zero_grad():
    _, message = run_ranks(2, idle_worker)
    assert message.startswith("optimizer.zero_grad() was not called after the step before; with")


def broken_everywhere_worker(rank, world, breaking):
    """Every rank discards what broke the promise, and goes on."""
    model, optimizer = train_until_static(2)
    for step in range(4, 6):
        breaking(model, optimizer, usual_gradients(100))
        with pytest.raises(RuntimeError, match=r"with ZeRO\(static_graph=True\) every step must"):
            optimizer.step()
        optimizer.zero_grad()
        model(usual_gradients(step)).backward()
        optimizer.step(zero_grad=True)
    return collect(model, optimizer)


@pytest.mark.parametrize("breaking", [fewer, more, twice, no_backward])
def test_discarding_what_broke_the_promise(breaking):
    model = Parameters()
    optimizer = new_optimizer(model)
    for step in range(1, 6):
        model(usual_gradients(step)).backward()
        optimizer.step(zero_grad=True)
    for found in run_ranks(2, broken_everywhere_worker, breaking):
        assert_same_bits(found, collect(model, optimizer))


def stale_worker(rank, world):
    model, optimizer = train_until_static(2)
    model(usual_gradients(4)).backward()
    optimizer.step()
    for _ in range(2):
        model(usual_gradients(100)).backward()
        with pytest.raises(RuntimeError, match="new gradients were accumulated onto"):
            optimizer.step()
    optimizer.zero_grad()
    model(usual_gradients(5)).backward()
    optimizer.step()
    return collect(model, optimizer)


def test_stale_gradients_until_zero_grad():
    model = Parameters()
    optimizer = new_optimizer(model)
    for step in range(1, 6):
        model(usual_gradients(step)).backward()
        optimizer.step(zero_grad=True)
    for found in run_ranks(2, stale_worker):
        assert_same_bits(found, collect(model, optimizer))
