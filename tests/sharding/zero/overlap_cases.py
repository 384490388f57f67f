"""A network that delivers late, and models that read weights in unusual ways."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import linear

from sharded_bf16_adamw import AdamW_BF16

from .cases import zero

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
    """A compiled function reads a weight, which no hook sees."""

    def __init__(self):
        super().__init__()
        self.body = layers(3)
        self.compiled = [torch.compile(linear, backend="eager", fullgraph=True)]

    def forward(self, x):
        x = self.compiled[0](x, self.body[1].weight)
        return self.body[2](self.body[0](x))


MODELS = [layers, Foreign, Attention, Unhooked, Frozen, CompiledFunction]
