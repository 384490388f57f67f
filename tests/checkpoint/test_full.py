"""Gather the full optimizer state on rank 0 and scatter it, under every layout, bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bits import assert_same_bits
from distributed import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sharded_bf16_adamw import AdamW_BF16
from sharded_bf16_adamw.checkpoint import object_collectives, transport
from sharded_bf16_adamw.checkpoint.full_state_dict import (
    _names_and_groups,
    gather_full_state_dict,
    scatter_full_state_dict,
)
from sharded_bf16_adamw.sharding import collectives
from sharded_bf16_adamw.sharding.dtensor import to_local

from .layouts import BY_NAME, LAYOUTS, Layout, everything, train

WEIGHTS = {
    f"{layer}.{kind}"
    for layer in ("up", "down", "precise", "last", "unused")
    for kind in ("weight", "bias")
}


CROSSED = ("DDP", "FSDP1", "FSDP2", "ZeRO-2")  # also scatter the state of another world size


def layouts_on(world: int) -> list[Layout]:
    return [
        layout
        for layout in LAYOUTS
        if world in layout.worlds and (world != 3 or layout.name in CROSSED)
    ]


def flat(full: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return a gathered state in the form of :func:`layouts.everything`, without the weights."""
    states = {
        f"{fqn}.{key}": value
        for fqn, state in full["state"].items()
        for key, value in state.items()
    }
    options = {
        fqn: {k: v for k, v in group.items() if k != "params"}
        for group in full["param_groups"]
        for fqn in group["params"]
    }
    return states, options


