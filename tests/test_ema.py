"""EMA: an unbiased average of the true weights, in bfloat16, that can take the model's place."""

import copy

import pytest
import torch
from small_optimizers import BF16, equal, give_gradients, param, snapshot, train
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sharded_bf16_adamw import EMA, AdamW_BF16, save
from sharded_bf16_adamw.ema import _update_chunk_, stochastic_sum
from sharded_bf16_adamw.kernels.reference import lowbias32


def build(*params, decay=0.9, **options):
    model = nn.ParameterList(params or [param(4, 8), param(8, seed=1)])
    optimizer = AdamW_BF16(model.parameters(), lr=1e-2, **options)
    return model, optimizer, EMA(model, optimizer, decay=decay)


def train_with(optimizer, ema, steps):
    for step in range(steps):
        give_gradients([p for group in optimizer.param_groups for p in group["params"]], seed=step)
        optimizer.step(zero_grad=True)
        ema.update()


def averages(optimizer):
    return [state["ema"].clone() for state in optimizer.state.values()]


def true_weights(optimizer):
    return [weight for _, weight in optimizer.true_weights()]


def ulps(x):
    return (torch.frexp(x.float())[1].double() - 8).exp2()


# --------------------------------------------------------------------------------------- rounding


@pytest.mark.parametrize("size", [1e1, 1e-1, 1e-3, 1e-5, 1e-7, 1e-9])
def test_rounded_sum_is_unbiased_for_every_size_of_change(size):
    n = 1 << 17
    generator = torch.Generator().manual_seed(0)
    x = (1.0 + torch.rand(n, generator=generator)).bfloat16().float()
    x *= torch.randint(0, 2, (n,), generator=generator) * 2 - 1
    delta = size * torch.randn(n, generator=generator)
    bits = lowbias32(torch.arange(n, dtype=torch.int32))
    error = (stochastic_sum(x, delta, bits).double() - x.double() - delta.double()) / ulps(x)
    for each in (error, error * delta.sign(), error * x.sign()):
        assert abs(each.mean()) < 4 * (each.std() / n**0.5).clamp(min=1e-9)


def test_one_draw_in_all_positions_moves_the_right_share_of_elements():
    """Over equidistant draws the number that rounds up is exact, also below 2^-17 of a step."""
    n = 1 << 16
    for share in (0.75, 0.5, 2.0**-14, 2.0**-16):
        x = torch.ones(n)
        bits = (torch.arange(n) * (1 << 16) - (1 << 31)).int() + (1 << 15)
        down = stochastic_sum(x, torch.full((n,), -share * 2.0**-8), bits)
        up = stochastic_sum(x, torch.full((n,), share * 2.0**-7), bits)
        assert int((up == 1 + 2.0**-7).sum()) == share * n == n - int((up == 1).sum())
        assert int((down == 1 - 2.0**-8).sum()) == share * n == n - int((down == 1).sum())


def test_changes_below_the_resolution_of_float32_move_the_right_share():
    n, x = 1 << 16, torch.full((1 << 16,), 1.5)
    lowest = torch.arange(n, dtype=torch.int32)  # draws below 2^-16
    highest = lowest | -(1 << 16)
    for share in (0.25, 0.75):
        delta = torch.full((n,), share * 2.0**-23)  # 2^-16 of a bf16 step
        for sign in (1.0, -1.0):
            assert (
                int((stochastic_sum(sign * x, sign * delta, lowest) != sign * x).sum()) == share * n
            )
            moved = stochastic_sum(sign * x, -sign * delta, highest) != sign * x
            assert int(moved.sum()) == share * n
            assert torch.equal(
                stochastic_sum(sign * x, sign * delta, highest), (sign * x).bfloat16()
            )


def test_inf_and_nan_stay():
    nan, inf = torch.nan, torch.inf
    x, delta = torch.tensor([inf, -inf, nan, 0.0]), torch.tensor([0.0, 1.0, 0.0, nan])
    found = stochastic_sum(x, delta, torch.full((4,), -1, dtype=torch.int32))
    assert torch.equal(found.isnan(), torch.tensor([False, False, True, True]))
    assert found[:2].tolist() == [inf, -inf]


