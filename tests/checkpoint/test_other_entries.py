"""Entries of ``optimizer.state`` that belong to no parameter of the model."""

from __future__ import annotations

import re
from unittest import mock

import pytest
import torch
from bits import same_bits

from sharded_bf16_adamw import AdamW_BF16, gather_full_state_dict, load, save
from sharded_bf16_adamw.checkpoint.optimizer_state import init_state

from .two_layers import layers, states, take_steps, trained


def test_state_of_foreign_tensor_is_not_saved(tmp_path):
    """accelerate's swap of parameters leaves such a state."""
    model, optimizer = trained()
    expected = states(model, optimizer)
    optimizer.state[torch.ones(3)] = {"step": torch.ones(()), "exp_avg": torch.ones(3)}
    path = save(tmp_path, 1, model, optimizer)
    fresh = layers(seed=1)
    resumed = AdamW_BF16(fresh.parameters(), lr=1e-2)
    load(path, fresh, resumed)
    assert same_bits(states(fresh, resumed), expected)
    load(path, model, optimizer)
    assert len(optimizer.state) == 5 and same_bits(states(model, optimizer), expected)
    assert len(gather_full_state_dict(model, optimizer)["state"]) == 4
    assert list(optimizer.state_dict()["state"]) == [0, 1, 2, 3] and len(optimizer.state) == 5


@pytest.mark.parametrize("kind", [AdamW_BF16, torch.optim.AdamW])
def test_entry_of_no_parameter_is_kept(kind, tmp_path):
    model = layers()
    optimizer = kind(model.parameters(), lr=1e-2)
    take_steps(model, optimizer) if kind is AdamW_BF16 else None
    optimizer.state["ema"] = {"decay": 0.5, "count": torch.tensor(3.0)}
    optimizer.state["epoch"] = 7
    fresh = layers(seed=1)
    resumed = kind(fresh.parameters(), lr=1e-2)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.state["epoch"] == 7 and resumed.state["ema"]["decay"] == 0.5
    resumed = kind(fresh.parameters(), lr=1e-2)
    load(save(tmp_path, 1, model, optimizer), fresh, resumed)
    assert resumed.state["epoch"] == 7 and resumed.state["ema"] == {
        "decay": 0.5,
        "count": torch.tensor(3.0),
    }
    assert optimizer.state["epoch"] == 7
    gather_full_state_dict(model, optimizer)
    if kind is AdamW_BF16:
        assert same_bits(states(fresh, resumed), states(model, optimizer))
        take_steps(fresh, resumed)


def test_entry_is_kept_if_a_step_for_missing_states_fails(monkeypatch):
    optimizer = torch.optim.AdamW(layers().parameters())
    optimizer.state["epoch"] = 7
    monkeypatch.setattr(optimizer, "step", mock.Mock(side_effect=RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        init_state(optimizer)
    assert optimizer.state["epoch"] == 7


def test_entry_that_cannot_be_saved_is_named(tmp_path):
    for name, entry, sentence in (
        (
            "ema",
            torch.ones(2000),
            "optimizer.state['ema'] belongs to no parameter and holds a tensor of 2000 "
            "elements, which cannot",
        ),
        (
            7.5,
            1,
            "optimizer.state has an entry under 7.5, which cannot be saved; use a string as "
            "its key",
        ),
    ):
        model, optimizer = trained()
        optimizer.state[name] = entry
        with pytest.raises(ValueError, match="^" + re.escape(sentence)):
            save(tmp_path, 1, model, optimizer)
        optimizer.load_state_dict(optimizer.state_dict())


def test_load_state_dict_does_not_change_its_argument():
    _, optimizer = trained()
    optimizer.state["ema"] = {"count": torch.tensor(3.0)}
    given = optimizer.state_dict()
    _, other = trained(seed=1)
    other.load_state_dict(given)
    other.state["ema"]["count"] += 1
    assert given["state"]["ema"]["count"] == 3
