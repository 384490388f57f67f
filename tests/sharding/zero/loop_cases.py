"""Training loops of all kinds, to run with ZeRO and on a single process."""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist

from .cases import (
    SHAPES,
    Parameters,
    assert_same_bits,
    collect,
    new_optimizer,
    rank_gradients,
    zero,
)

ALL = frozenset(SHAPES)
FP32_SUMS = {"reduce_dtype": torch.float32, "accumulate_dtype": torch.float32}


class Loop:
    """A model and its optimizer.

    On a single process backward passes give the mean gradients of all ``ranks``.
    """

    def __init__(self, ranks, options=None):
        self.ranks = ranks
        self.alone = options is None
        self.model = Parameters()
        if options is not None and options.get("overlap_gather"):
            options = {**options, "model": self.model}
        self.optimizer = new_optimizer(
            self.model, None if options is None else zero(**options), skip_nonfinite=True
        )

    def backward(self, step, names_of=lambda rank: ALL):
        """Run a backward pass in which each rank uses the parameters ``names_of(rank)``."""
        if self.alone:
            used = frozenset().union(*(names_of(rank) for rank in range(self.ranks)))
            contributions = [
                {name: grad for name, grad in self._grads(step, rank) if name in names_of(rank)}
                for rank in range(self.ranks)
            ]
            sums = {
                name: sum(each[name].double() for each in contributions if name in each)
                for name in ALL
                if name in used
            }
            self.run(
                {
                    name: (total / self.ranks).to(self.model.get_parameter(name).dtype)
                    for name, total in sums.items()
                }
            )
        else:
            self.run(
                {
                    name: grad
                    for name, grad in self._grads(step, dist.get_rank())
                    if name in names_of(dist.get_rank())
                }
            )

    def run(self, grads):
        if any(self.model.get_parameter(name).requires_grad for name in grads):
            self.model(grads).backward()

    def _grads(self, step, rank):
        return rank_gradients(step, rank, self.ranks).items()

    def no_sync(self):
        return contextlib.nullcontext() if self.alone else self.optimizer.no_sync()

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()


def unused_on_some_ranks(loop):
    for step in range(6):
        loop.backward(
            step,
            lambda rank: ALL - {"even", "large"} if rank == 0 else {"even", "scalar", "uneven"},
        )
        loop.step()


def unused_on_changing_ranks(loop):
    for step in range(8):
        loop.backward(
            step,
            lambda rank, step=step: {
                name for i, name in enumerate(SHAPES) if (i + rank + step) % 3
            },
        )
        loop.step()


def unused_everywhere_for_a_while(loop):
    for step in range(9):
        loop.backward(
            step, lambda rank, step=step: ALL - {"conv", "fp32", "wide"} if 2 <= step < 7 else ALL
        )
        loop.step()


def a_rank_without_any_gradient(loop):
    for step in range(4):
        loop.backward(
            step, lambda rank, step=step: ALL if rank == step % loop.ranks else frozenset()
        )
        loop.step()


def several_backwards(loop):
    for step in range(4):
        with loop.optimizer.accumulate():  # without effect unless step_in_backward=True
            loop.backward(7 * step)
            loop.backward(7 * step + 1)
        loop.backward(7 * step + 2)
        loop.step()


def several_backwards_with_other_uses(loop):
    for step in range(4):
        with loop.optimizer.accumulate():
            loop.backward(7 * step, lambda rank: ALL if rank == 0 else {"even", "conv"})
        loop.backward(
            7 * step + 1, lambda rank: {"uneven", "scalar"} if rank == 0 else ALL - {"conv"}
        )
        loop.step()


def no_sync(loop):
    for step in range(4):
        with loop.no_sync():
            loop.backward(7 * step)
            loop.backward(
                7 * step + 1, lambda rank: {"even", "fp32", "scalar"} if rank == 0 else ALL
            )
        loop.backward(7 * step + 2, lambda rank: ALL - {"large", "scalar"})
        loop.step()