def test_average_follows_where_bfloat16_averaged_model_stalls():
    """Weights near 1 move by 3e-4 a step; 0.001 of the distance is below half a bf16 ulp."""
    start = (1.0 + torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) / 2).to(BF16)
    model = nn.ParameterList([nn.Parameter(start.clone())])
    optimizer = AdamW_BF16(model.parameters(), lr=3e-4, weight_decay=0.0)
    ema = EMA(model, optimizer, decay=0.999)
    torchs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    torchs.update_parameters(model)  # the first call copies
    exact = start.double()
    for step in range(300):
        noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
        model[0].grad = (1 + 0.3 * noise).to(BF16)  # equal elements would get equal draws
        optimizer.step(zero_grad=True)
        ema.update()
        torchs.update_parameters(model)
        exact += 0.001 * (true_weights(optimizer)[0].double() - exact)
    moved = (exact - start.double()).mean().item()
    assert -0.015 < moved < -0.01
    assert torch.equal(torchs.module[0], start)
    found = (averages(optimizer)[0].double() - start.double()).mean().item()
    assert found == pytest.approx(moved, rel=0.02)


def test_average_of_constant_weights_converges_to_the_true_weight():
    """The time-mean is ``p + correction``, which bf16 cannot hold, and not ``p``."""
    model, optimizer, ema = build(param(2048), decay=0.9)
    p, step = model[0], ulps(model[0]).float()
    state = optimizer.state[p]
    state["correction"].copy_(0.3 * step)
    mean = torch.zeros(2048, dtype=torch.float64)
    for _ in range(400):
        ema.update()
        mean += state["ema"].double() / 400
    offset = (mean - p.detach().double()) / step
    assert offset.mean().item() == pytest.approx(0.3, abs=0.01)
    assert offset.std() < 0.15


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_the_bits_of_the_cpu():
    patterns = torch.randint(-(1 << 15), 1 << 15, (3, 1 << 20)).to(torch.int16).view(BF16)
    results = []
    for device in ("cpu", "cuda"):
        e, p, c = patterns.to(device, copy=True)
        _update_chunk_(e, p, c, weight=2.0**-10, key=0x9E3779B9)
        results.append(e.cpu())
    number = ~results[0].isnan()
    assert torch.equal(number, ~results[1].isnan())
    assert torch.equal(results[0][number].view(torch.int16), results[1][number].view(torch.int16))


# ------------------------------------------------------------------------------------- the average


def test_decay_zero_is_the_weight_and_decay_one_the_start():
    for decay, expected in ((0.0, "weight"), (1.0, "start")):
        model, optimizer, ema = build(param(64), decay=decay)
        start = model[0].detach().clone()
        train_with(optimizer, ema, 3)
        target = start if expected == "start" else true_weights(optimizer)[0]
        distance = (averages(optimizer)[0].float() - target).abs() / ulps(target).float()
        assert distance.max() < 1
        assert expected == "weight" or torch.equal(averages(optimizer)[0], start)


def test_float32_parameters_have_a_float32_average():
    model, optimizer, ema = build(param(16, dtype=torch.float32), param(4), decay=0.5)
    expected = model[0].detach().clone()
    for step in range(4):
        give_gradients(model, seed=step)
        optimizer.step()
        ema.update()
        expected += (model[0] - expected).detach() * 0.5
    assert optimizer.state[model[0]]["ema"].dtype == torch.float32
    assert torch.equal(optimizer.state[model[0]]["ema"], expected)


