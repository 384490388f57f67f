"""Print what a bug report needs: versions, backends, GPUs, and what is slow here and why.

Example::

    python -m sharded_bf16_adamw.env

Needs neither a GPU nor Triton. Never raises: a check that fails becomes a line of the report.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from . import __version__
from .kernels import cpu, cuda

PACKAGES = {"Triton": "triton", "numpy": "numpy", "safetensors": "safetensors"}
PROCESS_GROUPS = ("gloo", "nccl", "ucc", "mpi", "xccl")
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
VARIABLES = (
    cpu.ISA_VARIABLE,
    "CC",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "CUDA_LAUNCH_BLOCKING",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_NO_CUDA_MEMORY_CACHING",
    "TORCH_DISTRIBUTED_DEBUG",
    "TORCH_COMPILE_DISABLE",
    "TRITON_ALWAYS_COMPILE",
    "TRITON_CACHE_DIR",
    "TRITON_INTERPRET",
    "NCCL_DEBUG",
    "NCCL_P2P_DISABLE",
    "NCCL_IB_DISABLE",
)
SLOW_IF_SET = {
    "CUDA_LAUNCH_BLOCKING": "the CPU waits for every GPU kernel",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "every GPU tensor calls the driver's allocator",
    "TRITON_ALWAYS_COMPILE": "every process compiles the Triton kernels again",
    "TRITON_INTERPRET": "Triton runs its kernels in Python",
    "NCCL_P2P_DISABLE": "the GPUs of a node exchange data through CPU memory",
    "NCCL_IB_DISABLE": "nodes exchange data over TCP instead of InfiniBand or RoCE",
}


@dataclass
class Facts:
    """Facts about this machine and this process. A field stays empty if its value is unknown."""

    versions: dict[str, str] = field(default_factory=dict)
    platform: dict[str, str] = field(default_factory=dict)
    backends: dict[str, str | None] = field(default_factory=dict)  # None if available, else why not
    gpus: list[str] = field(default_factory=list)
    process_groups: dict[str, bool] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)  # warnings and errors raised while gathering
    isa: str | None = None  # CPU instruction set in use
    isas: list[str] = field(default_factory=list)  # those that the processor has, slowest first
    machine: str = ""
    threads: int = 0  # used by a step on CPU
    cpus: int = 0  # usable by this process
    accelerator: str | None = None  # device type
    gpu_support: str | None = None  # CUDA or ROCm version that torch was built with
    nvidia_driver: str | None = None


def gather_facts() -> Facts:
    """Collect everything that :func:`report` prints. Never raises."""
    facts = Facts()
    for gather in (
        _gather_variables,
        _gather_versions,
        _gather_platform,
        _gather_threads,
        _gather_native,
        _gather_gpus,
        _gather_process_groups,
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            errors = []
            try:
                gather(facts)
            except Exception as error:
                errors = [f"{gather.__name__.removeprefix('_gather_')}: {_describe(error)}"]
        facts.problems += [*(str(warning.message) for warning in caught), *errors]
    return facts


def slow_parts(facts: Facts) -> list[str]:
    """Return a short text for each cause of slowness: what is slow, and how to fix it."""
    return [*_slow_on_cpu(facts), *_slow_on_gpu(facts), *_slow_variables(facts)]


def report(facts: Facts) -> str:
    """Return the report as text."""
    slow = slow_parts(facts) or ["nothing found: every device has its own backend"]
    groups = [name for name, available in facts.process_groups.items() if available]
    sections: dict[str, list[str]] = {
        "Versions": _rows(facts.versions),
        "Platform": _rows(facts.platform),
        "Backends": _rows(
            {
                name: "available" if reason is None else f"not available: {reason}"
                for name, reason in facts.backends.items()
            }
        ),
        "GPUs": facts.gpus or ["none"],
        "Process groups": [", ".join(groups) or "none"],
        "Environment variables": _rows(facts.variables) or ["none of those that matter is set"],
        "Warnings and errors": facts.problems,
        "What is slow on this machine, and why": [f"- {sentence}" for sentence in slow],
    }
    blocks = [
        "\n".join([title, *(f"  {line}" for row in lines for line in row.splitlines())])
        for title, lines in sections.items()
        if lines
    ]
    return "\n\n".join(blocks)


def main(argv: list[str] | None = None) -> int:
    """Print the report and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m sharded_bf16_adamw.env",
        description="Print what a bug report needs, and what is slow here and why.",
    )
    parser.parse_args(argv)
    text = report(gather_facts())
    print(text.encode("ascii", "backslashreplace").decode())  # stdout may support only ASCII
    return 0


