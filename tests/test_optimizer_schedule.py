"""The learning rate: schedules of our own, of torch and of the user."""

import math
import warnings

import numpy as np
import pytest
import torch
from small_optimizers import give_gradients, param, train

from sharded_bf16_adamw import LR, AdamW_BF16


class TestSchedule:
    def test_default_is_lr(self):
        optimizer = AdamW_BF16([param(2)])
        seen = []
        for _ in range(3):
            train(optimizer, 1)
            seen.append(optimizer.param_groups[0]["lr"])
        assert seen == [LR()(0), LR()(1), LR()(2)]

    def test_group_with_its_own_lr_does_not_get_the_default_schedule(self):
        optimizer = AdamW_BF16([{"params": [param(2)], "lr": 0.5}, {"params": [param(2)]}])
        train(optimizer, 2)
        assert [group["lr"] for group in optimizer.param_groups] == [0.5, LR()(1)]

    def test_constant_lr_may_be_changed_by_torch_schedulers(self):
        optimizer = AdamW_BF16([param(2)], lr=1.0)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        seen = []
        for _ in range(3):
            seen.append(optimizer.param_groups[0]["lr"])
            train(optimizer, 1)
            scheduler.step()
        assert seen == [1.0, 0.5, 0.25]

    @pytest.mark.filterwarnings("ignore:a torch learning-rate scheduler was built")
    def test_torch_scheduler_wins_over_lr_function(self):
        optimizer = AdamW_BF16([param(2)], lr_function=lambda step: 1.0 / (step + 1))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 7.0 + epoch)
        used = []
        for _ in range(3):
            train(optimizer, 1)
            used.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
        assert used == [7.0, 8.0, 9.0]

    def test_changed_lr_holds_until_it_is_put_back(self):
        """torch's checkpoint code sets lr to 0, steps with zero gradients to make the state, and puts the lr back."""
        p = param(100)
        optimizer = AdamW_BF16([p], lr_function=lambda step: 0.1 * (step + 1), weight_decay=1.0)
        before = p.detach().clone()
        p.grad = torch.zeros_like(p)
        written, optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"], 0.0
        optimizer.step(closure=None)
        assert torch.equal(p, before), "a step at lr 0 must not decay"
        optimizer.param_groups[0]["lr"] = written
        train(optimizer, 1)
        assert optimizer.param_groups[0]["lr"] == 0.1 * 2

    def test_a_torch_scheduler_over_a_schedule_is_warned_of(self):
        """It takes the first rate of a warm-up for its base rate."""
        optimizer = AdamW_BF16([param(2)])
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
        with pytest.warns(
            UserWarning,
            match=r"lr_function=LR\(lr=0.001.*first value, 3.33333e-07, and takes over; pass lr=",
        ):
            train(optimizer, 1)
        with warnings.catch_warnings(action="error"):
            train(optimizer, 1)

    @pytest.mark.parametrize("wrong", [None, -1.0, math.nan, math.inf, "0.1"])
    def test_what_is_no_rate_is_refused_at_any_step(self, wrong):
        rates = [
            0.5,
            0.5,
            0.5,
            wrong,
        ]  # the construction's for the default and the group, and those of two steps
        p = param(4)
        optimizer = AdamW_BF16([p], lr_function=lambda step: rates.pop(0))
        train(optimizer, 1)
        before = p.detach().clone()
        with pytest.raises(
            ValueError,
            match=rf"Invalid learning rate: lr_function\(1\) is {wrong!r}; it must be a finite number",
        ):
            train(optimizer, 1)
        assert torch.equal(p, before) and optimizer.param_groups[0]["schedule_step"] == 1
        with pytest.raises(ValueError, match=r"Invalid learning rate: lr_function\(0\) is"):
            AdamW_BF16([p], lr_function=lambda step: wrong)

    def test_a_group_for_which_the_schedule_has_no_rate_is_not_added(self):
        rates = [0.5, 0.5, math.nan]
        optimizer = AdamW_BF16([param(4)], lr_function=lambda step: rates.pop(0))
        for error in (ValueError, IndexError):
            with pytest.raises(error):
                optimizer.add_param_group({"params": [param(3)]})
            assert len(optimizer.param_groups) == 1

    def test_numpy_numbers_become_plain_data(self):
        optimizer = AdamW_BF16([param(2)], lr_function=lambda step: np.float32(0.5) / (step + 1))
        train(optimizer, 2)
        assert (
            type(optimizer.param_groups[0]["lr"]) is float
            and optimizer.param_groups[0]["lr"] == 0.25
        )

    def test_a_state_of_torch_goes_on_where_it_was(self):
        groups = [[{"params": [param(3)]}, {"params": [param(2)]}] for _ in range(2)]
        source = torch.optim.AdamW(groups[0], lr=0.5)
        for _ in range(7):
            give_gradients(source.param_groups[0]["params"])  # the other group is frozen so far
            source.step()
        optimizer = AdamW_BF16(groups[1], lr_function=float)
        optimizer.load_state_dict(source.state_dict())
        train(optimizer, 1)
        assert [group["lr"] for group in optimizer.param_groups] == [7.0, 7.0]

    def test_a_tensor_that_somebody_put_there_holds_without_being_compared(self):
        optimizer = AdamW_BF16([param(2)], lr_function=lambda step: 0.5)
        own = optimizer.param_groups[0]["lr"] = torch.tensor(
            0.5
        )  # to compare one on a GPU would wait for it
        train(optimizer, 2)
        assert optimizer.param_groups[0]["lr"] is own

    def test_a_schedule_may_give_tensors(self):
        optimizer = AdamW_BF16([param(2)], lr_function=lambda step: torch.tensor(float(step)))
        train(optimizer, 3)
        assert optimizer.param_groups[0]["lr"] == 2.0

    def test_a_schedule_that_fails_for_one_group_leaves_all_as_they_were(self):
        p, q = param(4), param(4)
        calls = iter(
            [0.1, 0.1, 0.1]
        )  # the construction's for the default and both groups, and none for the steps
        optimizer = AdamW_BF16(
            [{"params": [p]}, {"params": [q]}],
            lr_function=lambda step: next(calls) if step == 0 else 0.1,
        )
        calls = iter([0.2])
        before = [p.detach().clone(), q.detach().clone()]
        with pytest.raises(StopIteration):
            train(optimizer, 1)
        assert torch.equal(p, before[0]) and torch.equal(q, before[1])
        assert [(group["lr"], group["schedule_step"]) for group in optimizer.param_groups] == [
            (0.1, 0),
            (0.1, 0),
        ]
        assert not optimizer.state, "no state was made before the schedule was asked"

    def test_late_group_joins_at_the_position_of_the_others(self):
        optimizer = AdamW_BF16([param(2)], lr_function=lambda step: float(step))
        train(optimizer, 5)
        optimizer.add_param_group({"params": [param(3)]})
        train(optimizer, 1)
        assert [group["lr"] for group in optimizer.param_groups] == [5.0, 5.0]

    def test_loading_restores_the_position_and_keeps_the_codes_schedule(self):
        saved = AdamW_BF16([param(2)], lr_function=lambda step: 1.0)
        train(saved, 4)
        resumed = AdamW_BF16([param(2)], lr_function=lambda step: 100.0 + step)
        resumed.load_state_dict(saved.state_dict())
        train(resumed, 1)
        assert resumed.param_groups[0]["lr"] == 104.0
