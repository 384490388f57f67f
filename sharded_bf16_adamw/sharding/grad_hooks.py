"""Post-accumulate-grad hooks of several optimizers on the same parameters."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


class GradHooks:
    """Post-accumulate-grad hooks. If a parameter has several owners, only the newest is called.

    Args:
        decorator: applied to each hook.

    Attributes:
        owner_of: for each parameter a weak reference to its newest owner.
        changes: number of changes of ``owner_of``.
    """

    def __init__(self, decorator: Callable[[Any], Any] = lambda hook: hook) -> None:
        self._decorator = decorator
        self.owner_of: Any = WeakIdKeyDictionary()
        self.changes = 0

    def add(
        self, owner: Any, params: Iterable[Tensor], hooked: Any, call: Callable[[Any, Tensor], None]
    ) -> None:
        """Register hooks on the trainable parameters that have none of this owner.

        Args:
            owner: the object on whose deletion the hooks are removed.
            params: the parameters.
            hooked: the owner's ``WeakIdKeyDictionary`` of hooked parameters, which is updated.
            call: function of the owner and the parameter, which the hook calls.
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
