"""The code in docs/checkpoints.md loads a checkpoint with torch.distributed.checkpoint alone."""

import re

import torch
from distributed import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard

from sharded_bf16_adamw import LR, AdamW_BF16, save


def build(sharded):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 3)).bfloat16()
    if sharded:
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
    return model, AdamW_BF16(model.parameters(), lr_function=LR(lr=1e-2, preheat_steps=5))


def full_bits(model, optimizer):
    """Return weights and states in full, by parameter name."""
    full = {}
    for name, param in model.named_parameters():
        for key, value in {"": param.detach(), **optimizer.state[param]}.items():
            full[f"{name} {key}"] = value.full_tensor() if hasattr(value, "full_tensor") else value
    return full


def train(model, optimizer, steps):
    for step in range(steps):
        torch.manual_seed(step)
        model(torch.randn(4, 12).bfloat16()).float().square().mean().backward()
        optimizer.step(zero_grad=True)


def save_and_load(rank, world_size, folder, lines):
    model, optimizer = build(sharded=True)
    train(model, optimizer, 3)
    saved = full_bits(model, optimizer)
    path = save(folder, 3, model, optimizer)
    model, optimizer = build(sharded=False)  # another layout
    exec(lines, {"model": model, "optimizer": optimizer, "path": path})
    loaded = full_bits(model, optimizer)
    position = optimizer.param_groups[0]["schedule_step"]
    return (
        saved.keys() == loaded.keys(),
        [torch.equal(saved[k], loaded[k]) for k in saved],
        position,
    )


def test_lines_of_the_page_load_every_bit(repo, tmp_path):
    page = (repo / "docs/checkpoints.md").read_text()
    section = page.partition("## Loading with torch alone")[2]
    (lines,) = re.findall(r"```python\n(.*?)```", section.partition("\n## ")[0], re.DOTALL)
    for keys, equal, position in run_ranks(2, save_and_load, tmp_path, lines):
        assert keys and len(equal) == 4 * 5 and all(equal)
        assert position == 3
