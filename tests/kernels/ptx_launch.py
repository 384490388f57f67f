"""Launches of the Triton kernels on the PTX emulator: compiled for a GPU, run on CPU tensors.

The host side is as on a GPU: the tables of ``cuda.py``, and Triton's specialization of a kernel by
its arguments (multiples of 16, 1, None). Only the launch itself is the emulator's instead of the
driver's. Use this module in processes where Triton compiles its kernels, not interprets them.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sharded_bf16_adamw.kernels import cuda, reference, triton_adamw, triton_norm

from . import ptx_emulator, ptx_memory, triton_checks, triton_norm_checks, triton_offline

KERNELS = (
    (triton_adamw, "adamw_kernel"),
    (triton_norm, "norm_kernel"),
    (triton_norm, "clip_kernel"),
)


class Exposed:
    """The live tensors whose address was read: a kernel cannot know any other memory."""

    def __init__(self) -> None:
        self._tensors: dict[int, weakref.ref[Tensor]] = {}
        self._address = Tensor.data_ptr

    def data_ptr(self, tensor: Tensor) -> int:
        """Record the tensor and return its address; stands in for ``Tensor.data_ptr``."""
        self._tensors[id(tensor)] = weakref.ref(tensor)
        return self._address(tensor)

    def memory(self) -> ptx_memory.Memory:
        self._tensors = {key: ref for key, ref in self._tensors.items() if ref() is not None}
        alive = [
            tensor
            for ref in self._tensors.values()
            if (tensor := ref()) is not None and tensor.numel()
        ]
        return ptx_memory.Memory([(self._address(x), x.numel() * x.element_size()) for x in alive])


class EmulatedKernel:
    """A replacement of a JIT function. A launch returns when it is done."""

    def __init__(self, function: Any, exposed: Exposed, by_warp: bool) -> None:
        self._function = function
        self._exposed = exposed
        self._by_warp = by_warp
        self._generator = np.random.default_rng(7)

    def __getitem__(self, grid: tuple[int]) -> Any:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int], *args: Any, **options: Any) -> None:
        compiled = self._function.warmup(*args, grid=grid, **options)
        assert compiled.metadata.global_scratch_size == compiled.metadata.profile_scratch_size == 0
        by_name = dict(zip(self._function.arg_names, args, strict=False)) | options
        passed = [
            by_name[name] for name, type_ in compiled.src.signature.items() if type_ != "constexpr"
        ]
        scratch = [0, 0]  # null pointers: the kernels use no global and no profile scratch
        arguments = [x.data_ptr() if isinstance(x, Tensor) else x for x in passed] + scratch
        kernel = _parsed(compiled.hash, compiled.asm["ptx"], compiled.metadata.shared)
        memory = self._exposed.memory()
        ptx_emulator.launch(
            kernel, grid[0], arguments, memory, by_warp=self._by_warp, generator=self._generator
        )


@functools.cache
def _parsed(key: str, ptx: str, shared: int) -> ptx_emulator.Kernel:
    return ptx_emulator.Kernel(ptx, shared)


@contextmanager
def emulated(target: str, by_warp: bool = False) -> Iterator[None]:
    """Run the kernels on CPU tensors, compiled for a target."""
    triton_offline.pretend(target)
    exposed = Exposed()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "data_ptr", lambda tensor: exposed.data_ptr(tensor))
        for module, name in KERNELS:
            patch.setattr(module, name, EmulatedKernel(getattr(module, name), exposed, by_warp))
        yield


def differences(name: str, target: str, by_warp: bool = False) -> list[str]:
    with emulated(target, by_warp):
        return triton_checks.differences(name)


def differences_beyond_32_bits(target: str) -> list[str]:
    with emulated(target):
        return triton_checks.differences_beyond_32_bits()


def norms(target: str, by_warp: bool = False) -> dict[str, tuple[Any, Any]]:
    with emulated(target, by_warp):
        return triton_norm_checks.norms(many_programs=not by_warp)


def norms_of_one_model(target: str) -> list[float]:
    """Return squared norms of the same gradients, each from programs in another order.

    The last one is from the reference.
    """
    generator = torch.Generator().manual_seed(8)
    grads = [
        torch.randn(n, generator=generator).to(dtype)
        for n in (70001, 16384, 5)
        for dtype in (torch.bfloat16, torch.float32)
    ]
    with emulated(target):
        norms = [float(cuda.grad_sum_sq(grads)) for _ in range(3)]
    return [*norms, float(reference.grad_sum_sq(grads))]
