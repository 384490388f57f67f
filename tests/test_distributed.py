"""The optimizer under DDP and FSDP2 on gloo: every rank holds its shard and no more, and the bits are those of one process."""

import gc

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from sharded_bf16_adamw import LR, AdamW_BF16

STATES = ("exp_avg", "exp_avg_sq", "correction")


def make_model():
    """Dimension 0 of 13, 7, 3 and 1: uneven on 2, 3 and 4 ranks, and empty on some."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 13), nn.Linear(13, 7), nn.Linear(7, 3), nn.Linear(3, 1)).to(
        torch.bfloat16
    )
    model[2].to(torch.float32)  # float32 parameters in the same model
    return model


def full_gradients(step, model):
    """The same gradients whatever the sharding, by the parameters' full shapes."""
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
    """Weights and states in full, by parameter name."""
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


def assert_same_bits(a, b):
    assert list(a) == list(b)
    for key in a:
        assert torch.equal(a[key], b[key]), key


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


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_fsdp2_gives_the_bits_of_one_process_and_each_rank_holds_its_rows(world, clip):
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
            own_bytes += size * (3 * 2 if p.dtype == torch.bfloat16 else 2 * 4)
        assert local_bytes == own_bytes, (
            "3 x 2 bytes for a bf16 parameter, 2 x 4 for a float32 one, of this rank's rows alone"
        )


