"""Tables and steps of any backend, with the arguments of ``adamw_bf16_``."""

from types import ModuleType
from typing import Any

from torch import Tensor

from sharded_bf16_adamw.kernels import Hyperparams, StepArgs, TensorLists


def table_of(backend: ModuleType, *columns: Any, **named: Any) -> Any:
    """Return a backend's table of ``params`` to ``steps`` and, optionally, ``groups``."""
    return backend.make_table(TensorLists(*columns, **named))


def take_step(table: Any, grads: list[Tensor], **arguments: Any) -> None:
    """Take a step of parameters that share their hyper-parameters."""
    hyper, flags = split(arguments)
    table.update_(StepArgs(grads, [hyper], **flags))


def split(arguments: dict[str, Any]) -> tuple[Hyperparams, dict[str, Any]]:
    """Return the hyper-parameters among the arguments, and the others."""
    hyper = {name: value for name, value in arguments.items() if name in Hyperparams._fields}
    flags = {name: value for name, value in arguments.items() if name not in hyper}
    return Hyperparams(**hyper), flags
