"""ZeRO stage 2 that updates weights inside the backward pass, for ``step_in_backward=True``.

[Note: updates of ZeRO inside the backward pass]
Each bucket goes through these stages, in the order of buckets::

    it holds all of its gradients   -> launch the reduce-scatter, as stage 2 always does
    the reduce-scatter completes    -> update this rank's shards, free their gradients,
                                       launch the all-gather of the updated weights
    the all-gather completes        -> copy the weights into the parameters

Hooks start the next stage of buckets whose collective has completed. Like those of stage 2 they
never block indefinitely on another rank. ``step()``, which every rank calls, does the rest after
the consensus.

* **Final gradients.** A bucket may be updated in the backward pass only if its reduction contains
  all gradients of the step from all ranks. A rank launches a bucket in a hook if the bucket is
  complete, else in ``step()``. Either way it then holds all gradients of the backward pass. So if
  each rank launches each bucket once per step, each reduction is final. Backward passes in
  ``accumulate()`` launch buckets several times. Then all updates wait for ``step()``, unless
  ``static_graph`` promises the number of launches.
* **Weights.** Once the gradient of a parameter is final, autograd no longer needs the weight. So
  updated weights may be copied in before the backward pass has ended.
* **Order of collectives.** The order of all-gathers relative to reductions differs between ranks,
  so all-gathers have their own process group. But NCCL needs the same order across both groups on
  all ranks. With NCCL, hooks therefore do not test what has completed. They let the device wait,
  and update only in the mode ``Backpressure.DEVICE``.
* **Errors.** If the consensus finds an error after some rank has updated weights, every rank
  completes the all-gathers that any rank has launched, and raises. The user then loads a
  checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..base import Caller
from ..collectives import new_group_like
from . import reduce_scatter, stage2
from .all_gather import AllGather, PendingAllGather
from .bucket import Bucket
from .grad_report import GradReport, GradState
from .param import ZeroParam
from .reduce_scatter import PendingReduce
from .stage2 import Backpressure, Stage2

if TYPE_CHECKING:
    from .config import ZeRO

OPERATION = "all-gathering the updated weights"  # for messages
LOAD_ADVICE = (
    "some weights were updated in the backward pass and others not; on every rank call "
    "optimizer.abandon_step(), then load a checkpoint into model and optimizer"
)
REPEAT_ADVICE = "call optimizer.zero_grad() on every rank, and repeat the backward pass"
ABANDONED_ERROR = "another rank has dropped this step by abandon_step() or zero_grad()"
UNEVEN_ERROR = (
    "ranks ran different numbers of backward passes in this step, and some had already used their "
    "gradients; run the same number on every rank, all but the last inside optimizer.accumulate()"
)


class Updates(Protocol):
    """The updates of one optimizer inside the backward pass, as this strategy calls them."""

    @property
    def is_accumulating(self) -> bool:
        """Return True if the backward pass runs inside ``accumulate()``."""

    @property
    def has_accumulated(self) -> bool:
        """Return True if ``accumulate()`` was entered since the last step."""

    def on_grad_ready(self, param: Tensor) -> None:
        """Note that ``param.grad`` is final, unless accumulating. Raise for a second one."""

    def has_taken(self, param: Tensor) -> bool:
        """Return whether the parameter's final gradient has been ready since the last step."""

    def update(self, params: list[Tensor], grads: list[Tensor]) -> None:
        """Update this rank's shards; ``grads`` are their gradients."""

    def forget_plans(self) -> None:
        """Drop the step plans of earlier updates, because the buckets were rebuilt."""

    def reset(self) -> None:
        """Drop this step, which has updated nothing on any rank."""

    def fail(self) -> None:
        """Refuse further steps until the user abandons this one: some weights are old, some new."""


