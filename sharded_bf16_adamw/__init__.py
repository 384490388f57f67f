"""AdamW for models whose weights are bfloat16, sharded over any number of ranks."""

from .checkpoint import (
    convert_fp32,
    export_fp32,
    gather_full_state_dict,
    import_fp32,
    latest,
    load,
    newest_good,
    prune,
    save,
    scatter_full_state_dict,
    verify,
    wait_for_save,
)
from .ema import EMA
from .optimizer import AdamW_BF16
from .param_groups import param_groups
from .precision_stats import PrecisionStats
from .schedule import LR, WSD
from .sharding import gloo_shutdown  # noqa: F401  # registers a function that runs at exit
from .sharding.fp32_sum import Fp32SumReduceScatter
from .sharding.model_parallel import ModelParallel
from .sharding.zero.config import ZeRO
from .step_in_backward.clip import ClipInBackward

__version__ = "0.1.0"
__all__ = [
    "EMA",
    "LR",
    "WSD",
    "AdamW_BF16",
    "ClipInBackward",
    "Fp32SumReduceScatter",
    "ModelParallel",
    "PrecisionStats",
    "ZeRO",
    "__version__",
    "convert_fp32",
    "export_fp32",
    "gather_full_state_dict",
    "import_fp32",
    "latest",
    "load",
    "newest_good",
    "param_groups",
    "prune",
    "save",
    "scatter_full_state_dict",
    "verify",
    "wait_for_save",
]
