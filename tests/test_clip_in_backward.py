"""Clipping inside the backward pass, by the previous step's norm or by each parameter's own."""

import copy
import math

import pytest
import torch
from small_optimizers import BF16, equal, snapshot
from torch import nn

from sharded_bf16_adamw import AdamW_BF16, ClipInBackward, load, save
from sharded_bf16_adamw.grad_norm import GradNorm
from sharded_bf16_adamw.kernels import clip_coefficient
from sharded_bf16_adamw.sharding.torch_managed import TorchManaged
from sharded_bf16_adamw.step_in_backward import batch
from sharded_bf16_adamw.step_in_backward.clip import PreviousStepClip

WIDTH = 16


@pytest.fixture(params=[1, 2 * 2 * WIDTH * WIDTH])
def batch_bytes(request, monkeypatch):
    """Update in batches of one parameter, and of two weights."""
    monkeypatch.setattr(batch, "BATCH_BYTES", request.param)


def make_model():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)]
    return nn.Sequential(*layers).to(BF16)


def make_loss(model, step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(4, WIDTH, generator=generator).to(BF16)
    return 3 ** (step % 4) / 30 * model(x).float().square().sum()


def groups_of(model):
    """Return two groups, so that batches hold parameters of both."""
    params = list(model.parameters())
    return [{"params": params[::2]}, {"params": params[1::2], "lr": 3e-3}]


def train_in_backward(model, optimizer, steps):
    norms = []
    for step in steps:
        make_loss(model, step).backward()
        optimizer.step()
        norms.append(optimizer.previous_grad_norm)
    return norms


def train_with_scales(model, optimizer, steps, max_norm):
    """Take plain steps, each with the scale that the previous step's norm gives."""
    norms, scale = [], None
    for step in steps:
        make_loss(model, step).backward()
        norm = optimizer.clip_grad_norm_(math.inf)
        if scale is not None:
            optimizer._clip.set(scale, torch.zeros(()))
        optimizer.step(zero_grad=True)
        norms.append(norm)
        scale = clip_coefficient(norm.double().square(), max_norm)[1]
    return norms


def optimizer_of(model, **options):
    return AdamW_BF16(groups_of(model), lr=1e-2, **options)


def test_the_previous_steps_norm_scales_the_gradients(batch_bytes):
    ours, plain = make_model(), make_model()
    clipping = ClipInBackward(2.0)
    optimizer = optimizer_of(ours, step_in_backward=True, clip_in_backward=clipping)
    reference = optimizer_of(plain)
    assert optimizer.previous_grad_norm is None
    norms = train_in_backward(ours, optimizer, range(6))
    expected = train_with_scales(plain, reference, range(6), 2.0)
    assert torch.allclose(torch.stack(norms), torch.stack(expected), rtol=1e-6)
    assert min(norms) < 2.0 < max(norms), "some steps are scaled and some are not"
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
        assert all(torch.equal(x, reference.state[b][k]) for k, x in optimizer.state[a].items())


def test_each_parameter_is_scaled_by_its_own_norm(batch_bytes):
    ours, plain = make_model(), make_model()
    clipping = ClipInBackward(0.1, by="param")
    optimizer = optimizer_of(ours, step_in_backward=True, clip_in_backward=clipping)
    lrs = [1e-2, 3e-3] * 3
    references = [AdamW_BF16([p], lr) for p, lr in zip(plain.parameters(), lrs, strict=True)]
    scaled = 0
    for step in range(4):
        make_loss(ours, step).backward()
        optimizer.step()
        make_loss(plain, step).backward()
        for reference in references:
            scaled += float(reference.clip_grad_norm_(0.1)) > 0.1
            reference.step(zero_grad=True)
    assert 0 < scaled < 4 * len(references)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    assert optimizer.previous_grad_norm is None


@pytest.mark.parametrize("by", ["previous_step", "param"])
def test_gradients_set_by_hand_are_clipped_like_the_others(by, batch_bytes):
    by_hand, by_hooks = make_model(), make_model()
    results = []
    for model in (by_hand, by_hooks):
        clipping = ClipInBackward(2.0, by)
        optimizer = optimizer_of(model, step_in_backward=True, clip_in_backward=clipping)
        for step in range(5):
            loss = make_loss(model, step)
            if model is by_hand and step % 2:
                params = list(model.parameters())
                for param, grad in zip(params, torch.autograd.grad(loss, params), strict=True):
                    param.grad = grad
            else:
                loss.backward()
            optimizer.step()
            assert all(param.grad is None for param in model.parameters())
        results.append((list(model.parameters()), optimizer.previous_grad_norm))
    assert all(map(torch.equal, results[0][0], results[1][0]))
    if by == "previous_step":
        assert torch.allclose(results[0][1], results[1][1], rtol=1e-6)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_the_step_after_a_norm_that_is_not_finite_is_not_scaled(value):
    weight = nn.Parameter(torch.ones(4, dtype=BF16))
    other = nn.Parameter(torch.ones(4, dtype=BF16))
    options = {"step_in_backward": True, "clip_in_backward": ClipInBackward(1e-3)}
    optimizer = AdamW_BF16([weight, other], lr=1e-2, **options)
    (other * value).sum().backward()
    optimizer.step()
    weight.sum().backward()
    optimizer.step()
    assert optimizer.state[weight]["exp_avg"].tolist() == pytest.approx([0.1] * 4, rel=0.01)
    weight.sum().backward()
    optimizer.step()  # scaled by 1e-3 / 2
    assert optimizer.state[weight]["exp_avg"].tolist() == pytest.approx([0.09] * 4, rel=0.01)


def test_a_step_without_gradients_has_norm_0():
    model = make_model()
    optimizer = optimizer_of(model, step_in_backward=True, clip_in_backward=ClipInBackward(1.0))
    train_in_backward(model, optimizer, range(1))
    optimizer.step()
    assert optimizer.previous_grad_norm == 0


def test_a_step_without_parameters_has_norm_0():
    """A pipeline stage may have no parameters of any group."""
    optimizer = AdamW_BF16(
        [{"params": []}], lr=1e-2, step_in_backward=True, clip_in_backward=ClipInBackward(1.0)
    )
    optimizer.step()
    assert optimizer.previous_grad_norm == 0


def test_each_stream_computes_the_scale_for_itself():
    """A shared scale would make one stream wait for another."""
    groups = [{"params": [], "previous_grad_sum_sq": torch.tensor(4.0, dtype=torch.float64)}]
    clip = PreviousStepClip(1.0, groups, GradNorm(TorchManaged()), None)
    cpu, streams = torch.device("cpu"), ("compute", "reduce-scatter")
    scales = [clip.scale(cpu, stream) for stream in streams]
    assert scales[0] is not scales[1] and scales[0] == scales[1] == pytest.approx(0.5)
    assert all(
        clip.scale(cpu, stream) is each for stream, each in zip(streams, scales, strict=True)
    )


def restored(how, model, optimizer, path):
    if how == "deepcopy":
        return copy.deepcopy((model, optimizer))
    other = make_model()
    new = optimizer_of(other, step_in_backward=True, clip_in_backward=ClipInBackward(1.0))
    if how == "state_dict":
        other.load_state_dict(model.state_dict())
        new.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        save(path, 3, model, optimizer)
        load(path, other, new)
    return other, new


@pytest.mark.parametrize("how", ["state_dict", "checkpoint", "deepcopy"])
def test_the_norm_is_part_of_the_state(how, tmp_path):
    model = make_model()
    optimizer = optimizer_of(model, step_in_backward=True, clip_in_backward=ClipInBackward(1.0))
    train_in_backward(model, optimizer, range(3))
    assert optimizer.previous_grad_norm > 1.0
    other, resumed = restored(how, model, optimizer, tmp_path)
    train_in_backward(model, optimizer, range(3, 5))
    train_in_backward(other, resumed, range(3, 5))
    assert equal(*map(snapshot, (optimizer, resumed)))


def test_an_abandoned_step_keeps_the_previous_steps_norm(batch_bytes):
    model = make_model()
    optimizer = optimizer_of(model, step_in_backward=True, clip_in_backward=ClipInBackward(2.0))
    (norm,) = train_in_backward(model, optimizer, range(1))
    make_loss(model, 3).backward()
    optimizer.abandon_step()
    assert torch.equal(optimizer.previous_grad_norm, norm)


class TestRefused:
    def test_without_step_in_backward(self):
        with pytest.raises(ValueError, match=r"call optimizer.clip_grad_norm_\(max_norm\)"):
            optimizer_of(make_model(), clip_in_backward=ClipInBackward(1.0))

    @pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan])
    def test_a_norm_that_is_not_positive(self, max_norm):
        with pytest.raises(ValueError, match="it must be positive"):
            ClipInBackward(max_norm)

    def test_another_rule(self):
        with pytest.raises(ValueError, match="must be 'previous_step' or 'param'"):
            ClipInBackward(1.0, by="layer")

    def test_the_call_names_the_option(self):
        optimizer = optimizer_of(make_model(), step_in_backward=True)
        with pytest.raises(RuntimeError, match="clip_in_backward=ClipInBackward"):
            optimizer.clip_grad_norm_(1.0)
