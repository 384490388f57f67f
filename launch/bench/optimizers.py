"""What ``benchmark.py`` times: our step, those of other libraries, and the memory traffic of a step alone.

Optimizers make their own parameters, gradients and states. What is compared with our step to tell of our step alone (its share of the
copy ceiling, the cost of clipping) runs on the very tensors of our step, or for a ceiling beside many tensors on one flat copy: where
the pages of two equal sets of tensors come to lie makes a difference. Gradients are set once and kept, so a step
is the optimizer's work alone. A contender whose package is missing raises ImportError when made, and nothing before.
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

from sharded_bf16_adamw import AdamW_BF16, kernels
from sharded_bf16_adamw.kernels import cpu

HYPER: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
BYTES_PER_PARAM = 18  # our step reads g, p, m, v, c and writes all but g, 2 bytes each
BF16, FP32 = torch.bfloat16, torch.float32
OURS, FP32_TORCH, BF16_TORCH, OTHER, CEILING = (
    "tab:blue",
    "tab:green",
    "tab:red",
    "tab:orange",
    "black",
)  # colors of bars
Shapes = Sequence[tuple[int, ...]]


def _nothing() -> None:
    pass


@dataclass
class Runner:
    """A contender with its tensors in place: ``before`` runs ahead of each turn, untimed, and then ``step``, timed. With ``optimizer``
    other contenders may run on its tensors."""

    step: Callable[[], Any]
    before: Callable[[], Any] = _nothing
    optimizer: AdamW_BF16 | None = None


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Args:
        key: its name in the JSON file.
        label: its name in the tables, saying what the time includes.
        make: from the parameters' shapes and a device to a :class:`Runner`; with ``on``, also from the optimizer of that contender.
        memory: bytes a parameter while it steps, temporaries included: what must fit beside the others.
        package: what to install for it.
        ceiling: key of the copy that its share of the memory bandwidth is measured against.
        color: of its bar.
        most: elements beyond which it is not measured, because a step takes seconds.
        on: key of the contender on whose tensors it runs.
    """

    key: str
    label: str
    make: Callable[..., Runner]
    memory: int
    package: str | None = None
    ceiling: str | None = None
    color: str = "tab:gray"
    most: int = 1 << 62
    on: str | None = None


def contenders(device: torch.device) -> list[Contender]:
    """All contenders of a device, ours first. Raises nothing for packages that are missing."""
    isas = cpu.supported_isas() if device.type == "cpu" and cpu.available() else []
    return [*_ours(device, isas), *_torch(), *_others(device), *_ceilings(device, isas)]


def ours_key(isa: str) -> str | None:
    """The key of our step with one CPU instruction set, or None where this processor or the library lacks it."""
    if not cpu.available() or isa not in cpu.supported_isas():
        return None
    return "ours" if isa == cpu.selected_isa() else f"ours-{isa}"


# ------------------------------------------------------------------------------------------------------------------------ ours


def _ours(device: torch.device, isas: list[str]) -> list[Contender]:
    fastest = cpu.selected_isa() if isas else None
    ceiling = f"ceiling-{fastest}" if isas else "ceiling" if device.type == "cuda" else None
    how = fastest or ("Triton" if device.type == "cuda" else "reference back end")
    rows = [Contender("ours", f"AdamW_BF16 ({how})", _make_ours, 10, ceiling=ceiling, color=OURS)]
    for isa in reversed(isas):
        if isa != fastest:
            forced = partial(_make_forced, isa=isa)
            rows.append(
                Contender(
                    f"ours-{isa}",
                    f"AdamW_BF16 ({isa})",
                    forced,
                    0,
                    on="ours",
                    ceiling=f"ceiling-{isa}",
                    color=OURS,
                )
            )
    reference = partial(_make_ours, backend="reference")
    rows += [
        Contender(
            "ours-clip",
            "AdamW_BF16, clip_grad_norm_ + step",
            _make_clipped,
            0,
            on="ours",
            color=OURS,
        ),
        *(
            [
                Contender(
                    "ours-reading",
                    "AdamW_BF16, a loop that reads the gradients + step",
                    _make_reading,
                    0,
                    on="ours",
                )
            ]
            if isas
            else []
        ),
        Contender(
            "ours-kernel",
            "AdamW_BF16, kernel call alone",
            _make_kernel_alone,
            0,
            on="ours",
            color=OURS,
        ),
        Contender(
            "ours-reference",
            "AdamW_BF16 (reference back end)",
            reference,
            10,
            color=OURS,
            most=1 << 27,
        ),
    ]
    return rows


