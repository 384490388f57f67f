"""decouple_lr: weight decay that follows the schedule but not the size of the learning rate."""

import copy
import warnings

import pytest
import torch
from small_optimizers import equal, give_gradients, param, snapshot, train
from torch import nn

from sharded_bf16_adamw import LR, WSD, AdamW_BF16, import_fp32, load, save

pytestmark = pytest.mark.filterwarnings("error")


def decayed(optimizer, p, steps, scheduler=None):
    """Take steps with zero gradients; return the share of the true weight that is left."""
    before = p.detach().float().clone()
    for _ in range(steps):
        p.grad = torch.zeros_like(p)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    (_, weight), *_ = optimizer.true_weights()
    return (weight / before).double()


@pytest.mark.parametrize("lr", [1e-2, 1e-5, torch.tensor(1e-5), torch.tensor(1e-2)])
def test_constant_lr_takes_off_the_weight_decay_whatever_the_lr(lr):
    p = param(256, dtype=torch.float32)
    optimizer = AdamW_BF16([p], lr=lr, weight_decay=1e-3, decouple_lr=True)
    left = decayed(optimizer, p, 10)
    torch.testing.assert_close(left, torch.full_like(left, (1 - 1e-3) ** 10), rtol=1e-6, atol=0)


def test_decay_follows_the_shape_of_the_schedule():
    for schedule in (
        LR(lr=1e-2, preheat_steps=3),
        LR(lr=1e-5, preheat_steps=3),
        WSD(lr=1e-5, warmup_steps=3, stable_steps=2, decay_steps=4),
    ):
        p = param(64, dtype=torch.float32)
        optimizer = AdamW_BF16([p], lr_function=schedule, weight_decay=1e-3, decouple_lr=True)
        expected = 1.0
        for step in range(8):
            expected *= 1 - 1e-3 * schedule(step) / schedule.lr
        left = decayed(optimizer, p, 8)
        torch.testing.assert_close(left, torch.full_like(left, expected), rtol=1e-6, atol=0)


def test_torchs_schedulers_scale_from_the_first_lr_or_from_max_lr():
    for max_lr, decays in ((None, (1e-3, 5e-4, 2.5e-4)), (2e-5, (5e-4, 2.5e-4, 1.25e-4))):
        p = param(64, dtype=torch.float32)
        optimizer = AdamW_BF16([p], 1e-5, weight_decay=1e-3, decouple_lr=True, max_lr=max_lr)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        expected = torch.tensor([1 - decay for decay in decays]).double().prod()
        left = decayed(optimizer, p, 3, scheduler)
        torch.testing.assert_close(left, expected.expand(64), rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:Detected call of:UserWarning")
def test_one_cycle_scheduler_sets_the_peak():
    p = param(64, dtype=torch.float32)
    optimizer = AdamW_BF16([p], lr=1e-5, weight_decay=1e-3, decouple_lr=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=4e-5, total_steps=9, cycle_momentum=False
    )
    expected = 1.0
    for _ in range(6):
        expected *= 1 - 1e-3 * optimizer.param_groups[0]["lr"] / 4e-5
        left = decayed(optimizer, p, 1, scheduler)
    assert left.mean().item() < 1 and optimizer.param_groups[0]["max_lr"] == 4e-5
    torch.testing.assert_close(p, param(64, dtype=torch.float32) * expected, rtol=1e-5, atol=0)


def test_same_bits_as_the_coupled_decay_with_the_same_product():
    """The lr and the decay are powers of two, so that the product rounds nowhere."""
    results = []
    for options in (
        {"weight_decay": 2.0**-4},
        {"weight_decay": 2.0**-14, "decouple_lr": True},
        {"weight_decay": 2.0**-14, "decouple_lr": True, "step_in_backward": True},
    ):
        p = param(300)
        optimizer = AdamW_BF16([p], lr=2.0**-10, **options)
        for step in range(3):
            gradient = param(300, seed=step + 1).detach()
            (p * gradient).sum().backward()
            optimizer.step(zero_grad=True)
        results.append(snapshot(optimizer))
    assert equal(results[0], results[1]) and equal(results[0], results[2])


def test_groups_have_their_own_peak():
    groups = [
        {"params": [param(4)]},
        {"params": [param(4)], "lr": 1e-2},
        {"params": [param(4)], "decouple_lr": False},
    ]
    schedule = LR(lr=5e-4, preheat_steps=10)
    optimizer = AdamW_BF16(groups, lr_function=schedule, weight_decay=1e-5, decouple_lr=True)
    assert [group["max_lr"] for group in optimizer.param_groups] == [5e-4, 1e-2, None]


def test_checkpoints_carry_the_options(tmp_path):
    def build(**options):
        model = nn.ParameterList([param(64)])
        return model, AdamW_BF16(model.parameters(), lr=1e-3, weight_decay=1e-4, **options)

    model, optimizer = build(decouple_lr=True, max_lr=2e-3)
    train(optimizer, 2)
    save(tmp_path, 2, model, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    train(optimizer, 2)
    for through_file in (False, True):
        other_model, other = build()
        train(other, 2)
        if through_file:
            load(tmp_path, other_model, other)
        else:
            other.load_state_dict(state)
            other_model[0].data.copy_(load_weight(tmp_path))
        assert other.param_groups[0]["decouple_lr"] and other.param_groups[0]["max_lr"] == 2e-3
        train(other, 2)
        assert equal(snapshot(other), snapshot(optimizer))


def load_weight(root):
    model = nn.ParameterList([param(64)])
    optimizer = AdamW_BF16(model.parameters(), lr=1e-3)
    load(root, model, optimizer)
    return model[0].detach()


def test_state_of_torchs_adamw_is_coupled():
    p = param(4)
    theirs = torch.optim.AdamW([param(4)], lr=1e-3)
    give_gradients(theirs.param_groups[0]["params"])
    theirs.step()
    optimizer = AdamW_BF16([p], lr=1e-3, weight_decay=1e-5, decouple_lr=True)
    optimizer.load_state_dict(theirs.state_dict())
    assert optimizer.param_groups[0]["decouple_lr"] is False
    train(optimizer, 1)
    model = nn.ParameterList([p])
    optimizer = AdamW_BF16(model.parameters(), lr=1e-3, weight_decay=1e-5, decouple_lr=True)
    import_fp32({"0": p.detach()}, model, optimizer, theirs.state_dict())
    (group,) = optimizer.param_groups
    assert (group["decouple_lr"], group["weight_decay"]) == (False, 1e-2)


def test_unusable_peaks_are_errors_and_a_large_decay_warns():
    with pytest.raises(ValueError, match=r"which is unknown for lr_function=.*; pass max_lr="):
        AdamW_BF16([param(2)], lr_function=lambda step: 0.1, weight_decay=0.0, decouple_lr=True)
    for options in ({"lr": 0.0}, {"lr": 1.0, "max_lr": -1.0}, {"lr": 1.0, "max_lr": torch.inf}):
        with pytest.raises(ValueError, match="Invalid max_lr"):
            AdamW_BF16([param(2)], weight_decay=0.0, decouple_lr=True, **options)
    with pytest.warns(UserWarning, match=r"shrinks each weight by 1\.00% in every step") as caught:
        AdamW_BF16([param(2)], lr=1e-3, decouple_lr=True)
    assert len(caught) == 1
    with warnings.catch_warnings(action="error"):
        AdamW_BF16([param(2)], lr=1e-3)
