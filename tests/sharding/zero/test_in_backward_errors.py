"""Errors of ZeRO stage 2 with ``step_in_backward=True`` are raised on every rank."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
import torch.distributed as dist
from bits import same_bits
from distributed import run_ranks
from torch import nn

import sharded_bf16_adamw
from sharded_bf16_adamw import AdamW_BF16, ClipInBackward, ModelParallel, ZeRO

from ..test_step_in_backward import Failing
from .cases import Linears, backpressure_timeout, collect, one_dimensional
from .in_backward_cases import LAYERS, backward, layers, make_input


def fail_in_backward(model, rank, step):
    """Raise in the middle of a backward pass, after half of the layers."""
    half = LAYERS // 2
    hidden = nn.Sequential(*list(model)[:half])(make_input(step, rank))
    nn.Sequential(*list(model)[half:])(Failing.apply(hidden)).square().mean().backward()


def recovery_worker(rank, world, folder, failing):
    """Fail on some ranks in the middle of a pass, load, and end where an undisturbed run does."""
    results = []
    for fails in (False, True):
        model, optimizer = layers(world)
        root = f"{folder}/{fails}"
        with backpressure_timeout(2.0):  # how long the others wait for a failed rank
            for step in range(2):
                backward(model, rank, step)
                optimizer.step()
            sharded_bf16_adamw.save(root, 2, model, optimizer)
            if fails:
                if rank in failing:
                    with pytest.raises(MemoryError):
                        fail_in_backward(model, rank, 2)
                else:
                    backward(model, rank, 2)
                    with pytest.raises(RuntimeError, match="another rank has dropped this step"):
                        optimizer.step()
                for refused in (optimizer.step, optimizer.zero_grad, optimizer.state_dict):
                    with pytest.raises(
                        RuntimeError, match=r"optimizer.abandon_step\(\), then load"
                    ):
                        refused()
                optimizer.abandon_step()
                sharded_bf16_adamw.load(root, model, optimizer)
            for step in range(2, 4):
                backward(model, rank, step)
                optimizer.step()
        results.append(collect(model, optimizer))
    assert same_bits(*results)


@pytest.mark.parametrize("failing", [(0, 1, 2), (1,)])
def test_a_failed_backward_pass_is_recovered_from_by_load(tmp_path, failing):
    run_ranks(3, recovery_worker, str(tmp_path), failing)


def second_pass(model, optimizer, rank):
    with pytest.raises(RuntimeError, match=r"got a second gradient before step\(\)"):
        backward(model, rank, 5)


def another_gradient(model, optimizer, rank):
    if rank == 1:
        model[3].weight.grad = torch.ones_like(model[3].weight)
    with pytest.raises(
        RuntimeError, match=r"on rank 1, parameter '3.weight' had its gradient used"
    ):
        optimizer.step()


def parameter_replaced(model, optimizer, rank):
    if rank == 1:
        model[3].weight = nn.Parameter(model[3].weight.detach().clone())
    with pytest.raises(RuntimeError, match=r"on rank 1, .*has been replaced in its module"):
        optimizer.step()


def error_worker(rank, world, error):
    model, optimizer = layers(world)
    with backpressure_timeout(60.0):
        backward(model, rank, 0)
    error(model, optimizer, rank)
    with pytest.raises(RuntimeError, match=r"on every rank call optimizer.abandon_step\(\), then"):
        optimizer.step()
    optimizer.abandon_step()
    if error is not parameter_replaced:
        for param in model.parameters():
            param.grad = None
        backward(model, rank, 1)
        optimizer.step()


@pytest.mark.parametrize("error", [second_pass, another_gradient, parameter_replaced])
def test_errors_after_updates_are_errors_on_every_rank(error):
    run_ranks(2, error_worker, error)


def harmless_worker(rank, world):
    """An error before any rank has updated anything leaves weights as they were."""
    model, optimizer = layers(world)
    before = [param.detach().clone() for param in model.parameters()]
    with optimizer.accumulate():
        backward(model, rank, 0)
    original, owner = model[3].weight, model[3]
    if rank == 1:
        owner.weight = nn.Parameter(original.detach().clone())
    with pytest.raises(RuntimeError, match=r"has been replaced in its module"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))
    owner.weight = original
    optimizer.zero_grad()
    backward(model, rank, 1)
    optimizer.step()
    assert not any(map(torch.equal, before, model.parameters()))


def test_errors_before_any_update():
    run_ranks(2, harmless_worker)


def repeating_worker(rank, world):
    """After an error before any update, ranks with and without zero_grad() start from nothing."""
    results = []
    for fails in (False, True):
        model, optimizer = layers(world)
        if fails:
            with optimizer.accumulate():
                backward(model, rank, 0)
            original, model[3].weight = model[3].weight, nn.Parameter(model[3].weight.detach())
            with pytest.raises(RuntimeError, match=r"replaced in its module.*repeat the backward"):
                optimizer.step()
            model[3].weight = original
            if rank == 1:
                optimizer.zero_grad()
        backward(model, rank, 1)
        optimizer.step()
        results.append(collect(model, optimizer))
    assert same_bits(*results)


def test_error_before_any_update_drops_the_gradients():
    run_ranks(2, repeating_worker)


def dropped_worker(rank, world):
    """Once a rank has dropped the step, the others' abandon_step() exchanges nothing.

    In the next step, abandon_step() is collective again.
    """
    results = []
    for fails in (False, True):
        model, optimizer = layers(world)
        for step in range(4):
            accumulates = step // 2
            if fails and rank == step % 2:
                optimizer.abandon_step()
            elif fails:
                with pytest.raises(RuntimeError, match="another rank has dropped this step"):
                    optimizer.step()
                optimizer.abandon_step()
            if accumulates:
                with optimizer.accumulate():
                    backward(model, rank, 10 + step)
                if fails:
                    optimizer.abandon_step()
                    with optimizer.accumulate():
                        backward(model, rank, 10 + step)
            backward(model, rank, step)
            optimizer.step()
        results.append(collect(model, optimizer))
    assert same_bits(*results)


def test_step_that_another_rank_dropped():
    run_ranks(2, dropped_worker)


def no_pass(model, optimizer, rank):
    if rank == 1:
        optimizer.abandon_step()  # of the step that has raised


def accumulated_pass(model, optimizer, rank):
    """Rank 1 raises before its first gradient."""
    with suppress(ZeroDivisionError), backpressure_timeout(0.05), optimizer.accumulate():
        if rank == 1:
            raise ZeroDivisionError
        backward(model, rank, 10)


def last_pass(model, optimizer, rank):
    """Rank 1 raises at its first gradient, where the schedule is read."""
    if rank == 0:
        with backpressure_timeout(0.05):
            return backward(model, rank, 10)
    optimizer.lr_function = lambda step: 1 / 0
    with pytest.raises(ZeroDivisionError):
        backward(model, rank, 10)
    optimizer.lr_function = None


def dropped_again_worker(rank, world, run_pass):
    """An abandon_step() after a step that has raised is collective, unless it is the first."""
    results = []
    for drops in (False, True):
        model, optimizer = layers(world)
        if drops:
            if rank == 0:
                optimizer.abandon_step()
            else:
                with pytest.raises(RuntimeError, match="another rank has dropped this step"):
                    optimizer.step()
            run_pass(model, optimizer, rank)
            optimizer.abandon_step()
        backward(model, rank, 0)
        optimizer.step()
        results.append(collect(model, optimizer))
    assert same_bits(*results)


@pytest.mark.parametrize("run_pass", [no_pass, accumulated_pass, last_pass])
def test_step_that_is_dropped_again(run_pass):
    run_ranks(2, dropped_again_worker, run_pass)


def uneven_worker(rank, world):
    """Rank 0 runs one more backward pass; rank 1 updates weights in its only one."""
    model, optimizer = layers(world)
    with backpressure_timeout(60.0):
        if rank == 0:
            with optimizer.accumulate():
                backward(model, rank, 0)
        else:
            backward(model, rank, 0)
    with backpressure_timeout(0.05):
        if rank == 0:
            backward(model, rank, 1)
    with pytest.raises(RuntimeError, match="ranks ran different numbers of backward passes in th"):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"abandon_step\(\), then load"):
        optimizer.step()


def test_uneven_numbers_of_backward_passes():
    run_ranks(2, uneven_worker)


def between_worker(rank, world):
    model, optimizer = layers(world)
    backward(model, rank, 0)
    for refused in (optimizer.zero_grad, optimizer.state_dict, optimizer.accumulate().__enter__):
        with pytest.raises(RuntimeError, match=r"call step\(\) first"):
            refused()
    with pytest.raises(RuntimeError, match=r"clip_grad_norm_\(\) needs all gradients"):
        optimizer.clip_grad_norm_(1.0)
    optimizer.param_groups[0]["weight_decay"] = 0.5
    with pytest.raises(RuntimeError, match="hyper-parameters in param_groups were changed"):
        optimizer.step()
    optimizer.param_groups[0]["weight_decay"] = 0.1
    optimizer.step()
    with optimizer.accumulate():
        backward(model, rank, 1)
    optimizer.zero_grad()  # nothing was updated
    before = [param.detach().clone() for param in model.parameters()]
    optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


def test_between_backward_pass_and_step():
    run_ranks(2, between_worker)


REFUSED = [
    ({"stage": 1}, {}, r"ZeRO\(stage=1\) are both given; DDP averages"),
    ({"overlap_gather": True}, {}, "weights are gathered behind the backward pass already"),
    ({}, {"skip_nonfinite": True}, "so a step cannot be skipped as a whole"),
    ({}, {"clip_in_backward": ClipInBackward(1.0, by="param")}, "use .*by='previous_step'"),
    ({}, {"model_parallel": True}, "experts beside ZeRO are updated only in step"),
]


def refused_worker(rank, world):
    for options, more, message in REFUSED:
        model = Linears(2, 4)
        if options.get("overlap_gather"):
            options = {**options, "model": model}
        if "model_parallel" in more:
            more = {"model_parallel": ModelParallel(ep=dist.group.WORLD, experts=[model[0].weight])}
        with pytest.raises(ValueError, match=message):
            AdamW_BF16(
                model.parameters(),
                step_in_backward=True,
                sharding=ZeRO(one_dimensional(), **options),
                **more,
            )
    with pytest.raises(ValueError, match="have different options: step_in_backward; give"):
        AdamW_BF16(
            Linears(2, 4).parameters(),
            step_in_backward=rank == 1,
            sharding=ZeRO(one_dimensional()),
        )
    sharding = ZeRO(one_dimensional(), stage=2)
    optimizer = AdamW_BF16([{"params": []}], lr=1e-2, step_in_backward=True, sharding=sharding)
    late = nn.Parameter(torch.ones(4).bfloat16())
    with pytest.raises(ValueError, match="capturable=True and step_in_backward=True are both"):
        optimizer.add_param_group({"params": [late], "capturable": True})
    assert not late._post_accumulate_grad_hooks
    optimizer.step()  # without any parameter


def test_what_is_refused():
    run_ranks(2, refused_worker)
