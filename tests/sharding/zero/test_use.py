"""ZeRO with accumulation, the guard, tied weights, added groups, loaded states and others."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch
from distributed import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sharded_bf16_adamw import AdamW_BF16
from sharded_bf16_adamw.sharding.zero.host_collectives import HostCollectives

from .cases import (
    Parameters,
    assert_same_bits,
    backpressure_timeout,
    collect,
    mean_gradients,
    new_optimizer,
    one_dimensional,
    rank_gradients,
    traffic,
    train,
    train_with_late_group,
    zero,
)


def fp32_accumulation_worker(rank, world):
    """Sum 1 + 8 * 2^-9, in which bfloat16 drops each of the small addends."""
    expected = torch.full((4,), 1 + 8 * 2.0**-9)
    found = {}
    for name, options in {
        "bf16": {},
        "fp32": {"accumulate_dtype": torch.float32, "reduce_dtype": torch.float32},
    }.items():
        for syncs in (True, False):
            p = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
            optimizer = AdamW_BF16([p], lr=0.0, betas=(0.0, 0.0), sharding=zero(**options))
            with traffic() as calls:
                for size in [1.0] + 7 * [2.0**-9]:
                    with contextlib.nullcontext() if syncs else optimizer.no_sync():
                        (p * size).sum().backward()
                assert bool(calls) == syncs, "no_sync() sends nothing"
                assert (p.grad is None) == (syncs or name == "fp32")
                (p * 2.0**-9).sum().backward()
            norm = optimizer.clip_grad_norm_(1e9)
            found[name, syncs] = norm.item() == expected.norm().item()
    return found


def test_accumulate_dtype_float32():
    for found in run_ranks(2, fp32_accumulation_worker):
        assert found == {
            ("bf16", True): False,
            ("bf16", False): False,
            ("fp32", True): True,
            ("fp32", False): True,
        }


def nonfinite_worker(rank, world, stage):
    model = Parameters()
    optimizer = new_optimizer(model, zero(stage), skip_nonfinite=True)
    train(model, optimizer, 2, averaged=stage == 1)
    before = collect(model, optimizer)
    for name in ("large", "scalar"):
        bad = torch.zeros_like(model.get_parameter(name))
        if stage == 1 or rank == world - 1:
            bad.view(-1)[-1] = torch.inf
        model({name: bad}).backward()
        optimizer.step(zero_grad=True)
    assert_same_bits(collect(model, optimizer), before)
    return optimizer.skipped_steps


@pytest.mark.parametrize("stage", [1, 2])
def test_inf_on_one_rank_skips_the_step_on_all(stage):
    assert run_ranks(3, nonfinite_worker, stage) == [2, 2, 2]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(12, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.embedding(x))


def tied_worker(rank, world):
    models = [Tied().bfloat16(), Tied().bfloat16()]
    optimizers = [
        AdamW_BF16(models[0].parameters(), lr=1e-2, sharding=zero()),
        AdamW_BF16(models[1].parameters(), lr=1e-2),
    ]
    for _ in range(5):
        for model, optimizer in zip(models, optimizers, strict=True):
            model(torch.arange(12)).float().logsumexp(-1).sum().backward()
            optimizer.step(zero_grad=True)
    assert len(optimizers[0].state) == 1
    assert torch.equal(models[0].head.weight, models[1].head.weight)


def test_tied_weights():
    run_ranks(2, tied_worker)


def late_group_worker(rank, world):
    with_zero, _ = train_with_late_group(zero(), added_at=2, steps=4)
    without, _ = train_with_late_group(None, added_at=2, steps=4)
    assert all(map(torch.equal, with_zero, without))


def test_add_param_group_between_backward_and_step():
    run_ranks(2, late_group_worker)


def late_group_of_one_busy_rank_worker(rank, world):
    """Rank 1 has no gradient, so it has nothing in flight when the group is added."""
    p, late = (nn.Parameter(torch.zeros(4, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = AdamW_BF16([p], lr=0.5, weight_decay=0.0, sharding=zero())
    if rank == 0:
        p.sum().backward()
    optimizer.add_param_group({"params": [late]})
    late.sum().backward()
    optimizer.step()
    return p.tolist(), late.tolist()


def test_add_param_group_while_only_one_rank_has_gradients():
    assert run_ranks(2, late_group_of_one_busy_rank_worker) == [([-0.5] * 4, [-0.5] * 4)] * 2


def beside_fsdp_worker(rank, world, sharding):
    """Train beside an FSDP2 model of the same shapes; one parameter is unused."""
    other = fully_shard(nn.Linear(6, 6).bfloat16())
    other(torch.ones(1, 6, dtype=torch.bfloat16)).sum().backward()
    torch.manual_seed(0)
    model = nn.Linear(6, 6).bfloat16()
    optimizer = AdamW_BF16(
        model.parameters(), lr=0.5, sharding=None if sharding is None else zero(sharding)
    )
    before = model.bias.tolist()
    model.weight.sum().backward()
    optimizer.step()
    assert other.weight.grad is not None and model.bias.tolist() == before
    return optimizer.state[model.weight]["step"].item()


@pytest.mark.parametrize("sharding", [None, 1, 2])
def test_unused_parameter_beside_fsdp_model_of_same_shapes(sharding):
    assert run_ranks(2, beside_fsdp_worker, sharding) == [1.0, 1.0]


def after_the_norm(model, optimizer, of_step):
    """Give one parameter a gradient before clip_grad_norm_, and all after it."""
    for step in range(3):
        model({"even": of_step(step)["even"]}).backward()
        optimizer.clip_grad_norm_(0.5)
        model(of_step(step)).backward()
        optimizer.step(zero_grad=True)


def after_the_norm_worker(rank, world):
    model = Parameters()
    optimizer = new_optimizer(model, zero(1))
    after_the_norm(model, optimizer, mean_gradients)
    return collect(model, optimizer)


def test_stage_1_gradients_after_clip_grad_norm():
    model = Parameters()
    optimizer = new_optimizer(model)
    after_the_norm(model, optimizer, mean_gradients)
    for found in run_ranks(2, after_the_norm_worker):
        assert_same_bits(found, collect(model, optimizer))


def set_after_the_norm_worker(rank, world):
    p = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    optimizer = AdamW_BF16([p], lr=0.5, weight_decay=0.0, betas=(0.0, 0.0), sharding=zero())
    p.grad = torch.ones(4, dtype=torch.bfloat16)
    optimizer.clip_grad_norm_(1e9)
    p.grad = torch.full((4,), -3.0, dtype=torch.bfloat16)
    optimizer.step()
    assert p.grad is None
    return p.tolist()


def test_gradients_set_by_hand_after_clip_grad_norm():
    assert run_ranks(2, set_after_the_norm_worker) == [[0.5] * 4] * 2


def consensus_worker(rank, world):
    """Most values fit into a byte; if one does not, all are exchanged in full."""
    collectives = HostCollectives(one_dimensional())
    with traffic() as calls:
        assert collectives.all_reduce_max([rank, 1 - rank, 254]) == [1, 1, 254]
    assert calls == [("consensus.all_to_all_single", 4, 8)], "four bytes to each rank"
    for values, expected in (
        ([255 - rank, 3], [255, 3]),
        ([300 * rank, 7], [300, 7]),
        ([-5 - rank, 3], [-5, 3]),
        ([2**60 + rank], [2**60 + 1]),
    ):
        assert collectives.all_reduce_max(values) == expected
    values = [2**63 - 1, 2**63 - 1 - rank, -(2**63), rank - 2**63, -4, rank]
    assert collectives.are_equal(values) == [True, False, True, False, True, False]


def test_consensus_takes_a_byte_for_a_flag_and_any_integer():
    run_ranks(2, consensus_worker)


def one_process_state_worker(rank, world, saved):
    model = Parameters()
    optimizer = new_optimizer(model, zero())
    optimizer.load_state_dict(saved)
    for p in model.parameters():
        assert all(
            isinstance(value, DTensor) for key, value in optimizer.state[p].items() if key != "step"
        )
    return {key: value for key, value in collect(model, optimizer).items() if "." in key}


def test_load_state_dict_of_single_process():
    model = Parameters()
    optimizer = new_optimizer(model)
    train(model, optimizer, 3, averaged=True)
    expected = {key: value for key, value in collect(model, optimizer).items() if "." in key}
    for found in run_ranks(3, one_process_state_worker, optimizer.state_dict()):
        assert_same_bits(found, expected)


def broadcast_worker(rank, world):
    model = Parameters(seed=rank)
    new_optimizer(model, zero(broadcast_initial=True))
    first = Parameters(seed=0)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), first.parameters(), strict=True)
    )


def test_broadcast_initial():
    run_ranks(3, broadcast_worker)


def true_weights_worker(rank, world):
    model = Parameters()
    optimizer = new_optimizer(model, zero())
    train(model, optimizer, 3, averaged=False)
    found = list(optimizer.true_weights())
    assert len(found) == len(list(model.parameters()))
    corrections = [
        state["correction"] for state in optimizer.state.values() if "correction" in state
    ]
    assert any(bool(correction.full_tensor().any()) for correction in corrections)
    for p, weight in found:
        correction = optimizer.state[p].get("correction")
        whole = weight.full_tensor()
        assert weight.dtype == torch.float32 and torch.equal(
            whole, p.float() + (0 if correction is None else correction.full_tensor().float())
        )
    optimizer.reset_correction()
    found = list(optimizer.true_weights())
    assert len(found) == len(list(model.parameters()))
    assert all(not weight.full_tensor().sub(p.float()).any() for p, weight in found)


def test_true_weights():
    run_ranks(3, true_weights_worker)


def stale_grads_worker(rank, world):
    """``zero_grad()`` clears stale gradients; gradients that it discards are never stale."""
    model = Parameters()
    optimizer = new_optimizer(model, zero())
    optimizer.step()  # uses no gradients
    train(model, optimizer, 1, averaged=False)
    optimizer.step()
    for discarded in (3, 4):  # as a discriminator discards gradients of the generator's loss
        model(rank_gradients(discarded, rank, world)).backward()
        optimizer.zero_grad()
    model(rank_gradients(1, rank, world)).backward()
    optimizer.step()
    before = collect(model, optimizer)
    model.zero_grad()
    if rank == 0:
        with backpressure_timeout(0.05):
            model(rank_gradients(2, rank, world)).backward()
    for refused in (optimizer.step, lambda: optimizer.clip_grad_norm_(1.0)):
        with pytest.raises(
            RuntimeError, match="new gradients were accumulated onto gradients that the previous"
        ):
            refused()
    assert_same_bits(collect(model, optimizer), before)
    optimizer.zero_grad()
    train(model, optimizer, 1, averaged=False, start=2)
    return collect(model, optimizer)


def test_stale_gradients_are_an_error_until_zero_grad():
    model = Parameters()
    optimizer = new_optimizer(model)
    optimizer.step()
    for step in range(3):
        train(model, optimizer, 1, averaged=True, start=step)
        if step == 0:
            optimizer.step()  # uses no gradients, as above
    for found in run_ranks(2, stale_grads_worker):
        assert_same_bits(found, collect(model, optimizer))


def stale_after_clip_worker(rank, world):
    p = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    optimizer = AdamW_BF16([p], lr=0.5, sharding=zero())
    p.sum().backward()
    optimizer.step()
    optimizer.clip_grad_norm_(1e9)  # prepares a second step with the same gradients
    p.grad = torch.ones_like(p)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="new gradients were accumulated onto"):
            optimizer.step()


def test_stale_gradients_after_clip_grad_norm_stay_an_error():
    run_ranks(2, stale_after_clip_worker)


def one_after_another_worker(rank, world):
    model = Parameters()
    first = new_optimizer(model, zero())
    second = new_optimizer(model, zero())
    train(model, second, 1, averaged=False)
    del second
    gc.collect()
    train(model, first, 1, averaged=False, start=1)  # the only optimizer again
    model(rank_gradients(2, rank, world)).backward()
    assert model.large.grad is None, "the hook takes gradients"
    first.step(zero_grad=True)
    return [state["step"].item() for state in first.state.values()]


def test_stage_2_trains_again_once_a_later_optimizer_is_gone():
    for steps in run_ranks(2, one_after_another_worker):
        assert set(steps) == {2.0}


def stale_grads_on_one_rank_worker(rank, world):
    """Rank 1 keeps its used gradients and has no new ones, but would add rank 0's."""
    model = Parameters()
    optimizer = new_optimizer(model, zero())
    train(model, optimizer, 1, averaged=False)
    model(rank_gradients(1, rank, world)).backward()
    optimizer.step()
    before = collect(model, optimizer)
    if rank == 0:
        optimizer.zero_grad()
        with backpressure_timeout(0.05):
            model(rank_gradients(2, rank, world)).backward()
    with pytest.raises(
        RuntimeError, match=r"new gradients were accumulated onto .* after each step, on every rank"
    ):
        optimizer.step()
    assert_same_bits(collect(model, optimizer), before)


def test_stale_gradients_on_another_rank_are_an_error():
    run_ranks(2, stale_grads_on_one_rank_worker)
