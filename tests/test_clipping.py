"""Gradient clipping folded into the step, and the guard against non-finite gradients."""

import pytest
import torch
from small_optimizers import equal, give_gradients, param, snapshot, train

from sharded_bf16_adamw import AdamW_BF16


class TestClipping:
    def test_norm_is_exact_and_step_applies_the_scale(self):
        p, q, r = param(1000), param(10, dtype=torch.float32), param(0)
        optimizer = AdamW_BF16([p, q, r], lr=1e-2)
        give_gradients([p, q, r])
        expected = torch.cat([p.grad.double(), q.grad.double()]).norm()
        norm = optimizer.clip_grad_norm_(0.5)
        assert norm.dtype == torch.float32 and norm == expected.float()
        optimizer.step()
        scaled = AdamW_BF16([param(10, dtype=torch.float32)], lr=1e-2)
        scaled.param_groups[0]["params"][0].grad = q.grad * (0.5 / (expected + 1e-6)).float()
        scaled.step()
        assert torch.equal(scaled.param_groups[0]["params"][0], q)

    def test_scale_lasts_one_step(self):
        p, q = param(100), param(100)
        a, b = AdamW_BF16([p], lr=1e-2), AdamW_BF16([q], lr=1e-2)
        for optimizer, max_norm in ((a, 1e-3), (b, 1e9)):
            give_gradients([optimizer.param_groups[0]["params"][0]], seed=1)
            optimizer.clip_grad_norm_(max_norm)
            optimizer.step()
        assert not torch.equal(a.state[p]["exp_avg"], b.state[q]["exp_avg"])
        for state in (a.state[p], b.state[q]):
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()
        give_gradients([p, q], seed=1)
        q.grad = p.grad.clone()
        a.step()
        b.step()
        torch.testing.assert_close(a.state[p]["exp_avg"], b.state[q]["exp_avg"], rtol=0.02, atol=0)

    def test_small_gradients_are_not_scaled_up(self):
        p, q = param(100), param(100)
        a, b = AdamW_BF16([p], lr=1e-2), AdamW_BF16([q], lr=1e-2)
        give_gradients([p])
        give_gradients([q])
        a.clip_grad_norm_(1e6)
        a.step()
        b.step()
        assert equal(snapshot(a), snapshot(b))

    @pytest.mark.parametrize("skip_nonfinite", [False, True])
    def test_zero_grad_clears_pending_clip(self, skip_nonfinite):
        """A training loop may skip a bad batch after it has seen the norm."""
        p = param(100)
        a, b = (AdamW_BF16([x], lr=1e-2, skip_nonfinite=skip_nonfinite) for x in (p, param(100)))
        p.grad = torch.full_like(p, torch.nan)
        assert a.clip_grad_norm_(1.0).isnan()
        a.zero_grad()
        for optimizer in (a, b):
            train(optimizer, 1)
        assert equal(snapshot(a), snapshot(b)) and a.skipped_steps == 0

    def test_scale_reaches_the_step_through_a_wrapper(self):
        """Lightning Fabric's wrapper reads the optimizer's attributes, and keeps its own."""

        class Wrapper(AdamW_BF16):
            def __init__(self, optimizer):
                self.__dict__["optimizer"] = optimizer

            def __getattr__(self, name):
                return getattr(self.__dict__["optimizer"], name)

            def step(self):
                self.optimizer.step()

        p = param(100)
        a, b = (AdamW_BF16([x], lr=1e-2) for x in (p, param(100)))
        for optimizer in (Wrapper(a), b):
            give_gradients(optimizer.param_groups[0]["params"])
            optimizer.clip_grad_norm_(1e-2)
            optimizer.step()
        assert equal(snapshot(a), snapshot(b)) and a.state[p]["exp_avg"].norm() < 0.01

    def test_max_norm_must_be_positive(self):
        with pytest.raises(ValueError, match=r"Invalid max_norm: 0\.0"):
            AdamW_BF16([param(2)]).clip_grad_norm_(0.0)


class TestSkipNonfinite:
    @pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
    @pytest.mark.parametrize("clip", [False, True])
    def test_nonfinite_step_changes_nothing_and_is_counted(self, bad, clip):
        p, q = param(100), param(3)
        optimizer = AdamW_BF16([p, q], lr=1e-2, skip_nonfinite=True)
        train(optimizer, 2)
        before = snapshot(optimizer)
        give_gradients([p, q])
        p.grad[37] = bad
        if clip:
            optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        assert equal(snapshot(optimizer), before) and optimizer.skipped_steps == 1
        train(optimizer, 1)
        assert optimizer.skipped_steps == 1 and optimizer.state[q]["step"].item() == 3

    def test_is_off_by_default(self):
        p = param(4)
        optimizer = AdamW_BF16([p], lr=1e-2)
        p.grad = torch.full_like(p, float("nan"))
        optimizer.step()
        assert p.isnan().all() and optimizer.skipped_steps == 0
