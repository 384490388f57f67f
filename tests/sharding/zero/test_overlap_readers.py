"""overlap_gather: whatever reads or replaces weights after a step waits for them."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from distributed import run_ranks
from torch import nn
from torch.nn.functional import linear

from sharded_bf16_adamw import AdamW_BF16, load, save

from .overlap_cases import batch, late_network, layers, one_step, optimizer_of, steady


def read_state_dict(model, optimizer, folder):
    return [value.clone() for value in model.state_dict().values()]


def read_state_dict_of_a_layer(model, optimizer, folder):
    weight = model[5].state_dict()["weight"].clone()
    return [*[p.detach().clone() for p in list(model.parameters())[:5]], weight]


def read_checkpoint(model, optimizer, folder):
    path = save(folder, 1, model, optimizer)
    fresh = layers()
    load(path, fresh, AdamW_BF16(fresh.parameters(), lr=1e-2))
    return list(fresh.parameters())


def read_true_weights(model, optimizer, folder):
    next(optimizer.true_weights())
    return [p.detach().clone() for p in model.parameters()]


def read_in_check_replicas(model, optimizer, folder):
    optimizer.check_replicas()
    return [p.detach().clone() for p in model.parameters()]


def read_in_a_step_hook(model, optimizer, folder):
    seen = []
    optimizer.register_step_post_hook(
        lambda *_: seen.extend(p.detach().clone() for p in model.parameters())
    )
    one_step(model, optimizer)
    return seen


def read_after_adding_a_group(model, optimizer, folder):
    optimizer.add_param_group({"params": [("late", nn.Parameter(torch.ones(4).bfloat16()))]})
    return [p.detach().clone() for p in model.parameters()]


def read_by_a_second_optimizer(model, optimizer, folder):
    """Its construction compares the weights of ranks."""
    optimizer_of(model)
    return [p.detach().clone() for p in model.parameters()]


READERS = [
    read_state_dict,
    read_state_dict_of_a_layer,
    read_checkpoint,
    read_true_weights,
    read_in_check_replicas,
    read_in_a_step_hook,
    read_after_adding_a_group,
    read_by_a_second_optimizer,
]


def readers_worker(rank, world, folder):
    for number, reader in enumerate(READERS):
        with late_network() as network:
            model, optimizer = steady()
            assert network.in_flight
            seen = reader(model, optimizer, f"{folder}/{number}")
            optimizer.wait()
            for a, b in zip(seen, model.parameters(), strict=True):
                assert torch.equal(a, b), reader.__name__


def test_readers_of_weights_see_the_new_ones(tmp_path):
    run_ranks(2, readers_worker, str(tmp_path))


class Fused(nn.Module):
    """A module that in evaluation reads its children's weights without calling them."""

    def __init__(self):
        super().__init__()
        self.body = layers(3)

    def forward(self, x):
        if self.training and torch.is_grad_enabled():
            return self.body(x)
        for layer in self.body:
            x = linear(x, layer.weight)
        return x


def evaluation_worker(rank, world):
    def in_eval_mode(model):
        return model.eval()(batch())

    def without_gradients(model):
        with torch.no_grad():
            return model(batch())

    def in_inference_mode(model):
        with torch.inference_mode():
            return model.eval()(batch())

    def of_a_child(model):
        return model.body[1](batch())

    for evaluate in (in_eval_mode, without_gradients, in_inference_mode, of_a_child):
        with late_network() as network:
            model, optimizer = steady(Fused())
            assert network.in_flight
            early = evaluate(model)
            assert not network.in_flight
            assert torch.equal(early, evaluate(model)), evaluate.__name__
            one_step(model.train(), optimizer)


def test_evaluation_uses_the_new_weights():
    run_ranks(2, evaluation_worker)


def copies_worker(rank, world):
    for duplicate in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
        model, optimizer = steady()
        for part in (model, model[0]):
            with pytest.raises(RuntimeError, match=r"model is copied .* call optimizer.wait\(\)"):
                duplicate(part)
        optimizer.wait()
        copied = duplicate(model)
        assert torch.equal(copied(batch()), model(batch()))
        copied.load_state_dict(copied.state_dict())
        one_step(model, optimizer)


def test_a_copy_with_old_weights_is_an_error():
    run_ranks(2, copies_worker)


def loaded_worker(rank, world):
    model, optimizer = steady()
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    one_step(model, optimizer)
    model.load_state_dict(saved)  # waits first, else the gathered weights would overwrite it
    model(batch())
    assert all(torch.equal(model.state_dict()[key], value) for key, value in saved.items())


def test_loaded_weights_stay():
    run_ranks(2, loaded_worker)


@torch.no_grad()
def write_in_place(weight):
    weight.mul_(0.5)


def write_data(weight):
    weight.data = weight.data * 0.5


def written_worker(rank, world):
    for write in (write_in_place, write_data):
        model, optimizer = steady()
        write(model[3].weight)
        with pytest.raises(RuntimeError, match=r"'3.weight' was changed .* optimizer.wait\(\)"):
            model(batch())
        with pytest.raises(RuntimeError, match=r"an earlier all-gather .* restart all ranks"):
            optimizer.step()


def test_writing_to_weights_in_flight_is_an_error():
    run_ranks(2, written_worker)


def dropped_worker(rank, world):
    with late_network() as network:
        model, optimizer = steady()
        early = [p.detach().clone() for p in model.parameters()]
        del optimizer
        gc.collect()
        assert network.in_flight
        output = model(batch())
        assert not network.in_flight
    assert torch.equal(output, model(batch()))
    assert not any(torch.equal(a, b) for a, b in zip(early, model.parameters(), strict=True))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_weights_arrive_though_the_optimizer_is_gone():
    run_ranks(2, dropped_worker)
