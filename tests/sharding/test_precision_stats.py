"""precision_stats over ranks equals that of a single process."""

import functools
import math

import pytest
import torch
from distributed import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from sharded_bf16_adamw import LR, AdamW_BF16, precision_sample, precision_stats
from sharded_bf16_adamw.sharding.dtensor import to_local

from .strategy_cases import BY_NAME, CLIP, Layers, Wrapped, backward, make_batch


def make_optimizer(wrapped):
    """Build an optimizer with a group for each dtype: FSDP1's flat parameters have one each."""
    params = list(wrapped.module.parameters())
    groups = [
        {"params": [p for p in params if p.dtype == dtype]}
        for dtype in (torch.bfloat16, torch.float32)
    ]
    schedule = LR(lr=1e-3, preheat_steps=5)
    return AdamW_BF16(groups, lr_function=schedule, sharding=wrapped.sharding)


def statistics(wrapped, uses_clip=True, fraction=1.0):
    """Train; return the statistics of the third step, for all groups and for each."""
    optimizer = make_optimizer(wrapped)
    for step in range(3):
        backward(wrapped, make_batch(step))
        if uses_clip:
            optimizer.clip_grad_norm_(CLIP)
        stats = optimizer.precision_stats(fraction) if step == 2 else None
        optimizer.step(zero_grad=True)
    return [each.as_dict() for each in (stats, *stats.groups)]


def worker(rank, world, name, uses_clip):
    return statistics(BY_NAME[name].wrap(Layers(), world), uses_clip)


@functools.cache
def expected(uses_clip):
    return statistics(Wrapped(Layers()), uses_clip)


@pytest.mark.parametrize("uses_clip", [True, False])
@pytest.mark.parametrize(
    ("world", "name"),
    [
        (2, "DDP"),
        (2, "FSDP2"),
        (2, "tensor parallel"),
        (2, "ZeRO-1 beside DDP"),
        (2, "ZeRO-2"),
        (4, "HSDP (FSDP2, 2 x 2)"),
    ],
)
def test_every_element_counts_once(world, name, uses_clip):
    for result in run_ranks(world, worker, name, uses_clip):
        for own, alone in zip(result, expected(uses_clip), strict=True):
            assert math.isfinite(alone["update_norm"])
            assert own == pytest.approx(alone, rel=1e-9, nan_ok=True)


def small_blocks(monkeypatch, numel=4):
    monkeypatch.setattr(precision_sample, "BLOCK", numel)


def sample_worker(rank, world, name):
    with pytest.MonkeyPatch.context() as monkeypatch:
        small_blocks(monkeypatch)
        return statistics(BY_NAME[name].wrap(Layers(), world), fraction=1 / 3)


@pytest.mark.parametrize(
    ("world", "name"),
    [
        (2, "DDP"),
        (2, "FSDP1 FULL_SHARD, use_orig_params=True"),
        (2, "FSDP2"),
        (3, "FSDP2"),
        (2, "FSDP2 shard_placement_fn to columns"),
        (2, "tensor parallel"),
        (2, "ZeRO-1 beside DDP"),
        (2, "ZeRO-2"),
        (4, "HSDP (FSDP2, 2 x 2)"),
        (4, "FSDP2 + tensor parallel (2 x 2)"),
    ],
)
def test_sample_is_that_of_a_single_process(monkeypatch, world, name):
    small_blocks(monkeypatch)
    single = statistics(Wrapped(Layers()), fraction=1 / 3)
    whole = expected(uses_clip=True)
    assert single[0]["elements"] == whole[0]["elements"]
    assert single[0]["update_norm"] != pytest.approx(whole[0]["update_norm"], rel=1e-3)
    for result in run_ranks(world, sample_worker, name):
        for own, alone in zip(result, single, strict=True):
            assert own == pytest.approx(alone, rel=1e-9, nan_ok=True)


def flat_worker(rank, world):
    with pytest.MonkeyPatch.context() as monkeypatch:
        small_blocks(monkeypatch)
        wrapped = BY_NAME["FSDP1 FULL_SHARD, use_orig_params=False"].wrap(Layers(), world)
        return [statistics(wrapped, fraction=fraction)[0] for fraction in (1.0, 1 / 3)]


def test_flat_parameters_are_sampled_over_all_ranks():
    """FSDP1 with use_orig_params=False flattens parameters into one, sampled as a whole."""
    for whole, sampled in run_ranks(2, flat_worker):
        assert sampled["elements"] == whole["elements"]
        assert sampled["update_norm"] != whole["update_norm"]
        assert sampled["update_norm"] == pytest.approx(whole["update_norm"], rel=0.5)