def _make_ours(shapes: Shapes, device: torch.device, *, backend: str | None = None) -> Runner:
    optimizer = AdamW_BF16(_parameters(shapes, device, BF16), **HYPER, backend=backend)
    return Runner(optimizer.step, _selecting(None, device), optimizer)


def _make_forced(shapes: Shapes, device: torch.device, ours: AdamW_BF16, *, isa: str) -> Runner:
    return Runner(ours.step, _selecting(isa, device))


def _make_clipped(shapes: Shapes, device: torch.device, ours: AdamW_BF16) -> Runner:
    def clip_and_step() -> None:
        ours.clip_grad_norm_(1.0)
        ours.step()

    return Runner(clip_and_step, _selecting(None, device))


def _make_reading(shapes: Shapes, device: torch.device, ours: AdamW_BF16) -> Runner:
    """What clipping costs at least, since the norm must read the gradients before the step does."""
    grads = _columns(ours)[0]

    def read_and_step() -> None:
        cpu.read_ceiling(grads)
        ours.step()

    return Runner(read_and_step, _selecting(None, device))


def _make_kernel_alone(shapes: Shapes, device: torch.device, ours: AdamW_BF16) -> Runner:
    grads, params, exp_avgs, exp_avg_sqs, corrections = _columns(ours)
    table = kernels.Table(
        params, exp_avgs, exp_avg_sqs, corrections, [state["step"] for state in ours.state.values()]
    )
    hyper = kernels.Hyperparams(HYPER["lr"], 0.9, 0.999, HYPER["eps"], HYPER["weight_decay"])
    return Runner(lambda: table.update_(grads, [hyper]), _selecting(None, device))


def _columns(ours: AdamW_BF16) -> list[list[Tensor]]:
    """g, p, m, v and c of all parameters, after a first step."""
    states = [
        [state[key] for state in ours.state.values()]
        for key in ("exp_avg", "exp_avg_sq", "correction")
    ]
    return [
        [p.grad for p in ours.state if p.grad is not None],
        [p.detach() for p in ours.state],
        *states,
    ]


def _selecting(isa: str | None, device: torch.device) -> Callable[[], None]:
    return partial(cpu.select_isa, isa) if device.type == "cpu" else _nothing


# ----------------------------------------------------------------------------------------------------------------------- torch


def _torch() -> list[Contender]:
    fused, foreach = {"fused": True}, {"foreach": True}
    return [
        Contender(
            "torch-fused-fp32",
            "torch fused fp32 + bf16 copy of the weights",
            partial(_make_fp32, options=fused),
            18,
            color=FP32_TORCH,
        ),
        Contender(
            "torch-fused-fp32-grads",
            "torch fused fp32 + bf16 copy of the weights + fp32 copy of the gradients",
            partial(_make_fp32, options=fused, bf16_grads=True),
            20,
            color=FP32_TORCH,
        ),
        Contender(
            "torch-foreach-fp32",
            "torch foreach fp32 + bf16 copy of the weights",
            partial(_make_fp32, options=foreach),
            26,
            color=FP32_TORCH,
        ),
        Contender(
            "torch-fused-bf16",
            "torch fused, all bf16 (stalls)",
            partial(_make_bf16, options=fused),
            8,
            color=BF16_TORCH,
        ),
        Contender(
            "torch-foreach-bf16",
            "torch foreach, all bf16 (stalls)",
            partial(_make_bf16, options=foreach),
            12,
            color=BF16_TORCH,
        ),
    ]


