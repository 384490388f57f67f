"""The strategies in the table of ``docs/strategies.md``, and a training run for all of them.

The model's layers do not feed each other: each has inputs ``x`` and cotangents ``c`` of its own,
and the loss is the sum of all ``(layer(x) * c).sum()``. So a weight's gradient is ``c.T @ x``,
whatever the weights are. If ``x`` and ``c`` are small integers (times a power of two), every
product, every sum over rows and every reduction over ranks is exact in bfloat16.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from sharded_bf16_adamw import LR, AdamW_BF16, Fp32SumReduceScatter, ZeRO
from sharded_bf16_adamw.sharding.dtensor import to_local

COLUMNS = ("weights", "exp_avg", "exp_avg_sq", "correction")
STEPS, ROWS = 20, 12  # the rows of a batch are divided evenly among 1, 2, 3 or 4 ranks
SHAPES = {  # (inputs, outputs)
    "tall": (6, 13),
    "wide": (12, 8),
    "flat": (16, 4),
    "single_row": (5, 1),
    "single_precision": (7, 3),
}
GAIN = 10
CLIP = 5.0  # exceeded by the norms of some steps only
Batch = dict[str, tuple[Tensor, Tensor]]  # x (rows, inputs) and c (rows, outputs) of each layer


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(GAIN))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Layers(nn.Module):
    """Layers of 13, 8, 4, 3 and 1 rows, so that shards are uneven or empty; one is float32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, (inputs, outputs) in SHAPES.items():
            self.add_module(name, nn.Linear(inputs, outputs))
        self.gain = Gain()
        self.to(torch.bfloat16)
        self.get_submodule("single_precision").float()

    def forward(self, batch: Batch) -> Tensor:
        losses = [
            (whole(self.get_submodule(name)(x)) * c).sum().float() for name, (x, c) in batch.items()
        ]
        return torch.stack(losses).sum()


def whole(output: Tensor) -> Tensor:
    return output.full_tensor() if isinstance(output, DTensor) else output


def make_batch(step: int, exact: bool = True) -> Batch:
    generator = torch.Generator().manual_seed(step)
    batch = {}
    for name, (inputs, outputs) in {**SHAPES, "gain": (GAIN, GAIN)}.items():
        if exact:
            x = torch.randint(-1, 2, (ROWS, inputs), generator=generator)
            c = torch.randint(-2, 3, (ROWS, outputs), generator=generator) * 2.0 ** -(step % 7)
        else:
            x = torch.randn(ROWS, inputs, generator=generator)
            c = torch.randn(ROWS, outputs, generator=generator)
        dtype = torch.float32 if name == "single_precision" else torch.bfloat16
        batch[name] = (x.to(dtype), c.to(dtype))
    return batch


@dataclass(frozen=True)
class Wrapped:
    """A wrapped model. The ranks of one ``data_rank`` see the same rows."""

    module: nn.Module
    data_rank: int = 0
    data_ranks: int = 1
    sharding: Any = None  # the optimizer's argument
    # If given, each rank's rows come in two micro-batches.
    set_gradient_sync: Callable[[bool], None] | None = None


@dataclass(frozen=True)
class Case:
    """A strategy: a row of the table for each of ``worlds``. ``wrap`` is called on every rank."""

    name: str
    worlds: tuple[int, ...]
    wrap: Callable[[nn.Module, int], Wrapped]


def over_all_ranks(module: nn.Module, **more: Any) -> Wrapped:
    return Wrapped(module, dist.get_rank(), dist.get_world_size(), **more)


def ddp(model: nn.Module, world: int) -> Wrapped:
    return over_all_ranks(DistributedDataParallel(model))


