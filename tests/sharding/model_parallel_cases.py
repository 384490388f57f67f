"""Jobs whose ranks hold different parameters, to compare with one process that holds them all.

A model is a dict of parameters by the names that one process would use. Each rank builds its part.
:func:`gradient` makes the gradients from a parameter's name and the step, as they are after the
communication of pipeline and expert parallelism.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from sharded_bf16_adamw import LR, AdamW_BF16, ModelParallel, ZeRO

STEPS, CLIP = 20, 40.0
LAYERS = {
    "embed.weight": (6, 5),
    "layers.0.weight": (7, 6),
    "layers.0.bias": (7,),
    "layers.1.weight": (7, 6),
    "layers.1.bias": (7,),
    "layers.2.weight": (7, 6),
    "layers.2.bias": (7,),
    "norm.weight": (5,),
}
STAGES = (("embed", "layers.0"), ("layers.1", "layers.2", "norm"))
MOE = {
    "router.weight": (4, 6),
    **{
        f"experts.{i}.{kind}": shape
        for i in range(4)
        for kind, shape in (("weight", (5, 6)), ("bias", (5,)))
    },
}
STACKED = {"router.weight": (4, 6), "moe.w1": (4, 5, 6)}  # all experts in one parameter
FP32_PARAMS = ("norm.weight",)


def value(name: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    return torch.randn(shape, generator=generator).to(
        torch.float32 if name in FP32_PARAMS else torch.bfloat16
    )


def gradient(name: str, shape: tuple[int, ...], step: int) -> Tensor:
    """Return integers times a power of two, whose sums and means over ranks are exact."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + 1000 * step)
    integers = torch.randint(-3, 4, shape, generator=generator).float()
    return (integers * 2.0 ** (step % 5 - 2)).to(
        torch.float32 if name in FP32_PARAMS else torch.bfloat16
    )


@dataclass
class Part:
    """The part of a model that one rank holds.

    Attributes:
        names: for each local name the global name, and the slice of the global tensor or None.
        group: the ranks that share the model; None for all.
    """

    model: nn.Module
    optimizer: AdamW_BF16
    names: dict[str, tuple[str, slice | None]]
    shapes: dict[str, tuple[int, ...]]
    group: dist.ProcessGroup | None = None

    def local(self, name: str) -> nn.Parameter:
        return self.model.get_parameter(name)

    def give_gradients(self, step: int, broken: bool = False) -> None:
        for local, (name, part) in self.names.items():
            whole = gradient(name, self.shapes[name], step)
            whole = whole if part is None else whole[part]
            param = self.local(local)
            if isinstance(param, DTensor):
                grad: Any = distribute_tensor(
                    whole, param.device_mesh, param.placements, src_data_rank=None
                )
                grad = grad.clone()
                if broken and grad.to_local().numel():
                    grad.to_local().fill_(torch.nan)
            else:
                grad = whole.clone().fill_(torch.nan) if broken else whole.clone()
            param.grad = grad

    def everything(self) -> dict[str, Tensor]:
        """Return weights and states by global name; for a slice, it ends with ``[start]``."""
        found = {}
        for local, (name, part) in self.names.items():
            label = name if part is None else f"{name}[{part.start}]"
            param = self.local(local)
            found[label] = whole(param)
            for key, tensor in self.optimizer.state.get(param, {}).items():
                found[f"{label}.{key}"] = whole(tensor)
        return found


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


@dataclass(frozen=True, eq=False)
class Case:
    """A distribution of a model; ``build(rank, world, seed)`` is called on every rank.

    ``reloads``: its checkpoint loads in one process, which has all parameters.
    """

    name: str
    world: int
    shapes: dict[str, tuple[int, ...]]
    build: Callable[[int, int, int], Part]
    reloads: bool = True


def module_of(params: dict[str, Tensor]) -> nn.Module:
    """Build a module with these parameters; children of ``experts`` go into a ModuleList."""
    root = nn.Module()
    for name, tensor in params.items():
        holder = root
        *parents, leaf = name.split(".")
        for place, parent in enumerate(parents):
            if isinstance(holder, nn.ModuleList):
                assert int(parent) in (len(holder) - 1, len(holder))
                if int(parent) == len(holder):
                    holder.append(nn.Module())
                holder = holder[int(parent)]
                continue
            if parent not in dict(holder.named_children()):
                is_list = parent == "experts" and place + 1 < len(parents)
                holder.add_module(parent, nn.ModuleList() if is_list else nn.Module())
            holder = holder.get_submodule(parent)
        holder.register_parameter(leaf, nn.Parameter(tensor))
    return root


