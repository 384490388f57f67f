"""Configuration of ZeRO, in which each rank updates one shard of every replicated parameter.

Sources: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
arXiv:1910.02054. Bucketed reduction during the backward pass is as in PyTorch DDP, Li et al.,
arXiv:2006.15704.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..base import Sharding


@dataclass(frozen=True)
class ZeRO:
    """Optimizer sharding for a model that every rank holds in full.

    Stage 1 shards optimizer states; use it with ``DistributedDataParallel``, which averages the
    gradients. Stage 2 is for the plain module. It averages gradients during the backward pass and
    keeps only this rank's shards of them. ``param.grad`` is then None after the backward pass, so
    use this optimizer's ``zero_grad`` and ``clip_grad_norm_``. In both stages ``step`` updates this
    rank's shards and all-gathers the updated weights.

    With ``overlap_gather`` the all-gathers overlap with the next forward pass of ``model``.
    A module waits only for the weights that it reads. Before other code reads or writes weights
    (averages of weights, a forward pass on one rank only), call ``optimizer.wait()`` on every rank.

    The constructor of the optimizer, ``step`` and ``clip_grad_norm_`` are collective, and so is
    ``zero_grad`` between a backward pass and its step. Every rank calls them in the same order.

    Args:
        mesh: one-dimensional, to shard every parameter over all ranks; or two-dimensional,
            (replicate, shard), to shard over the second dimension and replicate over the first, as
            in HSDP.
        stage: 1 or 2.
        bucket_size_mb: size of a bucket in MiB of weights. One collective carries one bucket.
        reduce_dtype: dtype in which gradients are reduced, ``torch.bfloat16`` or ``torch.float32``;
            None for the dtype of the parameter. Stage 2 only.
        accumulate_dtype: ``torch.float32`` to accumulate several backward passes in float32; None
            for the dtype of the gradients. Stage 2 only.
        broadcast_initial: broadcast the first rank's weights. By default it is an error if initial
            weights differ between ranks.
        max_in_flight: number of buckets in flight at once. More of them hide slower networks and
            take more memory.
        static_graph: promise that in every step, on each rank, the same parameters get gradients in
            the same number of backward passes. After the first few steps ranks then communicate
            only gradients, weights and norms. A rank that breaks the promise raises RuntimeError;
            the others fail while they wait for it.
        overlap_gather: let ``step`` return while updated weights are still all-gathered, into
            buffers of ``max_in_flight`` buckets.
        model: the module whose forward pass uses the parameters; for ``overlap_gather``.
        fp32_sum: sum gradients in float32, whatever dtype they are sent in, by an all-to-all
            instead of a reduce-scatter. This sends as many bytes, and takes memory for one more
            bucket per bucket in flight. gloo always does so. On a two-dimensional mesh this option
            also makes the all-reduce between replicas float32, with any backend. Stage 2 only.

    Raises:
        ValueError: an argument is out of range, this rank is not in the mesh, or only one of
            ``overlap_gather`` and ``model`` is given.

    Examples:
        >>> import torch
        >>> import torch.distributed as dist
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from sharded_bf16_adamw import AdamW_BF16, ZeRO
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> mesh = init_device_mesh("cpu", (1,))
        >>> model = torch.nn.Linear(4, 2, dtype=torch.bfloat16)
        >>> optimizer = AdamW_BF16(model.parameters(), lr=1e-3, sharding=ZeRO(mesh, stage=2))
        >>> model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        >>> optimizer.step(zero_grad=True)
        >>> optimizer.state[model.weight]["exp_avg"].placements
        (Shard(dim=0),)
        >>> dist.destroy_process_group()
    """

    mesh: DeviceMesh
    stage: int = 2
    bucket_size_mb: float = 25.0
    reduce_dtype: torch.dtype | None = None
    accumulate_dtype: torch.dtype | None = None
    broadcast_initial: bool = False
    max_in_flight: int = 2
    static_graph: bool = False
    overlap_gather: bool = False
    model: nn.Module | None = field(default=None, repr=False)
    fp32_sum: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.mesh, DeviceMesh):
            raise ValueError(
                f"Invalid mesh: {self.mesh!r}; ZeRO needs a DeviceMesh, such as "
                "init_device_mesh('cuda', (world_size,))"
            )
        if self.mesh.ndim not in (1, 2):
            raise ValueError(
                f"Invalid mesh: it has {self.mesh.ndim} dimensions; ZeRO takes one (shard) or two "
                "(replicate, shard)"
            )
        if self.mesh.get_coordinate() is None:
            raise ValueError(
                "Invalid mesh: this rank is not in it; build the optimizer only on the ranks of "
                "the mesh"
            )
        ranks = self.mesh.mesh
        if any((ranks.diff(dim=dim) < 0).any() for dim in range(ranks.ndim)):
            raise ValueError(
                f"Invalid mesh: its ranks {ranks.tolist()} do not ascend, but those of torch's "
                "process groups do; give a mesh with ascending ranks in each dimension"
            )
        if self.stage not in (1, 2):
            raise ValueError(
                f"Invalid stage: {self.stage}; ZeRO has 1 (beside DDP) and 2 (on the plain "
                "module); for stage 3 use FSDP2"
            )
        if not 0 < self.bucket_size_mb < math.inf:
            raise ValueError(
                f"Invalid bucket_size_mb: {self.bucket_size_mb}; it must be positive and finite"
            )
        if self.max_in_flight < 1:
            raise ValueError(f"Invalid max_in_flight: {self.max_in_flight}; it must be at least 1")
        if self.reduce_dtype not in (None, torch.bfloat16, torch.float32):
            raise ValueError(
                f"Invalid reduce_dtype: {self.reduce_dtype}; choose torch.bfloat16, torch.float32 "
                "or None"
            )
        if self.accumulate_dtype not in (None, torch.float32):
            raise ValueError(
                f"Invalid accumulate_dtype: {self.accumulate_dtype}; choose torch.float32 or None"
            )
        if self.stage == 1 and (self.reduce_dtype or self.fp32_sum or self.accumulate_dtype):
            raise ValueError(
                "reduce_dtype, fp32_sum and accumulate_dtype are for stage 2; in stage 1 DDP "
                "reduces and accumulates the gradients"
            )
        if self.overlap_gather != isinstance(self.model, nn.Module):
            raise ValueError(
                f"Invalid overlap_gather: {self.overlap_gather} with model: "
                f"{type(self.model).__name__}; give ZeRO(mesh, overlap_gather=True, model=model) "
                "the module that you call in each step, or give neither option"
            )

    @property
    def bucket_bytes(self) -> int:
        """Size of a bucket in bytes of weights."""
        return max(1, int(self.bucket_size_mb * 2**20))

    def build_stage(self, in_backward: bool = False) -> Sharding:
        """Return the sharding strategy of one optimizer. Collective over the mesh.

        Args:
            in_backward: update weights inside the backward pass; for stage 2.
        """
        from .in_backward import Stage2InBackward
        from .stage1 import Stage1
        from .stage2 import Stage2

        if self.stage == 1:
            return Stage1(self)
        return Stage2InBackward(self) if in_backward else Stage2(self)
