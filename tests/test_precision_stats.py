"""precision_stats: against float64 on constructed cases, and without effect on the optimizer."""

import copy
import math

import pytest
import torch
from small_optimizers import BF16, equal, give_gradients, param, snapshot, train
from torch import nn

from sharded_bf16_adamw import LR, AdamW_BF16, precision_stats
from sharded_bf16_adamw.kernels import reference_precision

NAMES = (
    "elements",
    "updates",
    "lost_share",
    "carried_share",
    "edq",
    "plain_edq",
    "correction_rms",
    "weight_norm",
    "update_norm",
    "update_ratio",
    "exp_avg_norm",
    "exp_avg_sq_norm",
)


def stepped(optimizer):
    """Take the step; return each parameter's tensors before and after it, flat and in float64."""
    groups = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            zeros = torch.zeros_like(p)
            state = optimizer.state.get(p, {})
            old = [state.get(key, zeros) for key in ("exp_avg", "exp_avg_sq", "correction")]
            values = [x.detach().double().flatten() for x in (p, p.grad, *old)]
            groups.append((group, p, int(state.get("step", 0)) + 1, values))
    optimizer.step()
    return [
        (group, p.dtype, step, values, p.detach().double().flatten(), correction_of(optimizer, p))
        for group, p, step, values in groups
    ]


def correction_of(optimizer, p):
    return optimizer.state[p].get("correction", torch.zeros_like(p)).double().flatten()


def expected(rows, scale=1.0, weights=None):
    """Compute the statistics in float64 from the stored tensors before and after a step.

    ``weights`` has a tensor for each row: how often each element counts, by default once.
    """
    p, p_new, c, c_new, u, m, v, ulps, plain, of_ulps = ([] for _ in range(10))
    weights = [torch.ones_like(row[4]) for row in rows] if weights is None else weights
    for (group, dtype, step, (p0, g, m0, v0, c0), p1, c1), w in zip(rows, weights, strict=True):
        beta1, beta2 = group["betas"]
        g = g * scale * (-1 if group["maximize"] else 1)
        m.append(beta1 * m0 + (1 - beta1) * g)
        v.append(beta2 * v0 + (1 - beta2) * g * g)
        denominator = (v[-1] / (1 - beta2**step)).sqrt() + group["eps"]
        update = group["lr"] * m[-1] / (1 - beta1**step) / denominator
        u.append(update + group["lr"] * group["weight_decay"] * (p0 + c0))
        plain.append((p0 - u[-1]).to(dtype).double() - p0)
        p.append(p0), p_new.append(p1), c.append(c0), c_new.append(c1)
        if dtype == BF16:
            ulp = torch.tensor([2.0 ** (max(math.frexp(x)[1] - 1, -126) - 7) for x in p0.tolist()])
            ulps.append(c0 / ulp)
            of_ulps.append(w)
    p, p_new, c, c_new, u, m, v, plain = map(torch.cat, (p, p_new, c, c_new, u, m, v, plain))
    w, of_ulps, ulps = (torch.cat([*x, torch.zeros(0)]).double() for x in (weights, of_ulps, ulps))
    effective = (p_new - p) + (c_new - c)
    is_lost = (plain == 0) & (u != 0)
    updates = w @ (u != 0).double()

    def norm(x):
        return (w @ x.square()).sqrt()

    result = {
        "elements": w.sum(),
        "updates": updates,
        "lost_share": w @ is_lost.double() / updates,
        "carried_share": w @ (is_lost & (effective != 0)).double() / updates,
        "edq": -(w * u @ effective) / (w * u @ u),
        "plain_edq": -(w * u @ plain) / (w * u @ u),
        "correction_rms": (of_ulps @ ulps.square() / of_ulps.sum()).sqrt(),
        "weight_norm": norm(p + c),
        "update_norm": norm(u),
        "update_ratio": norm(u) / norm(p + c),
        "exp_avg_norm": norm(m),
        "exp_avg_sq_norm": norm(v),
    }
    return {name: float(value) for name, value in result.items()}


def check(stats, wanted):
    assert stats.as_dict() == pytest.approx(wanted, rel=1e-5, abs=0, nan_ok=True)


def mixed_optimizer(lr_function):
    """Build an optimizer of several shapes, dtypes, layouts and hyperparameters."""
    transposed = nn.Parameter(param(12, 20, seed=1).detach().t())
    ascending = {"params": [param(70, seed=2)], "maximize": True, "betas": (0.8, 0.9), "eps": 1e-3}
    plain = {"params": [param(33, dtype=torch.float32), param(0)], "lr": 1e-7, "weight_decay": 0.0}
    groups = [{"params": [param(300), transposed]}, ascending, plain]
    return AdamW_BF16(groups, lr_function=lr_function, weight_decay=0.1)


