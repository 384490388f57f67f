"""The layouts of a model in the table of ``docs/checkpoints.md``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from sharded_bf16_adamw import LR, AdamW_BF16, ZeRO

INPUTS = 6


class Net(nn.Module):
    """A model with 12, 7, 5 and 1 rows: uneven shards, and empty ones on some ranks.

    One layer is float32, one parameter never has a gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(INPUTS, 12)
        self.down = nn.Linear(12, 7, bias=False)
        self.precise = nn.Linear(7, 5, bias=False)
        self.last = nn.Linear(5, 1, bias=False)
        self.to(torch.bfloat16)
        self.precise.float()
        self.unused = nn.Linear(3, 3, bias=False).to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.down(torch.tanh(self.up(x))))
        return self.last(torch.tanh(self.precise(hidden.float())).bfloat16())


@dataclass(frozen=True)
class Layout:
    """A layout; ``wrap`` returns the module and the optimizer's ``sharding`` on each rank."""

    name: str
    worlds: tuple[int, ...]
    wrap: Callable[[Net, int], tuple[nn.Module, Any]]

    def build(self, world: int, seed: int) -> tuple[nn.Module, AdamW_BF16]:
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # FSDP1 is deprecated
            warnings.filterwarnings("ignore", "FSDP is switching to use `NO_SHARD`")  # on one rank
            module, sharding = self.wrap(Net(), world)
        named = list(module.named_parameters())
        precise = [param for name, param in named if "precise" in name]
        others = [param for name, param in named if "precise" not in name]
        groups: list[dict[str, Any]] = [
            {"params": others, "weight_decay": 0.1},
            {"params": precise, "lr": 3e-3, "betas": (0.8, 0.99)},
        ]
        return module, AdamW_BF16(
            groups, lr_function=LR(lr=1e-2, preheat_steps=5), sharding=sharding
        )


def single(model: Net, world: int) -> tuple[nn.Module, Any]:
    return model, None


def ddp(model: Net, world: int) -> tuple[nn.Module, Any]:
    return DistributedDataParallel(model, find_unused_parameters=True), None


def fsdp1(use_orig_params: bool) -> Callable[[Net, int], tuple[nn.Module, Any]]:
    def wrap(model: Net, world: int) -> tuple[nn.Module, Any]:
        options: dict[str, Any] = {
            "device_mesh": init_device_mesh("cpu", (world,)),
            "use_orig_params": use_orig_params,
            "device_id": torch.device("cpu"),
        }
        for name in ("up", "precise", "unused"):  # the others share the root's flat parameter
            setattr(model, name, FullyShardedDataParallel(getattr(model, name), **options))
        return FullyShardedDataParallel(model, **options), None

    return wrap


def fsdp2_over(model: nn.Module, mesh: Any) -> nn.Module:
    for layer in model.children():
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp2(model: Net, world: int) -> tuple[nn.Module, Any]:
    return fsdp2_over(model, init_device_mesh("cpu", (world,))), None


def hsdp(model: Net, world: int) -> tuple[nn.Module, Any]:
    return fsdp2_over(
        model, init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    ), None


def fsdp2_tp(model: Net, world: int) -> tuple[nn.Module, Any]:
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return fsdp2_over(model, mesh["data"]), None


def zero(stage: int) -> Callable[[Net, int], tuple[nn.Module, Any]]:
    def wrap(model: Net, world: int) -> tuple[nn.Module, Any]:
        mesh = init_device_mesh("cpu", (world,))
        module = (
            DistributedDataParallel(model, find_unused_parameters=True) if stage == 1 else model
        )
        return module, ZeRO(mesh, stage=stage)

    return wrap


ANY = (1, 2, 3, 4)
LAYOUTS = [
    Layout("single", (1,), single),
    Layout("DDP", ANY, ddp),
    Layout("FSDP1", ANY, fsdp1(use_orig_params=False)),
    Layout("FSDP1 use_orig_params", ANY, fsdp1(use_orig_params=True)),
    Layout("FSDP2", ANY, fsdp2),
    Layout("HSDP", (2, 4), hsdp),
    Layout("FSDP2 + TP", (2, 4), fsdp2_tp),
    Layout("ZeRO-1", ANY, zero(1)),
    Layout("ZeRO-2", ANY, zero(2)),
]
BY_NAME = {layout.name: layout for layout in LAYOUTS}


def batch() -> Tensor:
    return torch.randn(12, INPUTS, generator=torch.Generator().manual_seed(5)).bfloat16()


def train(module: nn.Module, optimizer: AdamW_BF16, steps: int) -> None:
    """Train on one batch for all ranks, so that every layout computes the same gradients."""
    for _ in range(steps):
        module(batch()).float().square().mean().backward()
        optimizer.step(zero_grad=True)


def loss(module: nn.Module) -> float:
    with torch.no_grad():
        return float(module(batch()).float().square().mean())


def everything(
    module: nn.Module, optimizer: AdamW_BF16
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return full weights and states by name, and the options of each parameter's group.

    Collective. It calls torch's own functions.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FSDP1 is deprecated, also where torch calls it
        options_full = StateDictOptions(full_state_dict=True)
        result = dict(get_model_state_dict(module, options=options_full))
        optimizer_state = get_optimizer_state_dict(module, optimizer, options=options_full)
    for fqn, state in optimizer_state["state"].items():
        result.update({f"{fqn}.{key}": value for key, value in state.items()})
    options = {
        fqn: {key: value for key, value in group.items() if key != "params"}
        for group in optimizer_state["param_groups"]
        for fqn in group["params"]
    }
    return {key: value.detach().clone() for key, value in result.items()}, options
