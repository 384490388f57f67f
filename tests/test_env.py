"""The report of ``python -m sharded_bf16_adamw.env``."""

import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy
import pytest
import torch

import sharded_bf16_adamw
from sharded_bf16_adamw import env
from sharded_bf16_adamw.kernels import cpu, cuda


def healthy(**changes):
    """Return the facts of a machine with a GPU on which nothing is slow."""
    facts = env.Facts(
        backends={"native (CPU)": None, "triton (H100)": None, "reference (any device)": None},
        gpus=["cuda:0 H100"],
        process_groups={"gloo": True, "nccl": True},
        isa="avx512",
        isas=["baseline", "avx2", "avx512"],
        machine="x86_64",
        threads=8,
        cpus=8,
        accelerator="cuda",
        gpu_support="CUDA 13.0",
        nvidia_driver="NVRM version: 580",
    )
    for name, value in changes.items():
        assert hasattr(facts, name)
        setattr(facts, name, value)
    return facts


def test_command_reports_versions_and_back_ends_without_a_compiler(repo, tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "sharded_bf16_adamw.env"],
        env={"PATH": str(tmp_path), "PYTHONPATH": str(repo), "CUDA_LAUNCH_BLOCKING": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stderr == ""
    for expected in (
        sharded_bf16_adamw.__version__,
        torch.__version__,
        numpy.__version__,
        "none (no cc, gcc or clang in PATH, and CC is not set)",
        "CUDA_LAUNCH_BLOCKING  1",
        "- CUDA_LAUNCH_BLOCKING=1: the CPU waits for every GPU kernel. Unset it.",
    ):
        assert expected in result.stdout
    titles = [line for line in result.stdout.splitlines() if line and not line.startswith(" ")]
    assert titles == [
        "Versions",
        "Platform",
        "Backends",
        "GPUs",
        "Process groups",
        "Environment variables",
        "What is slow on this machine, and why",
    ]


def test_healthy_machine_has_nothing_slow():
    assert env.slow_parts(healthy()) == []
    assert "nothing found" in env.report(healthy())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"backends": {"native (CPU)": "no library"}}, "slower: no library. Install a C compiler"),
        (
            {"backends": {"native (CPU)": f"{cpu.ISA_VARIABLE} is 'x'"}},
            f"raise an error: {cpu.ISA_VARIABLE} is 'x'; or unset",
        ),
        ({"isa": "avx2"}, "use avx2 although the processor has avx512"),
        ({"isa": "baseline", "isas": ["baseline"]}, "has no AVX2"),
        ({"threads": 1, "variables": {"OMP_NUM_THREADS": "1"}}, "1 of 8 CPUs: set OMP_NUM_THREADS"),
        ({"threads": 9}, "9 CPU threads share 8 CPUs: set OMP_NUM_THREADS=8"),
        (
            {"variables": {"LOCAL_WORLD_SIZE": "4"}},
            "4 processes of 8 CPU threads share 8 CPUs: set OMP_NUM_THREADS=2",
        ),
        ({"backends": {"triton (V100)": "no bfloat16"}}, "slower reference backend: no bfloat16"),
        ({"gpus": [], "gpu_support": None}, "built without CUDA; install"),
        ({"gpus": []}, "compare the driver with torch's CUDA 13.0"),
        ({"accelerator": "mps"}, "Steps on mps use the slower reference"),
        ({"process_groups": {"gloo": True, "nccl": False}}, "this torch has no NCCL"),
        ({"variables": {"TRITON_INTERPRET": "1"}}, "TRITON_INTERPRET=1: Triton runs its kernels"),
        ({"variables": {"TORCH_DISTRIBUTED_DEBUG": "detail"}}, "TORCH_DISTRIBUTED_DEBUG=DETAIL"),
    ],
)
def test_names_what_is_slow_and_what_to_do(changes, expected):
    (found,) = env.slow_parts(healthy(**changes))
    assert expected in found
    assert f"- {found}" in env.report(healthy(**changes))


def test_advice_for_a_source_folder_is_not_a_compiler():
    (found,) = env.slow_parts(healthy(backends={"native (CPU)": f"{cpu.SOURCE_FOLDER} /src"}))
    assert found.endswith(f"tens of times slower: {cpu.SOURCE_FOLDER} /src.")