class TestAgainstFloat64:
    @pytest.mark.parametrize("backend", [None, "reference"])
    @pytest.mark.parametrize("steps", [0, 3])
    @pytest.mark.parametrize("clip", [False, True])
    def test_matches_the_step_that_is_then_taken(self, monkeypatch, backend, steps, clip):
        monkeypatch.setattr(reference_precision, "CHUNK", 64)
        optimizer = mixed_optimizer(LR(lr=1e-3, preheat_steps=10))
        optimizer.backend = backend
        train(optimizer, steps)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        give_gradients(params, seed=7)
        params[0].grad_dtype = None
        params[0].grad = params[0].grad.float() * 1.01  # bf16 does not hold it
        norm = optimizer.clip_grad_norm_(5.0) if clip else None
        stats = optimizer.precision_stats()
        rows = stepped(optimizer)
        scale = 5.0 / (float(norm) + 1e-6) if clip else 1.0
        assert not clip or scale < 0.5
        check(stats, expected(rows, scale))
        assert len(stats.groups) == 3
        for index, group_stats in enumerate(stats.groups):
            own = [row for row in rows if row[0] is optimizer.param_groups[index]]
            check(group_stats, expected(own, scale))

    def test_groups_add_up_to_the_whole(self):
        optimizer = mixed_optimizer(LR(lr=1e-3, preheat_steps=1))
        train(optimizer, 2)
        give_gradients([p for group in optimizer.param_groups for p in group["params"]])
        stats = optimizer.precision_stats()
        groups = [group.as_dict() for group in stats.groups]
        whole = stats.as_dict()
        for name in ("elements", "updates"):
            assert whole[name] == sum(group[name] for group in groups)
        for name in ("lost_share", "carried_share"):
            assert whole[name] * whole["updates"] == pytest.approx(
                sum(group[name] * group["updates"] for group in groups)
            )
        for name in ("weight_norm", "update_norm", "exp_avg_norm", "exp_avg_sq_norm"):
            assert whole[name] == pytest.approx(math.hypot(*[group[name] for group in groups]))
        for name in ("edq", "plain_edq"):
            total = sum(group[name] * group["update_norm"] ** 2 for group in groups)
            assert whole[name] * whole["update_norm"] ** 2 == pytest.approx(total)

    def test_second_moments_whose_squares_float32_lacks(self):
        p = nn.Parameter(torch.ones(8, dtype=BF16))
        optimizer = AdamW_BF16([p], lr=1e-3, eps=0.0)
        p.grad = torch.full_like(p, 2.0**-50)
        stats = optimizer.precision_stats()
        expected_norm = 0.001 * 2.0**-100 * math.sqrt(8)
        assert float(stats.exp_avg_sq_norm) == pytest.approx(expected_norm, rel=1e-5, abs=0)


class TestLostUpdates:
    def ones(self, lr, **more):
        p = nn.Parameter(torch.ones(1000, dtype=BF16))
        optimizer = AdamW_BF16([p], lr=lr, weight_decay=0.0, **more)
        give_gradients([p])
        return optimizer

    @pytest.mark.parametrize("lr", [1e-3, 1e-6, 1e-12])
    def test_plain_weights_stall_and_the_correction_carries(self, lr):
        """The first update is lr for every element; the spacing below 1 is 2^-8."""
        stats = self.ones(lr).precision_stats()
        assert float(stats.lost_share) == 1.0
        assert float(stats.plain_edq) == 0.0
        assert float(stats.carried_share) == 1.0
        assert float(stats.edq) == pytest.approx(1.0, abs=2e-3)

    def test_large_updates_are_not_lost(self):
        stats = self.ones(0.25).precision_stats()
        assert float(stats.lost_share) == float(stats.carried_share) == 0.0
        assert float(stats.plain_edq) == pytest.approx(1.0, abs=1e-2)
        assert float(stats.edq) == pytest.approx(1.0, abs=1e-4)

    def test_rounding_away_of_a_step_enlarges_the_plain_update(self):
        """0.6 of the spacing rounds to 1."""
        p = nn.Parameter(torch.full((100,), 1.5, dtype=BF16))
        optimizer = AdamW_BF16([p], lr=0.6 * 2.0**-7, weight_decay=0.0)
        give_gradients([p])
        stats = optimizer.precision_stats()
        assert float(stats.lost_share) == 0.0
        assert float(stats.plain_edq) == pytest.approx(1 / 0.6, rel=1e-3)

    def test_an_update_that_the_correction_rounds_away_is_not_carried(self):
        """Beside a correction of 2^-9, an update of 2^-30 is mostly rounded to nothing."""
        optimizer = self.ones(2.0**-30)
        p = optimizer.param_groups[0]["params"][0]
        optimizer.init_state()
        optimizer.state[p]["correction"].fill_(2.0**-9 * 1.0078125)
        stats = optimizer.precision_stats()
        assert float(stats.lost_share) == 1.0
        assert float(stats.carried_share) < 0.05

    def test_zero_updates_do_not_count(self):
        optimizer = self.ones(1e-6)
        p = optimizer.param_groups[0]["params"][0]
        p.grad[:900] = 0
        stats = optimizer.precision_stats()
        assert (float(stats.elements), float(stats.updates)) == (1000.0, 100.0)
        assert float(stats.lost_share) == float(stats.carried_share) == 1.0
        p.grad.zero_()
        stats = optimizer.precision_stats()
        assert float(stats.updates) == 0.0 and math.isnan(float(stats.lost_share))