def even_worker(rank, world):
    model = fsdp2(
        nn.Sequential(nn.Linear(16, 24, bias=False), nn.Linear(24, 48)).to(torch.bfloat16)
    )
    optimizer = train_on_given_gradients(model, 1)
    return sum(
        state.to_local().nbytes
        for p in model.parameters()
        for key, state in optimizer.state[p].items()
        if key in STATES
    )


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_state_at_rest_is_six_bytes_a_parameter_over_the_world_size(world):
    parameters = 16 * 24 + 24 * 48 + 48
    assert run_ranks(world, even_worker) == [3 * 2 * parameters // world] * world


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
def test_trains_and_ranks_agree(wrap):
    (losses, weights), (_, other) = run_ranks(2, real_training_worker, wrap)
    assert losses[-1] < 0.2 * losses[0]
    assert_same_bits(weights, other)


def built_too_early_worker(rank, world):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(torch.bfloat16)
    optimizer = AdamW_BF16(model.parameters(), lr=1e-2)
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    fully_shard(model)
    model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
    for _ in range(2):
        with pytest.raises(
            RuntimeError,
            match=r"built before fully_shard .* build AdamW_BF16\(model.parameters\(\)\) afterwards",
        ):
            optimizer.step()
    assert (
        all(
            torch.equal(a, b)
            for a, b in zip(before, optimizer.param_groups[0]["params"], strict=True)
        )
        and not optimizer.state
    )


def test_optimizer_built_before_fully_shard_is_refused():
    run_ranks(2, built_too_early_worker)


def model_that_is_gone_worker(rank, world):
    def train_another():
        sharded = fully_shard(nn.Linear(5, 3).to(torch.bfloat16))
        sharded(torch.ones(1, 5, dtype=torch.bfloat16)).sum().backward()
        sharded.itself = [sharded]  # goes when the collector comes

    plain = AdamW_BF16(nn.Linear(5, 3).to(torch.bfloat16).parameters(), lr=1e-2)
    gc.disable()
    train_another()
    plain.step()
    gc.enable()


def test_unused_parameters_beside_a_model_that_is_gone_are_no_error():
    run_ranks(2, model_that_is_gone_worker)


def raw_tensor_worker(rank, world):
    """A tensor that is no module's parameter has not been replaced in one, whatever its shape."""
    sharded = fully_shard(nn.Linear(4, 4).to(torch.bfloat16))
    prompt = torch.zeros(4, 4, dtype=torch.bfloat16, requires_grad=True)
    optimizers = [AdamW_BF16(sharded.parameters(), lr=1e-2), AdamW_BF16([prompt], lr=1e-2)]
    sharded(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()


def test_raw_tensors_beside_a_sharded_model_are_no_error():
    run_ranks(2, raw_tensor_worker)


def whole_state_worker(rank, world, whole):
    model = fsdp2(make_model())
    optimizer = AdamW_BF16(model.parameters(), lr=1e-2)
    optimizer.load_state_dict(whole)
    held = {
        key: value.to_local().numel()
        for key, value in optimizer.state[next(model.parameters())].items()
        if key != "step"
    }
    assert set(held.values()) == {next(model.parameters()).to_local().numel()}, (
        "each rank keeps its rows"
    )
    found = collect(model, optimizer)
    train_on_full_gradients(model, optimizer)
    return found, held


def train_on_full_gradients(model, optimizer):
    for p, grad in zip(model.parameters(), full_gradients(1, model), strict=True):
        p.grad = distribute_tensor(grad, p.device_mesh, p.placements)
    optimizer.step()


@pytest.mark.parametrize("of", [AdamW_BF16, torch.optim.AdamW])
def test_fsdp2_loads_the_whole_state_of_one_process(of):
    model = make_model()
    optimizer = of(model.parameters(), lr=1e-2)
    for p, grad in zip(model.parameters(), full_gradients(0, model), strict=True):
        p.grad = grad
    optimizer.step()
    for found, held in run_ranks(2, whole_state_worker, optimizer.state_dict()):
        assert set(held) == {"exp_avg", "exp_avg_sq", "correction"}
        for name, p in model.named_parameters():
            for key, value in optimizer.state[p].items():
                assert torch.equal(found[f"{name}.{key}"], value), (name, key)


def sharded_otherwise_worker(rank, world):
    """States as torch.save wrote them elsewhere: of the right global shape, with other elements on this rank."""
    model = fully_shard(nn.Linear(4, 4).to(torch.bfloat16))  # of equal parts
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
        (
            right.to_local(),
            mesh,
            (Replicate(),),
        ),  # stands for placements on a mesh of more dimensions that give this shape too
    ):
        state = optimizer.state_dict()
        state["state"][0]["exp_avg"] = DTensor.from_local(local, on, placements, **whole)
        with pytest.raises(
            ValueError,
            match=r"the loaded exp_avg of parameter 0 .* is sharded differently from the parameter .*; load it",
        ):
            optimizer.load_state_dict(state)
    named = init_device_mesh(
        "cpu", (world,), mesh_dim_names=("dp",)
    )  # the same ranks by another name
    state = optimizer.state_dict()
    state["state"][0]["exp_avg"] = DTensor.from_local(
        right.to_local(), named, right.placements, **whole
    )
    optimizer.load_state_dict(state)
    assert_same_bits(collect(model, optimizer), before)


def test_states_that_are_sharded_otherwise_are_refused():
    run_ranks(2, sharded_otherwise_worker)


def second_model_worker(rank, world):
    """A plain model of the same shapes beside an FSDP one is no mistake, gradients or none."""
    sharded = fully_shard(nn.Linear(4, 4).to(torch.bfloat16))
    sharded_optimizer = AdamW_BF16(sharded.parameters(), lr=1e-2)
    plain = AdamW_BF16(nn.Linear(5, 3).to(torch.bfloat16).parameters(), lr=1e-2)
    sharded(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
    plain.step()
    sharded_optimizer.step()


def test_unused_parameters_beside_another_sharded_model_are_no_error():
    run_ranks(2, second_model_worker)


def nonfinite_worker(rank, world):
    model = fsdp2(make_model())
    optimizer = AdamW_BF16(model.parameters(), lr=1e-2, skip_nonfinite=True)
    for step in range(2):
        for p, grad in zip(model.parameters(), full_gradients(step, model), strict=True):
            if step == 1 and p.shape == (13, 6):
                grad[12, 5] = float("nan")  # in the last rank's rows alone
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements)
        if step == 1:
            before = collect(model, optimizer)
        optimizer.step(zero_grad=True)
    assert_same_bits(collect(model, optimizer), before)
    return optimizer.skipped_steps


def test_one_ranks_nan_makes_every_rank_skip():
    assert run_ranks(3, nonfinite_worker) == [1, 1, 1]


def norm_worker(rank, world):
    """Parameters sharded on a 2-D mesh, on one of its axes, replicated, and plain: each element counts once."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    from torch.distributed.tensor import Replicate

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
    """Tensor parallelism may leave a gradient as partial sums; the update needs their sum."""
    from torch.distributed.tensor import Partial, Replicate

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
