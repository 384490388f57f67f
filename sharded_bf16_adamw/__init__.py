"""AdamW for models whose weights are bfloat16, sharded over any number of ranks."""

from .checkpoint import latest, load, save
from .optimizer import AdamW_BF16
from .schedule import LR

__version__ = "0.1.0"
__all__ = ["LR", "AdamW_BF16", "__version__", "latest", "load", "save"]
