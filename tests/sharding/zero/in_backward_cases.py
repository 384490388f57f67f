"""A model of equal layers whose optimizer updates them inside the backward pass, under ZeRO."""

from __future__ import annotations

import torch

from .cases import Linears, mesh_of, new_optimizer, zero

LAYERS, WIDTH = 8, 16
LAYER_BYTES = WIDTH * WIDTH * 2


def in_backward_optimizer(model, shape, clip=None, **options):
    return new_optimizer(
        model, zero(2, mesh_of(shape), **options), step_in_backward=True, clip_in_backward=clip
    )


def layers(world, **options):
    """Return a model of a layer per bucket, and its optimizer, with one reduction at a time."""
    model, size = Linears(LAYERS, WIDTH), LAYER_BYTES / 2**20
    options = {"bucket_size_mb": size, "max_in_flight": 1, "shape": (world,), **options}
    return model, in_backward_optimizer(model, **options)


def make_input(step, rank):
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(4, WIDTH, generator=generator).bfloat16().requires_grad_()


def backward(model, rank, step):
    model(make_input(step, rank)).square().mean().backward()
