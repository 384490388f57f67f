"""Parameters with random gradients, training steps on them, and bitwise comparison of results."""

import torch
from bits import same_bits
from torch import nn

BF16 = torch.bfloat16
equal = same_bits


def param(*shape, dtype=BF16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(*shape, generator=generator).to(dtype))


def give_gradients(params, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def train(optimizer, steps, seed=0):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(steps):
        give_gradients(params, seed=seed * 1000 + step)
        optimizer.step(zero_grad=True)


def snapshot(optimizer):
    """Return copies of all weights and states."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [
        [p.detach().clone(), *[value.clone() for _, value in sorted(optimizer.state[p].items())]]
        for p in params
    ]
