"""The Triton backend without a GPU: interpreted bit for bit, and compiled offline.

Triton reads TRITON_INTERPRET at import, so interpreted cases run in a separate process that returns
its findings.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from sharded_bf16_adamw import kernels
from sharded_bf16_adamw.kernels import backend, cuda, reference

triton = pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")

from . import (  # noqa: E402 (they import Triton)
    triton_checks,
    triton_norm_checks,
    triton_offline,
    triton_root_checks,
)
from .processes import pool  # noqa: E402

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def interpreted(triton_interpreter: None) -> Iterator[Run]:
    """Call a module-level function in a process that interprets Triton."""
    with pool("1") as process:
        yield lambda function, *args: process.submit(function, *args).result()


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Run]:
    """Call a module-level function in a process where Triton compiles."""
    with pool("0") as process:
        yield lambda function, *args: process.submit(function, *args).result()


# ------------------------------------------------------------------------- the update, interpreted


@pytest.mark.parametrize("name", triton_checks.CASES)
def test_same_bits_as_the_reference(interpreted: Run, name: str) -> None:
    assert interpreted(triton_checks.differences, name) == []


def test_offsets_beyond_32_bits(interpreted: Run) -> None:
    assert interpreted(triton_checks.differences_beyond_32_bits) == []


@pytest.mark.parametrize("name", triton_checks.PRECISION_CASES)
def test_precision_sums_are_those_of_the_reference(interpreted: Run, name: str) -> None:
    assert interpreted(triton_checks.precision_differences, name) == []


# --------------------------------------------------------------------------------------- host side


def test_launches_and_uploads(interpreted: Run) -> None:
    results = interpreted(triton_checks.host_side)
    assert results.pop("steps") == [10.0] * len(triton_checks.SIZES)
    assert results.pop("step of an empty parameter") == 1.0
    # 4 + 2: the row is off a 16-byte boundary. An empty tensor counts as aligned.
    assert results.pop("variants") == [0, 6]
    # Each launch has programs only for its own rows, one for each chunk of 1024: 3, 1, 1, 1, 2, 2.
    assert results.pop("programs") == {
        "all aligned": [10],
        "one unaligned": [7, 3],
        "one unaligned, while a graph is captured": [7, 3],
    }
    assert results.pop("programs of a mixture that a graph captures first") == [10, 10]
    assert results.pop("counter") == 0
    assert results == {  # (launches, uploads)
        "first": (1, 2),
        "again": (1, 0),
        "other hyper-parameters": (1, 1),
        "first hyper-parameters again": (1, 1),
        "other addresses": (1, 1),
        "one unaligned": (2, 3),
        "one unaligned, again": (2, 0),
        "other dtype at the same addresses": (1, 1),
    }


def test_captured_plans_are_kept_and_half_a_clipped_step_is_refused(interpreted: Run) -> None:
    first = (
        "a CUDA graph captures a step of these 3 parameters for the first time; take an eager step "
        "of the same parameters before each capture"
    )
    half = (
        "a CUDA graph captures only one of clip_grad_norm_() and the step() that it belongs to; "
        "capture both or neither"
    )
    results = interpreted(triton_checks.graphs)
    assert results.pop("first step").startswith(first)
    assert results == {
        "states after it": 0,
        "a plan that no graph reads": False,
        "a plan that a graph reads": True,
        "the learning rate that it reads": True,
        "clip captured: False, step: True": half,
        "clip captured: True, step: False": half,
        "clip captured: True, step: True": "no error",
        "clip captured: False, step: False": "no error",
    }


def test_unavailable_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA or ROCm device" in str(cuda.unavailable_reason())


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Simulate two GPUs and return their compute capabilities. Launches succeed."""
    capabilities = [(9, 0), (7, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(cuda, "is_capturing", lambda device: False)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device, **options: ones(*shape, **options))
    monkeypatch.setattr(cuda, "clip_coefficient", lambda sum_sq, max_norm: None)
    cuda._reason_on.cache_clear()
    backend.backend_module.cache_clear()
    yield capabilities
    cuda._reason_on.cache_clear()
    backend.backend_module.cache_clear()


@pytest.mark.parametrize("first", [0, 1])
def test_each_device_has_its_own_capability(gpus: list[tuple[int, int]], first: int) -> None:
    for index in (first, 1 - first):
        reason = cuda.unavailable_reason(torch.device("cuda", index))
        assert (reason is None) == (index == 0)
        assert reason is None or reason.startswith("GPU 1 has no bfloat16 arithmetic")
    assert cuda.unavailable_reason() is cuda.unavailable_reason(torch.device("cuda")) is None


@pytest.mark.parametrize("module", ["missing compiler", "broken compiler", "broken Triton"])
def test_reference_is_used_if_triton_cannot_launch(
    gpus: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    error = {
        "missing compiler": RuntimeError(
            "Failed to find C compiler. Please specify via CC environment variable.\nmore"
        ),
        "broken compiler": subprocess.CalledProcessError(1, ["gcc", "main.c"]),
        "broken Triton": ImportError("libtriton.so: undefined symbol"),
    }[module]
    monkeypatch.setattr(cuda, "clip_coefficient", mock.Mock(side_effect=error))
    device = torch.device("cuda", 0)
    sentence = (
        r"^AdamW_BF16 uses the slower reference backend on cuda: "
        r"Triton cannot launch a kernel on cuda:0 \("
        + re.escape(f"{type(error).__name__}: {str(error).splitlines()[0]}")
        + r"\); it needs a C compiler \(gcc or clang in PATH, or one named by CC\) and a writable "
        + r"cache folder; see python -m sharded_bf16_adamw\.env$"
    )
    with pytest.warns(UserWarning, match=sentence):
        assert backend.backend_module(device, None) is reference
    with pytest.raises(
        ValueError, match=r"backend 'triton' is not available: Triton cannot launch"
    ):
        kernels.check_backend("triton")


def test_device_error_does_not_select_another_back_end(
    gpus: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        cuda,
        "clip_coefficient",
        mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")),
    )
    with pytest.raises(torch.OutOfMemoryError):
        cuda.unavailable_reason()
    monkeypatch.setattr(cuda, "is_capturing", lambda device: True)
    with pytest.raises(
        RuntimeError, match="captures the first use of cuda:0; take an eager step of"
    ):
        cuda.unavailable_reason()
    monkeypatch.setattr(cuda, "is_capturing", lambda device: False)
    monkeypatch.setattr(cuda, "clip_coefficient", lambda sum_sq, max_norm: None)
    assert cuda.unavailable_reason() is None


# ---------------------------------------------------------------------------------------- the norm


def test_norm_and_clip(interpreted: Run) -> None:
    pairs = interpreted(triton_norm_checks.norms)
    assert {name: found for name, (found, _) in pairs.items()} == {
        name: wanted for name, (_, wanted) in pairs.items()
    }


# -------------------------------------------------------------------------- the square root of AMD


def test_square_root_that_flushes_subnormals_is_corrected(interpreted: Run) -> None:
    wrong = interpreted(triton_root_checks.square_roots, False)
    assert wrong["subnormal"] > 0 and wrong["below 2^-96"] > 0 and wrong["others"] == 0, (
        "the model has no error to correct"
    )
    assert not any(interpreted(triton_root_checks.square_roots, True).values())


# 2^-96 and 2^32 as older and newer versions of LLVM print them
POWER_96 = r"(?:0x39F0000000000000|f0x0F800000)"
POWER_32 = r"(?:0x41F0000000000000|f0x4F800000)"


def elements(pattern: str, llvm: str) -> int:
    """Count matches in LLVM IR. A match with the group ``v`` has two elements."""
    return sum(2 if match["v"] else 1 for match in re.finditer(pattern, llvm))


@pytest.mark.parametrize(("target", "scales"), [("gfx942", True), ("sm_90", False)])
@pytest.mark.parametrize("kernel", ["bf16", "fp32"])
def test_square_roots_are_scaled_only_for_amd(kernel: str, target: str, scales: bool) -> None:
    compiled = triton_offline.compile_kernel(kernel, target)
    roots = elements(
        r"@llvm\.(?:sqrt|amdgcn\.rsq)\.(?P<v>v2)?f32\(",
        compiled.llvm.partition("\ndefine")[2].partition("\n}")[0],
    )
    tiny = elements(rf"fcmp olt (?P<v><2 x )?float.*, (?:splat \(float )?{POWER_96}", compiled.llvm)
    scaled = elements(rf"fmul (?P<v><2 x )?float.*, (?:splat \(float )?{POWER_32}", compiled.llvm)
    assert (tiny, scaled) == ((roots, roots) if scales else (0, 0))
    assert roots >= 9 or not scales, "the loop has 8 elements, its tail 1"


# -------------------------------------------------------------------------------- compiled offline


VECTORS = {  # 16-byte loads and stores of the main loop: 8 elements a thread
    "bf16": (5, 4),
    "bf16, fp32 gradient": (6, 4),
    "bf16, unaligned gradient": (4, 4),
    "fp32": (8, 6),
    "precision": (5, 0),
    "precision, unaligned gradient": (4, 0),
    "precision, fp32": (8, 0),
    "norm": (6, 0),  # 16 elements a thread: 2 for bfloat16 and 4 for float32
}
# fp32 additions and multiplications of one element, without those of / and sqrt
OPERATIONS = {"bf16": (9, 9), "fp32": (6, 9)}


@pytest.mark.parametrize(
    ("kernel", "target"),
    [
        (k, t)
        for t in triton_offline.TARGETS
        for k in triton_offline.KERNELS
        if t in ("sm_90", "gfx942") or k in ("bf16", "norm")
    ],
)
def test_compiled(kernel: str, target: str) -> None:
    compiled = triton_offline.compile_kernel(kernel, target)
    assert compiled.spilled == 0
    if kernel in VECTORS:
        loads, stores = VECTORS[kernel]
        assert compiled.count(triton_offline.LOAD_16) >= loads
        assert compiled.count(triton_offline.STORE_16) >= stores
    if kernel in ("precision", "precision, unaligned") and target != "gfx942":
        # The sums over warps at the end: in the loop each thread adds up its own registers.
        assert compiled.count(r"\bSTS\b") <= 2 * 10 + 1
    if target == "gfx942":
        # A correctly rounded square root takes 5 fma, if possible of several elements at once.
        # Nothing else may be fused.
        roots = len(re.findall(r"call \S*float @llvm\.amdgcn\.rsq\.f32\(", compiled.llvm))
        lanes = len(re.findall(r"call float @llvm\.fma\.f32\(", compiled.llvm))
        lanes += sum(map(int, re.findall(r"call [^@]*@llvm\.fma\.v(\d+)f32\(", compiled.llvm)))
        assert lanes == 5 * roots
        assert not re.search(
            r"\bf(add|sub|mul|div) (fast|contract|reassoc|arcp|afn|nnan|ninf|nsz)\b", compiled.llvm
        )
        assert "llvm.fmuladd" not in compiled.llvm
    else:
        for inexact in ("fma.rn.f32", ".ftz", ".approx", "div.full"):
            assert inexact not in compiled.text
        # The norm's products are exact, so fusing them changes no bit.
        assert ("fma.rn.f64" in compiled.text) == (kernel == "norm")


@pytest.mark.parametrize("kernel", OPERATIONS)
def test_nothing_is_fused_in_machine_code(kernel: str) -> None:
    """If ptxas fused operations, fewer additions would remain than the rule has.

    The loop has 8 elements, its tail 1.
    """
    additions, multiplications = (9 * n for n in OPERATIONS[kernel])
    compiled = triton_offline.compile_kernel(kernel, "sm_90")
    assert compiled.count(r"\bFADD\b") >= additions
    assert compiled.count(r"\bFMUL\b") >= multiplications
    fused = triton_offline.compile_kernel(kernel, "sm_90", enable_fp_fusion=True)
    assert fused.count(r"\bFADD\b") < additions, "this test cannot detect fusion"


# ------------------------------------------------------------------------------- launch signatures


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_values_do_not_recompile(elsewhere: Run, target: str) -> None:
    """One binary for each set of optional arguments, whatever the numbers."""
    launched = elsewhere(triton_checks.signatures, target)
    assert len(launched) == 3 * (2 * 3 + 4)
    assert sorted(name for name, _ in set(launched)) == ["adamw_kernel"] * 2 + ["clip_kernel"] + [
        "norm_kernel"
    ] * 2 + ["precision_kernel"]