def test_permuted_elements_have_permuted_averages_and_no_generator_is_used():
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    results = []
    for permutation in (torch.arange(300), order):
        values = param(300).detach()[permutation]
        model, optimizer, ema = build(nn.Parameter(values.view(3, 100).t()))
        before = torch.get_rng_state()
        for step in range(5):
            gradient = param(300, seed=step + 1).detach()[permutation]
            model[0].grad = gradient.view(3, 100).t()
            optimizer.step(zero_grad=True)
            ema.update()
        assert torch.equal(before, torch.get_rng_state())
        results.append(averages(optimizer)[0].t().flatten())
    assert torch.equal(results[0][order], results[1])


def test_parameters_without_gradient_and_late_groups_are_averaged():
    model, optimizer, ema = build(param(8), param(8, seed=1), decay=0.0)
    model[1].requires_grad_(False)
    late = param(8, seed=2)
    optimizer.add_param_group({"params": [late]})
    for p in (model[0], late):
        p.grad = torch.ones_like(p)
    optimizer.step()
    ema.update()
    assert torch.equal(optimizer.state[model[1]]["ema"], model[1])
    assert torch.equal(optimizer.state[late]["ema"], late)
    assert [group["ema_updates"] for group in optimizer.param_groups] == [1, 1]


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_average_with_step_in_backward(dtype):
    model, optimizer, ema = build(param(8, dtype=dtype), step_in_backward=True)
    (model[0].float().sum()).backward()
    with pytest.raises(RuntimeError, match=r"ema\.update\(\)"):
        ema.update()
    with pytest.raises(RuntimeError, match=r"ema\.swapped\(\)"), ema.swapped():
        pass
    optimizer.step()
    ema.update()
    before = snapshot(optimizer)
    with ema.swapped(), pytest.raises(RuntimeError, match=r"inside ema\.swapped\(\), so the opt"):
        (model[0].float().sum()).backward()
    assert equal(snapshot(optimizer), before)
    (model[0].float().sum()).backward()
    optimizer.step()
    assert not equal(snapshot(optimizer), before)


def test_wrong_arguments_are_errors():
    model = nn.ParameterList([param(4)])
    with pytest.raises(TypeError, match="AdamW_BF16, but the optimizer is of type SGD"):
        EMA(model, torch.optim.SGD(model.parameters()))
    for decay in (-0.1, 1.1, torch.nan):
        with pytest.raises(ValueError, match="Invalid decay"):
            EMA(model, AdamW_BF16(model.parameters(), lr=1.0), decay=decay)
    ema = EMA(model, AdamW_BF16(model.parameters(), lr=1.0))
    ema.decay = 0.5
    with pytest.raises(ValueError, match=r"Invalid decay: 1.1; it must be from 0 to 1"):
        ema.decay = 1.1
    assert ema.decay == 0.5


def test_average_that_could_not_be_built_is_not_in_the_way_of_another(monkeypatch):
    def fail():
        raise MemoryError

    model = nn.ParameterList([param(4, 8)])
    optimizer = AdamW_BF16(model.parameters())
    monkeypatch.setattr(optimizer, "init_state", fail)
    with pytest.raises(MemoryError) as caught:
        EMA(model, optimizer)
    monkeypatch.undo()
    EMA(model, optimizer)
    assert caught.traceback, "holds the EMA that could not be built"


def test_second_average_of_an_optimizer_is_an_error():
    """Both would move the one average in the optimizer's state."""
    model, optimizer, ema = build()
    with pytest.raises(RuntimeError, match="the optimizer has an EMA already"):
        EMA(model, optimizer, decay=0.5)
    ema.update()
    del ema
    EMA(model, optimizer, decay=0.5).update()


