"""Extra states of modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharded_bf16_adamw import AdamW_BF16, load, save

from .two_layers import BF16


class History(nn.Module):
    """A module with an extra state: a tensor that grows, or another type while it is empty."""

    def __init__(self, values: list[float], empty: Any = None) -> None:
        super().__init__()
        self.layer, self.values, self.empty = nn.Linear(2, 2).to(BF16), values, empty

    def get_extra_state(self) -> Any:
        return torch.tensor(self.values) if self.values or self.empty is None else self.empty

    def set_extra_state(self, state: Any) -> None:
        self.values = state.tolist() if isinstance(state, Tensor) else []


@pytest.mark.parametrize("saved", [[], [1.0], [1.0, 2.0, 3.0]])
@pytest.mark.parametrize("current", [[], [5.0], [6.0, 7.0]])
@pytest.mark.parametrize("empty", [None, {"seen": "nothing"}])
def test_extra_state_is_restored_with_size_and_type_of_the_checkpoint(
    saved, current, empty, tmp_path
):
    model = History(saved, empty)
    save(tmp_path, 1, model, AdamW_BF16(model.parameters(), lr=0.1))
    fresh = History(current, empty)
    load(tmp_path, fresh, AdamW_BF16(fresh.parameters(), lr=0.1))
    assert fresh.values == saved and torch.equal(fresh.layer.weight, model.layer.weight)


def test_missing_extra_state_is_a_mismatch(tmp_path):
    plain = nn.Sequential(nn.Linear(2, 2).to(BF16))
    save(tmp_path, 1, plain, AdamW_BF16(plain.parameters(), lr=0.1))
    model = nn.Sequential(nn.Linear(2, 2).to(BF16), History([1.0]))
    optimizer = AdamW_BF16(model[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"missing key model.1._extra_state"):
        load(tmp_path, model, optimizer)
    load(tmp_path, model, optimizer, strict=False)
    assert model[1].values == [1.0]
