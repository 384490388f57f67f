"""Trained models, of this package and of torch, and the expected exports and imports."""

from __future__ import annotations

import torch

from sharded_bf16_adamw.checkpoint.importing import round_moment
from sharded_bf16_adamw.checkpoint.safetensors_io import TensorInfo, open_safetensors, write_sharded

from .layouts import LAYOUTS, Net, train


def trained(steps=3, seed=0):
    module, optimizer = LAYOUTS[0].build(1, seed)
    train(module, optimizer, steps)
    return module, optimizer


def read_folder(folder):
    return {name: file.read(name) for name, file in open_safetensors(folder).items()}


def true_values(module, optimizer):
    return {
        name: weight
        for (name, _), (_, weight) in zip(
            module.named_parameters(), in_order(module, optimizer), strict=True
        )
    }


def in_order(module, optimizer):
    by_id = {id(param): (param, weight) for param, weight in optimizer.true_weights()}
    return [by_id[id(param)] for param in module.parameters()]


def fp32_training(dtype=torch.float32, steps=4):
    """Train a model of ``dtype`` with a torch.optim.AdamW in two groups."""
    torch.manual_seed(3)
    model = Net().to(dtype)
    named = dict(model.named_parameters())
    groups = [
        [named[name] for name in named if "precise" not in name],
        [named[name] for name in named if "precise" in name],
    ]
    optimizer = torch.optim.AdamW(
        [{"params": params, "lr": 2e-3 * (1 + i)} for i, params in enumerate(groups)],
        betas=(0.8, 0.95),
    )
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for name, param in named.items():
            param.grad = (
                None
                if "unused" in name
                else torch.randn(param.shape, generator=generator).to(dtype)
            )
        optimizer.step()
    return model, optimizer


def written(folder, weights):
    folder.mkdir()
    infos = {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in weights.items()}
    write_sharded(folder, infos, lambda name: weights[name].detach(), 300)
    return folder


def expected_states(model, optimizer):
    """Return the states to expect, by definition, element by element on full tensors."""
    result = {}
    for name, param in model.named_parameters():
        dtype = torch.float32 if "precise" in name else torch.bfloat16
        result[name] = param.detach().to(dtype)
        state = optimizer.state.get(param, {})
        for key in ("exp_avg", "exp_avg_sq"):
            value = state.get(key, torch.zeros_like(param)).float()
            result[f"{name}.{key}"] = value if dtype == torch.float32 else round_moment(value)
        if dtype == torch.bfloat16:
            result[f"{name}.correction"] = (
                param.detach().float() - param.detach().bfloat16().float()
            ).bfloat16()
        result[f"{name}.step"] = torch.tensor(float(state.get("step", 0)))
    return result


def named_state(model, optimizer):
    """Return the state as get_optimizer_state_dict(full_state_dict=True) does."""
    name_of = {param: name for name, param in model.named_parameters()}
    state = {name_of[param]: values for param, values in optimizer.state.items()}
    groups = [
        {**group, "params": [name_of[param] for param in group["params"]]}
        for group in optimizer.param_groups
    ]
    return {"state": state, "param_groups": groups}
