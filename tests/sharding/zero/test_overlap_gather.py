"""overlap_gather: weights arrive late, but before anything reads them."""

from __future__ import annotations

import logging
import time
import warnings

import pytest
import torch
from distributed import run_ranks
from torch import nn
from torch.nn.functional import linear
from torch.nn.parallel import DistributedDataParallel

from .cases import assert_same_bits, backpressure_timeout, collect, consensus_calls, mesh_of
from .overlap_cases import (
    MODELS,
    WIDTH,
    batch,
    late_network,
    layers,
    one_step,
    optimizer_of,
    steady,
)

# --------------------------------------------------------------------------- what is in flight


class Backwards(nn.Sequential):
    """Layers that are used in reverse order."""

    def forward(self, x):
        for layer in reversed(list(self)):
            x = layer(x)
        return x


def order_worker(rank, world, shape):
    model = Backwards(*layers())
    optimizer = optimizer_of(model, mesh=mesh_of(shape), max_in_flight=2)
    with late_network() as network:
        for step in range(3):
            model(batch(step)).float().square().sum().backward()
            network.new_step()
            optimizer.step(zero_grad=True)
            assert bool(network.in_flight) == (step > 0), "recorded after the first step"
        after_step = list(network.events)
        for index, layer in enumerate(reversed(list(model))):
            layer.register_forward_hook(lambda *_, i=index: network.events.append(("forward", i)))
        model(batch())
        assert network.most_in_flight == 2
    return after_step, network.events[len(after_step) :]


@pytest.mark.parametrize("shape", [(2,), (2, 2)], ids=str)
def test_a_layer_waits_for_its_own_bucket_only(shape):
    for after_step, in_forward in run_ranks(len(shape) * 2, order_worker, shape):
        assert after_step == [("launch", 0), ("launch", 1)]
        expected = []
        for i in range(6):
            expected += [("wait", i)] + [("launch", i + 2)] * (i < 4) + [("forward", i)]
        assert in_forward == expected


def side_buffer_worker(rank, world):
    """All-gathers that have arrived, but that nobody has waited for."""
    model, optimizer = steady(max_in_flight=6)
    optimizer.wait()
    before = [weight.detach().clone() for weight in model.parameters()]
    one_step(model, optimizer)
    for pending in optimizer._sharding._all_gather._in_flight.values():
        while not pending._work.is_completed():
            time.sleep(1e-3)
    other = slice(4 * (1 - rank), 4 * (1 - rank) + 4)  # the rows that the other rank updates
    assert all(
        torch.equal(a[other], b[other]) for a, b in zip(before, model.parameters(), strict=True)
    )
    optimizer.wait()
    assert not any(
        torch.equal(a[other], b[other]) for a, b in zip(before, model.parameters(), strict=True)
    )


def test_weights_change_only_while_somebody_waits():
    run_ranks(2, side_buffer_worker)


def skipped_worker(rank, world):
    """A layer is not called, but its weight may be read after the forward pass."""
    with late_network() as network:
        model, optimizer = steady()
        assert network.in_flight
        model[5] = nn.Identity()
        model(batch())
        assert not network.in_flight
    optimizer.wait()


def test_nothing_is_in_flight_after_the_forward_pass():
    run_ranks(2, skipped_worker)


# ------------------------------------------------------------------------------------------- bits


def bits_worker(rank, world, index, stage):
    """Return weights and states without and with overlap_gather."""
    results = []
    for overlap in (False, True):
        model = MODELS[index]().bfloat16()
        optimizer = optimizer_of(model, overlap=overlap, stage=stage)
        module = DistributedDataParallel(model) if stage == 1 else model
        with late_network() as network:
            for step in range(5):
                one_step(module, optimizer, step)
                assert bool(network.in_flight) == (overlap and step > 0)
            optimizer.wait()
            assert not network.in_flight
        results.append(collect(model, optimizer))
    return results


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("index", range(len(MODELS)), ids=[model.__name__ for model in MODELS])
def test_bits_are_those_without_it(index, stage):
    for without, with_it in run_ranks(2, bits_worker, index, stage):
        assert_same_bits(with_it, without)


class Block(nn.Module):
    """A module that torch.compile does not skip, as it does torch's own."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) * 2


def compiled_worker(rank, world, how):
    """Hooks do not run in compiled modules, so nothing is in flight after a step."""
    results = []
    for overlap in (False, True):
        model = layers()
        model[2] = Block(model[2])
        optimizer = optimizer_of(model, overlap=overlap)
        module = model
        with late_network() as network:
            for step in range(6):
                if step == (3 if how == "a layer, later" else 0):
                    if how == "scripted":
                        with warnings.catch_warnings():
                            warnings.simplefilter("ignore")  # torch.jit is deprecated
                            model[2] = torch.jit.script(model[2])
                    elif how == "the model":
                        module = torch.compile(model, backend="eager", fullgraph=True)
                    else:
                        model[2].compile(backend="eager", fullgraph=True)
                one_step(module, optimizer, step)
                assert not network.in_flight or (how == "a layer, later" and step < 3)
        results.append(collect(model, optimizer))
    return results


@pytest.mark.parametrize("how", ["the model", "a layer", "a layer, later", "scripted"])
def test_compiled_modules_find_all_weights(how):
    for without, with_it in run_ranks(2, compiled_worker, how):
        assert_same_bits(with_it, without)


def no_effect_worker(rank, world):
    """No forward pass of the given model is seen: a warning, and step() waits for the weights."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("sharded_bf16_adamw")
    logger.addHandler(handler)
    model = layers()
    optimizer = optimizer_of(model)
    with late_network() as network:
        for step in range(4):
            model.forward(batch(step)).float().square().sum().backward()
            optimizer.step(zero_grad=True)
            assert not network.in_flight
    logger.removeHandler(handler)
    return [r.getMessage() for r in records if "overlap_gather of ZeRO has no effect" in r.msg]


