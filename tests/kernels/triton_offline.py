"""Compile the Triton kernels without a GPU. Run it as a module to print the figures."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from sharded_bf16_adamw.kernels import triton_adamw, triton_norm, triton_precision

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
LOAD_16 = r"\bLDG\.E\S*\.128|(?:global|buffer)_load_dwordx4"
STORE_16 = r"\bSTG\.E\S*\.128|(?:global|buffer)_store_dwordx4"

ADAMW_ARGUMENTS: dict[str, str] = {
    "param_table": "*i64",
    "grads": "*i64",
    "hypers": "*i64",
    "chunks": "*i32",
    "done_counter": "*i32",
    "n_rows": "i32",
    "chunk": "i32",
    "grad_scale": "*fp32",
    "found_inf": "*fp32",
}
PRECISION_ARGUMENTS = {name: t for name, t in ADAMW_ARGUMENTS.items() if name != "done_counter"}
PRECISION_ARGUMENTS["partials"] = "*fp64"
NORM_ARGUMENTS: dict[str, str] = {
    "numels": "*i64",
    "grads": "*i64",
    "chunks": "*i32",
    "partials": "*fp64",
    "done_counter": "*i32",
    "sum_sq": "*fp64",
    "clip": "*fp32",
    "n_rows": "i32",
    "chunk": "i32",
    "max_norm_bits": "i64",
}
CLIP_ARGUMENTS: dict[str, str] = {"sum_sq": "*fp64", "clip": "*fp32", "max_norm_bits": "i64"}

_FULL_ADAMW = {"fp32_param": False, "hardware_cast": True}
KERNELS: dict[str, tuple[Any, dict[str, str], dict[str, Any]]] = {
    "bf16": (triton_adamw.adamw_kernel, ADAMW_ARGUMENTS, _FULL_ADAMW | {"variant": 0}),
    "bf16, fp32 gradient": (
        triton_adamw.adamw_kernel,
        ADAMW_ARGUMENTS,
        _FULL_ADAMW | {"variant": 1},
    ),
    "bf16, unaligned gradient": (
        triton_adamw.adamw_kernel,
        ADAMW_ARGUMENTS,
        _FULL_ADAMW | {"variant": 2},
    ),
    "bf16, unaligned": (triton_adamw.adamw_kernel, ADAMW_ARGUMENTS, _FULL_ADAMW | {"variant": 6}),
    "fp32": (
        triton_adamw.adamw_kernel,
        ADAMW_ARGUMENTS,
        _FULL_ADAMW | {"variant": 1, "fp32_param": True},
    ),
    "precision": (
        triton_precision.precision_kernel,
        PRECISION_ARGUMENTS,
        _FULL_ADAMW | {"variant": 0},
    ),
    "precision, unaligned gradient": (
        triton_precision.precision_kernel,
        PRECISION_ARGUMENTS,
        _FULL_ADAMW | {"variant": 2},
    ),
    "precision, unaligned": (
        triton_precision.precision_kernel,
        PRECISION_ARGUMENTS,
        _FULL_ADAMW | {"variant": 6},
    ),
    "precision, fp32": (
        triton_precision.precision_kernel,
        PRECISION_ARGUMENTS,
        _FULL_ADAMW | {"variant": 1, "fp32_param": True},
    ),
    "norm": (triton_norm.norm_kernel, NORM_ARGUMENTS, {}),
    "clip": (triton_norm.clip_kernel, CLIP_ARGUMENTS, {}),
}


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target.

    ``text`` is the PTX or AMD assembly, ``llvm`` the LLVM IR, ``sass`` the NVIDIA machine code
    (empty for AMD).
    """

    text: str
    llvm: str
    sass: str
    registers: int
    spilled: int  # registers (AMD) or bytes (NVIDIA)

    def count(self, pattern: str) -> int:
        """Count the instructions of the machine code that match a regular expression."""
        return len(re.findall(pattern, self.sass or self.text, re.MULTILINE))


@functools.cache
def compile_kernel(kernel: str, target: str, **options: Any) -> Compiled:
    """Compile ``KERNELS[kernel]`` for ``TARGETS[target]``; ``options`` replace the launcher's."""
    function, arguments, constants = KERNELS[kernel]
    gpu = TARGETS[target]
    constants = constants | {"flushing_sqrt": gpu.backend == "hip"}
    constant_arguments = {
        name: value for name, value in constants.items() if name in function.arg_names
    }
    signature = {name: arguments.get(name, "constexpr") for name in function.arg_names}
    aligned = {
        i: name
        for i, name in enumerate(function.arg_names)
        if name not in ("grad_scale", "found_inf")
    }
    source = ASTSource(
        function,
        signature,
        {(function.arg_names.index(name),): value for name, value in constant_arguments.items()},
        {
            (i,): [["tt.divisibility", 16]]
            for i, name in aligned.items()
            if signature[name].startswith("*")
        },
    )
    warps = 1 if kernel == "clip" else triton_adamw.THREADS // gpu.warp_size
    binary = triton.compile(source, gpu, {"num_warps": warps, "enable_fp_fusion": False} | options)
    if gpu.backend == "hip":
        text = binary.asm["amdgcn"]
        vgprs, spilled = (
            sum(map(int, re.findall(rf"\.{key}:\s+(\d+)", text)))
            for key in ("vgpr_count", "[sv]gpr_spill_count")
        )
        return Compiled(text, binary.asm["llir"], "", vgprs, spilled)
    return Compiled(binary.asm["ptx"], binary.asm["llir"], *_machine_code(binary.asm["cubin"]))


def pretend(target: str) -> None:
    """Make this process's launchers compile for ``TARGETS[target]``, as if that were the device."""

    class Driver:
        get_current_target = staticmethod(lambda: TARGETS[target])
        # launchers cache compiled kernels by device
        get_current_device = staticmethod(lambda: list(TARGETS).index(target))
        get_current_stream = staticmethod(lambda device=0: 0)

    driver.set_active(Driver())


def _machine_code(cubin: bytes) -> tuple[str, int, int]:
    """Return disassembly, registers and bytes of stack (spills), by the tools of Triton."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = subprocess.run(
            [tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    registers = max(map(int, re.findall(r"REG:(\d+)", usage)))
    return sass, registers, sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage)))


if __name__ == "__main__":
    for name in KERNELS:
        for target in TARGETS:
            compiled = compile_kernel(name, target)
            loads, stores = compiled.count(LOAD_16), compiled.count(STORE_16)
            instructions = compiled.count(r"^\s+(/\*[0-9a-f]{4,}\*/|[vs]_|global_|buffer_|ds_)")
            print(
                f"{name:26} {target:7} {compiled.registers:4} registers, {compiled.spilled} "
                f"spilled, {loads} loads and {stores} stores of 16 bytes, {instructions} "
                "instructions in all"
            )
