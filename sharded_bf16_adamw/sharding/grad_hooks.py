"""Hooks that run once autograd has added a gradient to a parameter."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


class GradHooks:
    """Post-accumulate-grad hooks. Of several owners of a parameter, only the newest is called.

    Args:
        decorator: applied to each hook.

    Attributes:
        owner_of: a weak reference to the newest owner, by parameter.
        changes: number of times that a parameter was given an owner.
    """

    def __init__(self, decorator: Callable[[Any], Any] = lambda hook: hook) -> None:
        self._decorator = decorator
        self.owner_of: Any = WeakIdKeyDictionary()
        self.changes = 0

    def add(
        self, owner: Any, params: Iterable[Tensor], hooked: Any, call: Callable[[Any, Tensor], None]
    ) -> None:
        """Put hooks on the parameters that require a gradient and have no hook of this owner.

        Args:
            owner: owner of the hooks, which are removed when it is deleted.
            params: some parameters.
            hooked: ``WeakIdKeyDictionary`` of the owner, to which hooked parameters are added.
            call: called with the owner and the parameter.
        """
        me = weakref.ref(owner)

        def on_grad_ready(param: Tensor) -> None:
            alive, newest = me(), self.owner_of.get(param)
            if alive is not None and (newest is me or newest is None or newest() is None):
                call(alive, param)

        hook = self._decorator(on_grad_ready)
        for param in params:
            if param.requires_grad and param not in hooked:
                hooked[param] = True
                self.owner_of[param] = me
                self.changes += 1
                weakref.finalize(owner, param.register_post_accumulate_grad_hook(hook).remove)
