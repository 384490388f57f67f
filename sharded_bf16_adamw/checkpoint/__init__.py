"""Sharded checkpoints of model and optimizer through torch.distributed.checkpoint (DCP), under parameter names (FQNs).

What is on disk does not depend on how model and optimizer were sharded, so it loads under any other layout and number of ranks::

    root/
        LATEST                 name of the newest complete checkpoint
        step-00000200/
            manifest.json      size and checksum of every file, hyper-parameters, the caller's extra data; written last
            .metadata          DCP: where each tensor's parts lie
            __0_0.distcp ...   DCP: one or more files a rank

Keys within: ``model.<fqn>``, ``optimizer.state.<fqn>.exp_avg`` and ``rng.<rank>.cpu``.
"""

from .async_save import wait_for_save
from .directory import latest, newest_good, prune
from .export import export_fp32
from .foreign import convert_fp32, import_fp32
from .full_state_dict import gather_full_state_dict, scatter_full_state_dict
from .loading import Loaded, load, verify
from .saving import save

__all__ = [
    "Loaded",
    "convert_fp32",
    "export_fp32",
    "gather_full_state_dict",
    "import_fp32",
    "latest",
    "load",
    "newest_good",
    "prune",
    "save",
    "scatter_full_state_dict",
    "verify",
    "wait_for_save",
]
