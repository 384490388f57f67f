"""ZeRO stage 2: gradients of a plain module are reduce-scattered during the backward pass.

[Note: Order of reductions across ranks]
A post-accumulate hook adds each gradient to its bucket. All ranks must launch the collectives of a
process group in the same order. But gradients may become ready in different orders, and a parameter
may be unused on some ranks. Hence three rules:

* Buckets launch in a fixed order, first to last, and start over if there are several backward
  passes per step. A complete bucket waits until the one before it has launched. So a rank on which
  a parameter is unused falls behind.
* ``reduce_grads()``, which every rank calls, exchanges the number of launches of each bucket. A
  rank that is behind then launches the missing ones (:meth:`Stage2._flush`), with zeros for missing
  gradients.
* Before that consensus, no rank blocks indefinitely on another. If ``max_in_flight`` reductions are
  in flight, the backward pass waits ``BACKPRESSURE_TIMEOUT_S`` for the oldest, then launches more
  anyway. A device has no timeout, so it may block only if all ranks had gradients of the same
  parameters in the last step (:class:`Backpressure`).

The same exchange tells which parameters have a gradient on any rank, and detects ranks that
disagree on ``zero_grad()``. A rank with an error still launches the reductions that other ranks
wait for. Then all ranks raise the error together.

Once a step repeats the one before, each rank compares its report with its previous one. If no
report has changed, the ranks know the result of a full exchange, so they exchange only one flag
each: on gloo with the last bucket (see [Note: Closing bucket]), else as eight bytes.

With ``static_graph`` ranks exchange not even the flag. A rank whose report is unchanged assumes the
same of the others. If its report has changed, it raises an error on this rank alone, before it
launches a bucket that the others do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ...profiling import profiler_range
from ..base import Caller
from ..grad_hooks import GradHooks
from .bucket import Bucket
from .bucket_order import BucketOrder
from .calls import CALLERS, Call, find_difference, timeout_errors
from .grad_consensus import GradConsensus
from .grad_report import GradReport, GradState, Keeps
from .param import ZeroParam
from .param_checks import changed_spec_problem, grad_problem, is_wrapped_by_ddp
from .reduce_scatter import PendingReduce
from .stage import Stage
from .static_graph import STATIC_GRAPH_ADVICE, promise_problem

if TYPE_CHECKING:
    from .config import ZeRO

BACKPRESSURE_TIMEOUT_S = 1.0
STALE_GRADS_ERROR = (
    "new gradients were accumulated onto gradients that the previous step() already used; ZeRO "
    "stage 2 holds gradients itself, where model.zero_grad() does not reach them, so call "
    "optimizer.zero_grad() or step(zero_grad=True) after each step, on every rank"
)
CLEARED_ON_SOME_RANKS_ERROR = (
    "some ranks have called optimizer.zero_grad() since the last step, and others have not; call "
    "it after each step, on every rank"
)

_hooks = GradHooks()  # if several stages have a parameter, only the newest takes its gradients


class Backpressure(Enum):
    """The way a backward pass waits when ``max_in_flight`` reductions are in flight.

    - ``HOST``: the calling thread waits, with a timeout. The initial state.
    - ``DEVICE``: NCCL blocks the device, without a timeout; gloo waits as in ``HOST``. Set after a
      step in which all ranks had gradients of the same parameters.
    - ``OFF``: nothing waits. Set after any other step, and after a timeout.
    """

    HOST = auto()
    DEVICE = auto()
    OFF = auto()


class Stage2(Stage):
    """The stage that shards states and gradients. See [Note: Order of reductions across ranks]."""

    def __init__(self, policy: ZeRO) -> None:
        super().__init__(policy)
        # - State
        self._grad_state = GradState.UNUSED
        self._backpressure = Backpressure.HOST
        self._require_grad_sync = True  # False inside no_sync()
        self._has_grad: set[ZeroParam] = set()  # on this rank, since clear_grads()
        self._accumulated_grads: dict[Tensor, Tensor] = {}  # unsharded float32, from no_sync()
        self._sharded_grads: dict[Tensor, Tensor] = {}  # local shards of the means over ranks
        self._updated: set[Tensor] = set()  # in this backward pass; see :mod:`.in_backward`

        # - Hooks
        self._hooked: Any = WeakIdKeyDictionary()
        self._seen_owner_changes = 0
        self._checked_ddp = False

        # - Buckets
        self._order = BucketOrder(policy)
        self._consensus = GradConsensus(self._collectives, policy.static_graph)
        self._in_flight: list[tuple[Bucket, PendingReduce]] = []
        self._held: Bucket | None = None  # closing bucket, complete but left to reduce_grads()

    def add_params(self, params: list[Tensor], names: list[str]) -> None:
        if self._zero_params:  # reductions in flight belong to the old buckets
            self._finish_reduction(Caller.ADD_PARAM_GROUP)
        super().add_params(params, names)
        self._is_reduced = False
        self._register_hooks()
        self._order.reset(self._zero_params.values())
        self._consensus.reset()

    # ------------------------------------------------------------------ during the backward pass

    def _register_hooks(self) -> None:
        """Register hooks on trainable parameters without hooks, such as newly unfrozen ones."""
        _hooks.add(self, self._zero_params, self._hooked, type(self)._on_grad_ready)

    @torch.no_grad()
    def _on_grad_ready(self, param: Tensor) -> None:
        zero_param, grad = self._zero_params[param], param.grad
        self._is_reduced = False
        if grad is None or grad_problem(grad) or changed_spec_problem(zero_param):
            return  # reduce_grads() raises on all ranks
        if self._require_grad_sync:
            self._order.record(zero_param)
            self._add_to_bucket(zero_param)
            self._launch_complete()
        elif self._policy.accumulate_dtype is not None:
            total = self._accumulated_grads.get(param)
            self._accumulated_grads[param] = (
                grad.to(torch.float32, copy=True) if total is None else total.add_(grad)
            )
            param.grad = None

    def _add_to_bucket(self, zero_param: ZeroParam) -> None:
        """Move a parameter's gradient, plus what no_sync() has accumulated, to its bucket."""
        param, grad = zero_param.param, zero_param.param.grad
        total = self._accumulated_grads.pop(param, None)
        if total is not None and grad is not None:
            total.add_(grad)
        unsharded_grad = grad if total is None else total
        assert unsharded_grad is not None
        self._has_grad.add(zero_param)
        if bucket := self._order.bucket_of.get(zero_param):  # an empty parameter has none
            if self._held is not None and self._order.is_active(bucket):
                self._launch_next(self._held)  # there are more backward passes than expected
            bucket.add_grad(zero_param, unsharded_grad)
        param.grad = None

    def _launch_complete(self) -> None:
        """Launch active buckets in order, up to the first incomplete one."""
        while complete := self._order.next_complete():
            index, bucket = complete
            if expected := self._consensus.expected:
                remaining = expected.agreed.launches[index] - bucket.launches
                if self._policy.static_graph and remaining <= 0:
                    return  # the other ranks do not launch it again
                if remaining == 1 and bucket is self._consensus.flag_carrier(self._order):
                    self._held = bucket
                    return
            self._launch_next(bucket)

    def _launch_next(self, bucket: Bucket) -> None:
        self._held = None
        self._apply_backpressure()
        self._launch(bucket)
        self._order.advance()

    def _apply_backpressure(self) -> None:
        """Wait for the oldest reduction if ``max_in_flight`` are in flight."""
        if self._backpressure is Backpressure.OFF:
            return
        if oldest := self._oldest_over_limit():
            device_may_block = self._backpressure is Backpressure.DEVICE
            if not oldest.finish_local(BACKPRESSURE_TIMEOUT_S, device_may_block):
                self._backpressure = Backpressure.OFF

    def _oldest_over_limit(self) -> PendingReduce | None:
        """Return the oldest unfinished reduction if there are ``max_in_flight``, else None."""
        unfinished = [pending for _, pending in self._in_flight if not pending.is_local_finished]
        return unfinished[0] if len(unfinished) >= self._policy.max_in_flight else None

    def _launch(self, bucket: Bucket, zeros: bool = False) -> None:
        while self._in_flight and self._in_flight[0][1].is_completed:
            self._wait_oldest()
        with profiler_range("ZeRO::reduce_scatter"):
            pending = bucket.launch_zeros() if zeros else bucket.launch_reduce()
        self._in_flight.append((bucket, pending))

    def _wait_oldest(self) -> None:
        """Wait for the oldest reduction, and accumulate its result."""
        bucket, pending = self._in_flight.pop(0)
        for zero_param, grad in bucket.local_shards(pending.wait()):
            held = self._sharded_grads.get(zero_param.param)
            self._sharded_grads[zero_param.param] = grad if held is None else held.add_(grad)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        before, self._require_grad_sync = self._require_grad_sync, False
        try:
            yield
        finally:
            self._require_grad_sync = before

    # ---------------------------------------------------------------------------------- in a step

    def reduce_grads(self, caller: Caller = Caller.STEP) -> None:
        self._all_gather.wait()  # the update changes weights that may still be in flight
        # A gradient that was set by hand after clip_grad_norm_ has run no hook.
        is_late = not self._is_reduced or any(p.grad is not None for p in self._zero_params)
        # A step() after clip_grad_norm_() on every rank, the usual case, exchanges nothing.
        if is_late or not (caller is Caller.STEP or self._is_promised):
            self._finish_reduction(caller)

    @property
    def _is_promised(self) -> bool:
        """Return True once ranks rely on the promise of ``static_graph`` and exchange nothing."""
        return self._policy.static_graph and self._consensus.expected is not None

    @torch.no_grad()
    def _finish_reduction(self, caller: Caller) -> None:
        """Agree on the gradients, launch missing reductions, and wait for all. Collective."""
        self._is_reduced = False
        is_for_step = caller not in (Caller.ZERO_GRAD, Caller.ADD_PARAM_GROUP)
        problem = None
        if is_for_step or self._is_busy():
            problem = self._find_problem()
            if problem is None:
                self._add_unhooked_grads()
        call = Call(caller, self._is_agreed)
        report = self._report(call)
        expected = self._consensus.expected
        if self._is_promised and expected is not None and is_for_step:
            self._check_promise(expected.own, report, problem)
            agreed, problems, closing_reduce = expected.agreed, None, None
        else:
            with timeout_errors(call, self._collectives.ranks):
                agreed, problems, closing_reduce = self._consensus.agree(
                    report, problem, self._order
                )
        buckets, active = self._order.buckets, self._order.num_active
        launches = list(agreed.launches)
        if closing_reduce is not None:
            launches[active - 1] -= 1
        self._flush(buckets[:active], launches[:active])
        if closing_reduce is not None:
            self._in_flight.append((buckets[active - 1], closing_reduce))
        # On a 2-D mesh, start the all-reduces of all active buckets before any other all-reduce, so
        # that their order is the same on all ranks.
        while self._in_flight:
            self._wait_oldest()
        self._flush(buckets[active:], launches[active:])
        while self._in_flight:
            self._wait_oldest()
        self._held = None
        self._order.restart()
        # Raise only after all reductions, so that all ranks can continue.
        if agreed.is_stale:
            self._grad_state = GradState.STALE
        error = self._find_error(agreed, problems)
        if error is not None:
            # Clearing used gradients needs no agreement; see :class:`GradState`.
            is_unused = agreed.grad_state is GradState.UNUSED
            self._is_agreed = is_unused and not self.STEPS_IN_BACKWARD
            raise RuntimeError(error)
        if caller is not Caller.ADD_PARAM_GROUP:
            self._is_agreed = self._is_reduced = is_for_step
        if is_for_step or any(agreed.launches):
            self._apply(agreed)

    def _find_error(self, agreed: GradReport, problems: str | None) -> str | None:
        """Return the error that every rank raises after the consensus, or None."""
        if problems is not None:
            return problems
        if difference := find_difference(agreed.call):
            return difference
        if not any(agreed.launches) and agreed.call[CALLERS.index(Caller.ADD_PARAM_GROUP)]:
            return None
        if self._grad_state is GradState.STALE and not agreed.discards:
            return STALE_GRADS_ERROR
        return CLEARED_ON_SOME_RANKS_ERROR if agreed.is_cleared_on_some_ranks else None

    def _check_promise(self, expected: GradReport, report: GradReport, problem: str | None) -> None:
        """Raise RuntimeError on this rank if its report breaks the promise of ``static_graph``."""
        if report.is_stale:
            self._grad_state = GradState.STALE
            raise RuntimeError(STALE_GRADS_ERROR)
        report = report._replace(call=expected.call)  # not every step has to clip
        problem = problem or promise_problem(
            expected, report, self._zero_params.values(), self._order.buckets
        )
        if problem is not None:
            raise RuntimeError(f"{problem}; {STATIC_GRAPH_ADVICE}")

    def _add_unhooked_grads(self) -> None:
        """Add gradients without a hook call: set by hand, newly unfrozen, or of no_sync()."""
        for zero_param in self._order.params:
            if zero_param.param.grad is not None or zero_param.param in self._accumulated_grads:
                self._add_to_bucket(zero_param)
                self._launch_complete()

    def _report(self, call: Call) -> GradReport:
        has_grad = [each in self._has_grad for each in self._zero_params.values()]
        keeps = Keeps.UNUSED if self._grad_state is GradState.UNUSED else Keeps.USED_OR_STALE
        return GradReport(
            launches=[bucket.launches + bucket.is_pending for bucket in self._order.buckets],
            has_grad=has_grad,
            lacks_grad=[not has for has in has_grad],
            call=call.flatten(),
            has_recorded_order=self._order.has_recorded,
            keeps=Keeps.NONE if call.caller is Caller.ZERO_GRAD else keeps,
            grad_state=self._grad_state,
        )

    def _apply(self, agreed: GradReport) -> None:
        """Use the agreed report for this step and for the next backward pass."""
        zero_params = self._zero_params.values()
        self._with_grad = [
            each for each, has in zip(zero_params, agreed.has_grad, strict=True) if has
        ]
        both = zip(agreed.has_grad, agreed.lacks_grad, strict=True)
        differ = any(some_have and some_lack for some_have, some_lack in both)
        self._backpressure = Backpressure.OFF if differ else Backpressure.DEVICE
        if agreed.has_recorded_order:
            self._order.agree_that_recorded()
        self._sharded_grads = {
            each.param: self._sharded_grad(each)
            for each in self._with_grad
            if each.param not in self._updated
        }

    def _flush(self, buckets: list[Bucket], launches: list[int]) -> None:
        """Launch buckets, in the order of the hooks, until their counts reach ``launches``.

        Each bucket sends its pending gradients in its next launch. The closing bucket sends them in
        its last launch unless it is held, as it does when a step repeats the one before.
        """
        for turn in range(max(launches, default=0)):
            for bucket, wanted in zip(buckets, launches, strict=True):
                if bucket.launches <= turn < wanted:
                    if oldest := self._oldest_over_limit():
                        oldest.finish_local()
                    sends_last = bucket is self._order.closing and bucket is not self._held
                    self._launch(bucket, zeros=sends_last and turn < wanted - 1)

    def _sharded_grad(self, zero_param: ZeroParam) -> Tensor:
        if zero_param.param not in self._sharded_grads:
            assert zero_param.param.numel() == 0
            return zero_param.local_shard(torch.zeros_like(zero_param.param))
        return self._sharded_grads[zero_param.param]

    def _find_problem(self) -> str | None:
        if not self._checked_ddp:
            self._checked_ddp = True  # walks over all objects of the process, so only once
            if is_wrapped_by_ddp(self._zero_params):
                return (
                    "the model is wrapped by DistributedDataParallel, which would reduce the "
                    "gradients too; use ZeRO stage 2 with the plain module, or ZeRO(stage=1) "
                    "with DDP"
                )
        if self._seen_owner_changes != _hooks.changes:
            if zero_param := self._find_claimed():
                return (
                    f"the gradients of parameter {zero_param.name} go to a ZeRO stage 2 optimizer "
                    "that was built later; delete that optimizer, or use only that one"
                )
            self._seen_owner_changes = _hooks.changes
        return super()._find_problem()

    def _find_claimed(self) -> ZeroParam | None:
        """Return the first parameter whose gradients another optimizer takes, or None."""
        for param, zero_param in self._zero_params.items():
            if _hooks.owner_of(param) not in (None, self):
                return zero_param
        return None

    def grads(self, params: list[Tensor]) -> list[Any]:
        return [self._sharded_grads.get(param) for param in params]

    def local_grads(self, params: list[Tensor]) -> list[Tensor]:
        return [self._sharded_grads[param] for param in params]

    @torch.no_grad()
    def all_gather_params(self) -> None:
        super().all_gather_params()
        self._grad_state = GradState.USED if self._with_grad else GradState.UNUSED
        self._register_hooks()
        assert not self._in_flight
        zero_params = list(self._zero_params.values())
        if self._order.rebuild(zero_params, self._with_grad, self._collectives):
            self._consensus.reset()
        if self._with_grad == self._order.built_for:
            self._consensus.expect_repetition()

    def clear_grads(self) -> None:
        self._accumulated_grads.clear()
        # Other ranks, too, may have launched reductions or hold reduced gradients.
        if self._is_busy() or (self._is_agreed and not self._is_promised):
            self._finish_reduction(Caller.ZERO_GRAD)
        self._sharded_grads.clear()
        self._has_grad.clear()
        self._is_reduced = self._is_agreed = False
        self._grad_state = GradState.UNUSED

    def _is_busy(self) -> bool:
        """Return whether this rank has launched reductions or holds pending gradients."""
        return bool(self._in_flight) or any(
            bucket.launches or bucket.is_pending for bucket in self._order.buckets
        )
