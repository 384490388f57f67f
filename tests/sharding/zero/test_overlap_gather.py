"""overlap_gather: weights arrive late, but before anything reads them."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import time
import warnings
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import linear
from torch.nn.parallel import DistributedDataParallel

from sharded_bf16_adamw import AdamW_BF16, load, save

from .cases import assert_same_bits, collect, zero
from .test_static_graph import consensus_calls

WIDTH = 8


class Network:
    """A network that delivers the data of an all-gather only once somebody waits for it."""

    def __init__(self):
        self.in_flight = []
        self.events = []  # ("launch" or "wait", number of the all-gather in the step)
        self.most_in_flight = self.launched = 0
        self.failing = False

    def new_step(self):
        assert not self.in_flight
        self.events.clear()
        self.launched = 0

    def launch(self, all_gather, output, shard, **options):
        arriving = torch.empty_like(output)
        work = LateWork(self, all_gather(arriving, shard, **options), arriving, output)
        self.events.append(("launch", work.number))
        self.launched += 1
        self.in_flight.append(work)
        self.most_in_flight = max(self.most_in_flight, len(self.in_flight))
        return work


class LateWork:
    def __init__(self, network, work, arriving, output):
        self.number = network.launched
        self.network, self.work = network, work
        self.arriving, self.output = arriving, output

    def is_completed(self):
        return False

    def wait(self):
        self.work.wait()
        if self.network.failing:
            raise RuntimeError("cable cut")
        self.output.copy_(self.arriving)
        self.network.in_flight.remove(self)
        self.network.events.append(("wait", self.number))


@contextmanager
def late_network():
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    original, network = getattr(dist, name), Network()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dist, name, lambda *args, **kw: network.launch(original, *args, **kw))
        yield network


def layers(count=6):
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(count)]).bfloat16()


def optimizer_of(model, params=None, overlap=True, **options):
    """Return an optimizer with a bucket for each weight."""
    model_or_none = model if overlap else None
    sharding = zero(overlap_gather=overlap, model=model_or_none, bucket_size_mb=1e-6, **options)
    return AdamW_BF16(params or model.named_parameters(), lr=1e-2, sharding=sharding)


def batch(step=0):
    generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
    return torch.randn(4, WIDTH, generator=generator).bfloat16()


def one_step(model, optimizer, step=0):
    model(batch(step)).float().square().sum().backward()
    optimizer.step(zero_grad=True)


def steady(model=None, **options):
    """Return a model and its optimizer after three steps, with weights in flight."""
    model = layers() if model is None else model
    optimizer = optimizer_of(model, **options)
    for step in range(3):
        one_step(model, optimizer, step)
    return model, optimizer


# --------------------------------------------------------------------------- what is in flight


class Backwards(nn.Sequential):
    """Layers that are used in reverse order."""

    def forward(self, x):
        for layer in reversed(list(self)):
            x = layer(x)
        return x


def order_worker(rank, world, shape):
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    model = Backwards(*layers())
    optimizer = optimizer_of(model, mesh=mesh, max_in_flight=2)
    with late_network() as network:
        for step in range(3):
            model(batch(step)).float().square().sum().backward()
            network.new_step()
            optimizer.step(zero_grad=True)
            assert bool(network.in_flight) == (step > 0), "recorded after the first step"
        after_step = list(network.events)
        for index, layer in enumerate(reversed(list(model))):
            layer.register_forward_hook(lambda *_, i=index: network.events.append(("forward", i)))
        model(batch())
        assert network.most_in_flight == 2
    return after_step, network.events[len(after_step) :]


@pytest.mark.parametrize("shape", [(2,), (2, 2)], ids=str)
def test_a_layer_waits_for_its_own_bucket_only(shape):
    for after_step, in_forward in run_ranks(len(shape) * 2, order_worker, shape):
        assert after_step == [("launch", 0), ("launch", 1)]
        expected = []
        for i in range(6):
            expected += [("wait", i)] + [("launch", i + 2)] * (i < 4) + [("forward", i)]
        assert in_forward == expected


def side_buffer_worker(rank, world):
    """All-gathers that have arrived, but that nobody has waited for."""
    model, optimizer = steady(max_in_flight=6)
    optimizer.wait()
    before = [weight.detach().clone() for weight in model.parameters()]
    one_step(model, optimizer)
    for pending in optimizer._sharding._all_gather._in_flight.values():
        while not pending._work.is_completed():
            time.sleep(1e-3)
    other = slice(4 * (1 - rank), 4 * (1 - rank) + 4)  # the rows that the other rank updates
    assert all(
        torch.equal(a[other], b[other]) for a, b in zip(before, model.parameters(), strict=True)
    )
    optimizer.wait()
    assert not any(
        torch.equal(a[other], b[other]) for a, b in zip(before, model.parameters(), strict=True)
    )


def test_weights_change_only_while_somebody_waits():
    run_ranks(2, side_buffer_worker)


def skipped_worker(rank, world):
    """A layer is not called, but its weight may be read after the forward pass."""
    with late_network() as network:
        model, optimizer = steady()
        assert network.in_flight
        model[5] = nn.Identity()
        model(batch())
        assert not network.in_flight
    optimizer.wait()


def test_nothing_is_in_flight_after_the_forward_pass():
    run_ranks(2, skipped_worker)


# ------------------------------------------------------------------------------------------- bits


class Foreign(nn.Module):
    """The first layer reads a weight of the last one, and the root that of the middle one."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = layers(3)
        self.first.other = [self.last]
        self.first.register_forward_pre_hook(lambda m, args: linear(args[0], m.other[0].weight))

    def forward(self, x):
        return self.last(self.middle(self.first(x))) + self.middle.weight.sum(0)


