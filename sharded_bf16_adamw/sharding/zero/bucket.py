"""Buckets: parameters whose gradients or weights travel in one collective."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .param import ZeroParam
from .reduce_scatter import PendingReduce, all_reduce_mean


class Bucket:
    """Parameters of one dtype and device whose gradients are reduced together.

    Args:
        zero_params: the parameters, in the expected order of their gradients.
        mesh: 1-D, or 2-D (replicate, shard).
        reduce_dtype: dtype of the gradients in the collective.
        result_dtype: dtype of their mean.
        fp32_sum: see :class:`.PendingReduce`.
    """

    def __init__(
        self,
        zero_params: list[ZeroParam],
        mesh: DeviceMesh,
        reduce_dtype: torch.dtype,
        result_dtype: torch.dtype,
        fp32_sum: bool,
    ) -> None:
        self.zero_params = zero_params
        self._mesh = mesh
        self._dtype = reduce_dtype
        self._result_dtype = result_dtype
        self._fp32_sum = fp32_sum
        self._device = zero_params[0].spec.device
        self._ranks = mesh.size(mesh.ndim - 1)
        self._padded_grads: dict[ZeroParam, Tensor] = {}  # views of the reduce-scatter input
        self._reduce_scatter_input: Tensor | None = None
        self.launches = 0  # since the last consensus

    @property
    def is_pending(self) -> bool:
        """Return True if the bucket holds a gradient."""
        return bool(self._padded_grads)

    @property
    def is_complete(self) -> bool:
        """Return True if the bucket holds a gradient of every trainable parameter."""
        return self.is_pending and all(
            zero_param in self._padded_grads or not zero_param.param.requires_grad
            for zero_param in self.zero_params
        )

    @property
    def has_all_grads(self) -> bool:
        """Return True if the bucket holds a gradient of every parameter, trainable or not."""
        return len(self._padded_grads) == len(self.zero_params)

    def add_grad(self, zero_param: ZeroParam, grad: Tensor) -> None:
        """Copy a gradient into the bucket, or add it to the gradient that is already there."""
        if self._needs_no_copy(zero_param, grad):
            self._reduce_scatter_input = grad.detach().view(self._ranks, -1)
            self._padded_grads[zero_param] = self._reduce_scatter_input
            return
        if self._reduce_scatter_input is None:
            self._reduce_scatter_input = self._new_reduce_scatter_input()
        padded_grad = self._padded_grads_in(self._reduce_scatter_input)[zero_param]
        if zero_param in self._padded_grads:
            addend = torch.empty_like(padded_grad)
            zero_param.copy_in(grad, addend)
            padded_grad.add_(addend)
        else:
            zero_param.copy_in(grad, padded_grad)
            self._padded_grads[zero_param] = padded_grad

    def launch_reduce(self) -> PendingReduce:
        """Start the reduce-scatter, with zeros for missing gradients, and empty the bucket."""
        reduce_scatter_input = self._fill_missing_grads()
        self._clear()
        self.launches += 1
        return self._reduce(reduce_scatter_input)

    def launch_zeros(self) -> PendingReduce:
        """Start a reduce-scatter of zeros only; the bucket keeps its gradients."""
        kept = self._reduce_scatter_input, self._padded_grads
        self._clear()
        try:
            return self.launch_reduce()
        finally:
            self._reduce_scatter_input, self._padded_grads = kept

    def local_shards(self, reduced: Tensor) -> Iterator[tuple[ZeroParam, Tensor]]:
        """Yield each parameter and its local shard, a view of the bucket's reduced shard."""
        shards = reduced.split([each.padded_shard_numel for each in self.zero_params])
        for zero_param, shard in zip(self.zero_params, shards, strict=True):
            yield zero_param, zero_param.unpack_shard(shard)

    def _reduce(
        self, reduce_scatter_input: Tensor, group: dist.ProcessGroup | None = None
    ) -> PendingReduce:
        mesh, dtype = self._mesh, self._result_dtype
        return PendingReduce(reduce_scatter_input, mesh, dtype, group, self._fp32_sum)

    def _fill_missing_grads(self) -> Tensor:
        """Zero the missing gradients in the reduce-scatter input, and return it."""
        reduce_scatter_input = self._reduce_scatter_input
        if reduce_scatter_input is None:
            reduce_scatter_input = self._new_reduce_scatter_input()
        for zero_param, padded_grad in self._padded_grads_in(reduce_scatter_input).items():
            if zero_param not in self._padded_grads:
                padded_grad.zero_()
        return reduce_scatter_input

    def _clear(self) -> None:
        self._reduce_scatter_input = None
        self._padded_grads = {}

    def _new_reduce_scatter_input(self) -> Tensor:
        numel = sum(zero_param.padded_shard_numel for zero_param in self.zero_params)
        return torch.empty(self._ranks, numel, dtype=self._dtype, device=self._device)

    def _padded_grads_in(self, reduce_scatter_input: Tensor) -> dict[ZeroParam, Tensor]:
        numels = [zero_param.padded_shard_numel for zero_param in self.zero_params]
        return dict(zip(self.zero_params, reduce_scatter_input.split(numels, 1), strict=True))

    def _needs_no_copy(self, zero_param: ZeroParam, grad: Tensor) -> bool:
        """Return whether the gradient can be the reduce-scatter input itself."""
        return (
            len(self.zero_params) == 1
            and not self._padded_grads
            and grad.dtype == self._dtype
            and zero_param.is_even
            and grad.is_contiguous()
        )


