"""Kernels that update local tensors. They know no ranks, meshes or modules.

========= ================================== ====================================================
backend   device                             source
========= ================================== ====================================================
native    CPU                                ``cpu.py`` over the C library of ``csrc/``
triton    CUDA and ROCm                      ``cuda*.py``, ``triton_*.py``
reference any; defines the exact result      ``reference.py``, ``reference_precision.py``
========= ================================== ====================================================

``backend.py`` chooses a backend by device.
"""

from .backend import BACKENDS as BACKENDS
from .backend import PRECISION_SUMS as PRECISION_SUMS
from .backend import FusedAdamW as FusedAdamW
from .backend import Hyperparams as Hyperparams
from .backend import Runs as Runs
from .backend import StepArgs as StepArgs
from .backend import TensorLists as TensorLists
from .backend import adamw_bf16_ as adamw_bf16_
from .backend import backend_for as backend_for
from .backend import check_backend as check_backend
from .clip import clip_coefficient as clip_coefficient
from .clip import grad_sum_sq as grad_sum_sq
from .clip import norm_and_clip_coefficient as norm_and_clip_coefficient
from .device_memory import NormScratch as NormScratch
from .device_memory import is_capturing as is_capturing
from .reference import double_device as double_device
from .reference import lowbias32 as lowbias32