def fsdp1(strategy: str, use_orig_params: bool) -> Callable[[nn.Module, int], Wrapped]:
    def wrap(model: nn.Module, world: int) -> Wrapped:
        hybrid = {"mesh_shape": (2, world // 2), "mesh_dim_names": ("replicate", "shard")}
        mesh = init_device_mesh(
            "cpu", **(hybrid if strategy == "HYBRID_SHARD" else {"mesh_shape": (world,)})
        )
        options = {
            "device_mesh": mesh,
            "sharding_strategy": ShardingStrategy[strategy],
            "use_orig_params": use_orig_params,
            "device_id": torch.device("cpu"),
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # FSDP1 and NO_SHARD are deprecated
            warnings.filterwarnings("ignore", "FSDP is switching to use `NO_SHARD`")  # on one rank
            # The other layers share the root's flat parameter.
            for name in ("wide", "single_row", "single_precision"):
                setattr(model, name, FullyShardedDataParallel(model.get_submodule(name), **options))
            return over_all_ranks(FullyShardedDataParallel(model, **options))

    return wrap


def fsdp2(**options: Any) -> Callable[..., Wrapped]:
    """Return a wrap that calls ``fully_shard`` with these options on every layer and the model."""

    def wrap(model: nn.Module, world: int, **more: Any) -> Wrapped:
        for module in (*model.children(), model):
            fully_shard(module, mesh=init_device_mesh("cpu", (world,)), **options, **more)
        return over_all_ranks(model)

    return wrap


def fsdp2_columns(model: nn.Module, world: int) -> Wrapped:
    def place(param: nn.Parameter) -> Shard:
        return Shard(1) if param.ndim == 2 and param.shape[1] % world == 0 else Shard(0)

    return fsdp2(shard_placement_fn=place)(model, world)


def fsdp2_accumulating(model: nn.Module, world: int) -> Wrapped:
    fsdp2()(model, world)
    return over_all_ranks(model, set_gradient_sync=model.set_requires_gradient_sync)


def hsdp(model: nn.Module, world: int, **options: Any) -> Wrapped:
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    for module in (*model.children(), model):
        fully_shard(module, mesh=mesh, **options)
    return over_all_ranks(model)


def fp32_sum(
    wrap: Callable[..., Wrapped], reduce_dtype: torch.dtype | None = torch.float32
) -> Callable[[nn.Module, int], Wrapped]:
    """Return a wrap that installs Fp32SumReduceScatter after ``wrap``."""

    def wrap_and_install(model: nn.Module, world: int) -> Wrapped:
        wrapped = wrap(model, world, mp_policy=MixedPrecisionPolicy(reduce_dtype=reduce_dtype))
        Fp32SumReduceScatter.install(model)
        return wrapped

    return wrap_and_install


def parallelize(model: nn.Module, mesh: Any) -> None:
    """Shard weights by columns and by rows and, for the gain, its inputs by rows.

    ``single_row`` and ``single_precision`` stay whole on every rank.
    """
    plan = {
        "tall": ColwiseParallel(output_layouts=Replicate()),
        "wide": ColwiseParallel(output_layouts=Replicate()),
        "flat": RowwiseParallel(input_layouts=Replicate()),
        "gain": SequenceParallel(sequence_dim=0),
    }
    parallelize_module(
        model,
        mesh,
        {"gain": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(0))},
    )
    parallelize_module(model, mesh, plan)


def tensor_parallel(model: nn.Module, world: int) -> Wrapped:
    parallelize(model, init_device_mesh("cpu", (world,)))
    return Wrapped(model)


def fsdp2_tensor_parallel(model: nn.Module, world: int) -> Wrapped:
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "tensor"))
    parallelize(model, mesh["tensor"])
    for module in (*model.children(), model):
        fully_shard(module, mesh=mesh["data"])
    return Wrapped(model, mesh.get_local_rank("data"), 2)


def zero1(model: nn.Module, world: int) -> Wrapped:
    return over_all_ranks(
        DistributedDataParallel(model), sharding=ZeRO(init_device_mesh("cpu", (world,)), stage=1)
    )


def zero2(model: nn.Module, world: int) -> Wrapped:
    return over_all_ranks(model, sharding=ZeRO(init_device_mesh("cpu", (world,)), stage=2))


def zero1_overlapped(model: nn.Module, world: int) -> Wrapped:
    return over_all_ranks(
        DistributedDataParallel(model, find_unused_parameters=True),
        sharding=overlapped(model, init_device_mesh("cpu", (world,)), 1),
    )


def zero2_overlapped(model: nn.Module, world: int) -> Wrapped:
    mesh = init_device_mesh("cpu", (world,))
    return over_all_ranks(model, sharding=overlapped(model, mesh, 2))


def zero2_overlapped_hybrid(model: nn.Module, world: int) -> Wrapped:
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    return over_all_ranks(model, sharding=overlapped(model, mesh, 2))


def overlapped(model: nn.Module, mesh: DeviceMesh, stage: int) -> ZeRO:
    """Return a sharding with a bucket for each layer or two."""
    options = {"bucket_size_mb": 200 / 2**20, "overlap_gather": True, "model": model}
    return ZeRO(mesh, stage=stage, **options)


