"""The schedules LR and WSD, mostly without an optimizer."""

import math
import pickle

import numpy as np
import pytest
import torch

from sharded_bf16_adamw import LR, WSD, AdamW_BF16


def test_warms_up_linearly_and_decays_as_a_power():
    schedule = LR(lr=2.0, preheat_steps=4, decay_power=-0.5)
    assert [schedule(step) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert schedule(15) == pytest.approx(2.0 * (16 / 4) ** -0.5)


def test_defaults_match_adamw_bfloat16():
    assert (LR().lr, LR().preheat_steps, LR().decay_power) == (1e-3, 3000, -0.5)


@pytest.mark.parametrize(
    "arguments", [{"lr": -1.0}, {"lr": float("nan")}, {"preheat_steps": 0}, {"decay_power": 0.5}]
)
def test_rejects_arguments_out_of_range(arguments):
    name = "learning rate" if "lr" in arguments else next(iter(arguments))
    with pytest.raises(ValueError, match=f"Invalid {name}"):
        LR(**arguments)


def wsd(**changes):
    return WSD(**{"lr": 0.3, "warmup_steps": 5, "stable_steps": 7, "decay_steps": 16, **changes})


@pytest.mark.parametrize("floor", [0.0, 0.01])
@pytest.mark.parametrize("decay", ["1-sqrt", "linear"])
def test_wsd_is_its_closed_form(decay, floor):
    schedule = wsd(decay=decay, floor=floor)
    for step in range(28):
        t = min(max((step - 12) / 16, 0.0), 1.0)
        fraction = 1 - math.sqrt(t) if decay == "1-sqrt" else 1 - t
        warmup = min((step + 1) / 5, 1.0)
        expected = floor + (0.3 - floor) * fraction if step >= 12 else 0.3 * warmup
        assert schedule(step) == pytest.approx(expected, rel=1e-15)
        assert schedule(step) > floor
    assert all(schedule(step) == 0.3 for step in range(4, 13)), "the peak is exact"
    assert all(schedule(step) == floor for step in (28, 29, 10**9))


def test_wsd_decays_by_1_sqrt_to_zero_by_default():
    assert wsd() == wsd(decay="1-sqrt", floor=0.0)
    assert [wsd(lr=1.0)(12 + step) for step in (1, 4, 9)] == [0.75, 0.5, 0.25]


def test_phases_of_wsd_may_be_empty():
    assert [wsd(warmup_steps=0)(step) for step in (0, 7)] == [0.3, 0.3]
    assert [wsd(stable_steps=0, decay="linear", lr=1.0)(step) for step in (4, 5, 6)] == [
        1.0,
        1.0,
        15 / 16,
    ]
    assert [wsd(decay_steps=0, floor=0.1)(step) for step in (11, 12)] == [0.3, 0.1]
    assert wsd(stable_steps=None)(10**9) == 0.3
    assert wsd(stable_steps=None)(0) == wsd()(0)
    assert wsd(floor=0.3)(20) == pytest.approx(0.3)


def test_wsd_computes_in_float64():
    schedule = WSD(np.float32(0.1), 3, 1, 8, floor=np.float32(0.01))
    lr, floor = float(np.float32(0.1)), float(np.float32(0.01))
    assert schedule(0) == lr / 3 and type(schedule(0)) is type(schedule(7)) is float
    assert schedule(7) == pytest.approx(floor + (lr - floor) * (1 - math.sqrt(3 / 8)), rel=1e-15)


@pytest.mark.parametrize(
    "arguments",
    [
        {"lr": -1.0},
        {"lr": math.nan},
        {"lr": math.inf},
        {"warmup_steps": -1},
        {"stable_steps": -1},
        {"decay_steps": -1},
        {"decay_steps": math.inf},
        {"decay": "cosine"},
        {"floor": -0.1},
        {"floor": 0.4},
        {"floor": math.nan},
    ],
)
def test_wsd_rejects_arguments_out_of_range(arguments):
    name = "learning rate" if "lr" in arguments else next(iter(arguments))
    with pytest.raises(ValueError, match=f"Invalid {name}"):
        wsd(**arguments)


def test_wsd_drives_the_optimizer_and_can_be_pickled():
    schedule = pickle.loads(pickle.dumps(wsd()))
    assert schedule == wsd()
    weight = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    optimizer = AdamW_BF16([weight], lr_function=schedule)
    for step in range(15):
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == schedule(step)


def test_peak_is_exact_at_the_first_step_of_the_decay():
    assert 1.2e-5 + (1e-4 - 1.2e-5) != 1e-4, "the closed form is not exact"
    assert wsd(lr=1e-4, floor=1.2e-5)(12) == 1e-4