def optimizer_of(model: nn.Module, **options: Any) -> AdamW_BF16:
    biases = [param for name, param in model.named_parameters() if name.endswith("bias")]
    others = [param for name, param in model.named_parameters() if not name.endswith("bias")]
    groups = [{"params": others, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
    return AdamW_BF16(
        groups, lr_function=LR(lr=1e-2, preheat_steps=5), skip_nonfinite=True, **options
    )


def part(
    shapes: dict[str, tuple[int, ...]],
    names: dict[str, tuple[str, slice | None]],
    seed: int,
    wrap: Callable[[nn.Module], Any] = lambda model: None,
    options: Callable[[nn.Module], dict[str, Any]] = lambda model: {},
    group: dist.ProcessGroup | None = None,
) -> Part:
    params = {}
    for local, (name, which) in names.items():
        tensor = value(name, shapes[name], seed)
        params[local] = tensor if which is None else tensor[which].clone()
    model = module_of(params)
    wrap(model)
    return Part(model, optimizer_of(model, **options(model)), names, shapes, group)


def one_process(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Part:
    return part(shapes, {name: (name, None) for name in shapes}, seed)


def names_of_stage(stage: int, renumber: bool = False) -> dict[str, tuple[str, slice | None]]:
    mine = [
        name for name in LAYERS if name.startswith(tuple(f"{prefix}." for prefix in STAGES[stage]))
    ]
    if not renumber:
        return {name: (name, None) for name in mine}
    first = min(int(name.split(".")[1]) for name in mine if name.startswith("layers."))
    local = {}
    for name in mine:
        head, *rest = name.split(".")
        local[
            ".".join([head, str(int(rest[0]) - first), *rest[1:]]) if head == "layers" else name
        ] = (name, None)
    return local


def pipeline(*, inner: str = "", renumber: bool = False) -> Callable[[int, int, int], Part]:
    def build(rank: int, world: int, seed: int) -> Part:
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("pp", "dp"))
        stage = mesh["pp"].get_local_rank()

        def wrap(model: nn.Module) -> None:
            if inner == "fsdp2":
                fully_shard(model, mesh=mesh["dp"])
            if inner == "hsdp":
                fully_shard(
                    model,
                    mesh=init_device_mesh(
                        "cpu", (2, 2, 1), mesh_dim_names=("pp", "replicate", "shard")
                    )["replicate", "shard"],
                )

        def options(model: nn.Module) -> dict[str, Any]:
            parallel = ModelParallel(pp=mesh["pp"], dp=mesh["dp"] if inner == "ddp" else None)
            return {
                "model_parallel": parallel,
                **({"sharding": ZeRO(mesh["dp"], stage=2)} if inner == "zero2" else {}),
            }

        return part(LAYERS, names_of_stage(stage, renumber), seed, wrap, options)

    return build


def names_of_experts(
    ep_rank: int, ep_ranks: int, uneven: bool = False
) -> dict[str, tuple[str, slice | None]]:
    counts = [3, 1] if uneven else [4 // ep_ranks] * ep_ranks
    first = sum(counts[:ep_rank])
    local = {"router.weight": ("router.weight", None)}
    for index in range(counts[ep_rank]):
        for kind in ("weight", "bias"):
            local[f"experts.{index}.{kind}"] = (f"experts.{first + index}.{kind}", None)
    return local  # type: ignore[return-value]


def experts(*, dense: str = "", uneven: bool = False) -> Callable[[int, int, int], Part]:
    def build(rank: int, world: int, seed: int) -> Part:
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("edp", "ep"))

        def wrap(model: nn.Module) -> None:
            if dense == "fsdp2":
                fully_shard(model.get_submodule("router"), mesh=init_device_mesh("cpu", (world,)))

        def options(model: nn.Module) -> dict[str, Any]:
            dp = dist.group.WORLD if world > 2 else None
            parallel = ModelParallel(ep=mesh["ep"], experts=model.get_submodule("experts"), dp=dp)
            return {
                "model_parallel": parallel,
                **({"sharding": ZeRO(mesh["ep"])} if dense == "zero2" else {}),
            }

        return part(
            MOE, names_of_experts(mesh["ep"].get_local_rank(), 2, uneven), seed, wrap, options
        )

    return build


def stacked_experts(rank: int, world: int, seed: int) -> Part:
    """Build one plain parameter for all experts of this rank, whose global numbers are unknown."""
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))
    count = 4 // world
    names = {
        "router.weight": ("router.weight", None),
        "moe.w1": ("moe.w1", slice(rank * count, (rank + 1) * count)),
    }
    return part(
        STACKED,
        names,
        seed,
        options=lambda model: {
            "model_parallel": ModelParallel(
                ep=mesh.get_group(), experts=[model.get_parameter("moe.w1")]
            )
        },
    )