def test_captured_update_is_an_error_that_counts_nothing(monkeypatch):
    _, optimizer, ema = build()
    for state in optimizer.state.values():
        del state["ema"]  # as loaded from a checkpoint without averages
    monkeypatch.setattr("sharded_bf16_adamw.ema.is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match=r"a CUDA graph captures ema\.update\(\)"):
        ema.update()
    assert not any("ema" in state for state in optimizer.state.values())
    assert not any("ema_updates" in group for group in optimizer.param_groups)


# ------------------------------------------------------------------------------------------ swapped


def test_swapped_puts_the_average_in_and_restores_every_bit():
    model, optimizer, ema = build(param(4, 8), param(6, dtype=torch.float32))
    train_with(optimizer, ema, 3)
    before, average = snapshot(optimizer), averages(optimizer)
    assert not torch.equal(model[0], average[0])
    with ema.swapped():
        assert all(torch.equal(p, e) for p, e in zip(model, average, strict=True))
        assert all(
            torch.equal(w, e.float()) for w, e in zip(true_weights(optimizer), average, strict=True)
        )
    assert equal(snapshot(optimizer), before)
    with pytest.raises(ZeroDivisionError), ema.swapped():
        raise ZeroDivisionError
    assert equal(snapshot(optimizer), before)


def test_swapped_that_fails_halfway_swaps_nothing(monkeypatch):
    model, optimizer, ema = build(param(4, 8), param(6))
    train_with(optimizer, ema, 3)
    before = snapshot(optimizer)
    exchange = ema._exchange

    def full_memory(p, average):
        if p is model[1]:
            raise torch.OutOfMemoryError
        exchange(p, average)

    monkeypatch.setattr(ema, "_exchange", full_memory)
    with pytest.raises(torch.OutOfMemoryError), ema.swapped():
        raise AssertionError("not entered")
    assert equal(snapshot(optimizer), before)
    train_with(optimizer, ema, 1)
    optimizer.state_dict()


def test_swapped_changes_nothing_in_the_training_after_it():
    results = []
    for evaluates in (False, True):
        _, optimizer, ema = build()
        train_with(optimizer, ema, 2)
        if evaluates:
            with ema.swapped():
                pass
        train_with(optimizer, ema, 2)
        results.append(snapshot(optimizer))
    assert equal(*results)


def test_inside_swapped_the_optimizer_refuses(tmp_path):
    model, optimizer, ema = build()
    train_with(optimizer, ema, 1)
    saved = optimizer.state_dict()
    before = snapshot(optimizer)
    with ema.swapped():
        give_gradients(model)
        for call in (
            optimizer.step,
            optimizer.state_dict,
            lambda: optimizer.load_state_dict(saved),
            lambda: save(tmp_path, 0, model, optimizer),
        ):
            with pytest.raises(RuntimeError, match=r"inside ema\.swapped\(\)"):
                call()
        with pytest.raises(RuntimeError, match=r"update\(\) is called inside"):
            ema.update()
        with pytest.raises(RuntimeError, match=r"swapped\(\) is called inside"), ema.swapped():
            pass
    assert equal(snapshot(optimizer), before)
    optimizer.step()
    optimizer.state_dict()


# -------------------------------------------------------------------------------------- state dicts


def test_state_dict_carries_the_average_and_its_count():
    _, optimizer, ema = build()
    train_with(optimizer, ema, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    train_with(optimizer, ema, 2)
    expected = snapshot(optimizer)
    _, other, _ = build()
    other.load_state_dict(saved)
    for group in other.param_groups:
        assert group["ema_updates"] == 3
    _, other, ema = build()
    train_with(other, ema, 3)  # so that the weights are those at the time of the save
    other.load_state_dict(saved)
    train_with(other, ema, 2)
    assert equal(snapshot(other), expected)


def test_loaded_state_without_average_starts_one_at_the_weight():
    plain = AdamW_BF16([param(4, 8), param(8, seed=1)], lr=1e-2)
    train(plain, 2)
    model, optimizer, ema = build()
    optimizer.load_state_dict(plain.state_dict())
    with ema.swapped():
        pass
    ema.update()
    assert all(torch.equal(optimizer.state[p]["ema"], p) for p in model)


def test_average_of_another_shape_is_an_error():
    _, optimizer, _ = build(param(4, 8))
    saved = optimizer.state_dict()
    saved["state"][0]["ema"] = torch.zeros(3)
    with pytest.raises(ValueError, match="size mismatch: the loaded ema of parameter 0"):
        optimizer.load_state_dict(saved)
