"""Contenders of ``benchmark.py step``: our step, those of other libraries, and plain copies.

Optimizers allocate their own parameters, gradients and states. Variants of our step, such as a step
with clipping, run on our step's tensors instead, because equal tensors on other memory pages differ
in speed. So does the CPU's copy ceiling, but on a flat copy if there are several tensors. Gradients
are set once and kept, so a step is the work of the optimizer alone. A contender whose package is
missing raises ImportError when it is made.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import bandwidth
from sharded_bf16_adamw import AdamW_BF16, kernels
from sharded_bf16_adamw.kernels import cpu

HYPER: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
BYTES_PER_PARAM = 18  # our step reads g, p, m, v, c and writes p, m, v, c, 2 bytes each
SAMPLE = 1 / 8  # argument of precision_stats
BF16, FP32 = torch.bfloat16, torch.float32
# Colors of bars.
OURS, FP32_TORCH, BF16_TORCH, OTHER = "tab:blue", "tab:green", "tab:red", "tab:orange"
CEILING = "black"
Shapes = Sequence[tuple[int, ...]]


def _nothing() -> None:
    pass


@dataclass
class Runner:
    """A contender with its tensors allocated.

    Attributes:
        step: the function to time.
        before: runs before each turn, untimed.
        optimizer: the optimizer whose tensors contenders with ``runs_on`` share.
    """

    step: Callable[[], Any]
    before: Callable[[], Any] = _nothing
    optimizer: AdamW_BF16 | None = None


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Args:
        key: name in the JSON file.
        label: name in the tables; says what the time includes.
        make: takes the parameters' shapes and a device, and with ``runs_on`` also that contender's
            optimizer; returns a :class:`Runner`.
        memory: peak bytes per parameter with temporaries, beside the tensors of ``runs_on``.
        package: package to install for it.
        ceiling: key of the copy that stands for 100 % of the memory bandwidth.
        color: of its bar.
        max_numel: elements above which it is not measured, because a step takes seconds.
        runs_on: key of the contender on whose tensors it runs.
    """

    key: str
    label: str
    make: Callable[..., Runner]
    memory: int
    package: str | None = None
    ceiling: str | None = None
    color: str = "tab:gray"
    max_numel: int = 1 << 62
    runs_on: str | None = None


def contenders(device: torch.device) -> list[Contender]:
    """Return all contenders of a device, ours first, including those whose package is missing."""
    isas = cpu.supported_isas() if device.type == "cpu" and cpu.unavailable_reason() is None else []
    return [*_ours(device, isas), *_torch(), *_others(device), *_ceilings(device, isas)]


# ------------------------------------------------------------------------------------------- ours


def _ours(device: torch.device, isas: list[str]) -> list[Contender]:
    fastest = cpu.selected_isa() if isas else None
    ceiling = f"ceiling-{fastest}" if isas else "ceiling" if device.type == "cuda" else None
    backend = fastest or ("Triton" if device.type == "cuda" else "reference backend")
    variant = partial(Contender, memory=0, runs_on="ours", color=OURS)
    rows = [
        Contender("ours", f"AdamW_BF16 ({backend})", _make_ours, 10, ceiling=ceiling, color=OURS)
    ]
    for isa in reversed(isas):
        if isa != fastest:
            make = partial(_make_with_isa, isa=isa)
            label = f"AdamW_BF16 ({isa})"
            rows.append(variant(f"ours-{isa}", label, make, ceiling=f"ceiling-{isa}"))
    rows.append(variant("ours-clip", "AdamW_BF16, clip_grad_norm_ + step", _make_clipped))
    label = "AdamW_BF16, precision_stats + step"
    rows.append(variant("ours-precision", label, _make_measured))
    label = f"AdamW_BF16, precision_stats(1/{round(1 / SAMPLE)}) + step"
    rows.append(variant("ours-precision-sample", label, partial(_make_measured, fraction=SAMPLE)))
    if isas:
        label = "AdamW_BF16, a loop that reads the gradients + step"
        rows.append(Contender("ours-reading", label, _make_reading, 0, runs_on="ours"))
    reference = partial(_make_ours, backend="reference")
    label = "AdamW_BF16 (reference backend)"
    return [
        *rows,
        variant("ours-kernel", "AdamW_BF16, kernel call alone", _make_kernel_alone),
        Contender("ours-reference", label, reference, 10, color=OURS, max_numel=1 << 27),
    ]


def _make_ours(shapes: Shapes, device: torch.device, *, backend: str | None = None) -> Runner:
    optimizer = AdamW_BF16(_parameters(shapes, device, BF16), **HYPER, backend=backend)
    return Runner(optimizer.step, _select_isa(None, device), optimizer)


