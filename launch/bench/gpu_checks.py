"""Run those checks of the optimizer step that need a GPU, and print PASS or FAIL lines.

    python launch/benchmark.py gpu-checks

They compare bits with the CPU reference, and check kernel launches, host syncs, CUDA graphs and
memory. ``benchmark.py --device cuda`` runs them first. The exit status is 1 if a check fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from training.command_line import Parser
from training.errors import UsageError

from bench.optimizers import HYPER, Runner, contenders
from bench.resident import peak_bytes, used_bytes
from sharded_bf16_adamw import LR, AdamW_BF16, kernels
from sharded_bf16_adamw.kernels import cuda, reference

BF16, FP32 = torch.bfloat16, torch.float32
SIZES = (0, 1, 7, 1023, 8192, 20001, 1 << 20)
SHAPES = [(1000, 512), (333,), (1,), (4096, 1024)]
MEMORY_NUMEL = 1 << 26
INF, NANS = [0x7F80, 0xFF80], [0x7FFF, 0xFFFF, 0x7FC0]  # words of bf16
ZEROS, SUBNORMALS, LARGEST = [0, 0x8000], [1, 0x8001, 0x7F], [0x7F7F, 0xFF7F]
SPECIAL = torch.tensor([*INF, *NANS, *ZEROS, *SUBNORMALS, *LARGEST], dtype=torch.uint16)


@dataclass(frozen=True)
class Check:
    """Result of a check, with its figures."""

    name: str
    passed: bool
    detail: str

    def __str__(self) -> str:
        return f"{'PASS' if self.passed else 'FAIL'}  {self.name}: {self.detail}"


def run_checks(device: torch.device) -> list[Check]:
    """Run and print all checks. A check that raises counts as failed; the others still run."""
    checks: dict[str, Callable[[torch.device], tuple[bool, str]]] = {
        "bits of the CPU reference": check_bits,
        "1 launch a step, 2 with clipping, at most 3 with skip_nonfinite": check_launches,
        "no host sync": check_no_sync,
        "a captured CUDA graph replays to the bits of eager steps": check_graph,
        "peak memory below torch's fused fp32 AdamW": check_memory,
    }
    done = []
    for name, function in checks.items():
        try:
            check = Check(name, *function(device))
        except Exception as error:
            check = Check(name, False, f"{type(error).__name__}: {str(error)[:500]}")
        print(check, flush=True)
        done.append(check)
    return done


# --------------------------------------------------------------------------------------------- bits


def check_bits(device: torch.device, sizes: tuple[int, ...] = SIZES) -> tuple[bool, str]:
    """Compare updates of random bits with the CPU reference, for dtypes, alignments and options."""
    # Dtypes of parameters and gradients, then their offsets from an aligned address, in elements.
    cases = list(product((BF16, FP32), (BF16, FP32), (0, 1), (0, 3)))
    option_sets: list[dict[str, Any]] = [
        {},
        {"grad_scale": 0.37},
        {"maximize": True},
        {"found_inf": 1.0},
    ]
    wrong = []
    for (param_dtype, grad_dtype, param_offset, grad_offset), options in product(
        cases, option_sets
    ):
        found = differing_tensors(
            device,
            sizes,
            options,
            param_dtype=param_dtype,
            grad_dtype=grad_dtype,
            param_offset=param_offset,
            grad_offset=grad_offset,
        )
        case = (
            f"{param_dtype} parameters, {grad_dtype} gradients, "
            f"offsets {param_offset} and {grad_offset}"
        )
        wrong += [f"{case}, {options}: {line}" for line in found]
    count = len(cases) * len(option_sets)
    if wrong:
        return False, wrong[0]
    return True, f"{count} cases of {len(sizes)} tensors each, up to {max(sizes)} elements"


def differing_tensors(
    device: torch.device,
    sizes: tuple[int, ...],
    options: dict[str, Any],
    *,
    param_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    param_offset: int,
    grad_offset: int,
) -> list[str]:
    """Name each tensor that differs from the CPU reference after one update.

    Offsets are in elements from the start of an allocation.
    """
    generator = torch.Generator().manual_seed(1)
    columns: dict[str, list[Any]] = {
        "params": [patterns(n, param_dtype, generator) for n in sizes],
        "exp_avgs": [patterns(n, param_dtype, generator) for n in sizes],
        "exp_avg_sqs": [patterns(n, param_dtype, generator) for n in sizes],
        "corrections": [
            patterns(n, param_dtype, generator) if param_dtype == BF16 else None for n in sizes
        ],
        "steps": [torch.tensor(float(7 * i)) for i in range(len(sizes))],
    }
    for v in columns["exp_avg_sqs"]:
        half = v[: len(v) // 2]
        half.copy_(half.abs())  # a negative exp_avg_sq gives NaN, so half of them are valid
    grads = [patterns(n, grad_dtype, generator) for n in sizes]
    on_device: dict[str, list[Any]] = {
        name: [None if x is None else copy_with_offset(x, device, param_offset) for x in column]
        for name, column in columns.items()
    }
    grads_on_device = [copy_with_offset(g, device, grad_offset) for g in grads]
    hypers = [
        kernels.Hyperparams(lr, 0.9, 0.999, 1e-8, 0.1, maximize=options.get("maximize", False))
        for lr in (1e-3, 3e-4)
    ]
    flags: dict[str, Any] = {
        key: torch.tensor(x) if isinstance(x, float) else x
        for key, x in options.items()
        if key != "maximize"
    }
    groups = [i % 2 for i in range(len(sizes))]
    tensors = kernels.TensorLists(**columns, groups=groups)
    reference.make_table(tensors).update_(kernels.StepArgs(grads, hypers, **flags))
    flags |= {key: x.to(device) for key, x in flags.items() if isinstance(x, Tensor)}
    tensors = kernels.TensorLists(**on_device, groups=groups)
    cuda.make_table(tensors).update_(kernels.StepArgs(grads_on_device, hypers, **flags))
    expected, found = {**columns, "grads": grads}, {**on_device, "grads": grads_on_device}
    return [
        f"{name}[{i}], {sizes[i]} elements"
        for name, column in expected.items()
        for i, x in enumerate(column)
        if x is not None and not same_bits(x, found[name][i])
    ]


def patterns(n: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return random bits of all exponents, subnormals, infinities and NaNs; a tenth is SPECIAL."""
    words = torch.randint(-(2**15), 2**15, (n, 2), generator=generator).to(torch.int16)
    special = SPECIAL.view(torch.int16)
    chosen = special[torch.randint(len(special), (n,), generator=generator)]
    is_special = torch.rand(n, generator=generator) < 0.1
    words[:, 1] = torch.where(is_special, chosen, words[:, 1])
    # float32 infinity and zero have zero low bits
    words[:, 0] *= ~(is_special & (torch.rand(n, generator=generator) < 0.5))
    if dtype == FP32:
        return words.view(torch.int32).flatten().view(FP32)
    return words[:, 1].contiguous().view(BF16)


