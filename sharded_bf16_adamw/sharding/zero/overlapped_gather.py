"""All-gather of updated weights that overlaps with the next forward pass.

[Note: overlapped all-gather]
``step()`` launches the buckets in the order in which the forward pass reads them, at most
``max_in_flight`` at a time, and returns. Each all-gather writes to a temporary buffer, so no
parameter mixes old and new values. A pre-hook of each module waits for the buckets that the module
reads, copies them into the parameters, and launches the next ones. At the end of the model's
forward pass all buckets have been copied.

A module may read a weight of another one (``MultiheadAttention`` does). So a
:class:`.ForwardRecorder` records the first training forward pass after a ``step()``, and the next
``step()`` merges the recordings of all ranks. If there was no such forward pass, the next few steps
try again. ``step()`` itself waits for weights that no module was seen to read. It waits for all
weights if any of them has not been recorded, or if a module is compiled, since hooks do not run
there.

All other readers wait for every bucket: forward passes under ``no_grad`` or in eval mode, direct
calls of a submodule, ``state_dict()``, ``load_state_dict()`` and the optimizer's methods.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ..collectives import new_group_like
from ..replica_checksum import text_checksum
from .all_gather import AllGather, PendingAllGather
from .bucket import split_by_size
from .forward_recorder import ForwardRecorder
from .host_collectives import HostCollectives
from .param import ZeroParam

if TYPE_CHECKING:
    from .config import ZeRO

logger = logging.getLogger("sharded_bf16_adamw")

MAX_RECORDINGS = 3  # after so many steps without a forward pass of the model, stop recording

OPERATION = "all-gathering the updated weights (in a forward pass, step() or optimizer.wait())"
FAILED_ERROR = (
    "an earlier all-gather of updated weights failed on this rank, so some of its weights are old; "
    "restart all ranks from the last checkpoint"
)

# Instances by construction number. All ranks construct, and therefore wait, in the same order.
_instances: WeakValueDictionary[int, OverlappedGather] = WeakValueDictionary()


def wait_for_all_gathers(params: list[Tensor]) -> None:
    """Wait for pending all-gathers of these parameters, including those of deleted optimizers."""
    for _, gather in sorted(_instances.items()):
        if any(map(gather.is_pending, params)):
            gather.wait()


class OverlappedGather(AllGather):
    """The all-gather of ``overlap_gather=True``; see [Note: overlapped all-gather]."""

    def __init__(self, policy: ZeRO, collectives: HostCollectives) -> None:
        super().__init__(policy)
        assert policy.model is not None
        self._model = policy.model
        self._collectives = collectives
        # Its own process group, so that all-gathers need no fixed order relative to reductions.
        self._group = new_group_like(self._group, torch.device(policy.mesh.device_type))

        # - Uses of parameters in the forward pass
        self._zero_params: list[ZeroParam] = []
        self._recorder: ForwardRecorder | None = None  # for the forward pass after the last step
        self._recorded_params: list[ZeroParam] = []
        self._recordings_left = MAX_RECORDINGS
        # In order of first use. The set is empty if no module was seen to read the parameter.
        self._readers: dict[ZeroParam, set[nn.Module]] = {}

        # - Buckets
        self._num_blocking = 0  # number of first buckets for which start() waits
        self._buckets_of_module: dict[nn.Module, list[int]] = {}
        self._bucket_of_param: dict[Tensor, int] = {}

        # - State
        self._pending: set[int] = set()  # buckets not yet copied into the parameters
        self._in_flight: dict[int, PendingAllGather] = {}
        self._next_launch = 0
        self._versions: dict[Tensor, tuple[int, int]] = {}  # right after step(); see _version()
        self._failure: BaseException | None = None
        self._in_forward = False  # whether the model's forward pass is running
        self._has_returned = False  # whether it has ended without an error

        # - Hooks
        self._hooked: set[nn.Module | Tensor] = set()
        self._handles: list[Any] = []
        self._is_released = False
        _instances[max(_instances, default=0) + 1] = self

    # ------------------------------------------------------------------------------------ in a step

    def add_params(self, zero_params: list[ZeroParam]) -> None:
        """Add parameters of the optimizer. Every rank adds the same ones."""
        self._zero_params += zero_params
        self._hook_params(zero_params)

    def start(self, zero_params: list[ZeroParam]) -> None:
        """Start to all-gather these parameters, which a step has updated. Collective."""
        if self._ranks == 1:
            return
        if self._recorder is not None and zero_params:
            self._agree_on_readers(self._recorder)
        new = [each for each in zero_params if each not in self._readers]
        if self._buckets_of != zero_params or new:
            self._assign_buckets(zero_params, is_blocking=bool(new))
        self._buckets_of = zero_params
        self._hook_params(zero_params)
        self._versions = {each.param: _version(each.param) for each in zero_params}
        self._pending = set(range(len(self._buckets)))
        self._next_launch = 0
        self._guarded(self._launch_more)
        for index in range(len(self._buckets) if self._is_compiled() else self._num_blocking):
            self._finish(index)
        if new:
            self._recorded_params = zero_params
            self._hook_modules()
            self._recorder = ForwardRecorder(self._model, [each.param for each in zero_params])

    def wait(self) -> None:
        """Wait for all buckets, and copy them into the parameters."""
        for index in sorted(self._pending):
            self._finish(index)

    def is_pending(self, param: Tensor) -> bool:
        """Return True if the parameter's updated weights have not been copied in yet."""
        return self._bucket_of_param.get(param) in self._pending

    def release(self) -> None:
        """Remove the hooks of a deleted optimizer, as soon as nothing is pending."""
        self._is_released = True
        if not self._pending:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()

    def _agree_on_readers(self, recorder: ForwardRecorder) -> None:
        """Merge the recordings of all ranks. Collective."""
        self._recorder = None
        index_of = {each.param: index for index, each in enumerate(self._zero_params)}
        own = [(index_of[param], sorted(fqns)) for param, fqns in recorder.reads.items()]
        is_same = all(self._collectives.are_equal([text_checksum(repr(own))]))
        recordings = [own] if is_same else self._collectives.all_gather_object(own)
        readers: dict[ZeroParam, set[nn.Module]] = {}
        for index, fqns in (item for recording in recordings for item in recording):
            zero_param = self._zero_params[index]
            readers.setdefault(zero_param, self._readers.get(zero_param, set()))
            readers[zero_param].update(map(self._model.get_submodule, fqns))
        self._recordings_left = MAX_RECORDINGS if readers else self._recordings_left - 1
        if not readers and self._recordings_left > 0:
            return  # start() will record the next forward pass
        if not readers:
            logger.warning(
                "overlap_gather of ZeRO has no effect: no training forward pass of the given "
                "model, uncompiled, was seen after step()"
            )
        for module in self._model.modules():
            for param in module._parameters.values():
                if param in index_of and (owned := self._zero_params[index_of[param]]) in readers:
                    readers[owned].add(module)
        self._readers = readers | {k: v for k, v in self._readers.items() if k not in readers}
        for zero_param in self._recorded_params:
            self._readers.setdefault(zero_param, set())
        self._buckets_of = []

    def _assign_buckets(self, zero_params: list[ZeroParam], is_blocking: bool) -> None:
        sharded = [each for each in zero_params if not each.is_replicated]
        if is_blocking:
            unread, read = sharded, []
        else:
            unread = [each for each in sharded if not self._readers[each]]
            updated = set(sharded)
            read = [each for each, by in self._readers.items() if by and each in updated]
        first = split_by_size(unread, self._policy.bucket_bytes)
        self._buckets = first + split_by_size(read, self._policy.bucket_bytes)
        self._num_blocking = len(first)
        self._bucket_of_param, self._buckets_of_module = {}, {}
        for index, bucket in enumerate(self._buckets):
            for zero_param in bucket:
                self._bucket_of_param[zero_param.param] = index
                for module in self._readers.get(zero_param, ()):
                    indices = self._buckets_of_module.setdefault(module, [])
                    if index not in indices[-1:]:
                        indices.append(index)

    def _is_compiled(self) -> bool:
        """Return whether the model has a compiled module, in which hooks do not run."""
        return any(map(_is_compiled, self._model.modules()))

    # -------------------------------------------------------------------------------------- buckets

    def _launch_more(self) -> None:
        while (
            self._next_launch < len(self._buckets)
            and len(self._in_flight) < self._policy.max_in_flight
        ):
            bucket = self._buckets[self._next_launch]
            self._in_flight[self._next_launch] = PendingAllGather(
                bucket, self._group, OPERATION, in_place=False
            )
            self._next_launch += 1

    def _finish(self, index: int) -> None:
        """Wait for a bucket if it is pending, and launch the next ones."""
        if index in self._pending:
            self._guarded(lambda: self._unpack(index))
        if self._is_released:
            self.release()

    def _guarded(self, function: Callable[[], None]) -> None:
        """Call ``function``. After an error some weights may be old, so all later calls raise."""
        if self._failure is not None:
            raise RuntimeError(FAILED_ERROR) from self._failure
        try:
            with torch.inference_mode(False), torch.no_grad():
                function()
        except BaseException as error:
            self._failure = error
            raise

    def _unpack(self, index: int) -> None:
        while index not in self._in_flight:
            self._unpack(next(iter(self._in_flight)))
        for zero_param in self._buckets[index]:
            if _version(zero_param.param) != self._versions[zero_param.param]:
                raise RuntimeError(
                    f"parameter {zero_param.name} was changed between step() and the forward pass, "
                    "while ZeRO(overlap_gather=True) still gathered its updated weights; call "
                    "optimizer.wait() on every rank before you change weights"
                )
        self._in_flight.pop(index).finish()
        self._pending.discard(index)
        self._launch_more()

    # ---------------------------------------------------------------------------------------- hooks

    def _hook_modules(self) -> None:
        """Register hooks on the model's modules that have none."""
        for module in self._model.modules():
            if module not in self._hooked and not isinstance(module, torch.jit.ScriptModule):
                self._hooked.add(module)
                self._handles += [
                    module.register_forward_pre_hook(
                        ModuleHook(self, "before_forward"), prepend=True
                    ),
                    module.register_state_dict_pre_hook(ModuleHook(self, "before_state_dict")),
                    module.register_load_state_dict_pre_hook(ModuleHook(self, "before_state_dict")),
                ]
                if module is self._model:
                    returned = ModuleHook(self, "on_forward_returned")
                    after = ModuleHook(self, "after_forward")
                    self._handles += [
                        module.register_forward_hook(returned),
                        module.register_forward_hook(after, always_call=True),
                    ]

    def before_forward(self, module: nn.Module, *_: Any) -> None:
        """Wait for the weights that the module reads."""
        may_overlap = module.training and torch.is_grad_enabled()
        if module is self._model:
            self._in_forward, self._has_returned = True, False
            recorder = self._recorder
            if recorder is not None or self._pending:
                # Modules may have been compiled since the step. Recording would recompile them.
                may_overlap = may_overlap and not self._is_compiled()
            if recorder is not None and not recorder.reads and may_overlap:
                recorder.start()
        if not self._pending:
            return
        if self._in_forward and may_overlap:
            for index in self._buckets_of_module.get(module, ()):
                self._finish(index)
        else:
            self.wait()

    def on_forward_returned(self, *_: Any) -> None:
        """Note that the model's forward pass has returned; its output may be None even so."""
        self._has_returned = True

    def after_forward(self, *_: Any) -> None:
        """Wait for the other buckets, since the loss may read weights. Runs after errors too."""
        self._in_forward = False
        if self._recorder is not None:
            self._recorder.stop(is_complete=self._has_returned)
        self.wait()

    def before_state_dict(self, *_: Any) -> None:
        """Wait for all weights, which are about to be read or written."""
        self.wait()

    def check_picklable(self) -> None:
        """Raise RuntimeError if a copy of the model would have old weights."""
        if self._pending:
            raise RuntimeError(
                "the model is copied or pickled while ZeRO(overlap_gather=True) still gathers its "
                "updated weights; call optimizer.wait() on every rank first"
            )

    def _hook_params(self, zero_params: list[ZeroParam]) -> None:
        """Register hooks on trainable parameters that have none."""
        for param in (each.param for each in zero_params):
            if param.requires_grad and param not in self._hooked:
                self._hooked.add(param)
                handle = param.register_post_accumulate_grad_hook(self._on_grad_ready)
                self._handles.append(handle)

    def _on_grad_ready(self, param: Tensor) -> None:
        if self.is_pending(param):
            name = next(each.name for each in self._zero_params if each.param is param)
            raise RuntimeError(
                f"parameter {name} got a gradient while ZeRO(overlap_gather=True) still gathered "
                "its updated weights, so the forward pass has read the old ones; run the forward "
                "pass by calling the model that you gave to ZeRO, uncompiled, or call "
                "optimizer.wait() on every rank after each step()"
            )


class ModuleHook:
    """A module hook that does nothing in copies of the module."""

    def __init__(self, gather: OverlappedGather | None, method: str) -> None:
        self._gather = gather
        self._method = method

    def __call__(self, module: nn.Module, *args: Any) -> None:
        """Call the method, unless ``torch.compile`` is tracing the module."""
        if torch.compiler.is_compiling() or self._gather is None:
            return
        getattr(self._gather, self._method)(module, *args)

    def __reduce__(self) -> tuple[Any, ...]:
        """Return a hook that does nothing, for a copy; raise while weights are pending."""
        if self._gather is not None:
            self._gather.check_picklable()
        return ModuleHook, (None, self._method)


def _version(param: Tensor) -> tuple[int, int]:
    """Return numbers that change if ``param`` is written, except in place through ``.data``."""
    return param._version, param.data_ptr()  # param.data = other changes only the second


def _is_compiled(module: nn.Module) -> bool:
    return (
        module._compiled_call_impl is not None
        or isinstance(module, torch.jit.ScriptModule)
        or type(module).__name__ == "OptimizedModule"  # importing torch._dynamo is slow
        or hasattr(module.forward, "_torchdynamo_orig_callable")
    )