@pytest.mark.parametrize(
    "changes",
    [
        {"isa": "baseline", "isas": ["baseline"], "machine": "aarch64"},
        {"threads": 4},  # torch's own choice: one thread a core
        {"threads": 2, "variables": {"LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "2"}},
        {"variables": {"NCCL_P2P_DISABLE": "0", "TORCH_DISTRIBUTED_DEBUG": "INFO"}},
        {"gpus": [], "nvidia_driver": None, "backends": {"triton (CUDA, ROCm)": "no GPU"}},
    ],
)
def test_names_nothing_that_is_not_slow(changes):
    assert env.slow_parts(healthy(**changes)) == []


def fail(*args, **kwargs):
    raise RuntimeError("broken driver")


def test_errors_and_warnings_become_lines(monkeypatch):
    def warn():
        warnings.warn("the driver is too old", stacklevel=1)
        return False

    monkeypatch.setattr(cpu, "unavailable_reason", fail)
    monkeypatch.setattr(torch.cuda, "is_available", warn)
    monkeypatch.setattr(env.dist, "is_nccl_available", fail)
    text = env.report(env.gather_facts())
    assert "  the driver is too old\n" in text
    for part in ("native", "process_groups"):
        assert f"  {part}: RuntimeError: broken driver" in text


def test_every_part_may_fail(monkeypatch, capsys):
    for owner, name in (
        (env.importlib.metadata, "version"),
        (env.platform, "platform"),
        (torch, "get_num_threads"),
        (cpu, "supported_isas"),
        (torch.accelerator, "current_accelerator"),
        (env.dist, "is_available"),
    ):
        monkeypatch.setattr(owner, name, fail)
    assert env.main([]) == 0
    text = capsys.readouterr().out
    assert text.count("RuntimeError: broken driver") == 6


def test_checks_the_back_end_once_for_each_gpu_model(monkeypatch):
    names = ["H100", "H100", "V100"]
    asked = []

    def reason(device):
        asked.append(device.index)
        if device.index == 2:
            raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda i: SimpleNamespace(name=names[i], total_memory=2**36, major=9, minor=i),
    )
    monkeypatch.setattr(cuda, "unavailable_reason", reason)
    facts = env.gather_facts()
    assert asked == [0, 2]
    assert facts.gpus[1] == "cuda:1 H100, 64.0 GiB, capability 9.1"
    assert facts.backends["triton (H100)"] is None
    assert facts.backends["triton (V100)"] == "the check failed with OutOfMemoryError: no memory"
    assert "not available: the check failed with OutOfMemoryError" in env.report(facts)


def test_invalid_instruction_set_is_the_reason(monkeypatch):
    monkeypatch.setenv(cpu.ISA_VARIABLE, "avx1024")
    monkeypatch.setattr(cpu, "_isa", None)
    facts = env.gather_facts()
    assert facts.variables[cpu.ISA_VARIABLE] == "avx1024"
    if not facts.isas:
        pytest.skip("the native library was not built")
    assert "'avx1024'; choose one of" in facts.backends["native (CPU)"]
    assert facts.isa is None


def test_compiler_is_the_one_of_an_installation(monkeypatch, tmp_path):
    fake = tmp_path / "clang"
    fake.write_text("#!/bin/sh\necho clang of the test\n")
    fake.chmod(0o755)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
    monkeypatch.setattr(env.shutil, "which", lambda name: name == "clang" or None)
    assert env._compiler() == "clang: clang of the test"
    monkeypatch.setenv("CC", f"{fake} -m64")
    assert env._compiler() == f"{fake} -m64: clang of the test"
    monkeypatch.setenv("CC", str(tmp_path / "gcc"))
    assert "gcc does not run: FileNotFoundError" in env._compiler()


def test_quota_of_a_container_limits_the_usable_cpus(monkeypatch, tmp_path):
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(env, "CPU_QUOTA", quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(16), raising=False)
    assert env._usable_cpus() == 16
    for content, expected in (
        ("max 100000", 16),
        ("150000 100000", 2),
        ("1000 100000", 1),
        ("9900000 100000", 16),
    ):
        quota.write_text(content)
        assert env._usable_cpus() == expected
