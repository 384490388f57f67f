"""Sharded checkpoints of model and optimizer through torch.distributed.checkpoint (DCP).

Tensors are saved under parameter names (FQNs), independent of how model and optimizer were sharded,
so that they load under any other layout and world size::

    root/
        LATEST                 name of the newest complete checkpoint
        step-00000200/
            manifest.json      size and checksum of every file, hyper-parameters, the caller's
                               extra data; written last
            .metadata          DCP: which file holds each shard
            .chunks            the same in a compact form, only if there are many shards
            __0_0.distcp ...   DCP: one or more files per rank

Keys of tensors: ``model.<fqn>``, ``optimizer.state.<fqn>.exp_avg`` and ``rng.<rank>.cpu``.
"""

from .async_save import wait_for_save as wait_for_save
from .convert import convert_fp32 as convert_fp32
from .directory import latest as latest
from .directory import newest_good as newest_good
from .directory import prune as prune
from .export import export_fp32 as export_fp32
from .full_state_dict import gather_full_state_dict as gather_full_state_dict
from .full_state_dict import scatter_full_state_dict as scatter_full_state_dict
from .importing import import_fp32 as import_fp32
from .loading import LoadResult as LoadResult
from .loading import load as load
from .loading import verify as verify
from .saving import save as save
