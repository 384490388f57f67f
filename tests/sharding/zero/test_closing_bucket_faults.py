"""Steady steps of several backward passes that use the closing bucket in some of them only."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from distributed import run_ranks

from sharded_bf16_adamw.sharding.zero.host_collectives import HostCollectives

from .cases import (
    Parameters,
    assert_same_bits,
    backpressure_timeout,
    collect,
    new_optimizer,
    rank_gradients,
    zero,
)

# A bucket each. "uneven" is the smallest one, so it closes.
ALL = frozenset({"even", "uneven", "large"})
OTHERS = ALL - {"uneven"}
NONE: frozenset[str] = frozenset()

# For each rank, the parameters that its backward passes use in every step.
STEADY = {
    "in the first pass": ([ALL, OTHERS], [ALL, OTHERS]),
    "in another pass on each rank": ([ALL, OTHERS], [OTHERS, ALL]),
    "in the first pass of a rank": ([ALL, OTHERS, OTHERS], [OTHERS, {"even"}, OTHERS]),
    "in the first two of three": ([ALL, ALL, OTHERS], [OTHERS, ALL, ALL]),
    "another one only once more": ([ALL, {"large"}], [ALL, NONE]),
}
# The same for one step between steady ones, in which each rank uses everything in a single pass.
ONE_MORE = {
    "on a rank": ([ALL, {"large"}], [ALL]),
    "on the other rank": ([ALL], [ALL, {"even"}]),
    "on both": ([ALL, {"large"}], [ALL, {"even"}]),
    "before and after": ([{"large"}, ALL, {"large"}], [ALL]),
}


class Training:
    """A model and its optimizer. Without ``sharding`` it takes the gradients of all ranks."""

    def __init__(self, ranks, sharding=None, **options):
        self.ranks, self.count = ranks, 0
        self.model = Parameters()
        for name in {name for name, _ in self.model.named_parameters()} - ALL:
            delattr(self.model, name)
        self.optimizer = new_optimizer(self.model, sharding, **options)

    def step(self, passes, own_ranks):
        """Take a step with the gradients of ``own_ranks`` in their passes."""
        for index in range(max(map(len, passes))):
            self.count += 7  # so that all sums are exact
            grads = {}
            for rank in own_ranks:
                used = passes[rank][index] if index < len(passes[rank]) else NONE
                for name, grad in rank_gradients(self.count, rank, self.ranks).items():
                    if name in used:
                        grads[name] = grads.get(name, 0) + grad / len(own_ranks)
            if grads:
                self.model(grads).backward()
        self.optimizer.step(zero_grad=True)

    def run(self, patterns, own_ranks):
        for passes in patterns:
            self.step(passes, own_ranks)
        return collect(self.model, self.optimizer)


@contextmanager
def bits_exchanged():
    """Record the exchanges of the flag alone."""
    calls, any_rank = [], HostCollectives.any_rank

    def recorded(self, condition):
        calls.append(condition)
        return any_rank(self, condition)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(HostCollectives, "any_rank", recorded)
        yield calls


def worker(rank, world, cases):
    results = {}
    for name, patterns in cases.items():
        training = Training(world, zero())
        with backpressure_timeout(0.05), bits_exchanged() as calls:
            try:
                results[name] = training.run(patterns, [rank])
            except Exception as error:
                raise AssertionError(name) from error
        results[name]["exchanges"] = torch.tensor(len(calls))
    return results


def check(cases):
    """Compare with a single process, and return how often each case exchanged the flag alone."""
    for found in run_ranks(2, worker, cases):
        exchanges = {name: int(result.pop("exchanges")) for name, result in found.items()}
        for name, patterns in cases.items():
            try:
                assert_same_bits(found[name], Training(2).run(patterns, range(2)))
            except AssertionError as error:
                raise AssertionError(name) from error
    return exchanges


def test_closing_bucket_that_the_last_backward_pass_does_not_use():
    cases = {}
    for name, passes in STEADY.items():
        one_rank_more = ([*passes[0], {"large"}], passes[1])
        cases[name] = [*[passes] * 5, one_rank_more, *[passes] * 5]
    exchanges = check(cases)
    # Other buckets launch after it, so that the flag travels alone.
    assert all(count > 2 for count in exchanges.values()), exchanges


def test_one_more_gradient_of_another_bucket():
    once = ([ALL], [ALL])
    exchanges = check(
        {name: [*[once] * 5, passes, *[once] * 4] for name, passes in ONE_MORE.items()}
    )
    assert not any(exchanges.values()), "the closing bucket carries the flag"
