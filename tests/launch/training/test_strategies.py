"""``launch/train.py --strategy``: every strategy trains like one process, resumes, and says what it cannot do."""

from __future__ import annotations

import contextlib
import io
import math

import distributed
import pytest
import torch
import torch.distributed as dist
import train
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from training.metrics import read_metrics
from training.model import GPT, PRESETS
from training.options import parse_args

from sharded_bf16_adamw.sharding.zero.param import Rows

SHORT = ["--device=cpu", "--no-progress", "--preset=nano", "--seq-len=16", "--batch-size=8"]
SHORT += ["--eval-batches=2", "--eval-every=3", "--save-every=0"]
RANKS = [
    ("ddp", 2),
    ("fsdp1", 3),
    ("fsdp1", 2),
    ("fsdp2", 2),
    ("hsdp", 4),
    ("tp", 2),
    ("fsdp2+tp", 4),
]
LR = 0.003  # at 0.01 some texts have steps where even another order of the sequences in a batch changes the gradient norm by 1 %
LIMIT = 0.005  # nats a byte, of about 5.5: the forward and backward of several ranks round otherwise than those of one


def train_worker(rank, world, *arguments):
    torch.manual_seed(0)
    return train.main([*SHORT, *map(str, arguments)])


def run(ranks, folder, *arguments):
    """Train on some ranks, or in this process on one; return the metrics."""
    arguments = ("--out", folder, *arguments)
    codes = distributed.run_ranks(ranks, train_worker, *arguments)
    assert codes == [0] * ranks
    return read_metrics(folder / "metrics.jsonl")


def held_out(lines):
    return {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}


def norms(lines):
    return [line["grad_norm"] for line in lines if "grad_norm" in line]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return run(
        1,
        tmp_path_factory.mktemp("single"),
        "--strategy",
        "single",
        "--steps",
        6,
        "--batch-size",
        12,
        "--lr",
        LR,
    )


@pytest.mark.parametrize(("strategy", "ranks"), RANKS)
def test_trains_like_one_process(tmp_path, single, strategy, ranks):
    lines = run(
        ranks, tmp_path, "--strategy", strategy, "--steps", 6, "--batch-size", 12, "--lr", LR
    )
    expected, losses = held_out(single), held_out(lines)
    assert list(losses) == [0, 3, 6]
    assert expected[6] < expected[0] - 100 * LIMIT, "or the limit would not tell training from none"
    for step, loss in losses.items():
        assert loss == pytest.approx(expected[step], abs=LIMIT)
    assert norms(lines) == pytest.approx(norms(single), rel=0.01), (
        "of all ranks together, each element once"
    )


@pytest.mark.parametrize(
    ("strategy", "ranks"), [("fsdp1", 2), ("hsdp", 4), ("tp", 2), ("fsdp2+tp", 4)]
)
def test_resumes_where_it_was(tmp_path, strategy, ranks):
    """The same losses, bit for bit, and a checkpoint that another strategy goes on from."""
    arguments = ("--strategy", strategy, "--save-every", 3, "--steps", 6, "--lr", 0.01)
    whole = run(ranks, tmp_path / "whole", *arguments)
    middle = tmp_path / "whole" / "checkpoints" / "step-00000003"
    resumed = run(ranks, tmp_path / "resumed", *arguments, "--resume", middle)
    later = [
        {k: v for k, v in line.items() if k != "tokens_per_s"} for line in whole if line["step"] > 3
    ]
    assert [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in resumed] == later
    other = run(2, tmp_path / "other", "--strategy", "fsdp2", *arguments[2:], "--resume", middle)
    assert held_out(other)[6] == pytest.approx(held_out(whole)[6], abs=LIMIT)


@pytest.mark.parametrize(("strategy", "ranks"), [("fsdp1", 2), ("tp", 2), ("fsdp2+tp", 4)])
def test_torchs_optimizer_trains_too(tmp_path, single, strategy, ranks):
    """The comparison that ``--optimizer torch-fp32`` is for: its first norm is the one of the same weights."""
    lines = run(
        ranks,
        tmp_path,
        "--strategy",
        strategy,
        "--steps",
        2,
        "--batch-size",
        12,
        "--optimizer",
        "torch-fp32",
    )
    assert norms(lines)[0] == pytest.approx(norms(single)[0], rel=0.01)
    assert all(math.isfinite(loss) for loss in held_out(lines).values())


def refused_worker(rank, world, *arguments):
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = train.main([*SHORT, *map(str, arguments)])
    return code, errors.getvalue()


