"""Float32 sums of gradients over ranks, and a reduce-scatter for FSDP2 that uses them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..torch_types import is_fsdp2
from .comm_errors import comm_errors

WIRE_DTYPE = torch.bfloat16
OPERATION = "averaging gradients"  # for messages
SUM_BLOCK_NUMEL = 1 << 16  # elements to sum at a time, so that temporaries stay in a CPU's cache


def sum_over_ranks(grads: Tensor, output: Tensor, divisor: float) -> None:
    """Sum over dimension 0 in float32, in rank order, then divide and round once.

    Args:
        grads: ``(ranks, numel)``.
        output: ``(numel,)``, of any dtype; overwritten.
        divisor: the number to divide the sum by.

    Examples:
        >>> output = torch.empty(1)
        >>> sum_over_ranks(torch.tensor([[2.0**24], [1.0], [-(2.0**24)]]), output, 1)
        >>> output
        tensor([0.])
    """
    # A GPU divides by a Python number by multiplying by its reciprocal, which rounds differently.
    by = torch.full((), float(divisor), dtype=torch.float32, device=grads.device)
    numel = SUM_BLOCK_NUMEL if grads.device.type == "cpu" else max(1, output.numel())
    for block, result in zip(grads.split(numel, 1), output.split(numel), strict=True):
        total = block[0].to(torch.float32, copy=True)
        for grad in block[1:]:
            total += grad
        result.copy_(total.div_(by))


class Fp32SumReduceScatter:
    """FSDP2's reduce-scatter with bfloat16 on the wire and a sum in float32.

    An all-to-all sends each shard of the gradients to the rank that owns it. That rank sums in
    float32, in rank order, and divides. This sends as many bytes as a reduce-scatter in bfloat16,
    half as many as one in float32. The result depends neither on the backend nor on the order of
    arrival.

    Use it with ``MixedPrecisionPolicy(reduce_dtype=torch.float32)``. FSDP2 then rounds only once,
    to the dtype of the parameters. It also accumulates in float32 under
    ``set_requires_gradient_sync(False)``, and all-reduces in float32 between the replicas of HSDP.
    Without that policy FSDP2 does all of this in the dtype of the gradients. Float32 gradients
    (accumulated ones, or those of a float32 forward pass) are rounded to bfloat16 for sending.

    Examples:
        >>> import torch
        >>> import torch.distributed as dist
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        >>> from sharded_bf16_adamw import Fp32SumReduceScatter
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> mesh = init_device_mesh("cpu", (1,))
        >>> policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        >>> model = fully_shard(torch.nn.Linear(4, 2).bfloat16(), mesh=mesh, mp_policy=policy)
        >>> Fp32SumReduceScatter.install(model)  # after the last fully_shard
        >>> model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        >>> model.bias.grad.dtype
        torch.bfloat16
        >>> dist.destroy_process_group()
    """

    @classmethod
    def install(cls, model: nn.Module) -> None:
        """Install an instance in every FSDP2 module of ``model``; call ``fully_shard`` first.

        Raises:
            ValueError: the model has no FSDP2 module, or one that shards its parameters over
                several meshes, for which torch accepts no custom reduce-scatter.
        """
        modules: list[Any] = [each for each in model.modules() if is_fsdp2(each)]
        if not any(map(_has_sharded_params, modules)):
            raise ValueError(
                "Fp32SumReduceScatter.install got a model without FSDP2 modules; call fully_shard "
                "on the model first"
            )
        for module in modules:
            module.set_custom_reduce_scatter(cls())

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocate a buffer for FSDP2, which calls this before any communication.

        Raises:
            ValueError: FSDP2 reduces in a dtype other than bfloat16 and float32.
        """
        if dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(
                f"Fp32SumReduceScatter sends bfloat16, but FSDP2 reduces gradients in {dtype}; "
                "give fully_shard MixedPrecisionPolicy(reduce_dtype=torch.float32)"
            )
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Reduce ``input_tensor`` over ranks, and write this rank's shard to ``output_tensor``.

        Args:
            output_tensor: 1-D; overwritten.
            input_tensor: 1-D, one shard for each rank.
            group: the process group.
            op: AVG, SUM, or PREMUL_SUM, which FSDP2's ``set_gradient_divide_factor`` needs.
            async_op: False; FSDP2 does not set it.

        Raises:
            ValueError: ``op`` is unsupported, or a sum that FSDP2 would divide after rounding.
            RuntimeError: another rank has died or hangs.
        """
        if async_op:
            raise ValueError(
                "Fp32SumReduceScatter got async_op=True, but is synchronous; leave async_op out"
            )
        divisor = _divisor(op, group.size(), output_tensor.dtype)
        grads = input_tensor.to(WIRE_DTYPE).view(group.size(), -1)
        received = torch.empty_like(grads)
        with comm_errors(OPERATION, dist.get_process_group_ranks(group)):
            dist.all_to_all_single(received, grads, group=group)
        sum_over_ranks(received, output_tensor, divisor)


def _has_sharded_params(module: Any) -> bool:
    """Return whether the FSDP2 module shards parameters, unlike one of torch's ``replicate``."""
    state = module._get_fsdp_state()
    # Before torch 2.13 a module has at most one group.
    groups = getattr(state, "_fsdp_param_groups", [getattr(state, "_fsdp_param_group", None)])
    return any(hasattr(getattr(each, "mesh_info", None), "shard_process_group") for each in groups)


def _divisor(op: Any, ranks: int, dtype: torch.dtype) -> float:
    """Return the number to divide the sum by for a reduction operation."""
    if op == dist.ReduceOp.AVG:
        return ranks
    if op == dist.ReduceOp.SUM:
        if dtype != torch.float32:
            raise ValueError(
                "set_force_sum_reduction_for_comms(True) makes FSDP2 divide a sum that was rounded "
                f"to {dtype}; leave it out with Fp32SumReduceScatter, or give fully_shard "
                "MixedPrecisionPolicy(reduce_dtype=torch.float32)"
            )
        return 1.0
    if op == dist.ReduceOp.PREMUL_SUM:
        return 1.0 / op.__getstate__()[1]  # its only accessor
    raise ValueError(
        f"Fp32SumReduceScatter got {op}, but supports only sums and averages; use it for FSDP2 "
        "gradients"
    )