def frozen_and_unfrozen(loop):
    loop.model.conv.requires_grad_(False)
    for step in range(9):
        if step in (2, 5):
            loop.model.uneven.requires_grad_(step == 5)
        if step == 4:
            loop.model.conv.requires_grad_(True)
        loop.backward(step)
        loop.step()


def kept_gradients(loop):
    """Without ``zero_grad`` the next step uses the same gradients."""
    for step in range(3):
        loop.backward(step)
        loop.optimizer.step()
        loop.optimizer.step()
        loop.optimizer.zero_grad()


def discarded_gradients(loop):
    for step in range(3):
        loop.backward(100 + step, lambda rank: ALL if rank == 0 else {"even"})
        loop.optimizer.zero_grad()
        loop.backward(step)
        loop.step()


def gradients_set_by_hand(loop):
    class Setting:
        def __call__(self, grads):
            for name, grad in grads.items():
                loop.model.get_parameter(name).grad = grad

    loop.run = Setting()
    for step in range(3):
        loop.backward(step, lambda rank: ALL if rank == 0 else {"even", "scalar", "empty"})
        loop.step()


def gradients_that_are_views(loop):
    """Set gradients whose strides differ from their parameters'."""

    def run(grads):
        for name, grad in grads.items():
            strided = torch.empty(*grad.shape, 2, dtype=grad.dtype)[..., 0] if grad.dim() else grad
            loop.model.get_parameter(name).grad = strided.copy_(grad)

    loop.run = run
    for step in range(3):
        loop.backward(step)
        loop.step()


def memory_of_parameters_replaced(loop):
    for step in range(4):
        if step == 2:
            loop.optimizer.wait()  # the weights of the step before may still be in flight
            for p in loop.model.parameters():
                p.data = p.data.clone()
        loop.backward(step)
        loop.step()


def state_reloaded(loop):
    for step in range(4):
        if step == 2:
            loop.optimizer.load_state_dict(loop.optimizer.state_dict())
        loop.backward(step)
        loop.step()


def clipped_before_and_after_the_last_backward(loop):
    for step in range(3):
        loop.backward(7 * step)
        loop.optimizer.clip_grad_norm_(0.25)
        loop.backward(7 * step + 1)
        loop.optimizer.clip_grad_norm_(0.5)
        loop.step()


def clipped_again_after_a_backward_on_a_rank(loop):
    for step in range(3):
        loop.backward(7 * step)
        loop.optimizer.clip_grad_norm_(0.25)
        loop.backward(7 * step + 1, lambda rank: ALL if rank == 0 else frozenset())
        loop.optimizer.clip_grad_norm_(0.5)
        loop.step()


def closure(loop):
    for step in range(3):
        loop.optimizer.zero_grad()
        loop.optimizer.step(lambda step=step: loop.backward(step))


SCENARIOS = [
    unused_on_some_ranks,
    unused_on_changing_ranks,
    unused_everywhere_for_a_while,
    a_rank_without_any_gradient,
    several_backwards,
    several_backwards_with_other_uses,
    no_sync,
    frozen_and_unfrozen,
    kept_gradients,
    discarded_gradients,
    gradients_set_by_hand,
    gradients_that_are_views,
    memory_of_parameters_replaced,
    state_reloaded,
    clipped_before_and_after_the_last_backward,
    clipped_again_after_a_backward_on_a_rank,
    closure,
]


@contextlib.contextmanager
def named(name):
    """Name the case in which the body raises."""
    try:
        yield
    except Exception as error:
        raise AssertionError(name) from error


def run_loops(scenarios, new_loop, run=lambda scenario, loop: scenario(loop)):
    """Run each scenario on a new loop. Return the weights and states by the scenario's name."""
    results = {}
    for scenario in scenarios:
        with named(scenario.__name__):
            loop = new_loop()
            run(scenario, loop)
            results[scenario.__name__] = collect(loop.model, loop.optimizer)
    return results


def assert_loops_match(found, expected):
    """Compare results of :func:`run_loops` on several ranks with those of a single process."""
    for of_rank in found:
        assert of_rank.keys() == expected.keys()
        for name, weights in expected.items():
            with named(name):
                assert_same_bits(of_rank[name], weights)
