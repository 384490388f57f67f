"""Steps of any back end's table, with the arguments of ``adamw_bf16_``."""

from typing import Any

from torch import Tensor

from sharded_bf16_adamw.kernels import Hyperparams


def take_step(table: Any, grads: list[Tensor], **arguments: Any) -> None:
    """A step of parameters that all share their hyper-parameters."""
    hyper, flags = split(arguments)
    table.update_(grads, [hyper], **flags)


def split(arguments: dict[str, Any]) -> tuple[Hyperparams, dict[str, Any]]:
    """The hyper-parameters among the arguments, and the others."""
    hyper = {name: value for name, value in arguments.items() if name in Hyperparams._fields}
    return Hyperparams(**hyper), {
        name: value for name, value in arguments.items() if name not in hyper
    }
