"""The optimizer under DDP and FSDP2 on gloo: each rank holds only its shard, with equal bits."""

import gc

import pytest
import torch
import torch.distributed as dist
from bits import assert_same_bits
from distributed import run_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from sharded_bf16_adamw import LR, AdamW_BF16, gradients
from sharded_bf16_adamw.sharding.stale_params import sharded_after_construction

STATES = ("exp_avg", "exp_avg_sq", "correction")


def make_model():
    """Return a model with 13, 7, 3 and 1 rows: uneven on 2, 3 and 4 ranks, empty on some."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 13), nn.Linear(13, 7), nn.Linear(7, 3), nn.Linear(3, 1)).to(
        torch.bfloat16
    )
    model[2].to(torch.float32)  # float32 parameters in the same model
    return model


def full_gradients(step, model):
    """Return gradients of the full shapes, independent of the sharding."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator).to(p.dtype) for p in model.parameters()]


def full(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train_on_given_gradients(model, steps, clip=None):
    optimizer = AdamW_BF16(
        model.parameters(), lr_function=LR(lr=1e-2, preheat_steps=5), weight_decay=0.1
    )
    for step in range(steps):
        for p, grad in zip(model.parameters(), full_gradients(step, model), strict=True):
            p.grad = (
                distribute_tensor(grad, p.device_mesh, p.placements)
                if isinstance(p, DTensor)
                else grad
            )
        if clip is not None:
            optimizer.clip_grad_norm_(clip)
        optimizer.step(zero_grad=True)
    return optimizer


def collect(model, optimizer):
    """Return full weights and states by parameter name."""
    result = {}
    for name, p in model.named_parameters():
        result[name] = full(p)
        result.update({f"{name}.{key}": full(value) for key, value in optimizer.state[p].items()})
    return result


def fsdp2(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def single_process(steps, clip=None):
    model = make_model()
    return collect(model, train_on_given_gradients(model, steps, clip))


def fsdp2_worker(rank, world, steps, clip):
    model = fsdp2(make_model())
    optimizer = train_on_given_gradients(model, steps, clip)
    placed = [
        optimizer.state[p][key]
        for p in model.parameters()
        for key in STATES
        if key in optimizer.state[p]
    ]
    assert all(isinstance(state, DTensor) and state.placements == (Shard(0),) for state in placed)
    local_bytes = sum(state.to_local().nbytes for state in placed)
    rows = {
        name: p.to_local().shape[0] if p.to_local().numel() else 0
        for name, p in model.named_parameters()
    }
    return collect(model, optimizer), local_bytes, rows


@pytest.mark.parametrize(("world", "clip"), [(1, None), (2, None), (3, None), (4, None), (3, 0.5)])
def test_fsdp2_matches_one_process_and_holds_only_its_rows(world, clip):
    expected = single_process(20, clip)
    results = run_ranks(world, fsdp2_worker, 20, clip)
    model = make_model()
    for rank, (weights, local_bytes, rows) in enumerate(results):
        assert_same_bits(weights, expected)
        own_bytes = 0
        for name, p in model.named_parameters():
            chunk = -(-p.shape[0] // world)
            own_rows = max(0, min(chunk, p.shape[0] - rank * chunk))
            assert rows[name] == own_rows
            size = p.numel() // p.shape[0] * own_rows
            # Three bfloat16 states of a bfloat16 parameter, two float32 states of a float32 one.
            own_bytes += size * (3 * 2 if p.dtype == torch.bfloat16 else 2 * 4)
        assert local_bytes == own_bytes


def real_training_worker(rank, world, wrap):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to(torch.bfloat16)
    model = fully_shard(model) if wrap == "fsdp2" else DistributedDataParallel(model)
    optimizer = AdamW_BF16(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(torch.ones(2, 8, dtype=torch.bfloat16)).float().sub(3.0).square().mean()
        loss.backward()
        optimizer.step(zero_grad=True)
        losses.append(loss.item())
    return losses, collect(model, optimizer)


@pytest.mark.parametrize("wrap", ["fsdp2", "ddp"])
def test_training_lowers_loss_and_ranks_agree(wrap):
    (losses, weights), (_, other) = run_ranks(2, real_training_worker, wrap)
    assert losses[-1] < 0.2 * losses[0]
    assert_same_bits(weights, other)


def built_too_early_worker(rank, world, steps_before):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(torch.bfloat16)
    optimizer = AdamW_BF16([{"params": layer.parameters()} for layer in model], lr=1e-2)
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    fully_shard(model)
    for _ in range(steps_before):  # no module has a gradient yet
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
    model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
    for _ in range(2):
        with pytest.raises(
            RuntimeError,
            match=r"built before fully_shard .* build AdamW_BF16\(model.parameters\(\)\) after",
        ):
            optimizer.step()
    assert (
        all(
            torch.equal(a, b)
            for a, b in zip(before, optimizer.param_groups[0]["params"], strict=True)
        )
        and not optimizer.state
    )


@pytest.mark.parametrize("steps_before", [0, 2])
def test_optimizer_built_before_fully_shard_is_rejected(steps_before):
    run_ranks(2, built_too_early_worker, steps_before)


@pytest.mark.parametrize(("with_grad", "searches"), [(True, 1), (False, 6)])
def test_search_for_replaced_parameters_ends(with_grad, searches, monkeypatch):
    """It walks all objects of the process, so it must not run in every step."""
    found = []
    monkeypatch.setattr(
        gradients,
        "sharded_after_construction",
        lambda params: found.append(sharded_after_construction(params)) or found[-1],
    )
    monkeypatch.setattr("gc.get_objects", lambda: list(model.modules()))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(torch.bfloat16)
    optimizer = AdamW_BF16(model.parameters(), lr=1e-2)
    if with_grad:
        model[0].weight.grad = torch.ones_like(model[0].weight)
    for _ in range(8):
        optimizer.step()
    assert found == [False if with_grad else None] * searches


def collectable_model_worker(rank, world):
    """Step on unused parameters of the same shapes as a sharded model that is garbage."""

    def train_another():
        sharded = fully_shard(nn.Linear(5, 3).to(torch.bfloat16))
        sharded(torch.ones(1, 5, dtype=torch.bfloat16)).sum().backward()
        sharded.itself = [sharded]  # only the garbage collector can free it

    plain = AdamW_BF16(nn.Linear(5, 3).to(torch.bfloat16).parameters(), lr=1e-2)
    gc.disable()
    train_another()
    plain.step()
    gc.enable()


def test_garbage_model_is_not_taken_for_a_replacement():
    run_ranks(2, collectable_model_worker)


def raw_tensor_worker(rank, world):
    """Step on a tensor that was in no module but has the shape of a sharded parameter."""
    sharded = fully_shard(nn.Linear(4, 4).to(torch.bfloat16))
    prompt = torch.zeros(4, 4, dtype=torch.bfloat16, requires_grad=True)
    optimizers = [AdamW_BF16(sharded.parameters(), lr=1e-2), AdamW_BF16([prompt], lr=1e-2)]
    sharded(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()


def test_raw_tensor_is_not_taken_for_a_replaced_parameter():
    run_ranks(2, raw_tensor_worker)


def full_state_worker(rank, world, full_state):
    model = fsdp2(make_model())
    optimizer = AdamW_BF16(model.parameters(), lr=1e-2)
    optimizer.load_state_dict(full_state)
    held = {
        key: value.to_local().numel()
        for key, value in optimizer.state[next(model.parameters())].items()
        if key != "step"
    }
    assert set(held.values()) == {next(model.parameters()).to_local().numel()}
    found = collect(model, optimizer)
    train_on_full_gradients(model, optimizer)
    return found, held


def train_on_full_gradients(model, optimizer):
    for p, grad in zip(model.parameters(), full_gradients(1, model), strict=True):
        p.grad = distribute_tensor(grad, p.device_mesh, p.placements)
    optimizer.step()


@pytest.mark.parametrize("optimizer_class", [AdamW_BF16, torch.optim.AdamW])
def test_fsdp2_loads_the_full_state_of_one_process(optimizer_class):
    model = make_model()
    optimizer = optimizer_class(model.parameters(), lr=1e-2)
    for p, grad in zip(model.parameters(), full_gradients(0, model), strict=True):
        p.grad = grad
    optimizer.step()
    for found, held in run_ranks(2, full_state_worker, optimizer.state_dict()):
        assert set(held) == {"exp_avg", "exp_avg_sq", "correction"}
        for name, p in model.named_parameters():
            for key, value in optimizer.state[p].items():
                assert torch.equal(found[f"{name}.{key}"], value), (name, key)


def sharded_otherwise_worker(rank, world):
    """Load states with the right global shape but other elements on this rank."""
    model = fully_shard(nn.Linear(4, 4).to(torch.bfloat16))  # equal shards
    optimizer = AdamW_BF16(model.parameters(), lr=1e-2)
    model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    before = collect(model, optimizer)
    right = optimizer.state[model.weight]["exp_avg"]
    mesh, other_mesh = right.device_mesh, DeviceMesh("cpu", list(reversed(range(world))))
    whole = {"shape": right.shape, "stride": right.stride(), "run_check": False}
    for local, on, placements in (
        (right.to_local()[:-1], mesh, right.placements),  # another number of rows
        (right.to_local(), other_mesh, right.placements),  # other rows
        (right.full_tensor(), mesh, (Replicate(),)),
        # Stands for placements on a mesh of more dimensions with the same local shape.
        (right.to_local(), mesh, (Replicate(),)),
    ):
        state = optimizer.state_dict()
        state["state"][0]["exp_avg"] = DTensor.from_local(local, on, placements, **whole)
        with pytest.raises(
            ValueError,
            match=r"the loaded exp_avg of parameter 0 .* is sharded differently from the "
            r"parameter .*; load it",
        ):
            optimizer.load_state_dict(state)
    named = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))  # the same ranks
    state = optimizer.state_dict()
    state["state"][0]["exp_avg"] = DTensor.from_local(
        right.to_local(), named, right.placements, **whole
    )
    optimizer.load_state_dict(state)
    assert_same_bits(collect(model, optimizer), before)


def test_state_with_another_sharding_is_rejected():
    run_ranks(2, sharded_otherwise_worker)


def second_model_worker(rank, world):
    """An FSDP2 model has not replaced the parameters of plain models without gradients.

    One is alive and has the same shapes; the other is gone and has other shapes.
    """
    sharded = fully_shard(nn.Linear(4, 4).to(torch.bfloat16))
    same_shapes = nn.Linear(4, 4).to(torch.bfloat16)
    plain = [
        AdamW_BF16(same_shapes.parameters(), lr=1e-2),
        AdamW_BF16(nn.Linear(5, 3).to(torch.bfloat16).parameters(), lr=1e-2),
    ]
    sharded(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
    for optimizer in plain:
        optimizer.step()


def test_unused_model_is_not_taken_for_a_replaced_one():
    run_ranks(2, second_model_worker)


def nonfinite_worker(rank, world):
    model = fsdp2(make_model())
    optimizer = AdamW_BF16(model.parameters(), lr=1e-2, skip_nonfinite=True)
    for step in range(2):
        for p, grad in zip(model.parameters(), full_gradients(step, model), strict=True):
            if step == 1 and p.shape == (13, 6):
                grad[12, 5] = float("nan")  # in the last rank's shard alone
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements)
        if step == 1:
            before = collect(model, optimizer)
        optimizer.step(zero_grad=True)
    assert_same_bits(collect(model, optimizer), before)
    return optimizer.skipped_steps


def test_nan_on_one_rank_makes_every_rank_skip():
    assert run_ranks(3, nonfinite_worker) == [1, 1, 1]


def norm_worker(rank, world):
    """Return the norm over parameters sharded on a 2-D mesh, on one dimension, and replicated."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    shapes_and_placements = [
        ((8, 6), mesh, (Shard(0), Shard(1))),
        ((5, 3), mesh, (Replicate(), Shard(0))),
        ((4, 4), mesh["shard"], (Shard(0),)),
        ((6,), mesh, (Replicate(), Replicate())),
    ]
    generator = torch.Generator().manual_seed(3)
    grads = [
        torch.randn(shape, generator=generator).bfloat16() for shape, _, _ in shapes_and_placements
    ]
    grads.append(torch.randn(9, generator=generator).bfloat16())
    params = []
    for grad, (_, where, placements) in zip(grads, shapes_and_placements, strict=False):
        params.append(nn.Parameter(distribute_tensor(torch.zeros_like(grad), where, placements)))
        params[-1].grad = distribute_tensor(grad, where, placements)
    params.append(nn.Parameter(torch.zeros(9, dtype=torch.bfloat16)))
    params[-1].grad = grads[-1]
    norm = AdamW_BF16(params, lr=1e-2).clip_grad_norm_(1.0)
    return norm, torch.cat([grad.double().flatten() for grad in grads]).norm().float()


def test_gradient_norm_over_mixed_meshes_counts_each_element_once():
    for norm, expected in run_ranks(4, norm_worker):
        assert norm == expected


def partial_worker(rank, world):
    """Step on a Partial gradient, as tensor parallelism may leave it."""
    mesh = init_device_mesh("cpu", (world,))
    p = nn.Parameter(DTensor.from_local(torch.zeros(4, dtype=torch.bfloat16), mesh, (Replicate(),)))
    p.grad = DTensor.from_local(
        torch.full((4,), 1.0 + rank, dtype=torch.bfloat16), mesh, (Partial(),)
    )
    optimizer = AdamW_BF16([p], lr=1e-2)
    norm = optimizer.clip_grad_norm_(1e9)
    optimizer.step()
    return norm.item(), full(optimizer.state[p]["exp_avg"])


def test_partial_gradients_are_summed():
    for norm, exp_avg in run_ranks(2, partial_worker):
        assert norm == 6.0
        torch.testing.assert_close(exp_avg.float(), torch.full((4,), 0.3), rtol=2**-7, atol=0)