def test_unseen_forward_passes_are_a_warning():
    assert [len(warnings) for warnings in run_ranks(2, no_effect_worker)] == [1, 1]


class LossInModel(nn.Sequential):
    """A model that keeps its loss and returns nothing."""

    def forward(self, input):
        self.loss = super().forward(input).float().square().sum()


def no_output_worker(rank, world):
    """Gradients are set by hand in the first two steps of a group, without a forward pass."""
    model = LossInModel(*layers())
    *named, late = model.named_parameters()
    optimizer = optimizer_of(model, named)
    with late_network() as network:
        for step in range(7):
            if step == 4:
                optimizer.add_param_group({"params": [late]})
            if step in (0, 1, 4, 5):
                for param in model.parameters():
                    param.grad = torch.ones_like(param)
            else:
                model(batch(step))
                model.loss.backward()
            network.new_step()
            optimizer.step(zero_grad=True)
            assert bool(network.in_flight) == (step in (2, 3, 6))
        assert network.in_flight[0].number == 0, "step() waits for no bucket"
        optimizer.wait()


def test_pass_without_output_after_steps_without_a_pass_is_recorded():
    run_ranks(2, no_output_worker)


def outside_worker(rank, world):
    """A weight that is read outside the model has arrived when step() returns."""
    model, scale = layers(), nn.Parameter(torch.ones(WIDTH).bfloat16())
    optimizer = optimizer_of(model, [*model.parameters(), scale])
    with late_network():
        for step in range(4):
            (model(batch(step)) * scale).float().square().sum().backward()
            optimizer.step(zero_grad=True)
            early = [p.detach().clone() for p in (scale, *model.parameters())]
        optimizer.wait()
    same = [torch.equal(a, b) for a, b in zip(early, (scale, *model.parameters()), strict=True)]
    assert same[0] and not any(same[1:])


def test_weights_read_outside_the_model_arrive_in_the_step():
    run_ranks(2, outside_worker)


def divergent_worker(rank, world):
    """Rank 1 leaves a layer out in the recorded forward pass, and uses it later."""
    results = []
    for overlap in (False, True):
        model = layers()
        optimizer = optimizer_of(model, overlap=overlap)
        with late_network(), backpressure_timeout(0.05):
            for step in range(6):
                leave_out = step == 1 and rank == 1
                removed = model[3] if leave_out else None
                if leave_out:
                    model[3] = nn.Identity()
                loss = model(batch(step)).float().square().sum()
                if leave_out:
                    model[3] = removed
                loss.backward()
                optimizer.step(zero_grad=True)
        results.append(collect(model, optimizer))
    return results


def test_ranks_that_read_other_weights():
    for without, with_it in run_ranks(2, divergent_worker):
        assert_same_bits(with_it, without)


def exchanges_worker(rank, world, static_graph):
    counts = []
    for overlap in (False, True):
        model = layers()
        optimizer = optimizer_of(model, overlap=overlap, static_graph=static_graph)
        for step in range(4):
            with consensus_calls() as calls:
                one_step(model, optimizer, step)
        counts.append(len(calls))
    return counts


@pytest.mark.parametrize("static_graph", [False, True])
def test_steady_steps_exchange_nothing_on_the_host(static_graph):
    assert run_ranks(2, exchanges_worker, static_graph) == [[0, 0]] * 2


# ----------------------------------------------------------------------------------------- errors


def unwatched_worker(rank, world):
    """The forward pass does not call the model, and reads old weights."""
    with late_network():
        model, _ = steady()
        output = batch()
        for weight in list(model.parameters()):
            output = linear(output, weight)
        with pytest.raises(
            RuntimeError, match=r"'\d.weight' got a gradient while .* the forward pass has read the"
        ):
            output.sum().backward()


def test_gradient_of_an_old_weight_is_an_error():
    run_ranks(2, unwatched_worker)


def failing_worker(rank, world):
    with late_network() as network:
        model, optimizer = steady()
        network.failing = True
        with pytest.raises(
            RuntimeError, match=r"^all-gathering the updated weights .* ranks 0, 1 fail"
        ):
            model(batch())
        for again in (lambda: model(batch()), optimizer.step, optimizer.wait, model.state_dict):
            with pytest.raises(RuntimeError, match=r"^an earlier all-gather .* restart all ranks"):
                again()


def test_failed_all_gather_is_an_error_ever_after():
    run_ranks(2, failing_worker)


def interrupted_worker(rank, world):
    """The first forward pass to record raises, and is not recorded."""
    model = layers()
    optimizer = optimizer_of(model)
    one_step(model, optimizer)
    handle = model[4].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(batch())
    handle.remove()
    with late_network() as network:
        for step in range(3):
            one_step(model, optimizer, step)
            assert network.in_flight


def test_forward_pass_that_raises_is_not_recorded():
    run_ranks(2, interrupted_worker)
