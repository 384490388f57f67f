"""A model of awkward shapes, gradients with exact means, and counters of bytes and exchanges."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bits import assert_same_bits as assert_same_bits
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.tensor import DTensor

from launch.planning.live import Collective, LiveBytes
from sharded_bf16_adamw import LR, AdamW_BF16, ZeRO
from sharded_bf16_adamw.sharding.zero import stage2
from sharded_bf16_adamw.sharding.zero.host_collectives import HostCollectives

SMALL = 300 / 2**20  # bucket size in MiB, for a few of the parameters below
STATES = ("exp_avg", "exp_avg_sq", "correction")
SHAPES = {
    "even": (24, 5),
    "uneven": (13, 6),
    "bias": (13,),
    "wide": (1, 64),  # enough columns for every rank, but not rows
    "short": (3, 2),  # neither enough
    "single": (1,),
    "scalar": (),
    "empty": (0, 4),
    "large": (40, 10),  # a bucket of its own
    "transposed": (8, 12),
    "conv": (6, 4, 3, 3),
    "fp32": (7, 5),
    "fp32_scalar": (),
}


class Parameters(nn.Module):
    """A model whose loss is linear in its parameters, so that callers choose the gradients."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in SHAPES.items():
            value = torch.randn(shape, generator=generator).to(
                torch.float32 if name.startswith("fp32") else torch.bfloat16
            )
            if name == "transposed":
                value = value.t().contiguous().t()
            if name == "conv":
                value = value.contiguous(memory_format=torch.channels_last)
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, grads: dict[str, Tensor]) -> Tensor:
        return torch.stack(
            [(self.get_parameter(name) * grad).sum().float() for name, grad in grads.items()]
        ).sum()