ANY = (1, 2, 3, 4)
CASES = [
    Case("DDP", ANY, ddp),
    *(
        Case(f"FSDP1 {strategy}, use_orig_params={orig}", worlds, fsdp1(strategy, orig))
        for strategy, worlds in (
            ("FULL_SHARD", ANY),
            ("SHARD_GRAD_OP", ANY),
            ("NO_SHARD", ANY),
            ("HYBRID_SHARD", (4,)),
        )
        for orig in (False, True)
    ),
    Case("FSDP2", ANY, fsdp2()),
    Case("FSDP2 reshard_after_forward=False", ANY, fsdp2(reshard_after_forward=False)),
    Case("FSDP2 reshard_after_forward=2", (4,), fsdp2(reshard_after_forward=2)),
    Case("FSDP2 shard_placement_fn to columns", ANY, fsdp2_columns),
    Case(
        "FSDP2 MixedPrecisionPolicy",
        ANY,
        fsdp2(mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32)),
    ),
    Case("FSDP2 CPUOffloadPolicy", ANY, fsdp2(offload_policy=CPUOffloadPolicy(pin_memory=False))),
    Case("FSDP2 two micro-batches", ANY, fsdp2_accumulating),
    Case("FSDP2 Fp32SumReduceScatter", ANY, fp32_sum(fsdp2())),
    Case("HSDP (FSDP2, 2 x 2)", (4,), hsdp),
    Case("HSDP Fp32SumReduceScatter (2 x 2)", (4,), fp32_sum(hsdp)),
    Case("tensor parallel", (2, 4), tensor_parallel),
    Case("FSDP2 + tensor parallel (2 x 2)", (4,), fsdp2_tensor_parallel),
    Case("ZeRO-1 beside DDP", ANY, zero1),
    Case("ZeRO-2", ANY, zero2),
    Case("ZeRO-1 overlap_gather", ANY, zero1_overlapped),
    Case("ZeRO-2 overlap_gather", ANY, zero2_overlapped),
    Case("ZeRO-2 overlap_gather (2 x 2)", (4,), zero2_overlapped_hybrid),
]
BY_NAME = {case.name: case for case in CASES}


def backward(wrapped: Wrapped, batch: Batch) -> None:
    """Run a backward pass on this rank's rows, with cotangents times the number of data ranks.

    So the mean over ranks is the gradient of the whole batch.
    """
    own = {
        name: (
            x[wrapped.data_rank :: wrapped.data_ranks],
            c[wrapped.data_rank :: wrapped.data_ranks] * wrapped.data_ranks,
        )
        for name, (x, c) in batch.items()
    }
    if wrapped.set_gradient_sync is None:
        wrapped.module(own).backward()
        return
    for last in (False, True):
        wrapped.set_gradient_sync(last)
        wrapped.module({name: (x[last::2], c[last::2]) for name, (x, c) in own.items()}).backward()


def make_optimizer(wrapped: Wrapped) -> AdamW_BF16:
    schedule = LR(lr=1e-2, preheat_steps=5)
    return AdamW_BF16(
        wrapped.module.parameters(),
        lr_function=schedule,
        weight_decay=0.1,
        sharding=wrapped.sharding,
    )


def train(
    wrapped: Wrapped, steps: int, exact: bool = True, clip: float | None = CLIP
) -> tuple[dict[str, dict[str, Tensor]], list[Tensor]]:
    """Train; return weights and states in full by name, and the norms before clipping."""
    optimizer = make_optimizer(wrapped)
    norms = []
    for step in range(steps):
        backward(wrapped, make_batch(step, exact))
        if clip is not None:
            norms.append(optimizer.clip_grad_norm_(clip))
        optimizer.step(zero_grad=True)
    return collect(wrapped.module, optimizer), norms


def collect(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # FSDP1's own functions that torch calls
        weights = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True))
        states = get_optimizer_state_dict(
            module, optimizer, options=StateDictOptions(full_state_dict=True)
        )["state"]
    return {
        name: {"weights": weight.clone(), **states.get(name, {})}
        for name, weight in weights.items()
    }


def single_process(
    steps: int, exact: bool = True, clip: float | None = CLIP
) -> tuple[dict[str, dict[str, Tensor]], list[Tensor]]:
    return train(Wrapped(Layers()), steps, exact, clip)


def table_worker(
    rank: int, world: int, name: str, steps: int
) -> tuple[dict[str, dict[str, Tensor]], list[Tensor]]:
    return train(BY_NAME[name].wrap(Layers(), world), steps)


def replay_worker(rank: int, world: int, name: str, steps: int) -> dict[str, dict[str, Tensor]]:
    """Train on gradients whose sums round; compare each shard with a single process.

    Returns:
        As :func:`collect`.
    """
    wrapped = BY_NAME[name].wrap(Layers(), world)
    optimizer = make_optimizer(wrapped)
    sharding = optimizer._sharding
    params = list(wrapped.module.parameters())
    alone = [nn.Parameter(to_local(sharding.shard(param)).detach().clone()) for param in params]
    optimizer_alone = make_optimizer(Wrapped(nn.ParameterList(alone)))
    for step in range(steps):
        backward(wrapped, make_batch(step, exact=False))
        sharding.reduce_grads()
        assert all(
            grad is not None or not copy.numel()
            for grad, copy in zip(sharding.grads(params), alone, strict=True)
        )
        for grad, param, copy in zip(sharding.grads(params), params, alone, strict=True):
            copy.grad = None if grad is None else sharding.local_grads([param])[0].clone()
        optimizer.step(zero_grad=True)
        optimizer_alone.step(zero_grad=True)
    for param, copy in zip(params, alone, strict=True):
        assert torch.equal(to_local(sharding.shard(param)), copy)
        assert list(optimizer.state[param]) == list(optimizer_alone.state[copy])
        for key, value in optimizer.state[param].items():
            assert torch.equal(to_local(value), optimizer_alone.state[copy][key]), key
    return collect(wrapped.module, optimizer)
