"""The average of the weights has the bits of a single process under every sharding."""

import functools
import itertools

import pytest
import torch
from distributed import run_ranks
from torch.distributed.tensor import DTensor

from sharded_bf16_adamw import EMA
from sharded_bf16_adamw.sharding.dtensor import to_local

from .strategy_cases import BY_NAME, Layers, Wrapped, backward, collect, make_batch, make_optimizer

STRATEGIES = [
    (2, "DDP"),
    (2, "FSDP1 FULL_SHARD, use_orig_params=False"),
    (2, "FSDP1 SHARD_GRAD_OP, use_orig_params=True"),
    (2, "FSDP2"),
    (2, "FSDP2 reshard_after_forward=False"),
    (2, "FSDP2 shard_placement_fn to columns"),
    (2, "tensor parallel"),
    (2, "ZeRO-1 beside DDP"),
    (2, "ZeRO-2"),
    (4, "HSDP (FSDP2, 2 x 2)"),
]


def evaluate(wrapped, step):
    with torch.no_grad():
        return float(wrapped.module(make_batch(step)))


def train(wrapped):
    """Train and evaluate the average between two steps.

    Returns:
        Weights and states by name; the losses before, of the average, and after.
    """
    optimizer = make_optimizer(wrapped)
    ema = EMA(wrapped.module, optimizer, decay=0.8)
    with ema.swapped():  # before any forward pass
        pass
    losses = []
    for step in range(6):
        backward(wrapped, make_batch(step))
        optimizer.step(zero_grad=True)
        ema.update()
        if step == 3:
            before = local_tensors(optimizer)
            losses.append(evaluate(wrapped, step))  # FSDP's root holds the whole weights now
            with ema.swapped():
                losses.append(evaluate(wrapped, step))
            losses.append(evaluate(wrapped, step))
            assert all(map(torch.equal, before, local_tensors(optimizer)))
    return collect(wrapped.module, optimizer), losses


def local_tensors(optimizer):
    params = [param for group in optimizer.param_groups for param in group["params"]]
    states = [value for param in params for value in optimizer.state[param].values()]
    return [to_local(tensor).detach().clone() for tensor in (*params, *states)]


def worker(rank, world, name):
    return train(BY_NAME[name].wrap(Layers(), world))


def full_memory_worker(rank, world):
    """Run out of memory at the third parameter: first in its swap, then in its all-gather."""
    wrapped = BY_NAME["ZeRO-2"].wrap(Layers(), world)
    optimizer = make_optimizer(wrapped)
    ema = EMA(wrapped.module, optimizer, decay=0.8)
    backward(wrapped, make_batch(0))
    optimizer.step(zero_grad=True)
    ema.update()
    before = local_tensors(optimizer)
    all_gather, gathers = DTensor.full_tensor, itertools.count()

    def failing(function):
        calls = itertools.count()

        def fail_once(*args):
            if next(calls) == 2:
                raise torch.OutOfMemoryError
            return function(*args)

        return fail_once

    def counted(tensor):
        next(gathers)
        return all_gather(tensor)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(DTensor, "full_tensor", counted)
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(ema, "_exchange", failing(ema._exchange))
            with pytest.raises(torch.OutOfMemoryError), ema.swapped():
                raise AssertionError("not entered")
        # Other ranks might not have failed, so no all-gather undoes the swap.
        assert next(gathers) == 0 and all(map(torch.equal, before, local_tensors(optimizer)))
        optimizer.state_dict()
        patched.setattr(DTensor, "full_tensor", failing(counted))
        with pytest.raises(torch.OutOfMemoryError), ema.swapped():
            raise AssertionError("not entered")
    assert next(gathers) == 1 + 2
    with pytest.raises(RuntimeError, match=r"restart from a checkpoint if ema\.swapped\(\) itself"):
        optimizer.step()


def test_swap_that_fails_on_one_rank_exchanges_nothing_more():
    run_ranks(2, full_memory_worker)


@functools.cache
def expected():
    return train(Wrapped(Layers()))


@pytest.mark.parametrize(("world", "name"), STRATEGIES)
def test_average_and_its_evaluation_match_a_single_process(world, name):
    reference, (before, average, after) = expected()
    assert before == after != average
    assert any(not torch.equal(each["ema"], each["weights"]) for each in reference.values())
    for values, losses in run_ranks(world, worker, name):
        assert values.keys() == reference.keys()
        for fqn, tensors in values.items():
            assert torch.equal(tensors["weights"], reference[fqn]["weights"]), fqn
            assert torch.equal(tensors["ema"], reference[fqn]["ema"]), fqn
        assert losses[0] == losses[2] != losses[1]
        assert abs(losses[1] - average) < abs(average - before) / 4
