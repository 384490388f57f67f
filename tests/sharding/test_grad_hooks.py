"""Hooks of several owners on one parameter."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from sharded_bf16_adamw.sharding.grad_hooks import GradHooks


class Owner:
    def __init__(self, number):
        self.number = number


def test_newest_owner_alive_is_called():
    hooks, param, called = GradHooks(), nn.Parameter(torch.ones(1)), []
    owners = [Owner(number) for number in range(3)]
    for owner in owners:
        hooks.add(owner, [param], WeakIdKeyDictionary(), lambda own, _: called.append(own.number))
    del owner
    while owners:
        param.sum().backward()
        owners.pop()
    param.sum().backward()
    assert called == [2, 1, 0]
    assert hooks.owner_of(param) is None
