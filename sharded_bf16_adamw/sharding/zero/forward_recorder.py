"""Recording which modules read each parameter in a forward pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

# These read a tensor's metadata, not its values.
METADATA = frozenset(
    getattr(Tensor, name).__get__ for name in ("device", "dtype", "ndim", "requires_grad", "shape")
) | {Tensor.dim, Tensor.numel, Tensor.size}


class ForwardRecorder(TorchFunctionMode):
    """Recorder of the modules that read each parameter in one forward pass.

    The reader of a parameter is the innermost module whose ``forward`` is running. It need not own
    the parameter.

    Args:
        model: the module whose forward pass to record.
        params: the parameters whose readers to record.

    Attributes:
        reads: the FQNs of each parameter's readers, in order of first use. Empty until a forward
            pass has been recorded.
    """

    def __init__(self, model: nn.Module, params: Iterable[Tensor]) -> None:
        super().__init__()
        self.reads: dict[Tensor, dict[str, None]] = {}
        self._model = model
        self._params = {id(param): param for param in params}
        self._fqns = {module: fqn for fqn, module in model.named_modules()}
        self._running: list[str] = []  # FQNs of the modules whose forward runs, innermost last
        self._handles: list[Any] = []

    def start(self) -> None:
        """Start recording. Call it from a forward pre-hook of ``model``."""
        if self._handles:  # a KeyboardInterrupt has skipped the forward hook
            self.stop(False)
        self._running.append("")
        self._handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._exit, always_call=True),
        ]
        self.__enter__()

    def stop(self, is_complete: bool) -> None:
        """Stop recording, if started, and discard an incomplete pass."""
        if not self._handles:
            return
        self.__exit__(None, None, None)
        for handle in self._handles:
            handle.remove()
        self._handles, self._running = [], []
        if not is_complete:
            self.reads.clear()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Record the parameters among the arguments, and call ``func``."""
        kwargs = kwargs or {}
        # torch.compile traces this function too; reads inside a compiled region are not recorded.
        if not torch.compiler.is_compiling() and func not in METADATA:
            for value in tree_iter((args, kwargs)):
                if id(value) in self._params:
                    self.reads.setdefault(value, {})[self._running[-1]] = None
        return func(*args, **kwargs)

    def _enter(self, module: nn.Module, args: Any) -> None:
        # Only modules of the model get hooks that wait for updated weights (overlapped_gather.py),
        # so for another module its caller counts as the reader.
        self._running.append(self._fqns.get(module, self._running[-1]))

    def _exit(self, module: nn.Module, args: Any, output: Any) -> None:
        if len(self._running) > 1:  # the model's own entry, made by start(), stays
            self._running.pop()