class Attention(nn.Module):
    """Modules whose parents read their weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.encoder(self.attention(x, x, x)[0])


class Unhooked(nn.Module):
    """Weights in a list, layers called by ``forward``, a recurrent layer, a tied head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.ParameterList([nn.Parameter(torch.randn(WIDTH, WIDTH)) for _ in range(3)])
        self.direct = nn.Linear(WIDTH, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = self.table[0]

    def forward(self, x):
        for weight in self.table[1:]:
            x = x @ weight
        return self.head(self.lstm(self.direct.forward(x))[0])


class Frozen(nn.Module):
    """A layer in eval mode, one under no_grad, one recomputed by a checkpoint."""

    def __init__(self):
        super().__init__()
        self.body = layers(4)

    def forward(self, x):
        self.body[1].eval()
        with torch.no_grad():
            shift = self.body[3](x)
        x = torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False)
        return x + shift


class CompiledFunction(nn.Module):
    """A compiled function reads a weight, which is then seen by no hook."""

    def __init__(self):
        super().__init__()
        self.body = layers(3)
        self.compiled = [torch.compile(linear, backend="eager", fullgraph=True)]

    def forward(self, x):
        x = self.compiled[0](x, self.body[1].weight)
        return self.body[2](self.body[0](x))


MODELS = [layers, Foreign, Attention, Unhooked, Frozen, CompiledFunction]


def bits_worker(rank, world, index, stage):
    """Return weights and states without and with overlap_gather."""
    results = []
    for overlap in (False, True):
        model = MODELS[index]().bfloat16()
        optimizer = optimizer_of(model, overlap=overlap, stage=stage)
        module = DistributedDataParallel(model) if stage == 1 else model
        with late_network() as network:
            for step in range(5):
                one_step(module, optimizer, step)
                assert bool(network.in_flight) == (overlap and step > 0)
            optimizer.wait()
            assert not network.in_flight
        results.append(collect(model, optimizer))
    return results


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("index", range(len(MODELS)), ids=[model.__name__ for model in MODELS])
def test_bits_are_those_without_it(index, stage):
    for without, with_it in run_ranks(2, bits_worker, index, stage):
        assert_same_bits(with_it, without)


class Block(nn.Module):
    """A module that torch.compile does not skip, as it does torch's own."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) * 2


def compiled_worker(rank, world, how):
    """Hooks do not run in compiled modules, so nothing is in flight after a step."""
    results = []
    for overlap in (False, True):
        model = layers()
        model[2] = Block(model[2])
        optimizer = optimizer_of(model, overlap=overlap)
        module = model
        with late_network() as network:
            for step in range(6):
                if step == (3 if how == "a layer, later" else 0):
                    if how == "scripted":
                        with warnings.catch_warnings():
                            warnings.simplefilter("ignore")  # torch.jit is deprecated
                            model[2] = torch.jit.script(model[2])
                    elif how == "the model":
                        module = torch.compile(model, backend="eager", fullgraph=True)
                    else:
                        model[2].compile(backend="eager", fullgraph=True)
                one_step(module, optimizer, step)
                assert not network.in_flight or (how == "a layer, later" and step < 3)
        results.append(collect(model, optimizer))
    return results


@pytest.mark.parametrize("how", ["the model", "a layer", "a layer, later", "scripted"])
def test_compiled_modules_find_all_weights(how):
    for without, with_it in run_ranks(2, compiled_worker, how):
        assert_same_bits(with_it, without)


def no_effect_worker(rank, world):
    """No forward pass of the given model is seen: a warning, and weights come in step()."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("sharded_bf16_adamw")
    logger.addHandler(handler)
    model = layers()
    optimizer = optimizer_of(model)
    with late_network() as network:
        for step in range(4):
            model.forward(batch(step)).float().square().sum().backward()
            optimizer.step(zero_grad=True)
            assert not network.in_flight
    logger.removeHandler(handler)
    return [r.getMessage() for r in records if "overlap_gather of ZeRO has no effect" in r.msg]


