"""A rank that dies or hangs is one clear error on the others, before weights change if possible."""

from __future__ import annotations

import os
import re

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks, run_ranks_that_die
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sharded_bf16_adamw import AdamW_BF16, ZeRO
from sharded_bf16_adamw.sharding.comm_errors import CheckedWork, comm_errors
from sharded_bf16_adamw.sharding.dtensor import to_local

from .fsdp1_cases import wrap
from .zero.cases import backpressure_timeout, mesh_with_timeout, shorten_timeout, zero

EXIT_CODE = 3
ADVICE = (
    "; most likely one of them has died or hangs, so look for the first error in their logs, then "
    "restart all ranks from the last checkpoint"
)


def build(strategy):
    """Return the module to call and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(12, 12) for _ in range(4)]).to(torch.bfloat16)
    if strategy.startswith("ZeRO"):
        optimizer = AdamW_BF16(
            model.parameters(),
            lr=1e-2,
            sharding=zero(
                int(strategy[-1]),
                static_graph="static" in strategy,
                **({"overlap_gather": True, "model": model} if "overlap" in strategy else {}),
            ),
            skip_nonfinite=True,
        )
        return (DistributedDataParallel(model) if strategy[-1] == "1" else model), optimizer
    model = fully_shard(model) if strategy == "FSDP2" else wrap(model)
    return model, AdamW_BF16(model.parameters(), lr=1e-2, skip_nonfinite=True)


def die(*args, **kwargs):
    os._exit(EXIT_CODE)


def arrange_death(moment, model, optimizer):
    if moment == "backward":
        # At the last gradient, while reductions of others are in flight.
        next(model.parameters()).register_post_accumulate_grad_hook(die)
    elif moment == "forward":
        next(model.children()).register_forward_pre_hook(die)
    elif moment == "agreement":
        optimizer._sharding.reduce_grads = die
    elif moment == "norm":
        optimizer._grad_norm.compute = die
    else:
        optimizer._sharding.all_gather_params = die


def memory_of(model, optimizer):
    states = [value for param in model.parameters() for value in optimizer.state[param].values()]
    return [to_local(tensor).detach().clone() for tensor in (*model.parameters(), *states)]


def one_step(model, optimizer, clip):
    model(torch.ones(2, 12, dtype=torch.bfloat16)).float().sum().backward()
    if clip:
        optimizer.clip_grad_norm_(1.0)
    optimizer.step(zero_grad=True)


def last_step(model, optimizer, clip):
    one_step(model, optimizer, clip)
    optimizer.wait()


def dying_worker(rank, world, folder, strategy, moment, clip):
    """Rank 1 dies in a step after the first; rank 0 saves its error."""
    model, optimizer = build(strategy)
    steps = {"static": 2, "overlap": 2, "steady": 3}
    for _ in range(next((count for kind, count in steps.items() if kind in strategy), 1)):
        one_step(model, optimizer, clip)
    if rank == 1:
        arrange_death(moment, model, optimizer)
    before = memory_of(model, optimizer)
    with pytest.raises(RuntimeError) as caught:
        last_step(model, optimizer, clip)
    unchanged = [
        torch.equal(a, b) for a, b in zip(before, memory_of(model, optimizer), strict=True)
    ]
    torch.save((str(caught.value), str(caught.value.__cause__), all(unchanged)), f"{folder}/seen")


AVERAGING = "averaging gradients"
OVERLAPPED = r"all-gathering the updated weights \(in a forward pass, .*\)"


@pytest.mark.parametrize(
    ("strategy", "moment", "clip", "what", "unchanged"),
    [
        ("ZeRO-2", "backward", True, "(averaging gradients|agreeing on what to exchange)", True),
        ("ZeRO-2", "agreement", True, "agreeing on what to exchange", True),
        ("ZeRO-2", "norm", True, "summing the gradient norm", True),
        ("ZeRO-2", "norm", False, "summing the gradient norm", True),
        ("ZeRO-2", "gather", False, "gathering the updated weights", False),
        # the closing bucket carries the flag
        ("ZeRO-steady-2", "backward", True, AVERAGING, True),
        ("ZeRO-steady-2", "agreement", True, AVERAGING, True),
        ("ZeRO-steady-2", "norm", False, "summing the gradient norm", True),
        ("ZeRO-steady-1", "agreement", False, "agreeing on what to exchange", True),
        # without a consensus, the first collective to fail depends on how far the dead rank came
        ("ZeRO-static-2", "backward", True, f"({AVERAGING}|summing the gradient norm)", True),
        ("ZeRO-static-2", "agreement", True, f"({AVERAGING}|summing the gradient norm)", True),
        ("ZeRO-static-2", "gather", False, "gathering the updated weights", False),
        ("ZeRO-overlap-2", "forward", False, OVERLAPPED, False),
        ("ZeRO-overlap-1", "gather", False, OVERLAPPED, False),
        ("ZeRO-1", "agreement", False, "agreeing on what to exchange", True),
        ("ZeRO-1", "gather", False, "gathering the updated weights", False),
        ("ZeRO-static-1", "agreement", False, "summing the gradient norm", True),
        ("FSDP2", "norm", True, "summing the gradient norm", True),
        ("FSDP1", "norm", False, "summing the gradient norm", True),
    ],
)
def test_dead_rank_is_a_clear_error_on_the_other(tmp_path, strategy, moment, clip, what, unchanged):
    _, died = run_ranks_that_die(2, dying_worker, str(tmp_path), strategy, moment, clip)
    assert died == EXIT_CODE
    message, cause, same = torch.load(tmp_path / "seen")
    assert re.fullmatch(rf"{what} between ranks 0, 1 failed on rank 0{ADVICE}", message)
    assert cause not in ("", "None", message), "torch's own words are kept"
    assert same or not unchanged


def hanging_worker(rank, world, moment):
    """Rank 1 hangs. The timeout is that of the mesh, not the default group's 100 s."""
    mesh = mesh_with_timeout({"construction": 3, "step": 3}.get(moment, 60))
    model = nn.Linear(4, 4).bfloat16()
    if moment == "construction":
        if rank == 0:
            with pytest.raises(
                RuntimeError,
                match=f"^agreeing on what to exchange between ranks 0, 1 failed on rank 0{ADVICE}$",
            ):
                AdamW_BF16(model.parameters(), sharding=ZeRO(mesh))
        return
    optimizer = AdamW_BF16(model.parameters(), sharding=ZeRO(mesh, broadcast_initial=True))
    x = torch.ones(2, 4, dtype=torch.bfloat16)
    for _ in range(0 if moment == "step" else 4):
        model(x).sum().backward()
        optimizer.step(zero_grad=True)
    if moment != "step":
        shorten_timeout(optimizer, mesh)
    if rank == 0 or moment != "failed backward":
        with backpressure_timeout(0.05):
            model(x).sum().backward()
    else:
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            model(x.t()).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    if rank == 0:
        what = "agreeing on what to exchange" if moment == "step" else AVERAGING
        with pytest.raises(
            RuntimeError, match=f"^{what} between ranks 0, 1 failed on rank 0{ADVICE}$"
        ):
            optimizer.step()
        assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("moment", ["construction", "step", "steady step", "failed backward"])
