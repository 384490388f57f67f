"""``launch/train.py --strategy``: all strategies train like one process and resume.

They refuse what they cannot do.
"""

from __future__ import annotations

import contextlib
import io
import math

import distributed
import pytest
import torch
import torch.distributed as dist
import train
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from training import setup
from training.metrics import read_metrics
from training.model import GPT, PRESETS
from training.options import parse_args
from training.signals_and_watchdog import Supervisor
from training.step import backward, compute_loss, update

from sharded_bf16_adamw.sharding.zero.param import ZeroParam

from ..train_runs import undrawn

SHORT = (
    "--device=cpu --no-progress --preset=nano --seq-len=16 --batch-size=8 --eval-batches=2 "
    "--eval-every=3 --save-every=0"
)
RANKS = [
    ("ddp", 2),
    ("fsdp1", 3),
    ("fsdp1", 2),
    ("fsdp2", 2),
    ("hsdp", 4),
    ("tp", 2),
    ("fsdp2+tp", 4),
]
TP = pytest.param("tp", 2, marks=pytest.mark.exhaustive)  # fsdp2+tp has the same
FSDP2_TP = pytest.param("fsdp2+tp", 4, marks=pytest.mark.exhaustive)  # the slowest
# At 0.01 some texts have steps where even another order of the sequences in a batch changes the
# gradient norm by 1 %.
LR = 0.003
# Nats per byte, of about 5.5: the forward and backward of several ranks round differently.
LIMIT = 0.005


def command_line(*arguments: object) -> list[str]:
    return " ".join([SHORT, *map(str, arguments)]).split()


def train_worker(rank, world_size, *arguments):
    torch.manual_seed(0)
    with undrawn():
        return train.main(command_line(*arguments))


def run(ranks, out_dir, *arguments):
    """Train on several ranks; return the metrics."""
    codes = distributed.run_ranks(ranks, train_worker, "--out", out_dir, *arguments)
    assert codes == [0] * ranks
    return read_metrics(out_dir / "metrics.jsonl")


def held_out(lines):
    return {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}


def norms(lines):
    return [line["grad_norm"] for line in lines if "grad_norm" in line]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    options = f"--strategy single --steps 6 --batch-size 12 --lr {LR}"
    return run(1, tmp_path_factory.mktemp("single"), options)


@pytest.mark.parametrize(("strategy", "ranks"), RANKS)
def test_strategy_trains_like_one_process(tmp_path, single, strategy, ranks):
    lines = run(ranks, tmp_path, f"--strategy {strategy} --steps 6 --batch-size 12 --lr {LR}")
    expected, losses = held_out(single), held_out(lines)
    assert list(losses) == [0, 3, 6]
    assert expected[6] < expected[0] - 100 * LIMIT, "else the limit would also pass no training"
    for step, loss in losses.items():
        assert loss == pytest.approx(expected[step], abs=LIMIT)
    assert norms(lines) == pytest.approx(norms(single), rel=0.01), "each element counts once"


@pytest.mark.parametrize(("strategy", "ranks"), [("fsdp1", 2), ("hsdp", 4), TP, ("fsdp2+tp", 4)])
def test_strategy_resumes_with_the_same_bits_and_under_another(tmp_path, strategy, ranks):
    options = "--save-every 3 --steps 6 --lr 0.01"
    whole = run(ranks, tmp_path / "whole", f"--strategy {strategy}", options)
    options += f" --resume {tmp_path}/whole/checkpoints/step-00000003"
    resumed = run(ranks, tmp_path / "resumed", f"--strategy {strategy}", options)
    for line in (*whole, *resumed):
        line.pop("tokens_per_s", None)
    assert resumed == [line for line in whole if line["step"] > 3]
    other = run(2, tmp_path / "other", "--strategy fsdp2", options)
    assert held_out(other)[6] == pytest.approx(held_out(whole)[6], abs=LIMIT)


@pytest.mark.parametrize(("strategy", "ranks"), [("fsdp1", 2), TP, FSDP2_TP])
def test_strategy_trains_with_torchs_optimizer(tmp_path, single, strategy, ranks):
    """The first norm equals that of ``--optimizer bf16``, since the initial weights are equal."""
    options = "--steps 2 --batch-size 12 --optimizer torch-fp32"
    lines = run(ranks, tmp_path, f"--strategy {strategy}", options)
    assert norms(lines)[0] == pytest.approx(norms(single)[0], rel=0.01)
    assert all(math.isfinite(loss) for loss in held_out(lines).values())


def refused_worker(rank, world_size, *arguments):
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = train.main(command_line(*arguments))
    return code, errors.getvalue()


@pytest.mark.parametrize(
    ("ranks", "options", "message"),
    [
        (3, "--strategy hsdp --batch-size 12", "needs an even number of processes, not 3"),
        (3, "--strategy fsdp2+tp --batch-size 12", "needs an even number of processes, not 3"),
        (3, "--strategy tp", "2 heads are not divisible by 3 tensor-parallel ranks"),
        (
            2,
            "--strategy tp --seq-len 15",
            "--seq-len 15 is not divisible by 2 tensor-parallel ranks: use a multiple of 2",
        ),
        (
            4,
            "--strategy fsdp2+tp --batch-size 3",
            "--batch-size 3 is not a multiple of 2 = 2 rank(s) x --grad-accum 1",
        ),
    ],
)
def test_indivisible_sizes_are_refused_on_every_rank(tmp_path, ranks, options, message):
    arguments = ("--out", tmp_path, "--steps 2", options)
    results = distributed.run_ranks(ranks, refused_worker, *arguments)
    assert [code for code, _ in results] == [2] * ranks
    assert message in results[0][1]
    assert not any(errors for _, errors in results[1:]), "only rank 0 prints it"