def _make_fp32(
    shapes: Shapes, device: torch.device, *, options: dict[str, Any], bf16_grads: bool = False
) -> Runner:
    """Mixed precision: fp32 master weights and moments, copied to the bf16 weights that the model runs with.

    With ``bf16_grads`` the gradients arrive as bf16, as those of bf16 weights do, and are copied to fp32 first; without, they are
    taken to be fp32 already, which favours this contender.
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


# ------------------------------------------------------------------------------------------------------------- other libraries


def _others(device: torch.device) -> list[Contender]:
    on_cpu = Contender(
        "deepspeed",
        "DeepSpeedCPUAdam fp32 + bf16 copy of the weights",
        _make_deepspeed,
        18,
        "deepspeed",
        color=OTHER,
    )
    return [
        *([on_cpu] if device.type == "cpu" else []),
        Contender(
            "optimi",
            "torch-optimi AdamW, bf16 + Kahan sum",
            _make_optimi,
            18,
            "torch-optimi",
            color=OTHER,
        ),
        Contender(
            "flashoptim",
            "FlashAdamW, 24-bit weights, 8-bit moments",
            _make_flashoptim,
            16,
            "flashoptim",
            color=OTHER,
        ),
        Contender(
            "torchao", "torchao AdamW8bit, bf16 weights", _make_torchao, 16, "torchao", color=OTHER
        ),
    ]


def _make_deepspeed(shapes: Shapes, device: torch.device) -> Runner:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    # Its extension is linked to the system's OpenMP library, where torch.set_num_threads, which serves torch's own, does nothing.
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

    torch._dynamo.reset()  # it compiles for each shape, and refuses the ninth
    return Runner(AdamW8bit(_parameters(shapes, device, BF16), **HYPER).step)


# ------------------------------------------------------------------------------------------------------------------- ceilings


def _ceilings(device: torch.device, isas: list[str]) -> list[Contender]:
    copy = Contender(
        "copy", "plain copy of 9 B a parameter (reads 9, writes 9)", _make_copy, 18, color=CEILING
    )
    if device.type == "cuda":
        mix = "copy ceiling: reads 10 B, writes 8 B a parameter"
        return [Contender("ceiling", mix, _make_gpu_ceiling, 10, color=CEILING), copy]
    mixes = [
        Contender(
            f"ceiling-{isa}",
            f"copy ceiling ({isa}): reads 10 B, writes 8 B",
            partial(make, isa=isa),
            10,
            on="ours",
            color=CEILING,
        )
        for isa, make in ((isa, _make_cpu_ceiling) for isa in reversed(isas))
    ]
    return [*mixes, copy]


def _make_cpu_ceiling(
    shapes: Shapes, device: torch.device, ours: AdamW_BF16, *, isa: str
) -> Runner:
    arrays = [
        column[0] if len(column) == 1 else torch.cat([x.flatten() for x in column])
        for column in _columns(ours)
    ]
    return Runner(lambda: cpu.stream_ceiling(arrays), _selecting(isa, device))


def _make_gpu_ceiling(shapes: Shapes, device: torch.device) -> Runner:
    from bench.triton_bandwidth import stream_ceiling_

    words = -(-_numel(shapes) // 32) * 16  # of two bf16 each, whole vectors
    arrays = [_random_words(words, device) for _ in range(5)]
    return Runner(lambda: stream_ceiling_(arrays))


def _make_copy(shapes: Shapes, device: torch.device) -> Runner:
    source = _random_words(
        -(-BYTES_PER_PARAM * _numel(shapes) // 8), device
    )  # half of the bytes are read, half written
    target = torch.zeros_like(source)
    return Runner(lambda: target.copy_(source))


def _random_words(count: int, device: torch.device) -> Tensor:
    """Zeros take less power to move, so on a GPU less time."""
    return torch.randint(-(2**31), 2**31 - 1, (count,), dtype=torch.int32, device=device)


def _numel(shapes: Shapes) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)


def _parameters(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Parameters and their gradients, of the magnitudes of a trained network: no subnormals, which would slow some contenders."""
    generator = torch.Generator(device).manual_seed(0)
    params: list[Tensor] = []
    for shape in shapes:
        param = torch.nn.Parameter(
            torch.empty(shape, dtype=dtype, device=device).normal_(0.0, 0.02, generator=generator)
        )
        param.grad = torch.empty_like(param, requires_grad=False).normal_(
            0.0, 1e-3, generator=generator
        )
        params.append(param)
    return params
