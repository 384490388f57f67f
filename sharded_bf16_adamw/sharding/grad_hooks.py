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
        changes: number of owners added to parameters.
    """

    def __init__(self, decorator: Callable[[Any], Any] = lambda hook: hook) -> None:
        self._decorator = decorator
        self._owners: Any = WeakIdKeyDictionary()  # weak references of each parameter, newest last
        self.changes = 0

    def owner_of(self, param: Tensor) -> Any:
        """Return the newest owner of the parameter that is alive, or None."""
        owners = (reference() for reference in reversed(self._owners.get(param, [])))
        return next((owner for owner in owners if owner is not None), None)

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
            alive = me()
            if alive is not None and self.owner_of(param) is alive:
                call(alive, param)

        hook = self._decorator(on_grad_ready)
        for param in params:
            if param.requires_grad and param not in hooked:
                hooked[param] = True
                older = [each for each in self._owners.get(param, []) if each() is not None]
                self._owners[param] = [*older, me]
                self.changes += 1
                weakref.finalize(owner, param.register_post_accumulate_grad_hook(hook).remove)