@pytest.mark.parametrize(("strategy", "ranks"), [("fsdp1", 2), ("hsdp", 4), FSDP2_TP])
def test_micro_batches_train_like_one_batch(tmp_path, single, strategy, ranks):
    options = f"--steps 6 --batch-size 12 --lr {LR} --grad-accum 3"
    lines = run(ranks, tmp_path, f"--strategy {strategy}", options)
    assert norms(lines) == pytest.approx(norms(single), rel=0.01)
    assert held_out(lines)[6] == pytest.approx(held_out(single)[6], abs=LIMIT)


class CountReductions(TorchDispatchMode):
    """Counter of the collectives that reduce, also those of torch's C++.

    Norms and agreements between ranks count as well. The functional collectives of tensor
    parallelism, which reduce activations, do not.
    """

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        kinds = ("allreduce", "reduce_scatter", "alltoall")
        sizes = [leaf.numel() for leaf in tree_iter(args) if isinstance(leaf, Tensor)]
        # Between micro-batches ranks exchange one number: whether to stop.
        is_gradient = max(sizes, default=0) > 1 and any(kind in name for kind in kinds)
        self.count += name.startswith("c10d.") and is_gradient
        return function(*args, **(kwargs or {}))


def set_up(out_dir, strategy, options):
    """Return a context with a run of 12 sequences per step."""
    options = f"--out {out_dir} --strategy {strategy} --batch-size 12 {options}"
    return setup.set_up(parse_args(command_line(options)), Supervisor())


def count_reductions(rank, world_size, root, strategy):
    """Return the reductions of the third step, with one micro-batch and with three.

    The first two steps find the order of gradients.
    """
    counts = []
    for micro_batches in (1, 3):
        options = f"--steps 3 --grad-accum {micro_batches}"
        with set_up(f"{root}/{micro_batches}", strategy, options) as run:
            for step in range(3):
                run.step = step
                with CountReductions() as reductions:
                    update(run, float(backward(run)))
        counts.append(reductions.count)
    return counts


@pytest.mark.parametrize(
    ("strategy", "ranks"),
    [
        ("ddp", 2),
        ("zero1", 2),
        ("zero2", 2),
        ("fsdp1", 2),
        ("fsdp2", 2),
        ("hsdp", 4),
        FSDP2_TP,
    ],
)
def test_gradients_are_reduced_once_per_step_with_micro_batches(tmp_path, strategy, ranks):
    for one, three in distributed.run_ranks(ranks, count_reductions, str(tmp_path), strategy):
        assert one == three > 0


def full_gradients(run):
    """Return the reduced gradients of a step by parameter name."""
    sharding = run.optimizer._sharding
    sharding.reduce_grads()
    if isinstance(run.wrapped_model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(run.wrapped_model, with_grads=True):
            return {
                name.replace("_fsdp_wrapped_module.", ""): p.grad.clone()
                for name, p in run.wrapped_model.named_parameters()
            }
    found = {}
    for name, p in run.model.named_parameters():
        (grad,) = sharding.grads([p])
        if not isinstance(grad, DTensor) and grad.shape != p.shape:
            grad = ZeroParam(p, run.world.mesh(), name).as_dtensor(grad)
        found[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()
    return found


def compare_accumulation(rank, world_size, out_dir, strategy, dtype):
    """Return the parameters whose reduced gradients differ from the expected mean.

    It is the mean over ranks, in float32, of the sums of micro-batches in ``dtype``.
    """
    with set_up(out_dir, strategy, "--steps 1 --grad-accum 3") as run:
        args = run.args
        model = GPT(PRESETS[args.preset]).bfloat16()
        model.init_weights(args.seed)
        sums = {}
        for batch in run.data.batch(args.seed, 0, 12)[run.world.batch_slice].chunk(3):
            (compute_loss(model, batch) / 3).backward()
            for name, p in model.named_parameters():
                sums[name] = sums[name] + p.grad.to(dtype) if name in sums else p.grad.to(dtype)
                p.grad = None
        backward(run)
        different = []
        for name, found in full_gradients(run).items():
            mean = sums[name].float()
            dist.all_reduce(mean)
            if not torch.equal(found, (mean / world_size).to(found.dtype)):
                different.append(name)
    return different, len(sums)


@pytest.mark.parametrize(
    ("strategy", "dtype"),
    [
        ("ddp", torch.bfloat16),
        ("zero1", torch.bfloat16),
        ("fsdp1", torch.bfloat16),
        ("zero2", torch.float32),
        ("fsdp2", torch.float32),
    ],
)
def test_micro_batches_accumulate_to_the_bits_of_their_sum(tmp_path, strategy, dtype):
    arguments = (str(tmp_path), strategy, dtype)
    for different, parameters in distributed.run_ranks(2, compare_accumulation, *arguments):
        assert not different and parameters > 10
