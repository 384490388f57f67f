"""ZeRO matches a single process bit for bit, with minimal memory and traffic."""

from __future__ import annotations

import functools
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sharded_bf16_adamw.sharding.zero import reduce_scatter
from sharded_bf16_adamw.sharding.zero.bucket import ReplicatedBucket
from sharded_bf16_adamw.sharding.zero.param import ZeroParam
from sharded_bf16_adamw.sharding.zero.reduce_scatter import PendingReduce

from .cases import (
    STATES,
    Linears,
    NewBytes,
    Parameters,
    assert_same_bits,
    backpressure_timeout,
    collect,
    mesh_of,
    new_optimizer,
    one_dimensional,
    rank_gradients,
    traffic,
    train,
    zero,
)

STEPS = 8  # the gradients' scales repeat after 7
LAYERS, WIDTH = 8, 48
WEIGHT_BYTES = LAYERS * WIDTH * WIDTH * 2
LAYER_MB = WIDTH * WIDTH * 2 / 2**20


@functools.cache
def single_process(steps, clip=None):
    model = Parameters()
    optimizer = new_optimizer(model)
    norms = train(model, optimizer, steps, averaged=True, clip=clip)
    return collect(model, optimizer), norms


def own_numel(shape, rank, ranks):
    """Return the numel of this rank's local shard by the documented rule."""
    if not shape:
        return 1
    dim = next(
        (d for d, size in enumerate(shape) if size >= ranks),
        max(range(len(shape)), key=lambda d: shape[d]),
    )
    chunk = -(-shape[dim] // ranks)
    rows = max(0, min(chunk, shape[dim] - rank * chunk))
    return rows * torch.Size([size for d, size in enumerate(shape) if d != dim]).numel()


def bits_worker(rank, world, stage, clip, options):
    model = Parameters()
    optimizer = new_optimizer(model, zero(stage, **options))
    norms = train(model, optimizer, STEPS, averaged=stage == 1, clip=clip)
    states = [
        (p, optimizer.state[p][key])
        for p in model.parameters()
        for key in STATES
        if key in optimizer.state[p]
    ]
    assert all(isinstance(state, DTensor) and state.shape == p.shape for p, state in states)
    for p, state in states:
        assert state.to_local().numel() == own_numel(p.shape, rank, world)
        assert state.to_local().untyped_storage().nbytes() == state.to_local().nbytes, (
            "no more memory than the shard"
        )
    return collect(model, optimizer), norms


@pytest.mark.parametrize(
    ("world", "stage", "clip"),
    [
        *((world, stage, 0.5) for world in (1, 2, 3, 4) for stage in (1, 2)),
        (2, 2, None),
        (3, 1, None),
    ],
)
def test_bits_match_single_process(world, stage, clip):
    expected, norms = single_process(STEPS, clip)
    for weights, own_norms in run_ranks(world, bits_worker, stage, clip, {}):
        assert own_norms == norms
        assert_same_bits(weights, expected)


OPTIONS = [
    {"reduce_dtype": torch.float32},
    {"accumulate_dtype": torch.float32},
    {"bucket_size_mb": 25.0},
    {"bucket_size_mb": 1e-6, "max_in_flight": 1},
    {"broadcast_initial": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_do_not_change_bits(options):
    expected, norms = single_process(STEPS, 0.5)
    for weights, own_norms in run_ranks(3, bits_worker, 2, 0.5, options):
        assert own_norms == norms
        assert_same_bits(weights, expected)


def hybrid_worker(rank, world, stage):
    model = Parameters()
    optimizer = new_optimizer(model, zero(stage, mesh_of((2, 2))))
    norms = train(model, optimizer, STEPS, averaged=stage == 1, clip=0.5)
    for p in model.parameters():
        assert optimizer.state[p]["exp_avg"].to_local().numel() == own_numel(p.shape, rank % 2, 2)
    return collect(model, optimizer), norms


@pytest.mark.parametrize("stage", [1, 2])
def test_bits_match_on_replicate_shard_mesh(stage):
    expected, norms = single_process(STEPS, 0.5)
    for weights, own_norms in run_ranks(4, hybrid_worker, stage):
        assert own_norms == norms
        assert_same_bits(weights, expected)


def ddp_worker(rank, world):
    model = Parameters()
    optimizer = new_optimizer(model, zero(1))
    ddp = DistributedDataParallel(model)
    for step in range(5):
        ddp(rank_gradients(step, rank, world)).backward()
        optimizer.step(zero_grad=True)
    return collect(model, optimizer)


@pytest.mark.parametrize("world", [2, 4])
def test_stage_1_with_ddp_matches_single_process(world):
    for weights in run_ranks(world, ddp_worker):
        assert_same_bits(weights, single_process(5)[0])


@contextmanager
def like_nccl():
    """Take the code path of NCCL, on gloo.

    AVG rounds as NCCL's does: it multiplies each addend by ``1 / ranks`` rounded to its dtype.
    """

    def averaging(function, position):
        def call(*args, group=None, op=dist.ReduceOp.SUM, async_op=False):
            if op == dist.ReduceOp.AVG:
                args[position].mul_(
                    torch.tensor(1 / dist.get_world_size(group)).to(args[position].dtype)
                )
                op = dist.ReduceOp.SUM
            return function(*args, group=group, op=op, async_op=async_op)

        return call

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reduce_scatter, "is_gloo", lambda *args: False)
        for name, position in (
            ("reduce_scatter_single", 1),
            ("reduce_scatter_tensor", 1),
            ("all_reduce", 0),
        ):
            if hasattr(dist, name):
                patched.setattr(dist, name, averaging(getattr(dist, name), position))
        yield


def reduce_scatter_worker(rank, world, shape, fp32_sum):
    """Train as with NCCL, and return the names of the collectives too."""
    model = Parameters()
    optimizer = new_optimizer(model, zero(2, mesh_of(shape), fp32_sum=fp32_sum))
    with like_nccl(), traffic() as calls:
        train(model, optimizer, 3, averaged=False)
    return collect(model, optimizer), {
        name.partition("_single")[0].partition("_tensor")[0] for name, _, _ in calls
    }


@pytest.mark.parametrize("fp32_sum", [False, True])
@pytest.mark.parametrize("shape", [(3,), (2, 2)])
def test_nccl_gives_same_bits(shape, fp32_sum):
    ranks = torch.Size(shape).numel()
    for weights, names in run_ranks(ranks, reduce_scatter_worker, shape, fp32_sum):
        assert ("all_to_all" in names, "reduce_scatter" in names) == (fp32_sum, not fp32_sum)
        assert_same_bits(weights, single_process(3)[0])


def mean_worker(rank, world, with_nccl):
    """Compare with a sum in float32 in the order of ranks, rounded once."""
    torch.manual_seed(rank)
    grads = torch.randn(world, 1000).bfloat16()
    of_ranks = [torch.empty_like(grads) for _ in range(world)]
    dist.all_gather(of_ranks, grads)
    total = functools.reduce(torch.add, [other[rank].float() for other in of_ranks])
    with like_nccl() if with_nccl else nullcontext():
        for dtype in (torch.bfloat16, torch.float32):
            pending = PendingReduce(grads, one_dimensional(), dtype, fp32_sum=with_nccl)
            assert torch.equal(pending.wait(), (total / world).to(dtype))


@pytest.mark.parametrize("with_nccl", [False, True], ids=["gloo", "nccl"])
@pytest.mark.parametrize("world", [2, 3])
def test_mean_is_rounded_once(world, with_nccl):
    run_ranks(world, mean_worker, with_nccl)


def two_dimensional_mean_worker(rank, world, with_nccl):
    """Sums are float32 between replicas too, and rounded once."""
    mesh = mesh_of((2, 2))
    grads = torch.randn(2, 1000, generator=torch.Generator().manual_seed(rank)).bfloat16()
    of_ranks = [torch.empty_like(grads) for _ in range(world)]
    dist.all_gather(of_ranks, grads)
    mine = [other[mesh.get_local_rank(1)].float() for other in of_ranks]
    mean = ((mine[0] + mine[1]) / 2 + (mine[2] + mine[3]) / 2) / 2
    scalar = grads[0, 0].clone()
    param = ZeroParam(nn.Parameter(torch.zeros((), dtype=torch.bfloat16)), mesh, "scale")
    bucket = ReplicatedBucket([param], mesh, torch.bfloat16, torch.float32, True)
    bucket.add_grad(param, scalar)
    with like_nccl() if with_nccl else nullcontext():
        for dtype in (torch.bfloat16, torch.float32):
            pending = PendingReduce(grads.clone(), mesh, dtype, fp32_sum=True)
            assert torch.equal(pending.wait(), mean.to(dtype))
        scalars = [other[0, 0].float() for other in of_ranks]
        assert bucket.launch_reduce().wait().item() == pytest.approx(
            float(sum(scalars)) / 4, rel=1e-6
        )


@pytest.mark.parametrize("with_nccl", [False, True], ids=["gloo", "nccl"])
def test_fp32_sum_between_replicas(with_nccl):
    run_ranks(4, two_dimensional_mean_worker, with_nccl)


def nccl_mean_worker(rank, world, shape):
    """Sums of small integers are exact in bfloat16, so only the division rounds."""
    mesh = mesh_of(shape)
    group, ranks = mesh.get_group(mesh.ndim - 1), shape[-1]
    replicas = shape[0] if mesh.ndim > 1 else None
    shard = mesh.get_local_rank(mesh.ndim - 1)
    grads = torch.randint(
        -8, 9, (ranks, 1000), generator=torch.Generator().manual_seed(rank)
    ).bfloat16()
    of_ranks = [torch.empty_like(grads) for _ in range(ranks)]
    dist.all_gather(of_ranks, grads, group=group)
    total = functools.reduce(torch.add, [other[shard].float() for other in of_ranks])
    whole = grads[0, :5].clone()
    of_all = [torch.empty_like(whole) for _ in range(world)]
    dist.all_gather(of_all, whole)
    for dtype in (torch.bfloat16, torch.float32):
        wanted = (total / ranks).to(torch.bfloat16 if replicas else dtype)
        if replicas:
            dist.all_reduce(wanted, group=mesh.get_group(0))
            wanted = (wanted.float() / replicas).to(dtype)
        with like_nccl():
            assert torch.equal(PendingReduce(grads.clone(), mesh, dtype).wait(), wanted)
    with like_nccl():
        reduce_scatter.all_reduce_mean(whole, mesh)
    # Over a dimension of one rank nothing is rounded, so each shape has the same mean.
    assert torch.equal(whole, (torch.stack(of_all).float().sum(0) / world).bfloat16())
    return float(total.abs().max())


@pytest.mark.parametrize("shape", [(3,), (1, 3), (3, 1)])
def test_nccl_average_is_not_used(shape):
    assert min(run_ranks(3, nccl_mean_worker, shape)) > 0


def first_step_worker(rank, world):
    """Rank 1 does not use the layer whose gradient comes first.

    It begins its step only after rank 0's backward pass.
    """
    model = Linears(LAYERS, WIDTH)
    optimizer = new_optimizer(
        model, zero(bucket_size_mb=LAYER_MB, max_in_flight=1, broadcast_initial=True)
    )
    x = torch.ones(2, WIDTH, dtype=torch.bfloat16)
    barrier_group = dist.new_group(timeout=timedelta(seconds=5))
    with like_nccl(), backpressure_timeout(0.05):
        for _ in range(3):
            nn.Sequential(*list(model)[: -1 if rank == 1 else None])(x).sum().backward()
            # Stands for loss.item() on rank 0, whose device waits for rank 1.
            dist.barrier(barrier_group)
            optimizer.step(zero_grad=True)
        for _ in range(3):
            model(x).sum().backward()
            optimizer.step(zero_grad=True)
    return [p.detach().clone() for p in model.parameters()]


def test_first_backward_pass_does_not_block_the_device():
    one, two = run_ranks(2, first_step_worker)
    assert all(map(torch.equal, one, two))


# -------------------------------------------------------------------------- memory and traffic


def state_bytes_worker(rank, world):
    model = nn.Sequential(nn.Linear(16, 24, bias=False), nn.Linear(24, 48)).to(torch.bfloat16)
    optimizer = new_optimizer(model, zero(broadcast_initial=True))
    model(torch.ones(1, 16, dtype=torch.bfloat16)).sum().backward()
    optimizer.step(zero_grad=True)
    return sum(
        optimizer.state[p][key].to_local().nbytes for p in model.parameters() for key in STATES
    )


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_state_takes_six_bytes_a_parameter_over_world_size(world):
    assert (
        run_ranks(world, state_bytes_worker) == [3 * 2 * (16 * 24 + 24 * 48 + 48) // world] * world
    )


def traffic_worker(rank, world, stage, old_names=False):
    """Train; with ``old_names``, collectives have only the names from before torch 2.13."""
    with pytest.MonkeyPatch.context() as patched:
        if old_names:
            patched.delattr(dist, "all_gather_single", raising=False)
        return traffic_of_a_step(stage)


def traffic_of_a_step(stage):
    model = Linears(LAYERS, WIDTH)
    optimizer = new_optimizer(model, zero(stage, bucket_size_mb=2.5 * LAYER_MB))
    for step in range(4):
        with traffic() as calls:
            model(torch.ones(2, WIDTH, dtype=torch.bfloat16)).sum().backward()
            optimizer.clip_grad_norm_(1.0)
            optimizer.step(zero_grad=True)
        if step == 0:
            assert sum(name == "consensus.broadcast" for name, _, _ in calls) <= 1, (
                "the order of gradients, once"
            )
    return calls


@pytest.mark.parametrize(("world", "old_names"), [(2, False), (2, True), (3, False), (4, False)])
def test_stage_2_traffic(world, old_names):
    for calls in run_ranks(world, traffic_worker, 2, old_names):
        sent = {
            name: sum(bytes_ for other, bytes_, _ in calls if other == name) for name, _, _ in calls
        }
        share = (world - 1) / world * WEIGHT_BYTES
        # Bytes added to the last bucket, which say whether the ranks must agree anew.
        flags = 2 * (world - 1)
        assert sent["all_gather_single"] == pytest.approx(share)
        assert sent["all_to_all_single"] == pytest.approx(share + flags, abs=1e-6)
        rest = [
            (name, size)
            for name, _, size in calls
            if name not in ("all_to_all_single", "all_gather_single")
        ]
        assert rest == [("all_reduce", 32)], "the norm"


def test_stage_1_traffic():
    for calls in run_ranks(3, traffic_worker, 1):
        assert sum(size for name, size, _ in calls if name == "all_gather_single") == pytest.approx(
            2 / 3 * WEIGHT_BYTES
        )
        rest = [(name, size) for name, _, size in calls if name != "all_gather_single"]
        assert sorted(rest) == [
            ("all_reduce", 32),
            ("consensus.all_reduce", 8),
        ], "the norm, and the check that the same gradients exist as in the last step"


def overlap_worker(rank, world):
    model = Linears(LAYERS, WIDTH)
    optimizer = new_optimizer(model, zero(bucket_size_mb=2.5 * LAYER_MB))
    events = []
    for index, layer in enumerate(model):
        layer.weight.register_post_accumulate_grad_hook(
            lambda p, i=index: events.append(f"gradient {i}")
        )
    for _ in range(2):
        events.clear()
        with traffic() as calls:
            loss = model(torch.ones(2, WIDTH, dtype=torch.bfloat16)).sum()
            calls.on_call = lambda name: (
                events.append("sent") if name == "all_to_all_single" else None
            )
            loss.backward()
            events.append("backward ended")
            calls.on_call = None
            optimizer.step(zero_grad=True)
    assert sum(name == "all_to_all_single" for name, _, _ in calls) == LAYERS // 2
    return events


def test_reductions_overlap_with_backward():
    """The optimizer's hooks run first, so a bucket is sent before its second gradient is listed."""
    for events in run_ranks(2, overlap_worker):
        expected = []
        for i in range(LAYERS - 1, 0, -2):
            expected += [f"gradient {i}", "sent", f"gradient {i - 1}"]
        assert events == [*expected, "backward ended"]


def memory_worker(rank, world, strategy):
    """Return bytes: the peak of gradients and buckets in a backward pass, and all gradients."""
    layers, width = 16, 32
    model = Linears(layers, width)
    weight_bytes = layers * width * width * 2
    bucket_mb = 2 * width * width * 2 / 2**20
    buckets = {}
    if strategy == "zero2":
        optimizer = new_optimizer(model, zero(bucket_size_mb=bucket_mb))
        module = model
    else:
        module = DistributedDataParallel(model, bucket_cap_mb=bucket_mb)
        optimizer = new_optimizer(model)

        def count(state, bucket):
            # The reducer's buffers live as long as the module.
            buckets[bucket.index()] = bucket.buffer().nbytes
            return torch.futures.collect_all([]).then(lambda _: bucket.buffer())

        module.register_comm_hook(None, count)
    x = torch.ones(1, width, dtype=torch.bfloat16)
    for _ in range(2):
        module(x).sum().backward()
        optimizer.step(zero_grad=True)
    live = NewBytes(model)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda _: live.look())
    with backpressure_timeout(60.0):  # NewBytes.look() is slow
        module(x).sum().backward()
    live.look()
    optimizer.step(zero_grad=True)
    return live.peak + sum(buckets.values()), weight_bytes


@pytest.mark.parametrize("world", [2, 4])
def test_stage_2_gradient_memory_below_ddp(world):
    ddp = run_ranks(world, memory_worker, "ddp")
    ours = run_ranks(world, memory_worker, "zero2")
    for (ddp_peak, gradient_bytes), (peak, _) in zip(ddp, ours, strict=True):
        assert ddp_peak >= 2 * gradient_bytes

        assert peak <= ddp_peak - gradient_bytes * (1 - 1 / world)
        assert peak >= gradient_bytes / world, "or nothing was measured"