def test_hanging_rank_is_an_error_within_the_mesh_timeout(moment):
    run_ranks(2, hanging_worker, moment)


def test_comm_errors_names_ranks_and_keeps_other_errors():
    for ranks, words in (
        ([0, 1], "ranks 0, 1 "),
        ([4, 5, 6, 7], "ranks 4 to 7 "),
        ([0, 2, 4], "ranks 0, 2, 4 "),
    ):
        run_ranks(1, naming_worker, ranks, words)
    with pytest.raises(KeyError), comm_errors("counting", [0, 1]):
        raise KeyError("not torch's")


def naming_worker(rank, world, ranks, words):
    with (
        pytest.raises(RuntimeError, match=f"counting between {words}failed on rank 0") as caught,
        comm_errors("counting", ranks),
    ):
        raise RuntimeError("torch's words")
    assert str(caught.value.__cause__) == "torch's words"


def refused_worker(rank, world):
    with pytest.raises(RuntimeError, match=r"^counting between ranks 0, 1 failed"):
        CheckedWork(
            "counting",
            dist.all_reduce,
            torch.zeros(2).to_sparse(),
            group=dist.group.WORLD,
            op=dist.ReduceOp.BXOR,
        )


def test_collective_that_cannot_start_is_reported():
    run_ranks(2, refused_worker)
