"""Failed steps under ``step_in_backward=True`` with ZeRO that only some ranks know of."""

from __future__ import annotations

import pytest
import torch
from bits import same_bits
from distributed import run_ranks

import sharded_bf16_adamw

from .cases import Linears, backpressure_timeout, collect, new_optimizer, zero

LAYERS, WIDTH = 4, 16


def new_training():
    """Return a model of a layer per bucket, and its optimizer."""
    model = Linears(LAYERS, WIDTH)
    size = WIDTH * WIDTH * 2 / 2**20
    sharding = zero(2, bucket_size_mb=size, max_in_flight=1)
    return model, new_optimizer(model, sharding, step_in_backward=True)


def backward(model, rank, step):
    generator = torch.Generator().manual_seed(10 * step + rank)
    x = torch.randn(4, WIDTH, generator=generator).bfloat16()
    model(x).square().mean().backward()


def train(model, optimizer, rank, steps):
    for step in steps:
        with backpressure_timeout(60.0):
            backward(model, rank, step)
        optimizer.step()


def in_step(model, optimizer, rank, failing):
    """The others learn of it in ``step()``, before they have updated anything."""
    if rank != failing:
        with backpressure_timeout(0.5):
            backward(model, rank, 2)
        with pytest.raises(RuntimeError, match=r"another rank has dropped this step.*repeat"):
            optimizer.step()


def accumulated(model, optimizer, rank, failing):
    """The others learn of it in the ``step()`` after a pass of ``accumulate()``."""
    if rank != failing:
        with backpressure_timeout(0.5), optimizer.accumulate():
            backward(model, rank, 2)
        with pytest.raises(RuntimeError, match=r"another rank has dropped this step.*repeat"):
            optimizer.step()


def not_in_step(model, optimizer, rank, failing):
    """The others abandon the step after their backward pass, without step()."""
    if rank != failing:
        with backpressure_timeout(0.5):
            backward(model, rank, 2)


def all_idle(model, optimizer, rank, failing):
    """No rank has come to its backward pass."""


def idle_worker(rank, world, root):
    """A rank raises before its first gradient, and abandons the step; the others do so later."""
    results = []
    for scenario in (None, in_step, accumulated, not_in_step, all_idle):
        model, optimizer = new_training()
        train(model, optimizer, rank, range(2))
        if scenario is not None:
            path = sharded_bf16_adamw.save(f"{root}/{scenario.__name__}", 2, model, optimizer)
            for failing in (1, 0):
                scenario(model, optimizer, rank, failing)
                optimizer.abandon_step()
                sharded_bf16_adamw.load(path, model, optimizer)
        train(model, optimizer, rank, range(2, 4))
        results.append(collect(model, optimizer))
        assert same_bits(results[0], results[-1]), scenario
    return results[0]


def test_step_that_a_rank_abandons_before_its_first_gradient(tmp_path):
    run_ranks(2, idle_worker, str(tmp_path))


def failing_update_worker(rank, world, root):
    """An update in ``step()`` fails, so that gradients are lost."""
    results = []
    for fails in (False, True):
        model, optimizer = new_training()
        train(model, optimizer, rank, range(2))
        path = sharded_bf16_adamw.save(f"{root}/{fails}", 2, model, optimizer)
        if fails:
            with optimizer.accumulate():  # so that step() updates everything
                backward(model, rank, 2)
            calls, update = [], optimizer._in_backward.update

            def failing(params, grads, calls=calls, update=update):
                calls.append(params)
                if len(calls) == 2:
                    raise MemoryError
                update(params, grads)

            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(optimizer._in_backward, "update", failing)
                with pytest.raises(MemoryError):
                    optimizer.step()
            assert len(calls) == 2
            for refused in (optimizer.step, optimizer.zero_grad, optimizer.state_dict):
                with pytest.raises(RuntimeError, match=r"optimizer.abandon_step\(\), then load"):
                    refused()
            optimizer.abandon_step()
            sharded_bf16_adamw.load(path, model, optimizer)
        train(model, optimizer, rank, range(2, 4))
        results.append(collect(model, optimizer))
    assert same_bits(*results)


def test_update_that_fails_in_step(tmp_path):
    run_ranks(2, failing_update_worker, str(tmp_path))
