"""Parts of bench/gpu_checks.py that run without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench import gpu_checks

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_patterns_contain_the_special_values(dtype: torch.dtype) -> None:
    x = gpu_checks.patterns(20000, dtype, torch.Generator().manual_seed(0))
    info = torch.finfo(dtype)
    assert x.dtype == dtype and x.shape == (20000,)
    for value in (torch.inf, -torch.inf, 0.0, torch.finfo(torch.bfloat16).max):
        assert (x == value).any()
    assert x.isnan().any() and ((x != 0) & (x.abs() < info.smallest_normal)).any()
    assert gpu_checks.patterns(0, dtype, torch.Generator()).shape == (0,)


def test_same_bits_tells_zeros_apart_but_not_nans() -> None:
    zero = torch.zeros(3)
    assert gpu_checks.same_bits(zero, zero.clone()) and not gpu_checks.same_bits(zero, -zero)
    nan = torch.tensor([0x7FC00000, 0x7F800001], dtype=torch.int32).view(torch.float32)
    assert gpu_checks.same_bits(nan, nan.flip(0)) and not gpu_checks.same_bits(nan, torch.zeros(2))


def test_copy_offsets_from_the_alignment() -> None:
    x = torch.arange(5, dtype=torch.bfloat16)
    y = gpu_checks.copy_with_offset(x, CPU, 1)
    assert torch.equal(x, y) and y.data_ptr() % 16 == 2
    assert gpu_checks.copy_with_offset(torch.tensor(3.0), CPU, 1).dim() == 0


def test_check_that_raises_fails_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raises(device: torch.device) -> tuple[bool, str]:
        raise RuntimeError("called a synchronizing operation")

    for name in ("check_bits", "check_launches", "check_graph", "check_memory"):
        monkeypatch.setattr(gpu_checks, name, lambda device: (True, "fine"))
    monkeypatch.setattr(gpu_checks, "check_no_sync", raises)
    checks = gpu_checks.run_checks(CPU)
    assert [c.passed for c in checks] == [True, True, False, True, True]
    assert (
        "FAIL  no host sync: RuntimeError: called a synchronizing operation"
        in capsys.readouterr().out
    )


INTERPRETED = """
import sys
sys.path[:0] = sys.argv[1:3]
import torch
from bench import gpu_checks
from bench.triton_bandwidth import copy_bandwidth_
from sharded_bf16_adamw.kernels import reference

cpu = torch.device("cpu")
bf16, fp32 = torch.bfloat16, torch.float32
names = ("param_dtype", "grad_dtype", "param_offset", "grad_offset")
cases = [(bf16, bf16, 0, 0), (bf16, fp32, 1, 3), (fp32, bf16, 0, 3)]
cases = [dict(zip(names, case)) for case in cases]
for case in cases:
    for options in ({}, {"grad_scale": 0.37}, {"found_inf": 1.0}):
        found = gpu_checks.differing_tensors(cpu, (0, 1, 1023), options, **case)
        assert found == [], (case, options)
reference.step_key = lambda step: step
assert gpu_checks.differing_tensors(cpu, (0, 1, 1023), {}, **cases[0]) != []

arrays = [torch.full((2096,), 1 << i, dtype=torch.int32) for i in range(5)]
copy_bandwidth_(arrays)
assert [x.unique().tolist() for x in arrays] == [[1], [3], [5], [9], [17]]
"""


def test_bits_and_bandwidth_kernel_in_the_interpreter(repo: Path, triton_interpreter: None) -> None:
    command = [sys.executable, "-c", INTERPRETED, str(repo), str(repo / "launch")]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
