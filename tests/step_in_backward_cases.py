"""Models and training runs for the tests of ``step_in_backward``."""

import copy

import torch
from small_optimizers import BF16, snapshot
from torch import nn
from torch.utils.checkpoint import checkpoint

from sharded_bf16_adamw import LR, AdamW_BF16

WIDTH = 16


def make_layers(count=4):
    torch.manual_seed(0)
    return nn.Sequential(
        *[nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(count)]
    ).to(BF16)


def make_input(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, WIDTH, generator=generator).to(BF16)


def make_optimizer(params, in_backward=True, **more):
    more.setdefault("lr_function", None if "lr" in more else LR(lr=1e-2, preheat_steps=3))
    return AdamW_BF16(params, step_in_backward=in_backward, **more)


class Tied(nn.Module):
    """An embedding that is also the head, and a layer that is called twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(WIDTH, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = self.embedding.weight
        self.unused = nn.Linear(3, 3)
        self.to(BF16)

    def forward(self, x):
        hidden = self.layer(torch.tanh(self.layer(self.embedding(x.argmax(-1)))))
        return self.head(hidden) + self.head.weight.square().sum()


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant, times=1):
        super().__init__()
        self.layers = make_layers()
        self.options = {"use_reentrant": use_reentrant}
        self.times = times

    def forward(self, x):
        x = x.requires_grad_()
        for layer in self.layers:
            for _ in range(self.times):
                x = checkpoint(layer, x, **self.options)
        return x


class Mixed(nn.Module):
    """Parameters of both dtypes, among them an empty, a 0-dim and a transposed one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = make_layers(2)
        self.single = nn.Linear(WIDTH, 5)
        self.empty = nn.Parameter(torch.zeros(0, 3, dtype=BF16))
        self.scalar = nn.Parameter(torch.ones((), dtype=BF16))
        self.transposed = nn.Parameter(torch.randn(7, WIDTH).to(BF16).t())

    def forward(self, x):
        x = self.layers(x) * self.scalar
        return self.single(x.float()).sum() + (x @ self.transposed).sum() + self.empty.sum()


MODELS = {
    "layers": make_layers,
    "tied": Tied,
    "mixed": Mixed,
    "lstm": lambda: nn.LSTM(WIDTH, WIDTH, num_layers=2).to(BF16),
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, 5).to(BF16)),
    "encoder": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 32, 0.0).to(BF16),
    "checkpoint": lambda: Checkpointed(use_reentrant=False, times=2),
    "reentrant checkpoint": lambda: Checkpointed(use_reentrant=True),
    "compiled eager": lambda: torch.compile(make_layers(), backend="eager"),
    "compiled aot_eager": lambda: torch.compile(make_layers(), backend="aot_eager"),
}


def loss_of(output):
    output = output[0] if isinstance(output, tuple) else output
    return output.float().square().mean()


def run(make_model, in_backward, micro_batches=1, steps=4, groups=1, **backward_options):
    torch.manual_seed(0)
    model = make_model()
    params = list(model.parameters())
    optimizer = make_optimizer(
        [
            {"params": params[index::groups], "weight_decay": 0.1 * index, "betas": (0.8, 0.95)}
            for index in range(groups)
        ],
        in_backward,
    )
    for step in range(steps):
        for micro in range(micro_batches - 1):
            with optimizer.accumulate():
                loss_of(model(make_input(100 * step + micro))).backward(**backward_options)
        loss_of(model(make_input(100 * step + 99))).backward(**backward_options)
        if in_backward:
            assert all(param.grad is None for param in params)
        optimizer.step(zero_grad=True)
    return snapshot(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
