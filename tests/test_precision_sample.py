"""precision_stats(fraction=...): the elements it reads, and its estimates."""

import math

import numpy as np
import pytest
import torch
from small_optimizers import give_gradients, param, train
from test_precision_stats import check, expected, stepped
from torch import nn

from sharded_bf16_adamw import LR, AdamW_BF16, precision_sample
from sharded_bf16_adamw.precision_sample import StratifiedSample

BLOCK = 16
SUMS = ("elements", "updates", "weight_norm", "update_norm", "exp_avg_norm")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(precision_sample, "BLOCK", BLOCK)


def weights_of(runs, numels, one_in):
    """Return for each parameter how often each element counts."""
    weights = [np.zeros(numel) for numel in numels]
    for i, begin, count, row in zip(*runs[:4], strict=True):
        assert not weights[i][begin : begin + count].any()
        weights[i][begin : begin + count] = one_in if row >= runs.n_rows // 2 else 1
    return [torch.from_numpy(x) for x in weights]


def mixed_optimizer(**more):
    """Build an optimizer of several shapes, dtypes and hyperparameters."""
    transposed = nn.Parameter(param(12, 20, seed=1).detach().t())
    ascending = {"params": [param(9, 7, 5, seed=2)], "maximize": True, "eps": 1e-3}
    plain = {"params": [param(301, dtype=torch.float32), param(0)], "weight_decay": 0.0}
    groups = [{"params": [param(1000), transposed, param(30, seed=3)]}, ascending, plain]
    return AdamW_BF16(groups, lr_function=LR(lr=1e-3, preheat_steps=10), weight_decay=0.1, **more)


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


class TestSample:
    @pytest.mark.parametrize("one_in", [2, 3, 8])
    @pytest.mark.parametrize(
        ("shape", "block"),  # elements of a block: whole rows
        [((1000,), 16), ((50, 3), 18), ((20, 40), 40), ((4, 5, 8), 16), ((7, 2, 2, 3), 18)],
    )
    def test_one_block_of_each_stratum_and_the_rest(self, shape, block, one_in):
        numel = math.prod(shape)
        sample = StratifiedSample([torch.zeros(shape)], [0], [0], 1, one_in)
        (weights,) = weights_of(sample.draw(5), [numel], one_in)
        stratum = one_in * block
        whole_strata = numel // stratum * stratum
        assert (weights[whole_strata:] == 1).all()
        drawn = weights[:whole_strata].reshape(-1, one_in, block)
        assert (drawn == drawn[:, :, :1]).all()
        assert (drawn[:, :, 0].sort(dim=1).values[:, -1] == one_in).all()
        assert drawn.sum() == whole_strata and weights.sum() == numel

    def test_large_parameters_have_larger_blocks(self, monkeypatch):
        monkeypatch.setattr(precision_sample, "MAX_STRATA", 5)
        runs = StratifiedSample([torch.zeros(5 * 4 * 100 + 3)], [0], [0], 1, 4).draw(2)
        assert runs.counts.tolist() == [3, 100, 100, 100, 100, 100]

    def test_blocks_are_drawn_equally_often_and_independently(self):
        """This holds over steps, parameters and strata."""
        one_in, steps = 4, 750
        shards = [torch.zeros(4 * 4 * BLOCK)] * 2
        sample = StratifiedSample(shards, [0, 7], [0, 0], 1, one_in)
        draws = []
        for step in range(steps):
            weights = weights_of(sample.draw(step), [256, 256], one_in)
            drawn = torch.cat(weights).reshape(8, one_in, BLOCK)[:, :, 0].argmax(1)
            draws.append(drawn)
        draws = torch.stack(draws)  # steps, strata
        error = math.sqrt(0.25 * 0.75 / steps)
        for block in range(one_in):
            share = (draws == block).double().mean(0)
            assert (share - 0.25).abs().max() < 4 * error
        for i in range(8):
            for j in range(i):
                same = (draws[:, i] == draws[:, j]).double().mean()
                assert abs(same - 0.25) < 4 * error
        again = (draws[1:] == draws[:-1]).double().mean()
        assert abs(again - 0.25) < 4 * error / math.sqrt(8)

    def test_small_empty_and_unordered_parameters_are_whole(self):
        shards = [torch.zeros(3 * BLOCK), torch.zeros(0), torch.zeros(40, 20).t()]
        runs = StratifiedSample(shards, [0, 1, 2], [0, 1, 0], 2, 4).draw(1)
        assert [column.tolist() for column in runs[:4]] == [[0, 2], [0, 0], [48, 800], [0, 0]]


