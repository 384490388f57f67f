"""The addresses of gradients on the device; a training loop may allocate new ones at each step."""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import check_grad_dtypes
from .device_memory import ALIGNMENT, DeviceArray


class GradientAddresses:
    """Addresses and variants of gradients (see ``triton_adamw.py``): int64 ``[2, n]`` on a device.

    Args:
        row_variants: for each gradient, the flags of its variant that its parameter determines.
        device: device of the array.
    """

    def __init__(self, row_variants: list[int], device: torch.device) -> None:
        from . import triton_adamw as kernels

        self._fp32_flag = kernels.FP32_GRAD.value
        self._unaligned_flag = kernels.UNALIGNED_GRAD.value
        self._row_variants = row_variants
        self._key: tuple[list[int], list[torch.dtype]] | None = None
        self.variants: list[int] = []  # of the last list of gradients
        self.array = DeviceArray((2, len(row_variants)), device)

    def upload(self, grads: list[Tensor]) -> tuple[Tensor, list[int]]:
        """Upload the array if it has changed. Return it and its distinct variants, sorted."""
        pointers, dtypes = list(map(Tensor.data_ptr, grads)), [g.dtype for g in grads]
        if (pointers, dtypes) != self._key:
            check_grad_dtypes(dtypes)
            fp32, unaligned, is_fp32 = self._fp32_flag, self._unaligned_flag, torch.float32
            self.variants = [
                variant
                | (fp32 if dtype is is_fp32 else 0)
                | (unaligned if pointer % ALIGNMENT else 0)
                for pointer, dtype, variant in zip(
                    pointers, dtypes, self._row_variants, strict=True
                )
            ]
            self._key = (pointers, dtypes)
        array = self.array.upload_if_changed([pointers, self.variants])
        return array, sorted(set(self.variants))