def _make_with_isa(shapes: Shapes, device: torch.device, ours: AdamW_BF16, *, isa: str) -> Runner:
    return Runner(ours.step, _select_isa(isa, device))


def _make_clipped(shapes: Shapes, device: torch.device, ours: AdamW_BF16) -> Runner:
    def clip_and_step() -> None:
        ours.clip_grad_norm_(1.0)
        ours.step()

    return Runner(clip_and_step, _select_isa(None, device))


def _make_measured(
    shapes: Shapes, device: torch.device, ours: AdamW_BF16, *, fraction: float = 1.0
) -> Runner:
    def measure_and_step() -> None:
        ours.precision_stats(fraction)
        ours.step()

    return Runner(measure_and_step, _select_isa(None, device))


def _make_reading(shapes: Shapes, device: torch.device, ours: AdamW_BF16) -> Runner:
    """Make a lower bound of clipping, whose norm reads all gradients before the step."""
    grads = _columns(ours)[0]

    def read_and_step() -> None:
        bandwidth.read_bandwidth(grads)
        ours.step()

    return Runner(read_and_step, _select_isa(None, device))


def _make_kernel_alone(shapes: Shapes, device: torch.device, ours: AdamW_BF16) -> Runner:
    grads, params, exp_avgs, exp_avg_sqs, corrections = _columns(ours)
    table = kernels.FusedAdamW(
        params, exp_avgs, exp_avg_sqs, corrections, [state["step"] for state in ours.state.values()]
    )
    hyper = kernels.Hyperparams(HYPER["lr"], 0.9, 0.999, HYPER["eps"], HYPER["weight_decay"])
    return Runner(
        lambda: table.update_(kernels.StepArgs(grads, [hyper])), _select_isa(None, device)
    )


def _columns(ours: AdamW_BF16) -> list[list[Tensor]]:
    """Return g, p, m, v and c of all parameters, after a first step."""
    keys = ("exp_avg", "exp_avg_sq", "correction")
    return [
        [p.grad for p in ours.state if p.grad is not None],
        [p.detach() for p in ours.state],
        *([state[key] for state in ours.state.values()] for key in keys),
    ]


def _select_isa(isa: str | None, device: torch.device) -> Callable[[], None]:
    return partial(cpu.select_isa, isa) if device.type == "cpu" else _nothing


# ------------------------------------------------------------------------------------------ torch


def _torch() -> list[Contender]:
    fp32, bf16 = partial(Contender, color=FP32_TORCH), partial(Contender, color=BF16_TORCH)
    fused, foreach = {"fused": True}, {"foreach": True}
    copy = "fp32 + bf16 copy of the weights"
    both = f"torch fused {copy} + fp32 copy of the gradients"
    make_fused = partial(_make_fp32, options=fused)
    make_both = partial(_make_fp32, options=fused, bf16_grads=True)
    make_foreach = partial(_make_fp32, options=foreach)
    make_bf16, make_foreach_bf16 = (partial(_make_bf16, options=x) for x in (fused, foreach))
    return [
        fp32("torch-fused-fp32", f"torch fused {copy}", make_fused, 18),
        fp32("torch-fused-fp32-grads", both, make_both, 20),
        fp32("torch-foreach-fp32", f"torch foreach {copy}", make_foreach, 26),
        bf16("torch-fused-bf16", "torch fused, all bf16 (stalls)", make_bf16, 8),
        bf16("torch-foreach-bf16", "torch foreach, all bf16 (stalls)", make_foreach_bf16, 12),
    ]


def _make_fp32(
    shapes: Shapes, device: torch.device, *, options: dict[str, Any], bf16_grads: bool = False
) -> Runner:
    """Make mixed precision: fp32 master weights and moments, and a bf16 copy of the weights.

    With ``bf16_grads`` a step first copies bf16 gradients to fp32, as bf16 weights need. Without,
    the gradients are fp32 already, which favours this contender.
    """
    master = _parameters(shapes, device, FP32)
    optimizer = torch.optim.AdamW(master, **HYPER, **options)
    return _with_copies(optimizer.step, master, bf16_grads)


def _with_copies(step: Callable[[], Any], master: list[Tensor], bf16_grads: bool = False) -> Runner:
    sources = [p.detach() for p in master]
    weights = [p.to(BF16) for p in sources]
    grads = [p.grad for p in master if p.grad is not None]
    model_grads = [g.to(BF16) for g in grads] if bf16_grads else []

    def run() -> None:
        if bf16_grads:
            torch._foreach_copy_(grads, model_grads)
        step()
        torch._foreach_copy_(weights, sources)

    return Runner(run)


def _make_bf16(shapes: Shapes, device: torch.device, *, options: dict[str, Any]) -> Runner:
    return Runner(torch.optim.AdamW(_parameters(shapes, device, BF16), **HYPER, **options).step)