def mean_gradients(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    scale = 2.0 ** -(step % 7)
    return {
        name: (torch.randint(-8, 9, shape, generator=generator) * scale).to(
            torch.float32 if name.startswith("fp32") else torch.bfloat16
        )
        for name, shape in SHAPES.items()
    }


def rank_gradients(step: int, rank: int, ranks: int) -> dict[str, Tensor]:
    """Return gradients that differ between ranks, with :func:`mean_gradients` as their mean.

    Every sum is exact in bfloat16.
    """
    generator = torch.Generator().manual_seed(1000 + step)
    scale = 2.0 ** -(step % 7)
    return {
        name: mean
        + (
            torch.randint(-3, 4, mean.shape, generator=generator) * scale * (2 * rank - ranks + 1)
        ).to(mean.dtype)
        for name, mean in mean_gradients(step).items()
    }


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    groups = [
        {"params": [item for item in named if item[1].ndim > 1]},
        {"params": [item for item in named if item[1].ndim <= 1], "weight_decay": 0.0},
    ]
    # torch mistakes an empty group for one without names.
    return [group for group in groups if group["params"]]


def new_optimizer(model: nn.Module, sharding: ZeRO | None = None, **options: Any) -> AdamW_BF16:
    return AdamW_BF16(
        groups_of(model),
        lr_function=LR(lr=1e-2, preheat_steps=5),
        weight_decay=0.1,
        sharding=sharding,
        **options,
    )


def one_dimensional() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def mesh_of(shape: tuple[int, ...]) -> DeviceMesh:
    """Return a mesh to shard over, of one dimension, or to replicate and shard over, of two."""
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def mesh_with_timeout(seconds: float) -> DeviceMesh:
    """Return a mesh to shard over, whose collectives wait that long for a rank."""
    return DeviceMesh.from_group(dist.new_group(timeout=timedelta(seconds=seconds)), "cpu")


def shorten_timeout(optimizer: AdamW_BF16, mesh: DeviceMesh, seconds: float = 1.0) -> None:
    """Set how long later collectives wait, of an optimizer with ZeRO on :func:`mesh_with_timeout`.

    Call it just before a rank hangs. Ranks that start with a short timeout fail on a busy machine.
    """
    for group in (mesh.get_group(), optimizer._sharding._collectives.group):
        _set_pg_timeout(timedelta(seconds=seconds), group)


def zero(stage: int = 2, mesh: DeviceMesh | None = None, **options: Any) -> ZeRO:
    return ZeRO(
        one_dimensional() if mesh is None else mesh,
        stage=stage,
        **{"bucket_size_mb": SMALL, **options},
    )


def train(
    model: nn.Module,
    optimizer: AdamW_BF16,
    steps: int,
    *,
    averaged: bool,
    clip: float | None = None,
    start: int = 0,
) -> list[float]:
    """Take steps on the gradients of this module, and return the norms.

    ``averaged``: gradients are those after DDP's averaging, or of one process.
    """
    norms = []
    for step in range(start, start + steps):
        rank, ranks = (0, 1) if averaged else (dist.get_rank(), dist.get_world_size())
        model(mean_gradients(step) if averaged else rank_gradients(step, rank, ranks)).backward()
        if clip is not None:
            norms.append(optimizer.clip_grad_norm_(clip).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def collect(model: nn.Module, optimizer: AdamW_BF16) -> dict[str, Tensor]:
    """Return full weights and states by parameter name. Collective."""
    optimizer.wait()
    result = {}
    for name, param in model.named_parameters():
        result[name] = full(param)
        result.update(
            {f"{name}.{key}": full(value) for key, value in sorted(optimizer.state[param].items())}
        )
    return result


def train_with_late_group(
    sharding: ZeRO | None, added_at: int, steps: int
) -> tuple[list[Tensor], list[str]]:
    """Add a group between two backward passes of the step ``added_at``.

    Returns:
        All weights after the last step, and the exchanges in it on the host.
    """
    model = Parameters()
    optimizer = new_optimizer(model, sharding)
    late = nn.Parameter(torch.linspace(-1, 1, 30).bfloat16().view(10, 3))
    for step in range(steps):
        model(rank_gradients(step, 0, 1)).backward()
        if step == added_at:
            optimizer.add_param_group({"params": [("late", late)], "weight_decay": 0.5})
        if step >= added_at:
            (late * 0.5).sum().backward()
        with consensus_calls() as exchanges:
            optimizer.step(zero_grad=True)
    return [p.detach() for p in (*model.parameters(), late)], exchanges


class Linears(nn.Sequential):
    """bfloat16 layers of ``width * width`` parameters each, for counting bytes."""

    def __init__(self, layers: int, width: int) -> None:
        torch.manual_seed(0)
        super().__init__(*[nn.Linear(width, width, bias=False) for _ in range(layers)])
        self.to(torch.bfloat16)


class Calls(list[tuple[str, float, float]]):
    """(name, bytes that a rank sends, bytes of its tensor) of each collective.

    The name starts with "consensus." if the tensor has integers: those are the exchanges on the
    host. ``on_call`` is called with the name.
    """

    on_call: Callable[[str], None] | None = None


@contextmanager
def traffic() -> Iterator[Calls]:
    """Record the collectives of this rank; see :class:`launch.planning.live.Collective`."""
    calls = Calls()

    class Recorder(LiveBytes):
        def on_collective(self, call: Collective) -> None:
            name = call.name if call.dtype.is_floating_point else f"consensus.{call.name}"
            if calls.on_call is not None:
                calls.on_call(name)
            calls.append((name, call.sent, call.nbytes))

    with Recorder():
        yield calls


@contextmanager
def consensus_calls() -> Iterator[list[str]]:
    """Record each exchange between ranks on the host, by its method."""
    calls: list[str] = []

    def recorded(name: str) -> Callable[..., Any]:
        original = getattr(HostCollectives, name)

        def call(*args: Any, **options: Any) -> Any:
            calls.append(name)
            return original(*args, **options)

        return call

    names = ("any_rank", "all_reduce_max_and_problems", "all_gather_object", "broadcast_from_first")
    with pytest.MonkeyPatch.context() as patched:
        for name in names:
            patched.setattr(HostCollectives, name, recorded(name))
        yield calls


@contextmanager
def backpressure_timeout(seconds: float) -> Iterator[None]:
    """Set how long a backward pass of this process waits for the oldest reduction."""
    before, stage2.BACKPRESSURE_TIMEOUT_S = stage2.BACKPRESSURE_TIMEOUT_S, seconds
    try:
        yield
    finally:
        stage2.BACKPRESSURE_TIMEOUT_S = before


class NewBytes:
    """Bytes of the tensors created since construction; ``peak`` is the most that look() found."""

    def __init__(self, model: nn.Module) -> None:
        self._params = list(model.parameters())
        self._before = set(_storages())
        self.peak = 0

    def look(self) -> None:
        grads = [p.grad for p in self._params]  # gc sees a tensor once Python has asked for it
        assert len(grads) == len(self._params)
        self.peak = max(
            self.peak, sum(size for key, size in _storages().items() if key not in self._before)
        )


def _storages() -> dict[int, int]:
    found = {}
    for item in gc.get_objects():
        if issubclass(type(item), Tensor) and not isinstance(item, DTensor):
            storage = item.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found