def copy_with_offset(x: Tensor, device: torch.device, offset: int) -> Tensor:
    """Return a copy on the device, ``offset`` elements into its allocation; 0-dim stays 0-dim."""
    if x.dim() == 0:
        return x.to(device, copy=True)
    memory = torch.zeros(x.numel() + offset, dtype=x.dtype, device=device)
    memory[offset:].copy_(x)
    return memory[offset:]


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Return True if two tensors hold the same bits; a NaN equals any other NaN."""
    x, y = x.cpu(), y.cpu()
    integer = torch.int16 if x.dtype == BF16 else torch.int32
    return bool(((x.view(integer) == y.view(integer)) | (x.isnan() & y.isnan())).all())


# -------------------------------------------------------------------------- launches and host syncs


class Twin:
    """An optimizer of random bf16 parameters in two groups. All twins start with the same bits."""

    def __init__(self, device: torch.device, **options: Any) -> None:
        self.generator = torch.Generator(device).manual_seed(0)
        self.params = [torch.nn.Parameter(self._random(shape, device, 0.02)) for shape in SHAPES]
        self.new_grads()
        groups: list[dict[str, Any]] = [
            {"params": self.params[:2]},
            {"params": self.params[2:], "weight_decay": 0.0},
        ]
        self.optimizer = AdamW_BF16(groups, **{**HYPER, **options})

    def _random(self, shape: tuple[int, ...], device: torch.device, std: float) -> Tensor:
        return torch.empty(shape, dtype=BF16, device=device).normal_(
            0.0, std, generator=self.generator
        )

    def new_grads(self) -> None:
        """Draw new gradients, in place if there are old ones."""
        for param in self.params:
            grad = self._random(tuple(param.shape), param.device, 1e-2)
            param.grad = grad if param.grad is None else param.grad.copy_(grad)

    def clipped_step(self) -> None:
        self.optimizer.clip_grad_norm_(1.0)
        self.optimizer.step()

    def tensors(self) -> list[Tensor]:
        states = [state[key] for state in self.optimizer.state.values() for key in sorted(state)]
        return [*(param.detach() for param in self.params), *states]


def kernels_launched(function: Callable[[], Any]) -> list[str]:
    """Return the names of the kernels that a call launches, without copies and fills.

    Two unprofiled calls come first, since the first compiles and uploads. An empty profile is
    repeated, because the profiler occasionally loses its events.
    """
    function()
    function()
    names: list[str] = []
    for _ in range(3):
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            function()
            torch.cuda.synchronize()
        # torch annotates each optimizer step, which is not a kernel.
        skipped = ("Memcpy", "Memset", "Context Sync")
        names = [
            event.name
            for event in profile.events()
            if event.device_type == torch.autograd.DeviceType.CUDA
            and not getattr(event, "is_user_annotation", False)
            and not event.name.startswith(skipped)
        ]
        if names:
            break
    return names


def check_launches(device: torch.device) -> tuple[bool, str]:
    plain, skipping = Twin(device), Twin(device, skip_nonfinite=True)
    launched = {
        "step": kernels_launched(plain.optimizer.step),
        "with clipping": kernels_launched(plain.clipped_step),
        "with skip_nonfinite and no clipping": kernels_launched(skipping.optimizer.step),
    }
    detail = "; ".join(f"{case} {names}" for case, names in launched.items())
    step, clipped, skipping_step = map(len, launched.values())
    return (step, clipped) == (1, 2) and skipping_step <= 3, detail


@contextmanager
def host_syncs_raise() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_no_sync(device: torch.device) -> tuple[bool, str]:
    """Check steps with and without clipping and other options, on old and new gradients."""
    for options in ({}, {"skip_nonfinite": True}, {"lr": None, "lr_function": LR()}):
        twin = Twin(device, **options)
        twin.clipped_step()  # compiling and creating states may synchronize
        twin.optimizer.step()
        for _ in range(3):
            with host_syncs_raise():
                twin.clipped_step()
                twin.optimizer.step()
            for param in twin.params:
                assert param.grad is not None
                # At another address, since the old gradient is freed only afterwards.
                param.grad = param.grad.clone()
    return True, (
        "step and clip_grad_norm_ + step, with and without skip_nonfinite and lr_function, "
        "on old and new gradients"
    )


# -------------------------------------------------------------------------------------- CUDA graphs


def check_graph(device: torch.device) -> tuple[bool, str]:
    """Replay a captured step, plain and clipped, and compare it with an eager twin."""
    replays = 5
    for name in ("step", "clip_grad_norm_ + step"):
        lr = partial(torch.tensor, 1e-3, device=device)
        twins = [Twin(device, capturable=True, lr=lr()) for _ in range(2)]
        eager, captured = twins
        calls = [twin.optimizer.step if name == "step" else twin.clipped_step for twin in twins]
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):  # torch requires steps on a side stream before a capture
                for call in calls:
                    call()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            calls[1]()
        for i in range(replays):
            for twin in twins:
                twin.new_grads()
                twin.optimizer.param_groups[0]["lr"].fill_(1e-3 / (i + 1))
            calls[0]()
            graph.replay()
        torch.cuda.synchronize()
        pairs = zip(eager.tensors(), captured.tensors(), strict=True)
        wrong = [i for i, (x, y) in enumerate(pairs) if not same_bits(x, y)]
        steps = float(captured.optimizer.state[captured.params[0]]["step"])
        if wrong or steps != 3 + replays:
            return False, (
                f"{name}: tensors {wrong} differ after {replays} replays, "
                f"and {steps:.0f} steps were counted, not {3 + replays}"
            )
    return True, (
        f"step and clip_grad_norm_ + step, {replays} replays each "
        "with new gradients and learning rates"
    )


# ------------------------------------------------------------------------------------------- memory


def check_memory(device: torch.device) -> tuple[bool, str]:
    """Compare the peak bytes per parameter over two steps with torch's mixed precision."""
    by_key = {c.key: c for c in contenders(device)}
    ours, fused_fp32 = (
        peak_of_steps(partial(by_key[key].make, [(MEMORY_NUMEL,)], device), device) / MEMORY_NUMEL
        for key in ("ours", "torch-fused-fp32")
    )
    detail = (
        f"{ours:.2f} B per parameter with weights and gradients, against {fused_fp32:.2f} B "
        "(fp32 masters and gradients, bf16 weights)"
    )
    # 2 B each of g, p, m, v and c, plus little overhead
    return ours < fused_fp32 and ours <= 10.1, detail


def peak_of_steps(make: Callable[[], Runner], device: torch.device) -> int:
    before = used_bytes(device) or 0
    with peak_bytes(device) as peak:
        runner = make()
        runner.step()
        runner.step()
    return peak[0] - before


def main(argv: list[str]) -> int:
    Parser("benchmark.py gpu-checks", __doc__).parse_args(argv)
    if not torch.cuda.is_available():
        raise UsageError(
            "gpu-checks needs a GPU, but torch sees no CUDA or ROCm device: run it on a machine "
            "with one."
        )
    checks = run_checks(torch.device("cuda", torch.cuda.current_device()))
    return int(not all(check.passed for check in checks))
