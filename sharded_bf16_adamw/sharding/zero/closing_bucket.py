"""The bucket that closes a step: its reduce-scatter also tells whether ranks have to talk.

[Note: Closing bucket]
Once ranks have agreed on their gradients, the next step usually repeats the one before. Each rank
sees for itself whether its own report is the same. If it is on every rank, so is what they would
agree on, and only one bit per rank has to travel: a flag, set by a rank whose report differs.

On gloo and a one-dimensional mesh, the flag travels with a bucket, so that the host exchanges
nothing else. A hook never launches this bucket for the last time in a step: ``reduce_grads()`` and
``clear_grads()`` do, on every rank, in a process group of its own and before anything else. So it
cannot be mistaken for another bucket, and waits for no rank that is behind with its buckets. If any
flag is set, each rank keeps the gradients of its closing bucket, and all ranks agree as in a first
step. Nothing has been updated by then.

One more gradient than expected makes a hook launch the bucket all the same; that rank then sets the
flag. But if other buckets launch more often in each step (several backward passes, the last of
which do not use the parameters of this bucket), such a gradient is an expected one. The flag then
travels alone.
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
    """Return whether a bucket of this mesh can carry a flag that the host reads without a sync."""
    device = torch.device(mesh.device_type)
    return (
        mesh.ndim == 1
        and mesh.size() > 1
        and device.type == "cpu"
        and is_gloo(mesh.get_group(0), device)
    )


class ClosingBucket(Bucket):
    """A bucket whose reduce-scatter input has one more element per rank, the flag."""

    def reduce_unless(self, flag: bool, group: dist.ProcessGroup) -> PendingReduce | None:
        """Reduce the bucket, unless any rank passes True. Collective, in a group of its own.

        Returns:
            The completed reduction. None if a rank has passed True; the bucket then keeps its
            gradients.
        """
        reduce_scatter_input = self._fill_missing_grads()
        reduce_scatter_input[:, -1] = flag
        pending = self._reduce(reduce_scatter_input, group)
        # The mean of the flags is 0, or at least 1 / ranks, which any floating dtype can represent.
        if pending.wait()[-1].item() != 0:
            return None
        self._clear()
        return pending

    def local_shards(self, reduced: Tensor) -> Iterator[tuple[ZeroParam, Tensor]]:
        yield from super().local_shards(reduced[:-1])

    def _new_reduce_scatter_input(self) -> Tensor:
        numel = sum(zero_param.padded_shard_numel for zero_param in self.zero_params) + 1
        result = torch.empty(self._ranks, numel, dtype=self._dtype, device=self._device)
        result[:, -1] = 0  # sent by launches without a flag too
        return result

    def _padded_grads_in(self, reduce_scatter_input: Tensor) -> dict[ZeroParam, Tensor]:
        return super()._padded_grads_in(reduce_scatter_input[:, :-1])

    def _needs_no_copy(self, zero_param: ZeroParam, grad: Tensor) -> bool:
        return False