# -------------------------------------------------------------------------------- other libraries


def _others(device: torch.device) -> list[Contender]:
    other = partial(Contender, color=OTHER)
    deepspeed = "DeepSpeedCPUAdam fp32 + bf16 copy of the weights"
    optimi = "torch-optimi AdamW, bf16 + Kahan sum"
    flash = "FlashAdamW, 24-bit weights, 8-bit moments"
    rows = [other("deepspeed", deepspeed, _make_deepspeed, 18, "deepspeed")]
    return [
        *(rows if device.type == "cpu" else []),
        other("optimi", optimi, _make_optimi, 18, "torch-optimi"),
        other("flashoptim", flash, _make_flashoptim, 16, "flashoptim"),
        other("torchao", "torchao AdamW8bit, bf16 weights", _make_torchao, 16, "torchao"),
    ]


def _make_deepspeed(shapes: Shapes, device: torch.device) -> Runner:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    # DeepSpeed's extension links the system's OpenMP library; torch.set_num_threads only sets the
    # number of threads of torch's own.
    ctypes.CDLL("libgomp.so.1").omp_set_num_threads(torch.get_num_threads())
    master = _parameters(shapes, device, FP32)
    return _with_copies(DeepSpeedCPUAdam(master, **HYPER, adamw_mode=True).step, master)


def _make_optimi(shapes: Shapes, device: torch.device) -> Runner:
    from optimi import AdamW

    return Runner(AdamW(_parameters(shapes, device, BF16), **HYPER).step)


def _make_flashoptim(shapes: Shapes, device: torch.device) -> Runner:
    from flashoptim import FlashAdamW

    return Runner(FlashAdamW(_parameters(shapes, device, BF16), **HYPER).step)


def _make_torchao(shapes: Shapes, device: torch.device) -> Runner:
    from torchao.optim import AdamW8bit

    torch._dynamo.reset()  # it recompiles for each shape, and the ninth is an error
    return Runner(AdamW8bit(_parameters(shapes, device, BF16), **HYPER).step)


# --------------------------------------------------------------------------------------- ceilings


def _ceilings(device: torch.device, isas: list[str]) -> list[Contender]:
    ceiling = partial(Contender, color=CEILING)
    copy = ceiling("copy", "plain copy of 9 B a parameter (reads 9, writes 9)", _make_copy, 18)
    if device.type == "cuda":
        label = "copy ceiling: reads 10 B, writes 8 B a parameter"
        return [ceiling("ceiling", label, _make_gpu_ceiling, 10), copy]
    rows = []
    for isa in reversed(isas):
        label = f"copy ceiling ({isa}): reads 10 B, writes 8 B"
        make = partial(_make_cpu_ceiling, isa=isa)
        rows.append(ceiling(f"ceiling-{isa}", label, make, 10, runs_on="ours"))
    return [*rows, copy]


def _make_cpu_ceiling(
    shapes: Shapes, device: torch.device, ours: AdamW_BF16, *, isa: str
) -> Runner:
    arrays = [
        column[0] if len(column) == 1 else torch.cat([x.flatten() for x in column])
        for column in _columns(ours)
    ]
    return Runner(lambda: bandwidth.copy_bandwidth(arrays), _select_isa(isa, device))


def _make_gpu_ceiling(shapes: Shapes, device: torch.device) -> Runner:
    from bench.triton_bandwidth import copy_bandwidth_

    words = -(-_numel(shapes) // 32) * 16  # of two bf16 each, full vectors
    arrays = [_random_words(words, device) for _ in range(5)]
    return Runner(lambda: copy_bandwidth_(arrays))


def _make_copy(shapes: Shapes, device: torch.device) -> Runner:
    # Half of the bytes are read, half written.
    source = _random_words(-(-BYTES_PER_PARAM * _numel(shapes) // 8), device)
    target = torch.zeros_like(source)
    return Runner(lambda: target.copy_(source))


def _random_words(count: int, device: torch.device) -> Tensor:
    """Return random int32, since zeros take less power to move, and on a GPU also less time."""
    return torch.randint(-(2**31), 2**31 - 1, (count,), dtype=torch.int32, device=device)


def _numel(shapes: Shapes) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)


def _parameters(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Return parameters with gradients, of the magnitudes of a trained network.

    Subnormals would slow some contenders.
    """
    generator = torch.Generator(device).manual_seed(0)
    params: list[Tensor] = []
    for shape in shapes:
        weight = torch.empty(shape, dtype=dtype, device=device)
        param = torch.nn.Parameter(weight.normal_(0.0, 0.02, generator=generator))
        grad = torch.empty_like(param, requires_grad=False)
        param.grad = grad.normal_(0.0, 1e-3, generator=generator)
        params.append(param)
    return params
