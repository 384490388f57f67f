"""Evaluation on held-out data."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from training import evaluation
from training.step import compute_loss


class Logits(nn.Module):
    """Dropout and a layer; records the shapes of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.dropout = nn.Embedding(8, 8), nn.Dropout(0.5)
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(tokens.shape))
        return self.dropout(self.embedding(tokens))


@pytest.mark.parametrize("grad_accum", [1, 3])
def test_held_out_loss_has_no_dropout_and_the_micro_batches_of_training(monkeypatch, grad_accum):
    monkeypatch.setattr(evaluation, "all_reduce_mean", lambda world, loss: [float(loss)])
    torch.manual_seed(0)
    model, windows = Logits(), torch.randint(8, (2, 6, 5))
    run = SimpleNamespace(
        args=SimpleNamespace(eval_batches=2, batch_size=6, grad_accum=grad_accum),
        world=SimpleNamespace(device=torch.device("cpu"), batch_slice=slice(None)),
        supervisor=SimpleNamespace(stop_if_requested=lambda: None, beat=lambda doing: None),
        data=SimpleNamespace(held_out_batch=lambda index, batches, size: windows[index]),
        wrapped_model=model,
        step=1,
    )
    random_state = torch.get_rng_state()
    loss = evaluation.held_out_loss(run)
    assert torch.equal(torch.get_rng_state(), random_state), "training draws the same numbers after"
    assert model.shapes == 2 * grad_accum * [(6 // grad_accum, 4)]
    assert model.training and model.dropout.training
    expected = compute_loss(model.eval(), windows.flatten(0, 1)).item()
    assert loss == pytest.approx(expected, rel=1e-6)
