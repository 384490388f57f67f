"""The last bucket of a step, whose reduce-scatter also tells whether ranks need an exchange.

[Note: Closing bucket]
A step usually repeats the one before. Each rank compares its gradient report with its previous one.
If the reports are unchanged on every rank, so is their maximum. So a rank only has to send one
flag, which is set if its report has changed.

On gloo and a one-dimensional mesh, the flag travels with the closing bucket, which saves a separate
exchange. Hooks leave the last launch of this bucket in a step to ``reduce_grads()`` or
``clear_grads()``. Every rank makes that launch first, in another process group than the buckets.
So it needs no fixed order relative to other buckets, and does not wait for ranks that are behind
with them. If any flag is set, each rank keeps the gradients of its closing bucket, and the ranks
exchange full reports. Nothing has been updated by then.

If there is one more gradient than expected, a hook launches the closing bucket after all, and this
rank sets the flag. This needs the closing bucket to launch as often as any other. Otherwise (if the
last of several backward passes do not use its parameters) a gradient after its last launch may be
an expected one, so the flag travels alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .bucket import Bucket
from .param import ZeroParam
from .reduce_scatter import PendingReduce, is_gloo


def can_carry_flag(mesh: DeviceMesh) -> bool:
    """Return whether a bucket can carry the flag, which the host must read without a sync."""
    device = torch.device(mesh.device_type)
    return (
        mesh.ndim == 1
        and mesh.size() > 1
        and device.type == "cpu"
        and is_gloo(mesh.get_group(0), device)
    )


class ClosingBucket(Bucket):
    """A bucket whose reduce-scatter input has an additional element per rank, the flag."""

    def reduce_unless(self, flag: bool, group: dist.ProcessGroup) -> PendingReduce | None:
        """Reduce the bucket, unless any rank's ``flag`` is True. Collective over ``group``.

        Returns:
            The completed reduction. None if any flag was True; the bucket then keeps its gradients.
        """
        reduce_scatter_input = self._fill_missing_grads()
        reduce_scatter_input[:, -1] = flag
        pending = self._reduce(reduce_scatter_input, group)
        # The mean of the flags is 0 or at least 1 / ranks, which is nonzero in any floating dtype.
        if pending.wait()[-1].item() != 0:
            return None
        self._clear()
        return pending

    def local_shards(self, reduced: Tensor) -> Iterator[tuple[ZeroParam, Tensor]]:
        yield from super().local_shards(reduced[:-1])

    def _new_reduce_scatter_input(self) -> Tensor:
        numel = sum(zero_param.padded_shard_numel for zero_param in self.zero_params) + 1
        result = torch.empty(self._ranks, numel, dtype=self._dtype, device=self._device)
        result[:, -1] = 0  # launch_reduce() sends it too
        return result

    def _padded_grads_in(self, reduce_scatter_input: Tensor) -> dict[ZeroParam, Tensor]:
        return super()._padded_grads_in(reduce_scatter_input[:, :-1])

    def _needs_no_copy(self, zero_param: ZeroParam, grad: Tensor) -> bool:
        return False