def _gather_variables(facts: Facts) -> None:
    facts.variables = {name: os.environ[name] for name in VARIABLES if name in os.environ}


def _gather_versions(facts: Facts) -> None:
    facts.versions["sharded_bf16_adamw"] = f"{__version__} in {Path(__file__).parent}"
    facts.versions["Python"] = f"{platform.python_version()} ({platform.python_implementation()})"
    facts.versions["torch"] = str(torch.__version__)
    for name, package in PACKAGES.items():
        try:
            facts.versions[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts.versions[name] = "not installed"


def _gather_platform(facts: Facts) -> None:
    facts.machine = platform.machine()
    facts.platform["system"] = platform.platform()
    facts.platform["processor"] = f"{cpu_model()} ({facts.machine})"
    facts.platform["C compiler"] = _compiler()


def _gather_threads(facts: Facts) -> None:
    facts.threads, facts.cpus = torch.get_num_threads(), _usable_cpus()
    facts.platform["CPU threads"] = f"{facts.threads}; {facts.cpus} CPUs are usable"


def _gather_native(facts: Facts) -> None:
    try:
        facts.isas = cpu.supported_isas()
        reason = cpu.unavailable_reason()
        if reason is None:
            facts.isa = cpu.selected_isa()
    except ValueError as error:
        reason = str(error)
    facts.backends["native (CPU)"] = reason
    if facts.isa is not None:
        facts.platform["CPU instruction set"] = f"{facts.isa}, of {', '.join(facts.isas)}"


def _gather_gpus(facts: Facts) -> None:
    cuda_version, hip_version = torch.version.cuda, torch.version.hip
    if cuda_version is not None:
        facts.gpu_support = f"CUDA {cuda_version}"
    elif hip_version is not None:
        facts.gpu_support = f"ROCm {hip_version}"
    facts.versions["GPU support of torch"] = facts.gpu_support or "none"
    if NVIDIA_DRIVER.exists():
        facts.nvidia_driver = NVIDIA_DRIVER.read_text().splitlines()[0].strip()
        facts.versions["NVIDIA driver"] = facts.nvidia_driver
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    facts.accelerator = None if accelerator is None else accelerator.type
    if not torch.cuda.is_available():
        facts.backends["triton (CUDA, ROCm)"] = cuda.unavailable_reason()
    else:
        _gather_gpu_models(facts)
    facts.backends["reference (any device)"] = None


def _gather_gpu_models(facts: Facts) -> None:
    """List the GPUs. Check the backend once per model, since a check takes GPU memory."""
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        facts.gpus.append(
            f"cuda:{index} {properties.name}, {properties.total_memory / 2**30:.1f} GiB, "
            f"capability {properties.major}.{properties.minor}"
        )
        backend = f"triton ({properties.name})"
        if backend not in facts.backends:
            try:
                facts.backends[backend] = cuda.unavailable_reason(torch.device("cuda", index))
            except Exception as error:  # out of memory, or another error of the device
                facts.backends[backend] = f"the check failed with {_describe(error)}"


def _gather_process_groups(facts: Facts) -> None:
    facts.process_groups = {
        name: dist.is_available() and getattr(dist, f"is_{name}_available", bool)()
        for name in PROCESS_GROUPS
    }


def _slow_on_cpu(facts: Facts) -> list[str]:
    found = []
    reason = facts.backends.get("native (CPU)")
    if reason is not None and cpu.ISA_VARIABLE in reason:
        found.append(f"Steps on CPU raise an error: {reason}; or unset {cpu.ISA_VARIABLE}.")
    elif reason is not None and cpu.SOURCE_FOLDER in reason:
        found.append(f"Steps on CPU use the reference backend, tens of times slower: {reason}.")
    elif reason is not None:
        found.append(
            f"Steps on CPU use the reference backend, tens of times slower: {reason}. Install a C "
            "compiler (gcc or clang) and then the package again: pip install --force-reinstall "
            "--no-deps --no-cache-dir, with what you installed it from."
        )
    elif facts.isas and facts.isa != facts.isas[-1]:
        found.append(
            f"Steps on CPU use {facts.isa} although the processor has {facts.isas[-1]}: unset "
            f"{cpu.ISA_VARIABLE}."
        )
    elif facts.isa == "baseline" and facts.machine.lower() in ("x86_64", "amd64"):
        found.append(
            "Steps on CPU use 128-bit vectors because the processor has no AVX2 (or hides it from "
            "a virtual machine)."
        )
    processes = _to_int(facts.variables.get("LOCAL_WORLD_SIZE"), 1)
    fair = max(1, facts.cpus // processes)
    limits = [name for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in facts.variables]
    if facts.threads < fair and limits:
        found.append(
            f"A step on CPU uses {facts.threads} of {fair} CPUs: set {' and '.join(limits)} to "
            f"{fair}, the number of CPUs for each process of a job on this machine. torchrun sets "
            "OMP_NUM_THREADS=1 if you do not."
        )
    elif facts.threads > fair:
        found.append(
            f"{processes} processes of {facts.threads} CPU threads share {facts.cpus} CPUs: set "
            f"OMP_NUM_THREADS={fair}."
            if processes > 1
            else f"{facts.threads} CPU threads share {facts.cpus} CPUs: set OMP_NUM_THREADS={fair}."
        )
    return found


def _slow_on_gpu(facts: Facts) -> list[str]:
    found = [
        f"Steps on this GPU use the slower reference backend: {reason}."
        for name, reason in facts.backends.items()
        if facts.gpus and name.startswith("triton") and reason is not None
    ]
    if not facts.gpus and facts.nvidia_driver is not None:
        fix = (
            "this torch is built without CUDA; install a CUDA build, as torch's install page says"
            if facts.gpu_support is None
            else "see the warnings above and CUDA_VISIBLE_DEVICES, and compare the driver with "
            f"torch's {facts.gpu_support}"
        )
        found.append(f"There is an NVIDIA driver but torch sees no GPU: {fix}.")
    if facts.accelerator not in (None, "cpu", "cuda"):
        found.append(
            f"Steps on {facts.accelerator} use the slower reference backend: there are kernels "
            "for CPU, CUDA and ROCm only."
        )
    if facts.gpus and facts.process_groups and not facts.process_groups.get("nccl"):
        found.append(
            "GPU ranks communicate through CPU memory because this torch has no NCCL: install a "
            "build with NCCL."
        )
    return found


def _slow_variables(facts: Facts) -> list[str]:
    found = [
        f"{name}={facts.variables[name]}: {effect}. Unset it."
        for name, effect in SLOW_IF_SET.items()
        if facts.variables.get(name, "0").lower() not in ("0", "", "false", "off", "no")
    ]
    if facts.variables.get("TORCH_DISTRIBUTED_DEBUG", "").upper() == "DETAIL":
        found.append(
            "TORCH_DISTRIBUTED_DEBUG=DETAIL: every collective compares its arguments over the "
            "ranks. Unset it."
        )
    return found


def cpu_model() -> str:
    """Return the processor's model name as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _compiler() -> str:
    """Return the C compiler that an installation would use, with its version."""
    named = shlex.split(os.environ.get("CC", ""))
    command = named or [name for name in ("cc", "gcc", "clang") if shutil.which(name)][:1]
    if not command:
        return "none (no cc, gcc or clang in PATH, and CC is not set)"
    try:
        result = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, errors="replace", timeout=20
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"{shlex.join(command)} does not run: {_describe(error)}"
    return f"{shlex.join(command)}: {(result.stdout.splitlines() or ['no version'])[0]}"


def _usable_cpus() -> int:
    """Return the number of CPUs that affinity and the container's quota allow, at least 1."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = CPU_QUOTA.read_text().split()
        count = min(count, -(-int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or no limit ("max")
        pass
    return max(1, count)


def _to_int(text: str | None, default: int) -> int:
    return int(text) if text is not None and text.isdecimal() and int(text) > 0 else default


def _rows(values: dict[str, str]) -> list[str]:
    width = max(map(len, values), default=0)
    return [f"{name:{width}}  {value}" for name, value in values.items()]


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main())
