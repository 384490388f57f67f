"""Checks that the layout of tensors in memory does not matter to the update.

Each takes the update function, as in ``rule_checks``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from bits import same_bits
from torch import Tensor

from .rule_checks import DEFAULT, State, Update, assert_matches_oracle, expected, stepped, typical

SHAPE = (4, 6, 3, 2)
N = 4 * 6 * 3 * 2

# Each copies a contiguous tensor of SHAPE into its own layout.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.clone,
    "transposed": lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "storage offset of one element": lambda x: torch.cat([x.new_full((1,), 9.0), x.flatten()])[
        1:
    ].view(SHAPE),
    "every other column": lambda x: torch.stack([x, torch.full_like(x, 9.0)], dim=-1)[..., 0],
    "inner block": lambda x: torch.nn.functional.pad(x, (1, 1, 2, 0), value=9.0)[..., 2:, 1:-1],
}


def storage(x: Tensor) -> Tensor:
    """Return all of the tensor's memory as a flat tensor, including elements outside the view."""
    return x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)


def check_layouts(update: Update) -> None:
    """Check that the layouts of the five tensors, equal or different, do not change the bits."""
    start = typical(N, 60).map(lambda x: x.view(SHAPE))
    names = list(LAYOUTS)
    mixed = [tuple(names[(i + j) % len(names)] for j in range(5)) for i in range(len(names))]
    one_differs = [
        ("contiguous",) * i + (name,) + ("contiguous",) * (4 - i)
        for name in names
        for i in range(5)
    ]
    for wide in (False, True):
        state = start._replace(g=start.g.float()) if wide else start
        wanted = stepped(update, state.map(torch.flatten), 3).map(lambda x: x.view(SHAPE))
        for layout in [*((name,) * 5 for name in names), *mixed, *one_differs]:
            laid = State(*(LAYOUTS[name](x) for name, x in zip(layout, state, strict=True)))
            before = [(x.data_ptr(), x.stride()) for x in laid]
            take_step(update, laid, 3)
            after = [(x.data_ptr(), x.stride()) for x in laid]
            assert before == after, f"{layout}: a tensor was moved"
            for name, a, b in zip(State._fields, laid, wanted, strict=True):
                assert same_bits(a, b), f"{layout}: {name} differs from the contiguous result"


def check_outside_views(update: Update) -> None:
    """Check that memory between the elements of a view keeps its bits."""
    state = typical(N, 61).map(lambda x: x.view(SHAPE))
    for name in ("storage offset of one element", "every other column", "inner block"):
        laid = state.map(LAYOUTS[name])
        outside = [storage(x) == 9.0 for x in laid]
        assert all(x.any() for x in outside)
        take_step(update, laid, 3)
        for field, x, mask in zip(State._fields, laid, outside, strict=True):
            assert (storage(x)[mask] == 9.0).all(), f"{name}: memory beside {field} was written to"


def check_shapes(update: Update) -> None:
    """Check 0-dim, empty and one-element tensors, and dimensions of size 1 with odd strides."""
    for shape in ((), (0,), (0, 5), (1,), (1, 1, 1), (7, 1), (1, 7)):
        n = torch.Size(shape).numel()
        state = typical(n, 62)
        wanted = expected(state, 3)
        shaped = state.map(lambda x, shape=shape: x.clone().view(shape))
        odd = shaped.map(
            lambda x: x.as_strided(
                x.shape, [s if d != 1 else 13 for s, d in zip(x.stride(), x.shape, strict=True)]
            )
        )
        for laid in (shaped.map(torch.clone), odd):
            take_step(update, laid, 3)
            assert_matches_oracle(laid.map(lambda x: x.reshape(-1)), wanted)


def check_expanded_gradient(update: Update) -> None:
    """Check that a gradient whose elements share memory (autograd's expand) is read correctly."""
    state = typical(N, 63).map(lambda x: x.view(SHAPE))
    # The other elements are what a read finds that ignores the strides.
    g = torch.linspace(0.25, 0.5, N).bfloat16()[0].expand(SHAPE)
    wanted = stepped(update, state._replace(g=g.contiguous()), 3)
    laid = state.map(torch.clone)._replace(g=g)
    take_step(update, laid, 3)
    assert same_bits(laid, wanted)


def check_skipped_in_any_layout(update: Update) -> None:
    """Check that found_inf leaves tensors unchanged also if the update works on copies of them."""
    state = typical(N, 64).map(lambda x: x.view(SHAPE))
    for name, lay in LAYOUTS.items():
        laid = state.map(lay)
        take_step(update, laid, 3, found_inf=torch.tensor(1.0))
        assert same_bits(laid, state), name


def take_step(update: Update, state: State, t: int, found_inf: Tensor | None = None) -> None:
    """Take step ``t`` in place, with the hyper-parameters ``DEFAULT``."""
    count = torch.tensor(float(t - 1))
    lists = [[state.p], [state.g], [state.m], [state.v], [state.c], [count]]
    update(*lists, **DEFAULT._asdict(), found_inf=found_inf)
