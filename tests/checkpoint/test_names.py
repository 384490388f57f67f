"""Saved names are those of the plain module under every nesting of wrappers."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import torch
from distributed import run_ranks
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from sharded_bf16_adamw import (
    AdamW_BF16,
    gather_full_state_dict,
    import_fp32,
    load,
    save,
    scatter_full_state_dict,
)
from sharded_bf16_adamw.checkpoint.reader import CheckpointReader
from sharded_bf16_adamw.names import clean_fqn, state_dict_key
from sharded_bf16_adamw.sharding.dtensor import to_local


class Counter(nn.Module):
    """A user's module with a child called ``module``, a buffer and an extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(4, 4, bias=False)
        self.register_buffer("count", torch.zeros(()))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(Counter(), nn.Linear(4, 3))
        self.to(torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x)


NAMES = ["block.0.module.weight", "block.1.weight", "block.1.bias"]
EXTRA_STATE = "block.0._extra_state"


def ac(module: nn.Module) -> nn.Module:
    return checkpoint_wrapper(module)


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def compiled_in_place(module: nn.Module) -> nn.Module:
    module.compile(backend="eager")
    return module


def ddp(module: nn.Module) -> nn.Module:
    return DistributedDataParallel(module)


def fsdp1(module: nn.Module, use_orig_params: bool = True) -> nn.Module:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    device = torch.device("cpu")
    return FullyShardedDataParallel(
        module, device_mesh=mesh, device_id=device, use_orig_params=use_orig_params
    )


def fsdp1_flat(module: nn.Module) -> nn.Module:
    return fsdp1(module, use_orig_params=False)


def fsdp2(module: nn.Module) -> nn.Module:
    return fully_shard(module, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))


def build(
    inner: tuple[Any, ...], outer: tuple[Any, ...], seed: int
) -> tuple[nn.Module, AdamW_BF16]:
    """Wrap a block by ``inner``, in order, and the model by ``outer``."""
    torch.manual_seed(seed)
    model: nn.Module = Net()
    for wrap in inner:
        model.block = wrap(model.block)
    for wrap in outer:
        model = wrap(model)
    return model, AdamW_BF16(model.parameters(), lr=1e-2)


def take_steps(model: nn.Module, optimizer: AdamW_BF16, steps: int) -> None:
    for step in range(steps):
        model(
            torch.full((2, 4), 1.0 + step, dtype=torch.bfloat16)
        ).float().square().sum().backward()
        optimizer.step(zero_grad=True)


def save_plain(path: str) -> nn.Module:
    """Save the model without wrappers, and return it."""
    plain, plain_optimizer = build((), (), seed=1)
    take_steps(plain, plain_optimizer, 2)
    for module in plain.modules():
        if isinstance(module, Counter):
            module.calls = 7
    save(path, 2, plain, plain_optimizer)
    return plain


def check(
    root: str, plain: nn.Module, plain_path: str, inner: tuple[Any, ...], outer: tuple[Any, ...]
) -> None:
    """Load the plain model's checkpoint in this nesting, save it, and compare bits.

    Then do the same with gathered states and imported weights.
    """
    model, optimizer = build(inner, outer, seed=2)
    load(plain_path, model, optimizer)
    assert [module.calls for module in model.modules() if isinstance(module, Counter)] == [7]
    path = save(f"{root}/wrapped", 2, model, optimizer)
    found, expected = CheckpointReader(path), CheckpointReader(plain_path)
    assert (
        found.manifest.groups[0].params == NAMES
        and found.manifest.values == expected.manifest.values
    )
    kept = {key for key in expected.infos if not key.startswith("rng.")}
    assert {key for key in found.infos if not key.startswith("rng.")} == kept
    assert all(torch.equal(found.read(key), expected.read(key)) for key in kept)
    full = gather_full_state_dict(model, optimizer)
    assert not full or sorted(full["state"]) == sorted(full["param_groups"][0]["params"]) == sorted(
        NAMES
    )
    for state in optimizer.state.values():
        for value in state.values():
            to_local(value).zero_()
    scatter_full_state_dict(model, optimizer, full)
    found = CheckpointReader(save(f"{root}/scattered", 2, model, optimizer))
    assert all(torch.equal(found.read(key), expected.read(key)) for key in kept)
    weights = {
        name: value.float() + 1 for name, value in plain.state_dict().items() if name != EXTRA_STATE
    }
    import_fp32(weights, model, optimizer)
    found = CheckpointReader(save(f"{root}/imported", 2, model, optimizer))
    for name, value in weights.items():
        assert torch.equal(found.read(f"model.{name}").float(), value.bfloat16().float()), name


