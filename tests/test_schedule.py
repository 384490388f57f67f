"""The LR schedule by itself."""

import pytest

from sharded_bf16_adamw import LR


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