SHAPE = (9, 7, 12)
TWO_ROWS = 20  # least elements of a block, which then has two rows of 12
PLACEMENTS = {
    "replicated": (Replicate(), Replicate()),
    **{f"Shard({dim})": (Replicate(), Shard(dim)) for dim in range(3)},
    "Shard(0), Shard(1)": (Shard(0), Shard(1)),
    "Shard(1), Shard(2)": (Shard(1), Shard(2)),
    "Shard(2), Shard(0)": (Shard(2), Shard(0)),
    "Shard(1) twice": (Shard(1), Shard(1)),
}


def elements_of_draw(shard):
    """Return the values of a shard that are always read, and those in its drawn blocks."""
    runs = precision_sample.StratifiedSample([shard], [3], [0], 1, 4).draw(8)
    flat = to_local(shard).flatten().tolist()
    found = [[], []]
    for _, begin, count, row in zip(*runs[:4], strict=True):
        assert begin >= 0 and begin + count <= len(flat)
        found[row] += flat[begin : begin + count]
    return found


def placements_worker(rank, world):
    with pytest.MonkeyPatch.context() as monkeypatch:
        small_blocks(monkeypatch, TWO_ROWS)
        mesh = init_device_mesh("cpu", (2, world // 2))
        full = torch.arange(math.prod(SHAPE)).reshape(SHAPE)
        return {
            name: elements_of_draw(distribute_tensor(full, mesh, placements))
            for name, placements in PLACEMENTS.items()
        }


def test_any_placement_reads_the_same_elements(monkeypatch):
    small_blocks(monkeypatch, TWO_ROWS)
    whole, drawn = elements_of_draw(torch.arange(math.prod(SHAPE)).reshape(SHAPE))
    assert (len(whole), len(drawn)) == (7 * 12, 7 * 2 * 12)  # 63 rows, strata of 4 * 2
    results = run_ranks(4, placements_worker)
    for name in PLACEMENTS:
        for number, wanted in enumerate((whole, drawn)):
            found = [value for result in results for value in result[name][number]]
            replicas = 4 // math.prod(2 for each in PLACEMENTS[name] if each.is_shard())
            assert sorted(found) == sorted(wanted * replicas), name


def unequal_worker(rank, world):
    wrapped = BY_NAME["FSDP2"].wrap(Layers(), world)
    plain = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = AdamW_BF16([*wrapped.module.parameters(), plain], lr=1e-3)
    backward(wrapped, make_batch(0))
    plain.grad = torch.full_like(plain, 1.0 + rank)
    return optimizer.precision_stats().as_dict()


def test_unequal_gradients_of_replicas_give_nan():
    for result in run_ranks(2, unequal_worker):
        assert all(map(math.isnan, result.values()))


def fractions_worker(rank, world, name):
    """Give rank 1 another fraction, and read the statistics in each of two ways."""
    wrapped = BY_NAME[name].wrap(Layers(), world)
    optimizer = make_optimizer(wrapped)
    backward(wrapped, make_batch(0))
    optimizer.clip_grad_norm_(CLIP)
    with pytest.raises(ValueError, match="got different fractions on different ranks"):
        optimizer.precision_stats(1 / 1000 if rank == 1 else 1 / 1001)
    with pytest.MonkeyPatch.context() as monkeypatch:
        # as on CUDA
        monkeypatch.setattr(precision_stats, "_check_fractions", lambda differ: None)
        stats = optimizer.precision_stats(1 / 3 if rank == 1 else 1.0)
    with pytest.raises(ValueError, match="got different fractions on different ranks"):
        stats.as_dict()
    message = "Invalid fraction: 2.0" if rank == 1 else "got different fractions on different ranks"
    with pytest.raises(ValueError, match=message):
        optimizer.precision_stats(2.0 if rank == 1 else 1.0)
    assert stats.edq.isnan() and all(group.edq.isnan() for group in stats.groups)
    assert float(optimizer.precision_stats(1 / 3).edq) > 0


@pytest.mark.parametrize(
    ("world", "name"),
    [(3, "FSDP2"), (2, "ZeRO-2"), (4, "HSDP (FSDP2, 2 x 2)"), (2, "tensor parallel")],
)
def test_another_fraction_on_a_rank_is_an_error_on_every_rank(world, name):
    run_ranks(world, fractions_worker, name)