class Stage2InBackward(Stage2):
    """Stage 2 that updates weights inside the backward pass.

    See [Note: updates of ZeRO inside the backward pass].
    """

    STEPS_IN_BACKWARD = True
    updates: Updates  # set right after construction

    def __init__(self, policy: ZeRO) -> None:
        super().__init__(policy)
        self._all_gather = self._gather = GatherInBackward(policy)
        self._final: dict[Bucket, PendingReduce] = {}  # reductions that contain all gradients
        self._is_in_hook = False
        self._is_abandoning = False
        group = policy.mesh.get_group(policy.mesh.ndim - 1)
        self._is_gloo = reduce_scatter.is_gloo(group, torch.device(policy.mesh.device_type))

    # ------------------------------------------------------------------ during the backward pass

    @torch.no_grad()
    def _on_grad_ready(self, param: Tensor) -> None:
        if self._require_grad_sync:
            self.updates.on_grad_ready(param)
        self._is_in_hook = True
        try:
            super()._on_grad_ready(param)
            if self._is_gloo:
                while self._in_flight and self._in_flight[0][1].finish(0.0):
                    self._wait_oldest()
                self._gather.advance()
        finally:
            self._is_in_hook = False

    def _launch(self, bucket: Bucket, zeros: bool = False) -> None:
        is_final = self._is_final(bucket)
        super()._launch(bucket, zeros)
        if is_final:
            self._final[bucket] = self._in_flight[-1][1]

    def _is_final(self, bucket: Bucket) -> bool:
        """Return whether the next reduction of the bucket contains all gradients of the step."""
        may_update = self._is_gloo or self._backpressure is Backpressure.DEVICE
        if not (self._is_in_hook and may_update) or self.updates.is_accumulating:
            return False
        if self._promised is not None:
            expected_launches = self._promised.launches[self._order.buckets.index(bucket)]
        else:  # 0: no launch is known to be the last
            expected_launches = 0 if self.updates.has_accumulated else 1
        # A parameter that is frozen on this rank may have a gradient on another one.
        return bucket.launches + 1 == expected_launches and bucket.has_all_grads

    @property
    def _promised(self) -> GradReport | None:
        """Return the agreed report that ``static_graph`` promises for this step, or None."""
        expected = self._consensus.expected
        return expected.agreed if self._policy.static_graph and expected is not None else None

    def _apply_backpressure(self) -> None:
        """Complete the oldest reductions until fewer than ``max_in_flight`` are in flight."""
        if self._backpressure is Backpressure.OFF:
            return
        device_may_block = self._backpressure is Backpressure.DEVICE
        while len(self._in_flight) >= self._policy.max_in_flight:
            if not self._in_flight[0][1].finish(stage2.BACKPRESSURE_TIMEOUT_S, device_may_block):
                self._backpressure = Backpressure.OFF
                return
            self._wait_oldest()

    def _wait_oldest(self) -> None:
        bucket, pending = self._in_flight[0]
        super()._wait_oldest()
        is_final = self._final.get(bucket) is pending
        if is_final:
            del self._final[bucket]  # else it would keep the reduced gradients alive
        if self._is_in_hook and is_final:
            params = [each.param for each in bucket.zero_params]
            grads = [self._sharded_grads.pop(param) for param in params]
            self._updated.update(params)  # even if the update fails
            self.updates.update(params, grads)
            if self._order.buckets[self._gather.num_added] is bucket:  # else step() gathers it
                self._gather.add(bucket.zero_params)
                self._gather.advance(device_may_block=not self._is_gloo)

    # ---------------------------------------------------------------------------------- in a step

    def _finish_reduction(self, caller: Caller) -> None:
        try:
            super()._finish_reduction(caller)
        except BaseException:
            if self._updated:
                self.updates.fail()
            raise

    def _find_problem(self) -> str | None:
        if problem := super()._find_problem():
            return problem
        for param, zero_param in self._zero_params.items():
            if param.grad is not None and self.updates.has_taken(param):
                return (
                    f"parameter {zero_param.name} had its gradient used in the backward pass and "
                    "has another one in .grad; accumulate gradients before the last backward pass "
                    "of a step"
                )
        return None

    def _find_error(self, agreed: GradReport, problems: str | None) -> str | None:
        error = super()._find_error(agreed, problems)
        is_uneven = self._promised is None and max(agreed.launches, default=0) > 1
        if error is None and not agreed.discards and is_uneven:
            # Some rank has run several backward passes, so no rank may have updated anything yet.
            if any(self._collectives.all_reduce_max([bool(self._updated)])):
                error = UNEVEN_ERROR
        elif agreed.discards and error is not None and problems is None:
            error = ABANDONED_ERROR
        if error is None and not agreed.discards:
            return None
        num_launched, any_updated = self._collectives.all_reduce_max(
            [self._gather.num_launched, bool(self._updated)]
        )
        self._gather.launch_all(self._order.buckets[:num_launched])
        if self._is_abandoning or error is None:
            return None
        if any_updated:
            self.updates.fail()
            return f"{error}; {LOAD_ADVICE}"
        if hasattr(self, "updates"):  # else the constructor of the optimizer adds a group
            self.updates.reset()
        # On every rank, also on one whose zero_grad() call has just raised.
        self._sharded_grads.clear()
        self._has_grad.clear()
        self._reset()
        return f"{error}; {REPEAT_ADVICE}"

    def take_grads(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Yield the parameters that the backward pass has not updated, and their gradient shards.

        They come bucket by bucket, as in the backward pass.
        """
        held, self._sharded_grads = self._sharded_grads, {}
        for bucket in self._order.buckets:
            if params := [each.param for each in bucket.zero_params if each.param in held]:
                yield params, [held.pop(param) for param in params]
        if held:  # empty parameters have no bucket
            yield list(held), list(held.values())

    def grads(self, params: list[Tensor]) -> list[Any]:
        return [None] * len(params)  # see take_grads()

    def all_gather_params(self) -> None:
        buckets = self._gather.buckets = self._order.buckets
        super().all_gather_params()
        if self._order.buckets is not buckets:
            self.updates.forget_plans()
        self._grad_state = GradState.UNUSED
        self._has_grad.clear()
        self._reset()

    def clear_grads(self) -> None:
        super().clear_grads()
        self._reset()

    def abandon(self, is_agreed: bool) -> None:
        """Drop all gradients, and complete and discard the collectives in flight.

        Args:
            is_agreed: whether every rank knows that this step has failed and nothing is in flight.
                Otherwise this call is collective: every rank calls it, or raises in its step.
        """
        for param in self._zero_params:
            param.grad = None
        self._accumulated_grads.clear()
        self._is_abandoning = True
        try:
            if not is_agreed:
                self._finish_reduction(Caller.ZERO_GRAD)
            self.clear_grads()
        finally:
            self._is_abandoning = False

    def _reset(self) -> None:
        self._final.clear()
        self._updated.clear()
        self._gather.reset()


class GatherInBackward(AllGather):
    """All-gathers that a backward pass launches bucket by bucket; :meth:`start` launches the rest.

    Attributes:
        buckets: the buckets of :class:`.BucketOrder`; set them before :meth:`start`.
        num_added: number of buckets added since the last step; they are added in order.
        num_launched: number of buckets launched since the last step.
    """

    def __init__(self, policy: ZeRO) -> None:
        super().__init__(policy)
        device = torch.device(policy.mesh.device_type)
        self._group = new_group_like(self._group, device)
        self.buckets: list[Bucket] = []
        self._waiting: list[list[ZeroParam]] = []
        self._in_flight: list[PendingAllGather] = []
        self.reset()

    def add(self, zero_params: list[ZeroParam]) -> None:
        """Add the next bucket, all of whose parameters were updated."""
        self.num_added += 1
        if self._ranks > 1:
            self._waiting.append(zero_params)

    def advance(self, device_may_block: bool = False) -> None:
        """Copy in weights that have arrived, and launch buckets while ``max_in_flight`` allows.

        Args:
            device_may_block: launch all added buckets now; if ``max_in_flight`` are in flight, the
                device waits for the oldest.
        """
        while self._in_flight and self._in_flight[0].is_completed and not device_may_block:
            self._in_flight.pop(0).finish()
        while self._waiting:
            if len(self._in_flight) == self._policy.max_in_flight:
                if not device_may_block:
                    return
                self._in_flight.pop(0).finish()
            self._launch(self._waiting.pop(0), in_place=False)

    def start(self, zero_params: list[ZeroParam]) -> None:
        """All-gather the parameters that no hook has added, and finish all. Collective."""
        if self._ranks == 1:
            return
        updated = {each for each in zero_params if not each.is_replicated}
        rest = [bucket.zero_params for bucket in self.buckets[self.num_added :]]
        in_backward = len(self._waiting)
        self._waiting += [[each for each in bucket if each in updated] for bucket in rest]
        for index, bucket in enumerate(self._waiting):
            if not bucket:
                continue
            if len(self._in_flight) == self._policy.max_in_flight:
                self._in_flight.pop(0).finish()
            self._launch(bucket, in_place=index >= in_backward)
        self._finish()

    def launch_all(self, buckets: list[Bucket]) -> None:
        """Launch the buckets that any rank has launched, and finish all. Collective."""
        for bucket in buckets[self.num_launched :]:
            self._launch(bucket.zero_params, in_place=False)
        self._finish()

    def reset(self) -> None:
        """Start over with the first bucket, after a step."""
        assert not self._in_flight
        self.num_added = self.num_launched = 0
        self._waiting.clear()

    def _launch(self, zero_params: list[ZeroParam], in_place: bool) -> None:
        self._in_flight.append(PendingAllGather(zero_params, self._group, OPERATION, in_place))
        self.num_launched += 1

    def _finish(self) -> None:
        while self._in_flight:
            self._in_flight.pop(0).finish()
