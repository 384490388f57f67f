"""ZeRO stage 2: gradients are averaged during the backward pass, and a rank keeps its rows of them.

From the backward pass to the step::

    gradient ready -> its place in a bucket -> bucket complete -> sent -> the mean of this rank's rows      (while backward goes on)
    reduce(): the ranks agree which buckets are left and who has gradients -> the rest is sent -> all are waited for

Buckets are sent in one order on every rank, whatever order the gradients come in: a bucket waits for the one before. A rank on which
a parameter is unused thus falls behind, and catches up in reduce(), where it learns how often each bucket was sent elsewhere. Until the
ranks have agreed there, no rank waits without end for another.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .bucket import Bucket, WholeBucket, split_by_size
from .checks import wrapped_by_ddp
from .param import Rows
from .reduce_scatter import MeanOnItsWay
from .stage1 import Stage, grad_problem, param_form

if TYPE_CHECKING:
    from .config import ZeRO

PATIENCE = 1.0  # seconds that a backward pass waits for a bucket to leave before it lets more of them pile up
PILED_UP = (
    "gradients have come on top of those that the step before has taken; ZeRO stage 2 holds gradients itself, where model.zero_grad() "
    "does not reach them, so call optimizer.zero_grad() or step(zero_grad=True) after each step, on every rank"
)
_taker: Any = (
    WeakIdKeyDictionary()
)  # parameter -> weak reference to the one Stage2, the newest, that takes its gradients

_takeovers = 0  # how often that has changed


def _take_over(param: Tensor, taker: weakref.ref[Stage2]) -> None:
    global _takeovers
    _taker[param] = taker
    _takeovers += 1


class Stage2(Stage):
    """On the plain module."""

    def __init__(self, policy: ZeRO) -> None:
        super().__init__(policy)
        self._hooked: set[Tensor] = set()
        self._syncs = True
        self._checked_ddp = False
        self._seen_takeovers = 0
        self._is_patient = (
            True  # whether the other ranks can be expected to keep up during the backward pass
        )
        self._is_trusting = (
            False  # whether they have, in the last step: the device may then wait for them
        )
        self._buckets: list[Bucket] = []
        self._active = 0  # the first buckets: of parameters that had gradients lately; the others go only when asked for
        self._next = 0  # the bucket to be sent next
        self._bucket_of: dict[Rows, Bucket] = {}
        self._in_flight: list[tuple[Bucket, MeanOnItsWay]] = []
        self._accumulated: dict[
            Tensor, Tensor
        ] = {}  # whole gradients of this rank, float32, where asked for
        self._reduced: dict[Tensor, Tensor] = {}  # the mean over ranks, of this rank's rows
        self._has_grad: set[Rows] = set()  # on this rank, since clear_grads()
        self._stepped = False  # whether a step has taken the gradients that are held
        self._piled_up = False  # whether others have come on top of them since
        self._arrival: (
            dict[Rows, None] | None
        ) = {}  # order in which gradients first came; None once the ranks have agreed on one
        self._agreed_arrival = False
        self._order: list[Rows] = []
        self._last_with_grad: list[Rows] = []
        self._built_for: list[Rows] = []

    def add_params(self, params: list[Tensor], names: list[str]) -> None:
        if any(self._agreement.maximum([self._is_busy()])):
            self.reduce_grads()  # what is under way goes by the old buckets
        super().add_params(params, names)
        self._ready = False
        self._hook_all()
        self._order = list(
            reversed(self._rows.values())
        )  # backward passes go roughly against the order of construction
        self._arrival = {}
        self._build(self._order)

    # ------------------------------------------------------------------------------------------------ during the backward pass

    def _hook_all(self) -> None:
        """Be called when a gradient is ready; parameters that were frozen so far may no longer be."""
        me = weakref.ref(self)

        def arrived(param: Tensor) -> None:
            stage = me()
            taker = _taker.get(param)
            if stage is not None and (taker is me or taker is None or taker() is None):
                stage._arrived(param)

        for param in self._rows:
            if param.requires_grad and param not in self._hooked:
                self._hooked.add(param)
                _take_over(param, me)
                weakref.finalize(self, param.register_post_accumulate_grad_hook(arrived).remove)

    @torch.no_grad()
    def _arrived(self, param: Tensor) -> None:
        rows, grad = self._rows[param], param.grad
        self._ready = False
        if grad is None or grad_problem(grad) or param_form(param) != rows.form:
            return  # reduce() tells all ranks
        if self._syncs:
            if self._arrival is not None:
                self._arrival.setdefault(rows)
            self._take(rows)
            self._send_complete()
        elif self._policy.accumulate_dtype is not None:
            total = self._accumulated.get(param)
            self._accumulated[param] = (
                grad.to(torch.float32, copy=True) if total is None else total.add_(grad)
            )
            param.grad = None

    def _take(self, rows: Rows) -> None:
        """Move a parameter's gradient to its bucket."""
        param, grad = rows.param, rows.param.grad
        total = self._accumulated.pop(param, None)
        if total is not None and grad is not None:
            total.add_(grad)
        whole = grad if total is None else total
        assert whole is not None
        self._has_grad.add(rows)
        if rows in self._bucket_of:
            self._bucket_of[rows].add(rows, whole)
        param.grad = None

    def _send_complete(self) -> None:
        while self._active and self._buckets[self._next].is_complete:
            self._send(self._buckets[self._next], PATIENCE)
            self._next = (self._next + 1) % self._active

    def _send(self, bucket: Bucket, patience: float | None = None) -> None:
        """Send a bucket when no more than ``max_in_flight`` are under way, or when ``patience`` seconds are over."""
        under_way = [mean for _, mean in self._in_flight if not mean.is_settled]
        if len(under_way) >= self._policy.max_in_flight and (patience is None or self._is_patient):
            self._is_patient = under_way[0].settle(patience, self._is_trusting)
        while self._in_flight and self._in_flight[0][1].is_done:
            self._receive()
        self._in_flight.append((bucket, bucket.send()))

    def _receive(self) -> None:
        """Take the rows of the oldest bucket on its way."""
        bucket, mean = self._in_flight.pop(0)
        for rows, part in bucket.own_rows(mean.wait()).items():
            earlier = self._reduced.get(rows.param)
            self._reduced[rows.param] = part if earlier is None else earlier.add_(part)

    @contextmanager
    def _without_sync(self) -> Iterator[None]:
        before, self._syncs = self._syncs, False
        try:
            yield
        finally:
            self._syncs = before

    def no_sync(self) -> AbstractContextManager[None]:
        return self._without_sync()

    # -------------------------------------------------------------------------------------------------------------- in a step

    def reduce_grads(self) -> None:
        if not self._ready or any(
            param.grad is not None for param in self._rows
        ):  # set by hand after clip_grad_norm_
            self._reduce(discarding=False)

    @torch.no_grad()
    def _reduce(self, discarding: bool) -> None:
        """``discarding``: for :meth:`clear_grads`, not for a step."""
        problem = self._problem()
        if problem is None:
            for rows in self._order:
                if (
                    rows.param.grad is not None or rows.param in self._accumulated
                ):  # set by hand, unfrozen lately, or of no_sync()
                    self._take(rows)
                    self._send_complete()
        all_rows = list(self._rows.values())
        own = [bucket.sent + bucket.is_pending for bucket in self._buckets]
        has = [rows in self._has_grad for rows in all_rows]
        values = [
            *own,
            *has,
            *[not x for x in has],
            bool(self._arrival),
            self._stepped,
            discarding,
            not discarding,
        ]
        agreed, problems = self._agreement.maximum_and_problems(values, problem)
        times, somewhere, missing = (
            agreed[: len(own)],
            agreed[len(own) :][: len(has)],
            agreed[len(own) + len(has) : -4],
        )
        any_arrival, any_stepped, any_discards, any_keeps = agreed[-4:]
        self._piled_up |= bool(any_stepped and any(times))
        self._send_rest(times[: self._active], self._buckets[: self._active])
        self._send_rest(times[self._active :], self._buckets[self._active :])
        while self._in_flight:
            self._receive()
        for bucket in self._buckets:
            bucket.sent = 0
        self._next = 0
        if (
            problems is not None
        ):  # raised when all that was under way has arrived, so that the ranks can still talk
            raise RuntimeError(problems)
        if self._piled_up and not any_discards:
            raise RuntimeError(PILED_UP)
        if any_discards and any_keeps:
            raise RuntimeError(
                "some ranks have discarded gradients by zero_grad() between a backward pass and its step, and others have not; every rank "
                "must call it there, and must have taken part in the backward pass"
            )
        self._with_grad = [rows for rows, some in zip(all_rows, somewhere, strict=True) if some]
        self._is_patient = self._is_trusting = not any(map(operator.and_, somewhere, missing))
        self._agreed_arrival = bool(any_arrival)
        self._reduced = {rows.param: self._reduced_rows(rows) for rows in self._with_grad}
        self._ready = True

    def _send_rest(self, times: list[int], buckets: list[Bucket]) -> None:
        """Send each bucket until it has been sent as often as on the rank that did most, in the order that hooks keep to."""
        for turn in range(max(times, default=0)):
            for bucket, wanted in zip(buckets, times, strict=True):
                if bucket.sent <= turn < wanted:
                    self._send(bucket)

    def _reduced_rows(self, rows: Rows) -> Tensor:
        if rows.param not in self._reduced:
            assert rows.param.numel() == 0
            return rows.own(torch.zeros_like(rows.param))
        return self._reduced[rows.param]

    def _problem(self) -> str | None:
        if not self._checked_ddp:
            self._checked_ddp = True  # a walk over all objects of the process: once is enough
            if wrapped_by_ddp(self._rows):
                return (
                    "the model is wrapped by DistributedDataParallel, which would reduce the gradients too; ZeRO stage 2 goes on the plain "
                    "module, or use ZeRO(stage=1) beside DDP"
                )
        if self._seen_takeovers != _takeovers:
            if rows := self._taken_over():
                return (
                    f"the gradients of parameter {rows.name} go to a ZeRO stage 2 optimizer that was built later; delete that one, or use "
                    "that one alone"
                )
            self._seen_takeovers = _takeovers
        return super()._problem()

    def _taken_over(self) -> Rows | None:
        """The first parameter whose gradients another optimizer takes."""
        takers = ((rows, _taker[param]()) for param, rows in self._rows.items() if param in _taker)
        return next((rows for rows, taker in takers if taker not in (None, self)), None)

    def grads(self, params: list[Tensor]) -> list[Any]:
        return [self._reduced.get(param) for param in params]

    def local_grads(self, params: list[Tensor]) -> list[Tensor]:
        return [self._reduced[param] for param in params]

    @torch.no_grad()
    def all_gather_params(self) -> None:
        super().all_gather_params()
        self._stepped = bool(self._with_grad)  # a step without any leaves nothing to pile up on
        self._hook_all()
        self._adapt()

    def clear_grads(self) -> None:
        self._accumulated.clear()
        if self._is_busy():
            self._reduce(discarding=True)  # other ranks may have sent what this one is to forget
        self._reduced.clear()
        self._has_grad.clear()
        self._ready = self._stepped = self._piled_up = False

    def _is_busy(self) -> bool:
        """Whether gradients of this rank are on their way or wait for others."""
        return bool(self._in_flight) or any(
            bucket.sent or bucket.is_pending for bucket in self._buckets
        )

    # ---------------------------------------------------------------------------------------------------------------- buckets

    def _adapt(self) -> None:
        """Fit the buckets to the order in which gradients come on the first rank, and to who has any, once that has lasted two steps."""
        if self._agreed_arrival and self._arrival is not None:
            numbered = list(self._rows.values())
            number = {rows: index for index, rows in enumerate(numbered)}
            arrived = list(self._arrival)
            arrived += [rows for rows in self._order if rows not in self._arrival]
            self._order = [
                numbered[index]
                for index in self._agreement.of_first([number[rows] for rows in arrived])
            ]
            self._arrival = None
            self._build(self._with_grad)
        elif self._with_grad == self._last_with_grad != self._built_for:
            self._build(self._with_grad)
        self._last_with_grad = self._with_grad

    def _build(self, active: list[Rows]) -> None:
        """Distribute the parameters over buckets, those in ``active`` over the first ones; 0-dim ones are not for the backward pass."""
        assert not self._in_flight and not any(bucket.is_pending for bucket in self._buckets)
        size = self._policy.bucket_bytes
        chosen = {rows for rows in active if not rows.is_whole}
        first = split_by_size(
            [rows for rows in self._order if rows in chosen and rows.param.numel()], size
        )
        rest = split_by_size(
            [rows for rows in self._order if rows not in chosen and rows.param.numel()], size
        )
        self._buckets = [self._new_bucket(members) for members in (*first, *rest)]
        self._bucket_of = {rows: bucket for bucket in self._buckets for rows in bucket.members}
        self._active, self._next = len(first), 0
        self._built_for = active

    def _new_bucket(self, members: list[Rows]) -> Bucket:
        dtype = self._policy.reduce_dtype or members[0].param.dtype
        kind = WholeBucket if members[0].is_whole else Bucket
        return kind(members, self._mesh, dtype, self._policy.accumulate_dtype or dtype)
