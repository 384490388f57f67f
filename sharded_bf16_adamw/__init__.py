"""AdamW for models whose weights are bfloat16, sharded over any number of ranks."""

import importlib
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
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


if not TYPE_CHECKING:  # with this function type checkers would accept any attribute name

    def __getattr__(name: str) -> Any:
        """Import :mod:`.checkpoint` on first use, because importing DCP takes a second."""
        if name in __all__ or name == "checkpoint":
            checkpoint = importlib.import_module(".checkpoint", __name__)
            return checkpoint if name == "checkpoint" else getattr(checkpoint, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
