"""from_fp32 over ranks: the bits of a single process, for models sharded in float32."""

import copy
import functools

import pytest
import torch
from distributed import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from sharded_bf16_adamw import LR, AdamW_BF16, ZeRO

from .strategy_cases import BY_NAME, Layers, Wrapped, backward, collect, make_batch, over_all_ranks


def float_layers():
    torch.manual_seed(0)
    model = Layers().float()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.rand(param.shape) / 100)  # no longer values that bfloat16 holds
    return model


def convert(model, **options):
    return AdamW_BF16.from_fp32(
        model,
        keep_fp32="single_precision",
        lr_function=LR(lr=1e-2, preheat_steps=5),
        weight_decay=0.1,
        **options,
    )


def build(name, world):
    if name == "DDP":
        model = float_layers()
        optimizer = convert(model)
        return over_all_ranks(DistributedDataParallel(model)), optimizer
    if name == "ZeRO-2":
        model, sharding = float_layers(), ZeRO(init_device_mesh("cpu", (world,)), stage=2)
        return over_all_ranks(model), convert(model, sharding=sharding)
    wrapped = BY_NAME[name].wrap(float_layers(), world)
    return wrapped, convert(wrapped.module)


def train(wrapped, optimizer):
    start = copy.deepcopy(collect(wrapped.module, optimizer))  # collect() may alias live states
    for step in range(3):
        backward(wrapped, make_batch(step))
        optimizer.step(zero_grad=True)
    return start, collect(wrapped.module, optimizer)


def worker(rank, world, name):
    return train(*build(name, world))


@functools.cache
def expected():
    model = float_layers()
    optimizer = convert(model)
    return train(Wrapped(model), optimizer)


@pytest.mark.parametrize(
    "name",
    ["DDP", "FSDP2", "FSDP2 reshard_after_forward=False", "tensor parallel", "ZeRO-2"],
)
def test_converted_model_and_its_training_match_a_single_process(name):
    start, end = expected()
    in_bf16 = [values for name, values in start.items() if "single_precision" not in name]
    assert all(values["correction"].any() for values in in_bf16)
    for result in run_ranks(2, worker, name):
        for found, reference in zip(result, (start, end), strict=True):
            assert found.keys() == reference.keys()
            for fqn, values in reference.items():
                assert found[fqn].keys() == values.keys()
                assert all(torch.equal(found[fqn][key], values[key]) for key in values), fqn


def refusal_worker(rank, world):
    name = "FSDP1 FULL_SHARD, use_orig_params=False"
    with pytest.raises(ValueError, match=r"use fully_shard \(FSDP2\)"):
        convert(BY_NAME[name].wrap(float_layers(), world).module)
    mesh = init_device_mesh("cpu", (world,))
    with pytest.raises(ValueError, match="build the same float32 model on every rank"):
        convert(float_layers(), sharding=ZeRO(mesh, broadcast_initial=True))


def test_fsdp1_and_broadcast_are_refused():
    run_ranks(2, refusal_worker)
