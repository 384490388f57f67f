"""Hooks that autograd calls: on each parameter, and at the end of a backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# parameter -> weak reference to the newest object that has hooked it
_hook_owner: Any = WeakIdKeyDictionary()


class HookOwner(Protocol):
    """The object that the hooks call while it is alive."""

    def on_grad_ready(self, param: Tensor) -> None:
        """Use ``param.grad``, to which autograd has added a gradient."""


def add_grad_hooks(owner: HookOwner, params: Iterable[Tensor], hooked: Any) -> None:
    """Put hooks on those parameters that require a gradient and have none.

    Args:
        owner: the object to call. Deleting it removes its hooks, and of several owners of a
            parameter only the newest is called.
        params: some parameters.
        hooked: ``WeakIdKeyDictionary`` of the owner's, to which hooks are added by parameter.
    """
    me = weakref.ref(owner)

    @torch._disable_dynamo
    def on_grad_ready(param: Tensor) -> None:
        alive = me()
        newest = _hook_owner.get(param)
        if alive is not None and (newest is me or newest is None or newest() is None):
            alive.on_grad_ready(param)

    for param in params:
        if param.requires_grad and param not in hooked:
            handle = param.register_post_accumulate_grad_hook(on_grad_ready)
            hooked[param] = handle
            _hook_owner[param] = me
            weakref.finalize(owner, handle.remove)


def call_at_backward_end(callback: Callable[[], None]) -> None:
    """Call ``callback`` when the current backward pass ends, unless it raises."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.queue_callback(torch._disable_dynamo(callback))