def test_unseen_forward_passes_are_a_warning():
    assert [len(warnings) for warnings in run_ranks(2, no_effect_worker)] == [1, 1]


def outside_worker(rank, world):
    """The loss's own weight is read outside the model: it is there when step() returns."""
    model, scale = layers(), nn.Parameter(torch.ones(WIDTH).bfloat16())
    optimizer = optimizer_of(model, [*model.parameters(), scale])
    with late_network():
        for step in range(4):
            (model(batch(step)) * scale).float().square().sum().backward()
            optimizer.step(zero_grad=True)
            early = [p.detach().clone() for p in (scale, *model.parameters())]
        optimizer.wait()
    same = [torch.equal(a, b) for a, b in zip(early, (scale, *model.parameters()), strict=True)]
    assert same[0] and not any(same[1:])


def test_weights_read_outside_the_model_arrive_in_the_step():
    run_ranks(2, outside_worker)


def divergent_worker(rank, world):
    """Rank 1 leaves a layer out in the recorded forward pass, and uses it later."""
    results = []
    for overlap in (False, True):
        model = layers()
        optimizer = optimizer_of(model, overlap=overlap)
        with late_network():
            for step in range(6):
                leave_out = step == 1 and rank == 1
                removed = model[3] if leave_out else None
                if leave_out:
                    model[3] = nn.Identity()
                loss = model(batch(step)).float().square().sum()
                if leave_out:
                    model[3] = removed
                loss.backward()
                optimizer.step(zero_grad=True)
        results.append(collect(model, optimizer))
    return results


def test_ranks_that_read_other_weights():
    for without, with_it in run_ranks(2, divergent_worker):
        assert_same_bits(with_it, without)


def exchanges_worker(rank, world, static_graph):
    counts = []
    for overlap in (False, True):
        model = layers()
        optimizer = optimizer_of(model, overlap=overlap, static_graph=static_graph)
        for step in range(4):
            with consensus_calls() as calls:
                one_step(model, optimizer, step)
        counts.append(len(calls))
    return counts


@pytest.mark.parametrize("static_graph", [False, True])
def test_steady_steps_exchange_nothing_on_the_host(static_graph):
    assert run_ranks(2, exchanges_worker, static_graph) == [[0, 0]] * 2


# -------------------------------------------------------------------- other readers of weights


def read_state_dict(model, optimizer, folder):
    return [value.clone() for value in model.state_dict().values()]


def read_state_dict_of_a_layer(model, optimizer, folder):
    weight = model[5].state_dict()["weight"].clone()
    return [*[p.detach().clone() for p in list(model.parameters())[:5]], weight]


def read_checkpoint(model, optimizer, folder):
    path = save(folder, 1, model, optimizer)
    fresh = layers()
    load(path, fresh, AdamW_BF16(fresh.parameters(), lr=1e-2))
    return list(fresh.parameters())


def read_true_weights(model, optimizer, folder):
    next(optimizer.true_weights())
    return [p.detach().clone() for p in model.parameters()]


def read_in_check_replicas(model, optimizer, folder):
    optimizer.check_replicas()
    return [p.detach().clone() for p in model.parameters()]


def read_in_a_step_hook(model, optimizer, folder):
    seen = []
    optimizer.register_step_post_hook(
        lambda *_: seen.extend(p.detach().clone() for p in model.parameters())
    )
    one_step(model, optimizer)
    return seen


def read_after_adding_a_group(model, optimizer, folder):
    optimizer.add_param_group({"params": [("late", nn.Parameter(torch.ones(4).bfloat16()))]})
    return [p.detach().clone() for p in model.parameters()]


def read_by_a_second_optimizer(model, optimizer, folder):
    """Its construction compares the weights of ranks."""
    optimizer_of(model)
    return [p.detach().clone() for p in model.parameters()]


READERS = [
    read_state_dict,
    read_state_dict_of_a_layer,
    read_checkpoint,
    read_true_weights,
    read_in_check_replicas,
    read_in_a_step_hook,
    read_after_adding_a_group,
    read_by_a_second_optimizer,
]


def readers_worker(rank, world, folder):
    for number, reader in enumerate(READERS):
        with late_network() as network:
            model, optimizer = steady()
            assert network.in_flight
            seen = reader(model, optimizer, f"{folder}/{number}")
            optimizer.wait()
            for a, b in zip(seen, model.parameters(), strict=True):
                assert torch.equal(a, b), reader.__name__


