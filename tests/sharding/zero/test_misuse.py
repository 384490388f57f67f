"""Misuse of ZeRO is an error on every rank: no hang, no silently wrong training."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from sharded_bf16_adamw import AdamW_BF16, ZeRO

from .cases import (
    Parameters,
    mean_gradients,
    new_optimizer,
    one_dimensional,
    rank_gradients,
    zero,
)


def linears():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)).to(torch.bfloat16)


def run(model, optimizer, forward=None):
    (forward or model)(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()


def fsdp2(rank, world):
    AdamW_BF16(fully_shard(linears()).parameters(), sharding=zero())


def fsdp1(rank, world):
    model = FullyShardedDataParallel(
        linears(),
        device_mesh=one_dimensional(),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )
    AdamW_BF16(model.parameters(), sharding=zero())


def fsdp2_on_one_rank(rank, world):
    model = linears()
    mesh = one_dimensional()
    AdamW_BF16(
        (fully_shard(model, mesh=mesh) if rank == 1 else model).parameters(), sharding=zero()
    )


def fsdp2_afterwards(rank, world):
    model = linears()
    optimizer = AdamW_BF16(model.parameters(), sharding=zero())
    fully_shard(model)
    run(model, optimizer)


def other_weights(rank, world):
    model = linears()
    with torch.no_grad():
        model[1].weight.view(-1)[-1 if rank == 1 else 0] += 0.125
    AdamW_BF16(model.named_parameters(), sharding=zero())


def other_order(rank, world):
    params = list(linears().named_parameters())
    AdamW_BF16(params[::-1] if rank == 1 else params, sharding=zero(broadcast_initial=True))


def other_shapes(rank, world):
    AdamW_BF16(
        nn.Linear(4, 6 + rank).bfloat16().parameters(), sharding=zero(broadcast_initial=True)
    )


def other_number(rank, world):
    AdamW_BF16(
        list(linears().named_parameters())[: 4 - rank], sharding=zero(broadcast_initial=True)
    )


def parameter_replaced(rank, world):
    model = linears()
    optimizer = AdamW_BF16(model.named_parameters(), sharding=zero())
    model[1].weight = nn.Parameter(model[1].weight.detach().clone())
    run(model, optimizer)


def parameter_replaced_on_one_rank(rank, world):
    model = linears()
    optimizer = AdamW_BF16(model.named_parameters(), sharding=zero())
    run(model, optimizer)
    if rank == 1:
        model[1].weight = nn.Parameter(model[1].weight.detach().clone())
    run(model, optimizer)


def another_dtype(rank, world):
    model = linears()
    optimizer = AdamW_BF16(model.named_parameters(), sharding=zero())
    model.float()
    run(model, optimizer, lambda x: model(x.float()))


def swapped_in_groups(rank, world):
    model = linears()
    optimizer = AdamW_BF16(model.named_parameters(), sharding=zero(1))
    other = linears()
    optimizer.param_groups[0]["params"] = list(other.parameters())
    run(other, optimizer)


def stage_2_with_ddp(rank, world):
    model = linears()
    optimizer = AdamW_BF16(model.parameters(), sharding=zero(2))
    run(model, optimizer, DistributedDataParallel(model))


def stage_1_without_ddp(rank, world):
    model = Parameters()
    optimizer = new_optimizer(model, zero(1))
    model(mean_gradients(0)).backward()  # all zero, so equal on both ranks
    for p in model.parameters():
        p.grad.zero_()
    optimizer.step(zero_grad=True)
    model(rank_gradients(0, rank, world)).backward()
    optimizer.step()


def stage_1_unused_on_a_rank(rank, world):
    model = linears()
    optimizer = AdamW_BF16(model.named_parameters(), sharding=zero(1))
    run(model, optimizer, model if rank == 0 else model[0])


def sparse_on_one_rank(rank, world):
    model = nn.Embedding(5, 3, sparse=rank == 1).bfloat16()
    optimizer = AdamW_BF16(model.parameters(), sharding=zero(broadcast_initial=True))
    model(torch.tensor([1])).sum().backward()
    optimizer.step()


def zero_grad_on_one_rank(rank, world):
    model = linears()
    optimizer = AdamW_BF16(model.parameters(), sharding=zero())
    model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
    if rank == 1:
        optimizer.zero_grad()
    optimizer.step()


def zero_grad_where_a_rank_has_none(rank, world):
    model = linears()
    optimizer = AdamW_BF16(model.parameters(), sharding=zero())
    if rank == 0:
        model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
    optimizer.zero_grad()
    run(model, optimizer)
    run(model, optimizer)


def zero_grad_on_one_rank_after_a_step(rank, world):
    """Rank 1 keeps its used gradients, and neither has new ones."""
    model = linears()
    optimizer = AdamW_BF16(model.parameters(), sharding=zero())
    run(model, optimizer)
    if rank == 0:
        optimizer.zero_grad()
    optimizer.step()


def zero_grad_on_one_rank_after_stale_gradients(rank, world):
    model = linears()
    optimizer = AdamW_BF16(model.parameters(), sharding=zero())
    run(model, optimizer)
    with pytest.raises(RuntimeError, match="new gradients were accumulated onto"):
        run(model, optimizer)
    if rank == 0:
        optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="new gradients were accumulated onto"):
        optimizer.step()  # rank 1's are stale, so rank 0 must not use them either
    optimizer.zero_grad()
    run(model, optimizer)
    if rank == 1:
        optimizer.zero_grad()
    optimizer.step()


def stage_3(rank, world):
    ZeRO(one_dimensional(), stage=3)


def no_mesh(rank, world):
    ZeRO(dist.group.WORLD)


def cubic_mesh(rank, world):
    ZeRO(init_device_mesh("cpu", (2, 1, 1)))


def descending_mesh(rank, world):
    ZeRO(DeviceMesh("cpu", [1, 0]))


def infinite_buckets(rank, world):
    zero(bucket_size_mb=float("inf"))


def overlap_without_a_model(rank, world):
    zero(overlap_gather=True)


def a_model_without_overlap(rank, world):
    zero(model=linears())


def no_zero(rank, world):
    AdamW_BF16(linears().parameters(), sharding="zero2")


def copied(rank, world):
    copy.deepcopy(AdamW_BF16(linears().parameters(), sharding=zero()))


def pickled(rank, world):
    pickle.dumps(AdamW_BF16(linears().parameters(), sharding=zero(1)))


def shards_into_one_process(rank, world):
    model = linears()
    optimizer = AdamW_BF16(model.named_parameters(), sharding=zero())
    run(model, optimizer)
    AdamW_BF16(model.named_parameters()).load_state_dict(optimizer.state_dict())


def no_sync_in_stage_1(rank, world):
    AdamW_BF16(linears().parameters(), sharding=zero(1)).no_sync()


def no_sync_without_zero(rank, world):
    AdamW_BF16(linears().parameters()).no_sync()


def a_second_one_of_stage_2(rank, world):
    model = linears()
    first = AdamW_BF16(model.named_parameters(), sharding=zero())
    second = AdamW_BF16(model.named_parameters(), sharding=zero())
    run(model, first)
    del second


def zero_grad_of_the_model(rank, world):
    model = linears()
    optimizer = AdamW_BF16(model.named_parameters(), sharding=zero())
    for _ in range(2):
        model.zero_grad()
        run(model, optimizer)


MISUSES = [
    (fsdp2, ValueError, "is a DTensor .* which is sharded already; leave out sharding="),
    (
        fsdp1,
        ValueError,
        "is a part of FullyShardedDataParallel, which is sharded already; leave out sharding=",
    ),
    (fsdp2_on_one_rank, ValueError, "on rank 1, parameter 0 .* is a DTensor"),
    (
        fsdp2_afterwards,
        RuntimeError,
        "parameter 0 .* has been replaced in its module by another .*; build the optimizer after",
    ),
    (
        other_weights,
        ValueError,
        "initial weights of parameter '1.weight' differ between ranks; .* broadcast_initial=True",
    ),
    (
        other_order,
        ValueError,
        r"number 0 is '0.weight' \(6, 4\) torch.bfloat16 *on rank 0 "
        r"but '1.bias' \(2,\) torch.bfloat16 *on rank 1",
    ),
    (other_shapes, ValueError, r"number 0 is .*\(6, 4\).* on rank 0 but .*\(7, 4\)"),
    (other_number, ValueError, "number 3 is '1.bias' .* on rank 0 but none on rank 1"),
    (parameter_replaced, RuntimeError, "parameter '1.weight' has been replaced in its module"),
    (
        parameter_replaced_on_one_rank,
        RuntimeError,
        "on rank 1, parameter '1.weight' has been replaced in its module",
    ),
    (
        another_dtype,
        RuntimeError,
        "parameter '0.weight' was .*torch.bfloat16 on cpu and is now .*torch.float32 on cpu",
    ),
    (swapped_in_groups, RuntimeError, r"was put into param_groups without add_param_group\(\)"),
    (
        stage_2_with_ddp,
        RuntimeError,
        "wrapped by DistributedDataParallel, which would reduce the gradients too; .*stage=1",
    ),
    (
        stage_1_without_ddp,
        RuntimeError,
        "the gradients of parameter 'even' differ between ranks; .*stage=2",
    ),
    (
        stage_1_unused_on_a_rank,
        RuntimeError,
        "parameter '1.weight' has a gradient on some ranks and none on others",
    ),
    (
        a_second_one_of_stage_2,
        RuntimeError,
        "gradients of parameter '0.weight' go to a ZeRO stage 2 optimizer that was built later; d",
    ),
    (
        sparse_on_one_rank,
        RuntimeError,
        "on rank 1, the gradient of parameter 0 .* is sparse, .* sparse=False",
    ),
    (
        zero_grad_on_one_rank,
        RuntimeError,
        r"some ranks called zero_grad\(\) between .* and others did not",
    ),
    (
        zero_grad_of_the_model,
        RuntimeError,
        r"model.zero_grad\(\) does not reach them, so call optimizer.zero_grad\(\) or step",
    ),
    (
        zero_grad_where_a_rank_has_none,
        RuntimeError,
        r"some ranks called zero_grad\(\)",
    ),
    (
        zero_grad_on_one_rank_after_a_step,
        RuntimeError,
        r"optimizer.zero_grad\(\) since the last step.*, and others have not; .* on every rank",
    ),
    (
        zero_grad_on_one_rank_after_stale_gradients,
        RuntimeError,
        r"optimizer.zero_grad\(\) since the last step.*, and others have not; .* on every rank",
    ),
    (stage_3, ValueError, "Invalid stage: 3"),
    (no_mesh, ValueError, "Invalid mesh: .* ZeRO needs a DeviceMesh"),
    (cubic_mesh, ValueError, "Invalid mesh: it has 3 dimensions"),
    (descending_mesh, ValueError, r"Invalid mesh: its ranks \[1, 0\] do not ascend"),
    (infinite_buckets, ValueError, "Invalid bucket_size_mb: inf; it must be positive and finite"),
    (overlap_without_a_model, ValueError, "overlap_gather: True with model: NoneType; give ZeRO"),
    (
        a_model_without_overlap,
        ValueError,
        "overlap_gather: False with model: Sequential; give ZeRO",
    ),
    (no_zero, ValueError, r"Invalid sharding: 'zero2'; give ZeRO\(mesh\)"),
    (copied, TypeError, "cannot be pickled or deep-copied; save its state"),
    (pickled, TypeError, "cannot be pickled or deep-copied; save its state"),
    (
        shards_into_one_process,
        ValueError,
        "the loaded exp_avg of parameter '0.weight' is a shard but the parameter is not sharded",
    ),
    (no_sync_in_stage_1, RuntimeError, r"use no_sync\(\) of the DistributedDataParallel module"),
    (no_sync_without_zero, RuntimeError, r"no_sync\(\) of the optimizer is for ZeRO stage 2"),
]


def misuse_worker(rank, world, number):
    misuse, error, message = MISUSES[number]
    with pytest.raises(error, match=message):
        misuse(rank, world)


@pytest.mark.parametrize(
    "number", range(len(MISUSES)), ids=[misuse.__name__ for misuse, _, _ in MISUSES]
)
def test_misuse_is_an_error_on_every_rank(number):
    run_ranks(2, misuse_worker, number)


OPTIONS_OF_RANKS = [
    ({"stage": 1}, {}, "stage"),
    ({"bucket_size_mb": 1.0}, {}, "bucket_size_mb"),
    ({"reduce_dtype": torch.float32, "fp32_sum": True}, {}, "reduce_dtype, fp32_sum"),
    ({"stage": 1, "static_graph": True}, {"stage": 1}, "static_graph"),
    ({"broadcast_initial": True}, {}, "broadcast_initial"),
    ({"overlap_gather": True}, {}, "overlap_gather"),
]


def options_worker(rank, world):
    model = linears()
    for of_ranks in OPTIONS_OF_RANKS:
        options = dict(of_ranks[rank])
        if "overlap_gather" in options:
            options["model"] = model
        with pytest.raises(ValueError, match=f"different options: {of_ranks[-1]}; give every rank"):
            AdamW_BF16(model.parameters(), sharding=zero(**options))


def test_options_that_differ_between_ranks_are_an_error():
    run_ranks(2, options_worker)
