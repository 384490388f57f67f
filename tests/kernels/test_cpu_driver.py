"""The native library in a separate C program: with sanitizers, other compilers, and for aarch64.

The driver reads a file: tensors (int64); lr, beta1, beta2, eps, weight_decay, grad_scale (double);
then for each tensor p_is_f32, g_is_f32, numel, offset (int64), step (double) and the elements of g,
p, m, v and, for bf16 parameters, c. It writes a file, for each instruction set and each caller: the
sum of squares and the precision sums of two groups (double), then for each tensor the step
(float32) and its elements.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import assert_same_bits, random_bits
from torch import Tensor

import sharded_bf16_adamw.kernels as kernels
from sharded_bf16_adamw.kernels import Hyperparams, StepArgs, reference

from .precision_checks import mismatches
from .tables import table_of, take_step

BF16, F32 = torch.bfloat16, torch.float32
CSRC = Path(kernels.__file__).with_name("csrc")
DRIVER = Path(__file__).with_name("native_driver.c")
FLAGS = ["-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi", "-pthread"]
HYPER = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
THREADS, SCALE = 3, 0.7
SANITIZERS = ["address,undefined", "thread"]


class Case:
    def __init__(
        self,
        numel: int,
        p_dtype: torch.dtype,
        g_dtype: torch.dtype,
        offset: int,
        step: float,
        wild: bool,
    ) -> None:
        self.offset, self.step = offset, torch.tensor(step)
        generator = torch.Generator().manual_seed(numel + offset)
        dtypes = [g_dtype, p_dtype, p_dtype, p_dtype] + [p_dtype] * (p_dtype == BF16)
        self.columns: list[Tensor] = []
        for dtype, scale in zip(dtypes, [1e-3, 0.05, 1e-3, 1e-6, 1e-5], strict=False):
            if wild:
                x = random_bits(numel, dtype, generator)
            else:
                x = (torch.randn(numel, generator=generator) * scale).abs().to(dtype)
            self.columns.append(x)

    def header(self) -> bytes:
        g, p = self.columns[:2]
        return struct.pack(
            "=4qd", p.dtype == F32, g.dtype == F32, p.numel(), self.offset, self.step.item()
        )


def cases(wild: bool) -> list[Case]:
    dtypes = [(BF16, BF16), (BF16, F32), (F32, F32), (F32, BF16)]
    lengths = [0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 1000]
    small = [Case(n, *pair, n % 3, float(n % 2 * 500), wild) for n in lengths for pair in dtypes]
    return [
        *small,
        *(
            Case(n, *pair, 1, 9.0, wild)
            for n, pair in zip((100_001, 70_000, 40_001), dtypes, strict=False)
        ),
    ]


def content(x: Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes() if x.numel() else b""


def run_and_compare(
    command: list[str],
    folder: Path,
    environment: dict[str, str] | None = None,
    callers: int = 1,
) -> None:
    """Run the driver and compare its results with the reference.

    They must be NaN at the same places and have the same bits everywhere else.
    """
    for wild in (False, True):
        run_and_compare_cases(cases(wild), command, folder, environment or {}, callers)


def run_and_compare_cases(
    all_cases: list[Case],
    command: list[str],
    folder: Path,
    environment: dict[str, str],
    callers: int,
) -> None:
    data = struct.pack("=q6d", len(all_cases), *HYPER.values(), SCALE)
    data += b"".join(case.header() + b"".join(map(content, case.columns)) for case in all_cases)
    source, target = folder / "input", folder / "output"
    source.write_bytes(data)
    arguments = [*command, str(source), str(target), str(THREADS), str(callers)]
    done = subprocess.run(
        arguments, capture_output=True, text=True, timeout=240, env={**os.environ, **environment}
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr[-4000:]

    sum_sq = reference.grad_sum_sq([case.columns[0] for case in all_cases]).item()
    columns = [
        [x[i] if i < len(x) else None for x in (c.columns for c in all_cases)] for i in range(5)
    ]
    states: list[Any] = [*columns[1:], [case.step for case in all_cases]]
    groups = [i % 2 for i in range(len(all_cases))]
    args = StepArgs(columns[0], [Hyperparams(**HYPER)] * 2, torch.tensor(SCALE))  # type: ignore[arg-type]
    sums = table_of(reference, *states, groups=groups).precision_sums(args)
    for case in all_cases:
        g, p, m, v, *c = case.columns
        table = table_of(reference, [p], [m], [v], c or [None], [case.step])
        take_step(table, [g], **HYPER, grad_scale=torch.tensor(SCALE))
    written = target.read_bytes()
    size = 8 + sums.nbytes + sum(4 + sum(x.nbytes for x in case.columns) for case in all_cases)
    assert len(written) >= size * callers and len(written) % (size * callers) == 0
    for start in range(0, len(written), size):  # of one instruction set and caller
        assert struct.unpack_from("=d", written, start)[0] == pytest.approx(
            sum_sq, rel=1e-12, nan_ok=True
        )
        at = start + 8 + sums.nbytes
        found = torch.frombuffer(bytearray(written[start + 8 : at]), dtype=torch.float64)
        assert mismatches(found.reshape(sums.shape), sums) == []
        for case in all_cases:
            assert struct.unpack_from("=f", written, at)[0] == case.step.item()
            at += 4
            for expected in case.columns:
                if expected.numel():
                    actual = torch.frombuffer(
                        bytearray(written[at : at + expected.nbytes]), dtype=expected.dtype
                    )
                    assert_same_bits(actual, expected, any_nan=True)
                at += expected.nbytes


def build(compiler: str, flags: list[str], folder: Path) -> Path:
    program = folder / "driver"
    sources = [str(DRIVER), *(str(path) for path in sorted(CSRC.glob("*.c")))]
    done = subprocess.run(
        [compiler, *FLAGS, *flags, *sources, "-o", str(program), "-lm"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return program


def skip_reason(compiler: str, flags: list[str], folder: Path) -> str | None:
    """Return why a trivial program cannot be built and run with these flags, or None if it can."""
    source, program = folder / "trivial.c", folder / "trivial"
    source.write_text("int main(void) { return 0; }\n")
    if shutil.which(compiler) is None:
        return f"there is no {compiler}"
    for command in ([compiler, *flags, str(source), "-o", str(program)], [str(program)]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            return f"{' '.join(command)} fails: {done.stderr.strip()[-200:]}"
    return None


@pytest.mark.exhaustive
@pytest.mark.parametrize(("compiler", "level"), [("cc", "-O0"), ("clang", "-O3")])
def test_compilers_and_levels_agree(compiler: str, level: str, tmp_path: Path) -> None:
    if reason := skip_reason(compiler, [level], tmp_path):
        pytest.skip(reason)
    run_and_compare([str(build(compiler, [level], tmp_path))], tmp_path)


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_sanitizers_find_nothing(sanitizer: str, tmp_path: Path) -> None:
    flags = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-g1", "-Og"]
    compiler = os.environ.get("CC", "cc")
    if reason := skip_reason(compiler, flags, tmp_path):
        pytest.skip(reason)
    # Only the thread sanitizer shows what concurrent callers add.
    callers = 3 if sanitizer == "thread" else 1
    environment = {"TSAN_OPTIONS": "halt_on_error=1"}
    run_and_compare([str(build(compiler, flags, tmp_path))], tmp_path, environment, callers)


@pytest.mark.exhaustive
def test_aarch64_in_an_emulator(tmp_path: Path) -> None:
    compiler, emulator = "aarch64-linux-gnu-gcc", "qemu-aarch64"
    for tool in (compiler, emulator):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool}")
    run_and_compare([emulator, str(build(compiler, ["-O3", "-static"], tmp_path))], tmp_path)
