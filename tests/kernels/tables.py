"""Tables and steps of any backend, with the arguments of ``adamw_bf16_``."""

from types import ModuleType
from typing import Any

from torch import Tensor

from sharded_bf16_adamw.kernels import Hyperparams, StepArgs, TensorLists


def table_of(backend: ModuleType, *columns: Any, **named: Any) -> Any:
    """Return a backend's table; the arguments are those of ``TensorLists``."""
    return backend.make_table(TensorLists(*columns, **named))


def take_step(table: Any, grads: list[Tensor], **arguments: Any) -> None:
    """Take a step of a table whose parameters share their hyper-parameters."""
    hyper, flags = split(arguments)
    table.update_(StepArgs(grads, [hyper], **flags))


def split(arguments: dict[str, Any]) -> tuple[Hyperparams, dict[str, Any]]:
    """Split the arguments into hyper-parameters and flags of ``StepArgs``."""
    hyper = {name: value for name, value in arguments.items() if name in Hyperparams._fields}
    flags = {name: value for name, value in arguments.items() if name not in hyper}
    return Hyperparams(**hyper), flags