class ReplicatedBucket(Bucket):
    """A bucket of 0-dim parameters, which are not sharded: every rank updates all of them.

    ``launch_reduce`` is an all-reduce that blocks until all ranks have launched it.
    """

    def add_grad(self, zero_param: ZeroParam, grad: Tensor) -> None:
        value = grad.detach().to(self._dtype, copy=True)
        held = self._padded_grads.get(zero_param)
        self._padded_grads[zero_param] = value if held is None else held + value

    def launch_reduce(self) -> PendingReduce:
        zero = torch.zeros((), dtype=self._dtype, device=self._device)
        grads = torch.stack([self._padded_grads.get(each, zero) for each in self.zero_params])
        if self._fp32_sum:
            grads = grads.float()
        self._padded_grads = {}
        self.launches += 1
        return _ReplicatedReduce(grads, self._mesh, self._result_dtype)

    def local_shards(self, reduced: Tensor) -> Iterator[tuple[ZeroParam, Tensor]]:
        yield from zip(self.zero_params, reduced, strict=True)


class _ReplicatedReduce(PendingReduce):
    """An all-reduce that the constructor has completed."""

    def __init__(self, grads: Tensor, mesh: DeviceMesh, dtype: torch.dtype) -> None:
        all_reduce_mean(grads, mesh)
        self._mean, self._dtype = grads, dtype
        self._replicate_work = None


def split_by_size(zero_params: Iterable[ZeroParam], bucket_bytes: int) -> list[list[ZeroParam]]:
    """Split parameters into buckets of up to ``bucket_bytes`` of weights.

    A larger parameter gets a bucket of its own. The parameters of a bucket have the same dtype and
    device, and are either all replicated or all sharded. Returns buckets in the order in which they
    fill up.
    """
    open_buckets: dict[object, tuple[list[ZeroParam], int]] = {}
    result = []
    for zero_param in zero_params:
        param = zero_param.param
        key = (param.dtype, param.device, zero_param.is_replicated)
        size = param.numel() * param.element_size()
        bucket, filled = open_buckets.pop(key, ([], 0))
        if bucket and filled + size > bucket_bytes:
            result.append(bucket)
            bucket, filled = [], 0
        bucket.append(zero_param)
        open_buckets[key] = (bucket, filled + size)
    return result + [bucket for bucket, _ in open_buckets.values()]