def test_readers_of_weights_see_the_new_ones(tmp_path):
    run_ranks(2, readers_worker, str(tmp_path))


class Fused(nn.Module):
    """A module that in evaluation reads its children's weights without calling them."""

    def __init__(self):
        super().__init__()
        self.body = layers(3)

    def forward(self, x):
        if self.training and torch.is_grad_enabled():
            return self.body(x)
        for layer in self.body:
            x = linear(x, layer.weight)
        return x


def evaluation_worker(rank, world):
    def in_eval_mode(model):
        return model.eval()(batch())

    def without_gradients(model):
        with torch.no_grad():
            return model(batch())

    def in_inference_mode(model):
        with torch.inference_mode():
            return model.eval()(batch())

    def of_a_child(model):
        return model.body[1](batch())

    for evaluate in (in_eval_mode, without_gradients, in_inference_mode, of_a_child):
        with late_network() as network:
            model, optimizer = steady(Fused())
            assert network.in_flight
            early = evaluate(model)
            assert not network.in_flight
            assert torch.equal(early, evaluate(model)), evaluate.__name__
            one_step(model.train(), optimizer)


def test_evaluation_uses_the_new_weights():
    run_ranks(2, evaluation_worker)


def copies_worker(rank, world):
    for duplicate in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
        model, optimizer = steady()
        for part in (model, model[0]):
            with pytest.raises(RuntimeError, match=r"model is copied .* call optimizer.wait\(\)"):
                duplicate(part)
        optimizer.wait()
        copied = duplicate(model)
        assert torch.equal(copied(batch()), model(batch()))
        copied.load_state_dict(copied.state_dict())
        one_step(model, optimizer)


def test_a_copy_with_old_weights_is_an_error():
    run_ranks(2, copies_worker)


def loaded_worker(rank, world):
    model, optimizer = steady()
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    one_step(model, optimizer)
    model.load_state_dict(saved)  # waits first, else the gathered weights would overwrite it
    model(batch())
    assert all(torch.equal(model.state_dict()[key], value) for key, value in saved.items())


def test_loaded_weights_stay():
    run_ranks(2, loaded_worker)


def written_worker(rank, world):
    model, optimizer = steady()
    with torch.no_grad():
        model[3].weight.mul_(0.5)
    with pytest.raises(RuntimeError, match=r"'3.weight' was changed .* call optimizer.wait\(\)"):
        model(batch())
    with pytest.raises(RuntimeError, match=r"an earlier all-gather .* restart all ranks"):
        optimizer.step()


def test_writing_to_weights_in_flight_is_an_error():
    run_ranks(2, written_worker)


def dropped_worker(rank, world):
    with late_network() as network:
        model, optimizer = steady()
        early = [p.detach().clone() for p in model.parameters()]
        del optimizer
        gc.collect()
        assert network.in_flight
        output = model(batch())
        assert not network.in_flight
    assert torch.equal(output, model(batch()))
    assert not any(torch.equal(a, b) for a, b in zip(early, model.parameters(), strict=True))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_weights_arrive_though_the_optimizer_is_gone():
    run_ranks(2, dropped_worker)


# ----------------------------------------------------------------------------------------- errors


def unwatched_worker(rank, world):
    """The forward pass does not call the model, and reads old weights."""
    with late_network():
        model, _ = steady()
        output = batch()
        for weight in list(model.parameters()):
            output = linear(output, weight)
        with pytest.raises(
            RuntimeError, match=r"'\d.weight' got a gradient while .* the forward pass has read the"
        ):
            output.sum().backward()


def test_gradient_of_an_old_weight_is_an_error():
    run_ranks(2, unwatched_worker)


def failing_worker(rank, world):
    with late_network() as network:
        model, optimizer = steady()
        network.failing = True
        with pytest.raises(
            RuntimeError, match=r"^all-gathering the updated weights .* ranks 0, 1 fail"
        ):
            model(batch())
        for again in (lambda: model(batch()), optimizer.step, optimizer.wait, model.state_dict):
            with pytest.raises(RuntimeError, match=r"^an earlier all-gather .* restart all ranks"):
                again()


def test_failed_all_gather_is_an_error_ever_after():
    run_ranks(2, failing_worker)


def interrupted_worker(rank, world):
    """The first forward pass to record raises, and is not recorded."""
    model = layers()
    optimizer = optimizer_of(model)
    one_step(model, optimizer)
    handle = model[4].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(batch())
    handle.remove()
    with late_network() as network:
        for step in range(3):
            one_step(model, optimizer, step)
            assert network.in_flight


def test_forward_pass_that_raises_is_not_recorded():
    run_ranks(2, interrupted_worker)
