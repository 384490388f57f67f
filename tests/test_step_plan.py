"""A step never uses a stale plan: it sees every change made between two steps."""

import copy

import pytest
import torch
from torch import nn

from sharded_bf16_adamw import AdamW_BF16
from sharded_bf16_adamw.kernels import cpu
from sharded_bf16_adamw.step_plan import StepPlan

BF16 = torch.bfloat16
NEEDS_ADDRESSES = pytest.mark.skipif(
    cpu.unavailable_reason() is not None,
    reason=f"only the native library keeps addresses: {cpu.unavailable_reason()}",
)


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).to(BF16)
    model[1].to(torch.float32)
    return model, AdamW_BF16(
        [
            {"params": model[0].parameters()},
            {"params": [*model[1].parameters(), *model[2].parameters()]},
        ],
        lr=1e-2,
    )


def give_gradients(optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


CHANGES = []


def changes(function):
    """Register a function that changes the model or the optimizer between two steps."""
    CHANGES.append(function)
    return function


@changes
def state_reload(model, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@changes
def state_reload_of_another_run(model, optimizer):
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["exp_avg"].mul_(2)
    optimizer.load_state_dict(saved)


@changes
def one_state_tensor_replaced(model, optimizer):
    state = optimizer.state[model[0].weight]
    state["exp_avg_sq"] = state["exp_avg_sq"].clone()


@changes
def step_replaced(model, optimizer):
    state = optimizer.state[model[0].weight]
    state["step"] = state["step"].clone()


@changes
def state_dict_of_a_parameter_replaced(model, optimizer):
    optimizer.state[model[0].weight] = {
        key: value.clone() for key, value in optimizer.state[model[0].weight].items()
    }


@changes
def state_emptied(model, optimizer):
    optimizer.state.clear()


@changes
def memory_of_a_state_replaced(model, optimizer):
    """Old code that moves states to another device does this."""
    for state in optimizer.state.values():
        for value in state.values():
            value.data = value.data.clone()


@changes
def memory_of_a_parameter_replaced(model, optimizer):
    for p in model.parameters():
        p.data = p.data.clone()


@changes
def model_moved_there_and_back(model, optimizer):
    """Like ``.to(device)``, converting the dtype and back gives parameters new memory."""
    model[0].to(torch.float64).to(BF16)


@changes
def parameter_swapped_in_its_group(model, optimizer):
    old = model[2].weight
    model[2].weight = nn.Parameter(old.detach().clone())
    params = optimizer.param_groups[1]["params"]
    params[[p is old for p in params].index(True)] = model[2].weight


@changes
def group_added(model, optimizer):
    extra = nn.Parameter(torch.ones(4, dtype=BF16))
    model.register_parameter("extra", extra)
    optimizer.add_param_group({"params": [extra], "lr": 1e-1})


@changes
def group_removed(model, optimizer):
    del optimizer.param_groups[0]


@changes
def groups_reordered(model, optimizer):
    optimizer.param_groups.reverse()


@changes
def parameter_moved_to_the_other_group(model, optimizer):
    """The concatenated parameters of all groups stay the same."""
    first, second = optimizer.param_groups
    first["params"].append(second["params"].pop(0))
    second["lr"] = 1e-4


@changes
def gradients_replaced(model, optimizer):
    """Like ``zero_grad(set_to_none=True)`` and the next backward pass."""
    for p in model.parameters():
        p.grad = None if p.grad is None else p.grad.clone()


@changes
def gradients_of_other_strides(model, optimizer):
    model[0].weight.grad = model[0].weight.grad.t().contiguous().t()


@changes
def a_gradient_missing(model, optimizer):
    model[0].weight.grad = None


@changes
def a_float32_gradient(model, optimizer):
    model[0].weight.grad_dtype = None
    model[0].weight.grad = torch.full(model[0].weight.shape, 0.3)


@changes
def state_with_a_foreign_entry(model, optimizer):
    optimizer.state[model[0].weight]["note"] = "not a tensor"


@changes
def transposed_parameter(model, optimizer):
    model[0].weight.data = model[0].weight.data.t().contiguous().t()


def run(change, clear_plans):
    """Return all weights and states after six steps, with ``change`` before the fourth."""
    model, optimizer = make()
    for step in range(6):
        give_gradients(optimizer, step)
        if step == 3:
            change(model, optimizer)
        if clear_plans:
            optimizer._step_plans.plans.clear()
        optimizer.step()
    params = list(model.parameters())
    states = [optimizer.state[p] for p in params]
    return [p.detach() for p in params] + [
        value for state in states for key, value in sorted(state.items()) if key != "note"
    ]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_next_step_sees_the_change(change):
    cached, rebuilt = run(change, False), run(change, True)
    assert all(torch.equal(a, b) for a, b in zip(cached, rebuilt, strict=True))


def test_unchanged_optimizer_reuses_its_plan():
    _, optimizer = make()
    give_gradients(optimizer, 0)
    optimizer.step(zero_grad=True)
    plans = list(optimizer._step_plans.plans)
    for step in (1, 2):
        give_gradients(optimizer, step)
        optimizer.step(zero_grad=True)
    assert len(plans) == 1 and optimizer._step_plans.plans == plans


def train_in_turns(optimizer, turns):
    """Take steps with gradients in one of two groups, as for generator and discriminator."""
    for turn in turns:
        give_gradients(optimizer, turn)
        for p in optimizer.param_groups[1 - turn]["params"]:
            p.grad = None
        optimizer.step()


def test_alternating_parameter_sets_keep_their_plans():
    _, optimizer = make()
    train_in_turns(optimizer, [0, 1])
    plans = list(optimizer._step_plans.plans)
    train_in_turns(optimizer, [0, 1, 1, 0])
    assert len(plans) == 2 and optimizer._step_plans.plans == plans


def test_step_sees_a_state_replaced_before_other_params_stepped():
    """The first group's plan becomes stale although the second group steps next."""
    results = []
    for clear_plans in (False, True):
        model, optimizer = make()
        train_in_turns(optimizer, [0, 1])
        param = model[0].weight
        optimizer.state[param] = {
            key: value.clone() + 1 for key, value in optimizer.state[param].items()
        }
        train_in_turns(optimizer, [1])
        if clear_plans:
            optimizer._step_plans.plans.clear()
        train_in_turns(optimizer, [0])
        results.append([param.detach(), *optimizer.state[param].values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_cache_drops_old_plans_and_those_of_removed_params():
    params = [nn.Parameter(torch.ones(3, dtype=BF16)) for _ in range(7)]
    optimizer = AdamW_BF16([{"params": params[:5]}, {"params": params[5:]}], lr=1e-2)
    for left_out in range(7):
        give_gradients(optimizer, left_out)
        params[left_out].grad = None
        optimizer.step()
    assert len(optimizer._step_plans.plans) == 4
    del optimizer.param_groups[1]
    optimizer.step()
    assert len(optimizer._step_plans.plans) == 1, "the others would keep removed parameters alive"


def test_step_sees_a_new_size_at_the_same_address():
    param = nn.Parameter(torch.ones(8, dtype=BF16))
    memory = param.data
    optimizer = AdamW_BF16([param], lr=1e-1)
    param.grad = torch.ones_like(param)
    optimizer.step()
    before = memory.clone()
    param.grad = None
    param.data = param.data[:4]
    param.grad = torch.ones_like(param)
    with pytest.raises(
        RuntimeError,
        match=r"parameter 0 \(shape \(4,\)\) has local shape \(4,\) but its exp_avg has \(8,\)",
    ):
        optimizer.step()
    assert torch.equal(memory, before)


@pytest.mark.parametrize("steps_before", [0, 1])
def test_gradient_of_another_size_is_rejected(steps_before):
    """A kernel would read beyond the gradient's end."""
    first, param = nn.Parameter(torch.ones(4, dtype=BF16)), nn.Parameter(torch.ones(8, dtype=BF16))
    memory = param.data
    optimizer = AdamW_BF16([("first", first), ("second", param)], lr=1e-1)
    for _ in range(steps_before):
        first.grad, param.grad = torch.ones_like(first), torch.ones_like(param)
        optimizer.step()
    param.grad, first.grad = None, torch.ones_like(first)
    param.data = memory[:4]
    param.grad = torch.ones_like(param)
    param.data = memory
    before = [first.detach().clone(), memory.clone()]
    with pytest.raises(
        RuntimeError,
        match="gradient of parameter 'second' has 4 elements, but the parameter has 8: the ",
    ):
        optimizer.step()
    assert torch.equal(first, before[0]) and torch.equal(memory, before[1])
    assert (
        optimizer.param_groups[0]["schedule_step"] == steps_before
        and len(optimizer.state) == 2 * steps_before
    )


def damaged(key, change):
    def damage(optimizer, param):
        state = optimizer.state[param]
        state[key] = change(state[key])

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda optimizer, param: setattr(param, "data", param.data.float()),
            "'w' is torch.float32 but its exp_avg is torch.bfloat16: the model",
        ),
        (
            damaged("exp_avg_sq", torch.Tensor.float),
            "'w' is torch.bfloat16 but its exp_avg_sq is torch.float32: the model was converted",
        ),
        (
            damaged("correction", lambda x: None),
            "state 'correction' of parameter 'w' is None instead of a tensor",
        ),
        (damaged("step", lambda x: 1), "state 'step' of parameter 'w' is 1 instead of a tensor"),
        (damaged("exp_avg", lambda x: x.to("meta")), "'w' is on cpu but its exp_avg is on meta"),
        (damaged("step", lambda x: torch.ones(2)), r"the step of parameter 'w' has shape \(2,\)"),
    ],
)
def test_unfit_state_error_names_the_parameter(damage, message):
    param = nn.Parameter(torch.ones(8, dtype=BF16))
    optimizer = AdamW_BF16([("w", param)], lr=1e-1)
    param.grad = torch.ones_like(param)
    optimizer.step()
    damage(optimizer, param)
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert torch.equal(param, before)


def test_converted_model_trains_after_its_states_are_dropped():
    param = nn.Parameter(torch.ones(8, dtype=BF16))
    optimizer = AdamW_BF16([param], lr=1e-1)
    param.grad = torch.ones_like(param)
    optimizer.step()
    param.grad = None
    param.data = param.data.float()
    optimizer.state.clear()
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert sorted(optimizer.state[param]) == ["exp_avg", "exp_avg_sq", "step"]


def test_step_sees_new_strides_at_the_same_address():
    results = []
    for clear_plans in (False, True):
        torch.manual_seed(0)
        param = nn.Parameter(torch.randn(4, 4).to(BF16))
        optimizer = AdamW_BF16([param], lr=1e-1)
        param.grad = torch.randn(4, 4).to(BF16)
        optimizer.step()
        param.data = param.data.t()
        if clear_plans:
            optimizer._step_plans.plans.clear()
        optimizer.step()
        results.append(param.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(memory_of_a_parameter_replaced, marks=NEEDS_ADDRESSES),
        one_state_tensor_replaced,
        step_replaced,
        pytest.param(memory_of_a_state_replaced, marks=NEEDS_ADDRESSES),
    ],
)
def test_changes_alter_the_result_of_a_stale_plan(change, monkeypatch):
    """test_next_step_sees_the_change fails if a plan is never invalid."""
    monkeypatch.setattr(StepPlan, "is_valid", lambda *_: True)
    cached, rebuilt = run(change, False), run(change, True)
    assert not all(torch.equal(a, b) for a, b in zip(cached, rebuilt, strict=True))