class TestEstimates:
    def test_fraction_1_has_the_bits_of_the_whole(self):
        optimizer = mixed_optimizer()
        train(optimizer, 2)
        give_gradients(params_of(optimizer))
        whole, same = optimizer.precision_stats(), optimizer.precision_stats(fraction=1.0)
        assert whole.as_dict() == same.as_dict()
        assert optimizer.precision_stats(fraction=0.25).as_dict() != whole.as_dict()

    @pytest.mark.parametrize("backend", [None, "reference"])
    @pytest.mark.parametrize("steps", [0, 3])
    @pytest.mark.parametrize("one_in", [2, 5])
    def test_matches_float64_over_the_sampled_elements(self, backend, steps, one_in):
        optimizer = mixed_optimizer(backend=backend)
        train(optimizer, steps)
        params = params_of(optimizer)
        give_gradients(params, seed=7)
        stats = optimizer.precision_stats(fraction=1 / one_in)
        sample = StratifiedSample(params, range(len(params)), [0] * len(params), 1, one_in)
        runs = sample.draw(steps)
        weights = weights_of(runs, [p.numel() for p in params], one_in)
        in_memory = weights[1].reshape(12, 20)  # of the transposed parameter
        weights[1] = in_memory.t().flatten()
        rows = stepped(optimizer)
        check(stats, expected(rows, weights=weights))
        for index, group in enumerate(optimizer.param_groups):
            own = [i for i, row in enumerate(rows) if row[0] is group]
            own_weights = [weights[i] for i in own]
            check(stats.groups[index], expected([rows[i] for i in own], weights=own_weights))

    def test_sums_are_unbiased_over_steps(self):
        """Blocks are unequal: weights and gradients grow along the parameter."""
        n, steps = 3000, 300
        growth = torch.linspace(0.1, 3.0, n)
        p = nn.Parameter((param(n).float() * growth).bfloat16())
        optimizer = AdamW_BF16([p], lr=1e-3, weight_decay=0.1)
        train(optimizer, 1)
        give_gradients([p], seed=3)
        p.grad.mul_(growth.flip(0))
        p.grad[::3] = 0
        optimizer.state[p]["exp_avg"][::3] = 0
        optimizer.param_groups[0]["weight_decay"] = 0.0
        whole = optimizer.precision_stats()
        found = {name: [] for name in SUMS}
        for step in range(steps):
            optimizer.param_groups[0]["schedule_step"] = step
            stats = optimizer.precision_stats(fraction=1 / 6)
            for name in SUMS:
                found[name].append(float(getattr(stats, name)))
        for name, values in found.items():
            power = 2 if name.endswith("norm") else 1  # sums of squares are unbiased, not norms
            values = torch.tensor(values).double() ** power
            wanted = float(getattr(whole, name)) ** power
            if name == "elements":
                assert (values == wanted).all()
                continue
            deviation = float(values.std())
            assert deviation > 1e-3 * wanted
            assert abs(float(values.mean()) - wanted) < 4 * deviation / math.sqrt(steps)

    def test_draw_depends_only_on_the_step_that_a_checkpoint_holds(self):
        optimizer = mixed_optimizer()
        give_gradients(params_of(optimizer))
        first = optimizer.precision_stats(fraction=0.25).as_dict()
        assert optimizer.precision_stats(fraction=0.25).as_dict() == first
        twin = mixed_optimizer()
        twin.load_state_dict(optimizer.state_dict())
        give_gradients(params_of(twin))
        assert twin.precision_stats(fraction=0.25).as_dict() == first
        optimizer.param_groups[0]["schedule_step"] += 1
        assert optimizer.precision_stats(fraction=0.25).as_dict() != first


class TestKeptBetweenCalls:
    def test_sample_follows_parameters_and_fraction(self):
        """The sample is built once for a step plan; another set of gradients is another plan."""
        optimizer = mixed_optimizer()
        train(optimizer, 1)
        params = params_of(optimizer)
        give_gradients(params)
        counts = {2: [], 5: []}
        for one_in in (2, 5, 2):
            stats = optimizer.precision_stats(fraction=1 / one_in)
            counts[one_in].append(stats.as_dict())
        assert counts[2][0] == counts[2][1] != counts[5][0]
        kept = optimizer._precision._sample
        optimizer.precision_stats(fraction=0.5)
        assert optimizer._precision._sample is kept
        params[0].grad = None
        elements = float(optimizer.precision_stats(fraction=0.5).elements)
        assert elements == sum(p.numel() for p in params[1:])

    def test_plan_of_moved_tensors_is_not_used(self):
        optimizer = mixed_optimizer()
        train(optimizer, 1)
        params = params_of(optimizer)
        give_gradients(params)
        for fraction in (1.0, 0.5):
            optimizer.precision_stats(fraction=fraction)
        state = optimizer.state[params[0]]
        state["exp_avg"] = torch.full_like(state["exp_avg"], 64.0)
        for fraction in (1.0, 0.5):
            norm = float(optimizer.precision_stats(fraction=fraction).exp_avg_norm)
            assert norm == pytest.approx(0.9 * 64 * math.sqrt(1000), rel=0.05)


@pytest.mark.parametrize("fraction", [0, -0.5, 1.5, math.nan])
def test_invalid_fraction(fraction):
    optimizer = AdamW_BF16([param(4)], lr=1e-3)
    with pytest.raises(ValueError, match=r"Invalid fraction: .*; it must be above 0 and at most 1"):
        optimizer.precision_stats(fraction=fraction)