def states_of(
    module: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    values, options = everything(module, optimizer)
    return {key: value for key, value in values.items() if key not in WEIGHTS}, options


def assert_same(
    found: tuple[dict[str, Any], dict[str, Any]],
    expected: tuple[dict[str, Any], dict[str, Any]],
    where: str,
) -> None:
    """Assert equal bits. A missing state (of a parameter without a gradient) equals zeros."""
    for key in found[0].keys() | expected[0].keys():
        if key in found[0] and key in expected[0]:
            assert_same_bits(found[0][key], expected[0][key], f"{where}: {key}")
        else:
            assert key.startswith("unused."), (where, key)
            assert not {**found[0], **expected[0]}[key].any()
    assert as_tuples(found[1]) == as_tuples(expected[1]), where


def as_tuples(options: dict[str, Any]) -> dict[str, Any]:
    """Turn betas into tuples; torch makes lists of them."""
    return {fqn: {**group, "betas": tuple(group["betas"])} for fqn, group in options.items()}


def round_trip_worker(
    rank: int, world: int, given: dict[str, Any] | None
) -> dict[str, dict[str, Any]]:
    """Gather in each layout, scatter into another optimizer, and scatter another run's state.

    Returns:
        On rank 0 the gathered states, by layout.
    """
    results = {}
    for seed, layout in enumerate(layouts_on(world)):
        module, optimizer = layout.build(world, seed)
        train(module, optimizer, 3)
        expected = states_of(module, optimizer)
        full = gather_full_state_dict(module, optimizer)
        if rank == 0:
            assert_same(flat(full), expected, layout.name)
            assert all(
                value.is_contiguous() and value.device.type == "cpu"
                for value in flat(full)[0].values()
            )
            results[layout.name] = copy.deepcopy(full)
        else:
            assert full == {}
        train(module, optimizer, 1)
        if rank == 0:
            assert_same(
                flat(full),
                flat(results[layout.name]),
                f"{layout.name}: the gathered state must not follow the training",
            )
        sources = [(full, layout.name), (given, "another run")]
        for source, name in sources if layout.name in CROSSED else sources[:1]:
            other, fresh = layout.build(world, seed=100)
            train(other, fresh, 1)
            scatter_full_state_dict(other, fresh, source if rank == 0 else None)
            assert_same(
                states_of(other, fresh),
                expected if name == layout.name else flat(given),
                f"{name} into {layout.name}",
            )
            train(other, fresh, 1)
            assert {
                int(state["step"]) for state in fresh.state.values() if state["step"].numel()
            } <= {0, 1, 4}
    return results


def test_gather_equals_torchs_and_scatter_inverts_it_under_every_layout():
    given = single_process_state()
    for world in (4, 3):
        gathered = run_ranks(world, round_trip_worker, given)[0]
        assert gathered.keys() == {layout.name for layout in layouts_on(world)}
        given = gathered["FSDP2"]  # scattered by the next run, which has another world size


def single_process_state() -> dict[str, Any]:
    module, optimizer = LAYOUTS[0].build(1, seed=50)
    train(module, optimizer, 3)
    return gather_full_state_dict(module, optimizer)


def test_gathered_state_does_not_share_memory_with_the_optimizer():
    module, _ = LAYOUTS[0].build(1, seed=53)
    optimizer = AdamW_BF16(module.parameters(), lr=torch.tensor(0.25))
    optimizer.param_groups[0]["mine"] = [1, 2]
    train(module, optimizer, 2)
    full = gather_full_state_dict(module, optimizer)
    gathered = copy.deepcopy(full)
    live = {
        value.untyped_storage().data_ptr()
        for state in optimizer.state.values()
        for value in state.values()
    }
    states = [value for state in full["state"].values() for value in state.values()]
    assert not live & {value.untyped_storage().data_ptr() for value in states}
    with torch.no_grad():
        for state in optimizer.state.values():
            for value in state.values():
                value.add_(1)
        optimizer.param_groups[0]["lr"].add_(1)
        optimizer.param_groups[0]["mine"].append(3)
    assert_same(flat(full), flat(gathered), "the gathered state must not follow the optimizer")
    for value in states:
        value.fill_(7)
    assert not any(
        bool((value == 7).any()) for state in optimizer.state.values() for value in state.values()
    ), "the optimizer must not follow the gathered state"


def test_gathered_state_is_interchangeable_with_torchs():
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    full = single_process_state()
    module, optimizer = LAYOUTS[0].build(1, seed=51)
    train(module, optimizer, 1)
    set_optimizer_state_dict(
        module,
        optimizer,
        copy.deepcopy(full),
        options=StateDictOptions(full_state_dict=True, strict=False),
    )
    assert_same(states_of(module, optimizer), flat(full), "torch loads ours")
    of_torch = get_optimizer_state_dict(
        module, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    module, optimizer = LAYOUTS[0].build(1, seed=52)
    scatter_full_state_dict(module, optimizer, of_torch)
    assert_same(states_of(module, optimizer), flat(full), "ours loads torch's")


def after_evaluation_worker(rank: int, world: int) -> dict[str, Any]:
    """Gather while FSDP2's root is unsharded, after a forward pass without a backward."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).bfloat16()
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    optimizer = AdamW_BF16(model.parameters(), lr=1e-2)
    model(torch.ones(2, 4).bfloat16()).float().sum().backward()
    optimizer.step(zero_grad=True)
    before = gather_full_state_dict(model, optimizer)
    with torch.no_grad():
        model(torch.ones(2, 4).bfloat16())
    after = gather_full_state_dict(model, optimizer)
    assert before.keys() == after.keys()
    if rank == 0:
        assert_same(flat(after), flat(before), "after an evaluation")
    return after


def test_gather_right_after_an_evaluation():
    full = run_ranks(2, after_evaluation_worker)[0]
    assert set(full["state"]) == {"0.weight", "0.bias", "1.weight", "1.bias"}


def no_copy_worker(rank: int, world: int) -> int:
    """Record the buffers of sends and receives, which must be the states' own memory."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).bfloat16()
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    optimizer = AdamW_BF16(model.parameters(), lr=1e-2)
    optimizer.init_state()
    own = {
        state.to_local().data_ptr()
        for states in optimizer.state.values()
        for key, state in states.items()
        if key != "step"
    }
    used = []
    original = transport._cpu_buffer

    def recording(*args: Any, **kwargs: Any) -> torch.Tensor:
        buffer = original(*args, **kwargs)
        used.append(buffer.data_ptr())
        return buffer

    transport._cpu_buffer = recording
    try:
        full = gather_full_state_dict(model, optimizer)
        scatter_full_state_dict(model, optimizer, full)
    finally:
        transport._cpu_buffer = original
    if rank > 0:
        assert len(set(used) & own) == 12
        assert len(set(used) - own) <= 4, "the step counts, which every rank holds"
    return len(used)


def test_other_ranks_send_and_receive_without_copies():
    assert all(count >= 24 for count in run_ranks(3, no_copy_worker)[1:])


def nccl_worker(rank: int, world: int, name: str) -> int:
    """Let the default group stand for NCCL: it takes no CPU tensors and must not be used."""
    model, optimizer = BY_NAME[name].build(world, seed=0)
    train(model, optimizer, 1)
    expected = gather_full_state_dict(model, optimizer)
    served, exchanged = collectives.served_devices, []
    # Errors may be exchanged over NCCL: their flag moves to the GPU, which this test lacks.
    flag_device = object_collectives.device_for
    object_collectives.device_for = lambda group, device: device
    originals = {function: getattr(dist, function) for function in ("send", "recv", "broadcast")}

    def of_group(function: str) -> Any:
        def call(tensor: torch.Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
            assert group not in (None, dist.group.WORLD), f"{function} over NCCL"
            exchanged.append(function)
            return originals[function](tensor, *args, group=group, **kwargs)

        return call

    collectives.served_devices = lambda group=None: (
        ["cuda"] if group in (None, dist.group.WORLD) else served(group)
    )
    try:
        for function in originals:
            setattr(dist, function, of_group(function))
        full = gather_full_state_dict(model, optimizer)
        for state in optimizer.state.values():
            for value in state.values():
                to_local(value).zero_()
        scatter_full_state_dict(model, optimizer, full)
    finally:
        collectives.served_devices = served
        object_collectives.device_for = flag_device
        for function, original in originals.items():
            setattr(dist, function, original)
    again = gather_full_state_dict(model, optimizer)
    for found in (full, again):
        assert (
            found == expected == {}
            if rank
            else assert_same(flat(found), flat(expected), name) is None
        )
    return len(exchanged)


@pytest.mark.parametrize("name", ["DDP", "FSDP2"])
def test_transfers_do_not_use_nccl(name):
    """Each rank transfers something, and nothing over the default group."""
    first, *others = run_ranks(3, nccl_worker, name)
    assert first > 0 and all(count > 0 for count in others)


def test_scatter_keeps_the_memory_of_a_tensor_lr():
    module, _ = LAYOUTS[0].build(1, seed=0)
    optimizer = AdamW_BF16(module.parameters(), lr=torch.tensor(0.25))
    train(module, optimizer, 1)
    full = gather_full_state_dict(module, optimizer)
    lr = optimizer.param_groups[0]["lr"]
    lr.fill_(0.5)
    scatter_full_state_dict(module, optimizer, full)
    assert optimizer.param_groups[0]["lr"] is lr and float(lr) == 0.25


def test_other_ranks_get_options_that_do_not_name_a_gpu_of_rank_0():
    lr = torch.tensor(0.25)  # stands for one on a GPU
    full = {"state": {}, "param_groups": [{"params": ["weight"], "lr": lr}]}
    _, (group,) = _names_and_groups(full)
    assert group == full["param_groups"][0] and group["lr"] is not lr, "a copy in CPU memory"


def test_scatter_zeroes_states_that_the_full_state_lacks():
    full = single_process_state()
    del full["state"]["up.weight"]
    module, optimizer = LAYOUTS[0].build(1, seed=4)
    train(module, optimizer, 2)
    assert optimizer.state[module.up.weight]["exp_avg"].any()
    scatter_full_state_dict(module, optimizer, full)
    assert not any(value.any() for value in optimizer.state[module.up.weight].values())
    assert optimizer.state[module.down.weight]["step"] == 3


def test_scatter_keeps_the_schedule_of_the_optimizer():
    full = single_process_state()
    constant_module, _ = LAYOUTS[0].build(1, seed=1)
    named = dict(constant_module.named_parameters())
    groups = [
        {"params": [named[name] for name in group["params"]]} for group in full["param_groups"]
    ]
    constant = AdamW_BF16(groups, lr=0.125)
    scatter_full_state_dict(constant_module, constant, full)
    assert (
        constant.param_groups[0]["scheduled_lr"] is None
        and constant.param_groups[0]["schedule_step"] == 3
    )
    module, optimizer = LAYOUTS[0].build(1, seed=2)
    scatter_full_state_dict(module, optimizer, full)
    group = optimizer.param_groups[0]
    assert group["scheduled_lr"] == group["lr"] == full["param_groups"][0]["lr"]
    train(module, optimizer, 1)
    assert group["lr"] == optimizer.lr_function(3)


def remove(full, fqn, key):
    del full["state"][fqn][key]


def replace(full, fqn, key, value):
    full["state"][fqn][key] = value


WRONG = [
    (lambda full: full.pop("state"), 'rank 0 must pass a dict with "state" and "param_groups"'),
    (lambda full: remove(full, "up.weight", "correction"), "missing key up.weight.correction"),
    (
        lambda full: replace(full, "up.weight", "exp_avg", torch.zeros(12, 5)),
        r"size mismatch for up.weight.exp_avg: saved as \(12, 5\), but \(12, 6\) in the model",
    ),
    (
        lambda full: replace(full, "up.bias", "exp_avg", torch.zeros(12)),
        "dtype mismatch for up.bias.exp_avg: saved as torch.float32, but torch.bfloat16 in",
    ),
    (
        lambda full: replace(full, "up.bias", "extra", torch.zeros(12)),
        "unexpected key up.bias.extra",
    ),
    (
        lambda full: full["state"].update(other={}),
        "unexpected parameter other",
    ),
    (
        lambda full: full["param_groups"][0]["params"].remove("up.bias"),
        "no saved group has all parameters of group 0",
    ),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message[:30] for _, message in WRONG])
def test_scatter_refuses_a_state_that_does_not_fit_and_changes_nothing(change, message):
    full = single_process_state()
    change(full)
    module, optimizer = LAYOUTS[0].build(1, seed=3)
    train(module, optimizer, 2)
    before = states_of(module, optimizer)
    with pytest.raises(
        ValueError, match=f"the full state is of another model or optimizer: {message}"
    ):
        scatter_full_state_dict(module, optimizer, full)
    assert_same(states_of(module, optimizer), before, "nothing changes")


def refused_everywhere_worker(rank: int, world: int) -> list[str]:
    """Scatter a wrong state, which only rank 0 has."""
    messages = []
    module, optimizer = BY_NAME["FSDP2"].build(world, 0)
    optimizer.init_state()
    sharded = {"up.weight": optimizer.state[module.up.weight]}
    for given in (
        {},
        {"state": sharded, "param_groups": [{"params": ["up.weight"]}]},
        {"state": {"up.weight": 5}, "param_groups": [{"params": ["up.weight"]}]},
        {"state": {}, "param_groups": [{}]},
    ):
        module, optimizer = BY_NAME["FSDP2"].build(world, 0)
        with pytest.raises(
            (ValueError, RuntimeError),
            match=r"the full state (is of another|of up)|cannot scatter the full state",
        ) as caught:
            scatter_full_state_dict(module, optimizer, given if rank == 0 else None)
        messages.append(str(caught.value))
        assert not optimizer.state
    return messages


def test_every_rank_raises_the_error_of_rank_0():
    first, second = run_ranks(2, refused_everywhere_worker)
    assert first == second
    assert first[1] == (
        "the full state of up.weight: exp_avg is a shard of a tensor; gather the full state dict "
        "first"
    )


def test_gather_refuses_a_state_that_is_not_a_tensor():
    module, optimizer = LAYOUTS[0].build(1, seed=0)
    train(module, optimizer, 1)
    optimizer.state[next(module.parameters())]["note"] = "text"
    with pytest.raises(
        ValueError,
        match=r"the state 'note' of parameter up.weight is str, but only tensors can be gathered",
    ):
        gather_full_state_dict(module, optimizer)