def single_nestings() -> list[tuple[tuple[Any, ...], tuple[Any, ...]]]:
    orders = [(ac,), (compiled,), (ac, compiled), (compiled, ac)]
    places = [nesting for order in orders for nesting in (((), order), (order, ()), (order, order))]
    in_place = [
        ((ac, compiled_in_place), (compiled,)),
        ((compiled_in_place, ac), (ac, compiled_in_place)),
    ]
    return [((), ()), *places, *in_place]


def test_names_under_every_order_of_checkpointing_and_compiling(tmp_path):
    plain_path = str(tmp_path / "plain")
    plain = save_plain(plain_path)
    for index, (inner, outer) in enumerate(single_nestings()):
        check(str(tmp_path / str(index)), plain, plain_path, inner, outer)


RANKS_NESTINGS = [
    ((), (ddp, ac)),
    ((compiled, ac), (ac, ddp, compiled)),
    ((ac, compiled), (compiled, ddp)),
    ((ac, fsdp2), (fsdp2,)),
    ((ac, compiled), (fsdp2,)),
    ((compiled, ac, fsdp2), (fsdp2, ac)),
    ((fsdp1, ac), (fsdp1,)),
    ((fsdp1, compiled), (fsdp1,)),
    ((ac, compiled), (fsdp1,)),
    ((compiled, ac, fsdp1), (fsdp1, compiled)),
    ((compiled, ac), (fsdp1, compiled, ac)),
    ((fsdp1_flat, compiled), (fsdp1_flat,)),
    ((compiled, ac, fsdp1_flat), (fsdp1_flat, compiled)),
]


def nestings_worker(rank: int, world: int, root: str, indices: list[int]) -> list[str]:
    compiled(nn.Linear(1, 1))  # imports dynamo, whose objects FSDP1 would search
    gc.collect()
    gc.freeze()
    failed = []
    plain_path = f"{root}/plain"
    plain = save_plain(plain_path)
    for index in indices:
        inner, outer = RANKS_NESTINGS[index]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                check(f"{root}/{index}", plain, plain_path, inner, outer)
            except Exception as error:
                import traceback

                traceback.print_exc()
                nesting = [[wrap.__name__ for wrap in wraps] for wraps in (inner, outer)]
                failed.append(f"{nesting}: {type(error).__name__} {error}")
    return failed


def test_names_under_every_order_of_parallel_wrappers(tmp_path):
    assert run_ranks(2, nestings_worker, str(tmp_path), list(range(len(RANKS_NESTINGS)))) == [
        [],
        [],
    ]


def test_user_module_called_module_keeps_its_segment():
    model = compiled(ac(Net()))
    wrapped = [name for name, _ in model.named_parameters()]
    assert wrapped != NAMES and [clean_fqn(model, name) for name in wrapped] == NAMES
    assert [
        clean_fqn(model, key)
        for key in model.state_dict()
        if key.rpartition(".")[2] in ("weight", "bias")
    ] == NAMES
    assert [state_dict_key(model, name) for name in NAMES] == NAMES, (
        "keys of the state dict do not name the outermost wrappers"
    )
    inner = nn.Sequential(compiled(Counter()))
    assert state_dict_key(inner, "0.module.weight") == "0._orig_mod.module.weight"
