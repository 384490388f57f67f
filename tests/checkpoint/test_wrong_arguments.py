"""Wrong models and optimizers are refused by name, on all ranks if one rank has them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from distributed import run_ranks
from torch import nn

from sharded_bf16_adamw import (
    AdamW_BF16,
    gather_full_state_dict,
    import_fp32,
    load,
    save,
    scatter_full_state_dict,
)

from .two_layers import BF16, layers, trained, wrapped


def on_one_rank_worker(rank: int, world: int, root: str) -> list[str]:
    """Pass a wrong argument on rank 1 only; no rank may block."""
    warnings.simplefilter("ignore")
    model, _, optimizer = wrapped("FSDP1 use_orig_params", world, seed=0)
    save(root, 1, model, optimizer)
    full = gather_full_state_dict(model, optimizer)
    weights = {name: torch.zeros(value.shape) for name, value in layers().state_dict().items()}
    plain = layers()
    wrong: list[tuple[Any, Any]] = [
        ("no model", optimizer),
        (model, None),
        (plain, optimizer),
        (model, AdamW_BF16(plain.parameters(), lr=1e-2)),
    ]
    calls = [
        lambda m, o: save(root, 2, m, o),
        lambda m, o: load(root, m, o),
        lambda m, o: gather_full_state_dict(m, o),
        lambda m, o: scatter_full_state_dict(m, o, full),
        lambda m, o: import_fp32(weights, m, o),
    ]
    messages = []
    for arguments in wrong:
        for call in calls:
            try:
                call(*(arguments if rank == 1 else (model, optimizer)))
                messages.append("nothing")
            except ValueError as error:
                messages.append(str(error))
    try:
        import_fp32(
            weights, model, optimizer if rank == 0 else torch.optim.AdamW(model.parameters())
        )
    except ValueError as error:
        messages.append(str(error))
    return messages


def test_error_of_one_rank_is_raised_on_all_ranks(tmp_path):
    first, second = run_ranks(2, on_one_rank_worker, str(tmp_path))
    assert first == second and len(first) == 21
    for found, sentence in zip(
        [first[:5], first[5:10], first[10:15], first[15:20], first[20:]],
        [
            "model must be a torch.nn.Module, but it is of type str; the order of arguments is ",
            "optimizer must be a torch.optim.Optimizer, but it is of type NoneType; the "
            "order of arguments is ",
            "the optimizer holds parameter 0 (shape ",
            "the optimizer holds parameter 0 (shape (4, 4)), which is not a parameter of "
            "this model (nor are 3 more)",
            "optimizer must be an AdamW_BF16, but it is of type AdamW",
        ],
        strict=True,
    ):
        assert all(text.startswith(sentence) for text in found), found


def test_tensor_on_meta_device_is_named(tmp_path):
    good = save(tmp_path, 1, *trained())
    for make_meta in (
        lambda model: setattr(
            model[0],
            "weight",
            nn.Parameter(torch.ones(4, 4, dtype=BF16, device="meta"), requires_grad=False),
        ),
        lambda model: model[0].register_buffer("weight_scale", torch.ones(4, device="meta")),
    ):
        model = layers()
        make_meta(model)
        optimizer = AdamW_BF16(model[1].parameters(), lr=1e-2)
        for call in (
            lambda m=model, o=optimizer: save(tmp_path, 2, m, o),
            lambda m=model, o=optimizer: load(good, m, o),
            lambda m=model, o=optimizer: import_fp32({}, m, o),
        ):
            with pytest.raises(
                ValueError,
                match=r"^0\.weight(_scale)? is on the meta device and has no values; call "
                r"model.to_empty",
            ):
                call()