def dtensor_experts(rank: int, world: int, seed: int) -> Part:
    """Build as torchtitan does: a DTensor over the expert mesh beside FSDP2."""
    mesh = init_device_mesh("cpu", (world,))

    def wrap(model: nn.Module) -> None:
        moe = model.get_submodule("moe")
        moe.w1 = nn.Parameter(
            distribute_tensor(moe.w1.detach(), mesh, [Shard(0)], src_data_rank=None)
        )
        fully_shard(model.get_submodule("router"), mesh=mesh)

    return part(STACKED, {name: (name, None) for name in STACKED}, seed, wrap)


def zero_on_a_half(rank: int, world: int, seed: int) -> Part:
    """Build two models of the same names and shapes, each on a half of the job."""
    half = rank // (world // 2)
    meshes = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("half", "dp"))
    mesh: DeviceMesh = meshes["dp"]
    return part(
        LAYERS,
        {name: (name, None) for name in LAYERS},
        seed + half,
        options=lambda model: {"sharding": ZeRO(mesh, stage=2)},
        group=mesh.get_group(),
    )


def pipeline_of_experts(rank: int, world: int, seed: int) -> Part:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "ep"))
    stage, ep_rank = mesh["pp"].get_local_rank(), mesh["ep"].get_local_rank()
    local_names = names_of_experts(ep_rank, 2)
    names = {
        f"block{stage}.{local}": (f"block{stage}.{name}", part_of)
        for local, (name, part_of) in local_names.items()
    }
    return part(
        TWO_MOE,
        names,
        seed,
        options=lambda model: {
            "model_parallel": ModelParallel(
                pp=mesh["pp"], ep=mesh["ep"], experts=model.get_submodule(f"block{stage}.experts")
            )
        },
    )


TWO_MOE = {f"block{stage}.{name}": shape for stage in range(2) for name, shape in MOE.items()}

CASES = [
    Case("PP2", 2, LAYERS, pipeline()),
    Case("PP2 x 2 replicas (DDP)", 4, LAYERS, pipeline(inner="ddp")),
    Case("PP2 x FSDP2", 4, LAYERS, pipeline(inner="fsdp2")),
    Case("PP2 x HSDP", 4, LAYERS, pipeline(inner="hsdp")),
    Case("PP2 x ZeRO-2", 4, LAYERS, pipeline(inner="zero2")),
    Case(
        "PP2, each stage numbers its layers from 0",
        2,
        LAYERS,
        pipeline(renumber=True),
        reloads=False,
    ),
    Case(
        "PP2 x FSDP2, each stage numbers its layers from 0",
        4,
        LAYERS,
        pipeline(inner="fsdp2", renumber=True),
        reloads=False,
    ),
    Case("EP2, plain experts in a ModuleList", 2, MOE, experts()),
    Case("EP2, 3 experts and 1", 2, MOE, experts(uneven=True)),
    Case("EP2 x 2 replicas", 4, MOE, experts()),
    Case("EP2, plain experts beside FSDP2", 2, MOE, experts(dense="fsdp2")),
    Case("EP2, plain experts beside ZeRO-2", 2, MOE, experts(dense="zero2")),
    Case("EP2, plain experts in one parameter", 2, STACKED, stacked_experts, reloads=False),
    Case("EP2, experts as DTensor beside FSDP2", 2, STACKED, dtensor_experts),
    Case("PP2 x EP2", 4, TWO_MOE, pipeline_of_experts),
    Case("ZeRO-2 on each half of the job", 4, LAYERS, zero_on_a_half),
]
BY_NAME = {case.name: case for case in CASES}


def train(model: Part, steps: Iterable[int]) -> list[float]:
    norms = []
    for step in steps:
        model.give_gradients(step)
        norms.append(model.optimizer.clip_grad_norm_(CLIP).item())
        model.optimizer.step(zero_grad=True)
    return norms