def test_correction_rms_is_in_units_of_the_last_place():
    weights = [1.0, -2.5, 1.9921875, 2.0**-130, 0.0]
    corrections = [2.0**-9, -(2.0**-8), 2.0**-8, 2.0**-133, 0.0]
    p = nn.Parameter(torch.tensor(weights, dtype=BF16))
    optimizer = AdamW_BF16([p, param(50, dtype=torch.float32)], lr=0.0)
    optimizer.init_state()
    optimizer.state[p]["correction"].copy_(torch.tensor(corrections))
    p.grad = torch.zeros_like(p)
    in_ulps = torch.tensor([0.25, -0.25, 0.5, 1.0, 0.0])
    stats = optimizer.precision_stats()
    assert float(stats.correction_rms) == pytest.approx(float(in_ulps.square().mean().sqrt()))


class TestWithoutEffect:
    @pytest.mark.parametrize("steps", [0, 2])
    def test_changes_nothing(self, steps):
        optimizer = mixed_optimizer(LR(lr=1e-2, preheat_steps=10))
        train(optimizer, steps)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        give_gradients(params)
        twin = copy.deepcopy(optimizer)
        for p, q in zip(params, [p for g in twin.param_groups for p in g["params"]], strict=True):
            q.grad = p.grad.clone()
        for each in (optimizer, twin):
            each.clip_grad_norm_(1.0)
        versions = [p._version for p in params]
        groups = [{**group} for group in optimizer.param_groups]
        grads = [p.grad.clone() for p in params]
        optimizer.precision_stats()
        assert len(optimizer.state) == (len(params) if steps else 0)
        assert versions == [p._version for p in params]
        assert groups == optimizer.param_groups
        assert all(torch.equal(p.grad, grad) for p, grad in zip(params, grads, strict=True))
        for each in (optimizer, twin):
            each.step()
        assert equal(snapshot(optimizer), snapshot(twin))

    def test_values_stay_tensors_until_read(self):
        optimizer = mixed_optimizer(LR())
        give_gradients([optimizer.param_groups[0]["params"][0]])
        stats = optimizer.precision_stats()
        for each in (stats, *stats.groups):
            assert tuple(each.as_dict()) == NAMES
            for name in NAMES:
                value = getattr(each, name)
                assert value.shape == () and value.dtype == torch.float64
        assert float(stats.elements) == float(stats.groups[0].elements) == 300.0
        assert float(stats.groups[1].elements) == 0.0


class TestErrors:
    def test_nan_gradient_gives_nan(self):
        p, q = param(10), param(10)
        optimizer = AdamW_BF16([{"params": [p]}, {"params": [q]}], lr=1e-3)
        give_gradients([p, q])
        p.grad[3] = torch.nan
        stats = optimizer.precision_stats()
        assert math.isnan(float(stats.update_norm)) and math.isnan(float(stats.edq))
        assert not math.isnan(float(stats.groups[1].edq))

    def test_step_in_backward_has_no_gradients_left(self):
        optimizer = AdamW_BF16([param(4)], lr=1e-3, step_in_backward=True)
        with pytest.raises(RuntimeError, match=r"precision_stats\(\) needs all gradients"):
            optimizer.precision_stats()

    def test_resized_parameter(self):
        p = param(10)
        optimizer = AdamW_BF16([p], lr=1e-3)
        give_gradients([p])
        p.data = p.data[:5].clone()
        with pytest.raises(RuntimeError, match=r"has 10 elements, but the parameter has 5"):
            optimizer.precision_stats()
        assert not optimizer.state

    def test_state_of_another_dtype(self):
        p = param(10)
        optimizer = AdamW_BF16([p], lr=1e-3)
        train(optimizer, 1)
        optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].float()
        give_gradients([p])
        with pytest.raises(RuntimeError, match="but its exp_avg is"):
            optimizer.precision_stats()


def test_capture_by_a_cuda_graph_is_refused(monkeypatch):
    """It is refused before a table is built, whose error would ask for an eager step."""
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = AdamW_BF16([weight], lr=1e-3)
    weight.grad = torch.ones_like(weight)
    monkeypatch.setattr(precision_stats, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="call it outside of the capture"):
        optimizer.precision_stats()
