"""Activations and tensor-parallel traffic, measured on the meta device.

The model runs forward and backward with one and with two layers, on meta tensors, which take no
memory. Each further layer adds as much as the second, since all layers are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F  # noqa: N812  # its usual name
from torch.utils.checkpoint import checkpoint
from training.model import GPT
from training.tensor_parallel import parallelize

from planning.live import LiveBytes
from planning.models import Shape, build
from sharded_bf16_adamw.sharding.dtensor import to_local

Shapes = tuple[torch.Size, ...]


@dataclass(frozen=True)
class LayerBytes:
    """A number of bytes that grows linearly with the number of layers."""

    one_layer: float
    per_further_layer: float

    def __call__(self, layers: float) -> int:
        return round(self.one_layer + self.per_further_layer * (layers - 1))


@dataclass(frozen=True)
class ActivationMemory:
    """Bytes of one micro-batch on a rank, without weights. :func:`_run_step` defines the phases.

    Attributes:
        block_shapes: local shapes of the parameters of a layer.
        root_shapes: local shapes of the other parameters: embedding, last norm, head.
        loss: peak of live bytes until the gradient of the logits is ready.
        head: peak from then on until the gradient of the last layer's output is ready.
        block: peak during the backward pass of the last layer, including its gradients.
        embedding: peak after the backward pass of the first layer, including the embedding's
            gradient.
        sent_bytes: bytes that tensor parallelism sends.
    """

    block_shapes: Shapes
    root_shapes: Shapes
    loss: LayerBytes
    head: LayerBytes
    block: LayerBytes
    embedding: int
    sent_bytes: LayerBytes


@cache
def measure_activation_memory(
    shape: Shape,
    dtype: torch.dtype,
    batch: int,
    seq_len: int,
    tensor_ranks: int = 1,
    recompute: bool = False,
    device: str = "cuda",
) -> ActivationMemory:
    """Measure a micro-batch of ``batch`` sequences of ``seq_len`` tokens.

    Args:
        shape: of the model.
        dtype: of the weights.
        batch: sequences of the micro-batch.
        seq_len: tokens of a sequence.
        tensor_ranks: ranks over which each layer is sharded.
        recompute: checkpoint the activations of each layer.
        device: "cuda" or "cpu", whose kernels save different tensors for the backward pass.

    Examples:
        >>> from planning.models import from_preset
        >>> shape = from_preset("nano")
        >>> nano = measure_activation_memory(shape, torch.bfloat16, batch=2, seq_len=128)
        >>> nano.block(10) - nano.block(9) == nano.block(2) - nano.block(1)
        True
    """
    tokens = torch.empty(batch, seq_len, dtype=torch.int64, device="meta")
    with fake_ranks(tensor_ranks):
        models = [build(shape, layers, dtype) for layers in (1, 2)]
        for model in models:
            _shard(model, tensor_ranks)
        with _kernels_of(device):
            (one, one_sent), (two, two_sent) = (_run_step(m, tokens, recompute) for m in models)
        local = list(map(to_local, models[0].parameters()))
        in_block = set(map(id, models[0].blocks[0].parameters()))
        is_block = [id(p) in in_block for p in models[0].parameters()]
    loss, head, block = (LayerBytes(a, b - a) for a, b in zip(one[:3], two[:3], strict=True))
    return ActivationMemory(
        block_shapes=tuple(p.shape for p, yes in zip(local, is_block, strict=True) if yes),
        root_shapes=tuple(p.shape for p, yes in zip(local, is_block, strict=True) if not yes),
        loss=loss,
        head=head,
        block=block,
        embedding=two[-1],
        sent_bytes=LayerBytes(one_sent, two_sent - one_sent),
    )


def _shard(model: GPT, tensor_ranks: int) -> None:
    if tensor_ranks > 1:
        is_tied = model.head.weight is model.embedding.weight
        parallelize(model, init_device_mesh("cpu", (tensor_ranks,)))
        if is_tied:  # each module got shards of its own
            model.head.weight = model.embedding.weight


def _run_step(model: GPT, tokens: Tensor, recompute: bool) -> tuple[list[int], float]:
    """Return the peak of each phase of a step, without weights, and the bytes that the step sends.

    A phase ends when the gradient of the logits, of a layer's output (last layer first), or of the
    first layer's input is ready; the last phase ends with the backward pass. The end of a phase
    frees the gradients of weights.
    """
    peaks: list[int] = []

    def end_phase(grad: Tensor | None = None) -> None:
        peaks.append(live.peak)
        model.zero_grad()
        live.reset_peak()

    def end_phase_at_output(module: nn.Module, inputs: Any, output: Tensor) -> None:
        output.register_hook(end_phase)

    def end_phase_at_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        inputs[0].register_hook(end_phase)

    model.blocks[0].register_forward_pre_hook(end_phase_at_input)
    for module in (*model.blocks, model):
        module.register_forward_hook(end_phase_at_output)
    if recompute:
        for block in model.blocks:
            block.forward = _checkpointed(block.forward)
    weight_bytes = sum(to_local(p).nbytes for p in model.parameters())
    with LiveBytes() as live:
        F.cross_entropy(model(tokens).float().flatten(0, 1), tokens.flatten()).backward()
        end_phase()
    return [peak - weight_bytes for peak in peaks], live.sent_bytes


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: checkpoint(forward, *args, use_reentrant=False)


@contextmanager
def _kernels_of(device: str) -> Iterator[None]:
    """Use the device's kernels where the meta device's would save other tensors for the backward.

    Both devices run flash attention. CUDA also has a kernel for RMSNorm. The functions are patched
    because a TorchFunctionMode would not see operations that a checkpoint recomputes.
    """
    aten = torch.ops.aten
    flash = (
        aten._scaled_dot_product_flash_attention
        if device == "cuda"
        else aten._scaled_dot_product_flash_attention_for_cpu
    )

    def attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        return flash(q, k, v, 0.0, is_causal)[0]

    def norm(x: Tensor, shape: tuple[int, ...], weight: Tensor, eps: float) -> Tensor:
        return aten._fused_rms_norm(x, shape, weight, eps)[0]

    with (
        mock.patch.object(F, "scaled_dot_product_attention", attention),
        mock.patch.object(F, "rms_norm", norm if device == "cuda" else F.rms_norm),
    ):
        yield


@contextmanager
def fake_ranks(ranks: int) -> Iterator[None]:
    """Initialize a fake process group with this process as rank 0, if ``ranks`` is more than 1."""
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    if ranks == 1:
        yield
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # its entries refer to the destroyed process group