@pytest.mark.parametrize(
    ("ranks", "arguments", "message"),
    [
        (
            3,
            ["--strategy", "hsdp", "--batch-size", 12],
            "in pairs, which 3 cannot be: start an even number",
        ),
        (
            3,
            ["--strategy", "fsdp2+tp", "--batch-size", 12],
            "in pairs, which 3 cannot be: start an even number",
        ),
        (3, ["--strategy", "tp"], "2 heads do not divide into 3 tensor-parallel ranks"),
        (
            2,
            ["--strategy", "tp", "--seq-len", 15],
            "--seq-len 15 does not divide into 2 tensor-parallel ranks: use a multiple of 2",
        ),
        (
            4,
            ["--strategy", "fsdp2+tp", "--batch-size", 3],
            "--batch-size 3 does not divide into 2 rank(s)",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused_on_every_rank(tmp_path, ranks, arguments, message):
    results = distributed.run_ranks(
        ranks, refused_worker, "--out", tmp_path, "--steps", 2, *arguments
    )
    assert [code for code, _ in results] == [2] * ranks
    assert message in results[0][1]
    assert not any(errors for _, errors in results[1:]), "one rank says it"


@pytest.mark.parametrize(("strategy", "ranks"), [("fsdp1", 2), ("hsdp", 4), ("fsdp2+tp", 4)])
def test_micro_batches_train_like_whole_ones(tmp_path, single, strategy, ranks):
    lines = run(
        ranks,
        tmp_path,
        "--strategy",
        strategy,
        "--steps",
        6,
        "--batch-size",
        12,
        "--lr",
        LR,
        "--grad-accum",
        3,
    )
    assert norms(lines) == pytest.approx(norms(single), rel=0.01)
    assert held_out(lines)[6] == pytest.approx(held_out(single)[6], abs=LIMIT)


class Reductions(TorchDispatchMode):
    """Counts the collectives that reduce gradients, those of torch's C++ included; agreements and norms are among them, but not what
    tensor parallelism does to activations, which are functional collectives."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        self.count += name.startswith("c10d.") and any(
            kind in name for kind in ("allreduce", "reduce_scatter", "alltoall")
        )
        return function(*args, **(kwargs or {}))


def counting_worker(rank, world, folder, strategy):
    """Reductions in a step, once the order of gradients is known, of one micro-batch and of three."""
    counts = []
    for micro_batches in (1, 3):
        out = f"{folder}/{micro_batches}"
        args = [
            "--out",
            out,
            "--strategy",
            strategy,
            "--batch-size",
            "12",
            "--steps",
            "3",
            "--grad-accum",
            str(micro_batches),
        ]
        run = train.set_up(parse_args([*SHORT, *args]))
        for step in range(3):
            run.step = step
            with Reductions() as reductions:
                train.update(run, float(train.backward(run)))
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
        ("fsdp2+tp", 4),
    ],
)
def test_gradients_are_reduced_once_a_step_however_many_micro_batches(tmp_path, strategy, ranks):
    for one, three in distributed.run_ranks(ranks, counting_worker, str(tmp_path), strategy):
        assert one == three > 0


def whole_gradients(run):
    """The reduced gradients of a step, by parameter name."""
    sharding = run.optimizer._sharding
    sharding.reduce_grads()
    if isinstance(run.module, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(run.module, with_grads=True):
            return {
                name.replace("_fsdp_wrapped_module.", ""): p.grad.clone()
                for name, p in run.module.named_parameters()
            }
    found = {}
    for name, p in run.model.named_parameters():
        (grad,) = sharding.grads([p])
        if not isinstance(grad, DTensor) and grad.shape != p.shape:
            grad = Rows(p, run.world.mesh(), name).as_dtensor(grad)
        found[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()
    return found


def accumulation_worker(rank, world, folder, strategy, dtype):
    """What the strategy reduces, against the sums of micro-batches in ``dtype``, averaged over the ranks in float32."""
    args = parse_args(
        [
            *SHORT,
            "--out",
            folder,
            "--strategy",
            strategy,
            "--batch-size",
            "12",
            "--steps",
            "1",
            "--grad-accum",
            "3",
        ]
    )
    run = train.set_up(args)
    alone = GPT(PRESETS[args.preset]).bfloat16()
    alone.init_weights(args.seed)
    sums = {}
    for rows in run.text.batch(args.seed, 0, 12)[run.world.rows].chunk(3):
        (train.loss_of(alone, rows) / 3).backward()
        for name, p in alone.named_parameters():
            sums[name] = sums[name] + p.grad.to(dtype) if name in sums else p.grad.to(dtype)
            p.grad = None
    train.backward(run)
    unlike = []
    for name, found in whole_gradients(run).items():
        mean = sums[name].float()
        dist.all_reduce(mean)
        if not torch.equal(found, (mean / world).to(found.dtype)):
            unlike.append(name)
    return unlike, len(sums)


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
def test_micro_batches_add_up_to_the_bits_of_their_sum(tmp_path, strategy, dtype):
    for unlike, parameters in distributed.run_ranks(
        2, accumulation_worker, str(tmp_path), strategy, dtype
    ):
        assert not unlike and parameters > 10
