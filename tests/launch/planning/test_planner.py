"""``launch/plan.py`` against what real ranks hold and send, for every strategy of ``train.py``."""

from __future__ import annotations

import doctest
import importlib
import json
from contextlib import contextmanager, nullcontext
from functools import partial
from unittest import mock

import distributed
import plan as command
import pytest
import torch
import training.model
from planning import memory
from planning.live import LiveBytes
from planning.memory import gradients, phases, states, weights
from planning.models import LLAMA_8B, LLAMA_70B, from_preset
from planning.planner import Options, Plan, cheapest, make_job, plan
from planning.traffic import sent_bytes
from torch.distributed.tensor import DTensor
from training import build, strategies
from training.model import PRESETS, Config
from training.options import parse_args
from training.setup import set_up
from training.signals_and_watchdog import Supervisor
from training.step import backward, update

from sharded_bf16_adamw import AdamW_BF16, ZeRO
from sharded_bf16_adamw.sharding.zero import reduce_scatter
from sharded_bf16_adamw.sharding.zero.all_gather import PendingAllGather

LAYERS = 4
PRESET = Config(LAYERS, 128, 4, 352, 64, 8, 3, 1e-3)
RANKS = {"single": 1, "hsdp": 4, "fsdp2+tp": 4}  # the others: 2
# Activations take most memory in the first, and weights, gradients and buffers in the second.
SEQ_LENS = (64, 8)
TOLERANCE = 0.05
BUCKET_BYTES = 200_000  # ten buckets, for updates in the backward pass


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def nbytes(tensors):
    return sum(local(tensor).nbytes for tensor in tensors)


@contextmanager
def in_backward_on_a_slow_network():
    """Let train.py step in the backward pass, and no collective complete before a wait for it.

    Otherwise the set of live tensors would depend on the machine's load.
    """
    completes = reduce_scatter._completes_within
    with (
        mock.patch.object(build, "AdamW_BF16", partial(AdamW_BF16, step_in_backward=True)),
        mock.patch.object(strategies, "ZeRO", partial(ZeRO, bucket_size_mb=BUCKET_BYTES / 2**20)),
        mock.patch.object(PendingAllGather, "is_completed", False),
        mock.patch.object(
            reduce_scatter, "_completes_within", lambda work, s: s > 0 and completes(work, s)
        ),
    ):
        yield


def measure(rank, world_size, directory, strategy, optimizer, seq_len, accumulation, in_backward):
    """Return the bytes that this rank holds and sends in its third step.

    The first two steps create the states and record the order of gradients. LiveBytes registers
    their storages but does not sum them after each operation, which saves a third of the time.
    """
    options = f"--strategy {strategy} --optimizer {optimizer} --grad-accum {accumulation}"
    paths = f"--data {directory}/text --out {directory}/{seq_len}"
    fixed = f"--device cpu --preset planned --no-progress --seq-len {seq_len}"
    with (
        mock.patch.dict(PRESETS, planned=PRESET),
        mock.patch.object(training.model, "has_fast_bf16", return_value=True),
        in_backward_on_a_slow_network() if in_backward else nullcontext(),
    ):
        arguments = parse_args(f"{options} {paths} {fixed}".split())
        with set_up(arguments, Supervisor()) as run:
            params = list(run.wrapped_model.parameters())
            live = LiveBytes()
            for step in range(3):
                run.step = step
                uncounted = mock.patch.object(LiveBytes, "live_bytes", 0)
                with live, uncounted if step < 2 else nullcontext():
                    live.collectives.clear()
                    live.reset_peak()
                    loss = float(backward(run))
                    no_second_reduce = nullcontext()
                    if strategy == "zero2":
                        run.optimizer._sharding.reduce_grads()
                        # else clip_grad_norm_() in update() would exchange again
                        no_second_reduce = mock.patch.object(
                            run.optimizer._sharding, "reduce_grads"
                        )
                        held = run.optimizer._sharding._sharded_grads
                        grads = [held[param] for param in params if param in held]
                    else:
                        grads = [param.grad for param in params if param.grad is not None]
                    gradient_bytes = nbytes(grads)
                    grads = held = None
                    if in_backward:  # update() clips, which needs all gradients first
                        run.optimizer.step(zero_grad=True)
                    else:
                        with no_second_reduce:
                            update(run, loss)
    return {
        "weights": nbytes(params),
        "gradients": gradient_bytes,
        "states": nbytes(x for state in run.optimizer.state.values() for x in state.values()),
        "sent_bytes": live.sent_bytes,
        "peak": live.peak,
    }


def planned(world_size, strategy, optimizer, seq_len, accumulation, in_backward):
    data_ranks = {"tp": 1, "fsdp2+tp": world_size // 2}.get(strategy, world_size)
    micro_batch = PRESET.batch_size // data_ranks // accumulation
    options = Options(
        optimizer, PRESET.batch_size, micro_batch, seq_len, in_backward=in_backward, device="cpu"
    )
    bucket_bytes = BUCKET_BYTES if in_backward else memory.BUCKET_BYTES
    with (
        mock.patch.dict(PRESETS, planned=PRESET),
        mock.patch.object(memory, "BUCKET_BYTES", bucket_bytes),
    ):
        job = make_job(from_preset("planned"), world_size, strategy, options)
        base = weights(job) + states(job)
        return {
            "weights": weights(job),
            "gradients": gradients(job, LAYERS + 1),
            "states": states(job),
            "sent_bytes": sent_bytes(job),
            "peak": base + max(phase.total for phase in phases(job)),
        }


CASES = [
    ("single", "bf16", 1, False),
    ("ddp", "bf16", 1, False),
    ("fsdp1", "bf16", 1, False),
    ("fsdp2", "bf16", 1, False),
    ("hsdp", "bf16", 1, False),
    ("tp", "bf16", 1, False),
    ("fsdp2+tp", "bf16", 1, False),
    ("zero1", "bf16", 1, False),
    ("zero2", "bf16", 1, False),
    ("zero2", "bf16", 1, True),
    ("zero2", "bf16", 2, True),
    ("fsdp2", "torch-fp32", 1, False),
    ("fsdp2", "bf16", 2, False),
    ("fsdp2", "bf16", 1, True),
]


@pytest.mark.parametrize(
    ("strategy", "optimizer", "accumulation", "in_backward", "seq_len"),
    [
        # The two lengths alternate over the cases; the other length of a case is exhaustive.
        pytest.param(
            *case, seq_len, marks=[] if at == index % len(SEQ_LENS) else pytest.mark.exhaustive
        )
        for index, case in enumerate(CASES)
        for at, seq_len in enumerate(SEQ_LENS)
    ],
)
def test_plan_matches_measured_bytes(
    tmp_path, strategy, optimizer, accumulation, in_backward, seq_len
):
    (tmp_path / "text").write_text("to be or not to be, " * 500)
    ranks = RANKS.get(strategy, 2)
    case = (strategy, optimizer, seq_len, accumulation, in_backward)
    found = distributed.run_ranks(ranks, measure, str(tmp_path), *case)
    expected = planned(ranks, *case)
    largest = {key: max(each[key] for each in found) for key in expected}
    assert largest == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize(
    "name", ["activation_memory", "live", "memory", "models", "planner", "traffic"]
)
def test_examples_run(name):
    found = doctest.testmod(importlib.import_module(f"planning.{name}"))
    assert found.attempted and not found.failed


def test_parameters_of_llama_are_counted():
    options = Options(seq_len=8)
    for shape, parameters in ((LLAMA_8B, 8_030_261_248), (LLAMA_70B, 70_553_706_496)):
        assert plan(shape, 1, "single", options).weights == 2 * parameters


def test_recompute_keeps_only_the_inputs_of_layers():
    options = (Options(recompute=recompute) for recompute in (False, True))
    jobs = (make_job(from_preset("8b"), 8, "fsdp2", each) for each in options)
    kept, recomputed = (job.activations.block.per_further_layer for job in jobs)
    assert recomputed == 4096 * 4096 * 2 < kept / 10


def test_step_in_backward_keeps_no_gradients():
    job = make_job(from_preset("8b"), 8, "fsdp2", Options(in_backward=True))
    assert gradients(job, job.layers + 1) == 0


def test_cheapest_sends_least_of_those_that_fit():
    def make_plan(strategy, total, sent):
        return Plan(strategy, 1, total, 0, mock.Mock(total=0), sent)

    plans = [make_plan(*each) for each in (("a", 10, 1), ("b", 5, 3), ("c", 4, 2), ("d", 3, 2))]
    assert [cheapest(plans, limit).strategy for limit in (10, 9)] == ["a", "d"]
    assert cheapest(plans, 2) is None


def write_config(path, **changes):
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "tie_word_embeddings": True,
    }
    path.write_text(json.dumps({**config, **changes}))


def test_plan_of_a_hugging_face_config(tmp_path, capsys):
    path = tmp_path / "config.json"
    write_config(path)
    arguments = f"--config {path} --world-size 2 --seq-len 16 --memory"
    assert command.main([*arguments.split(), "1"]) == 0
    output = capsys.readouterr().out
    assert output.splitlines()[-1] == "sends least and fits: --strategy tp --grad-accum 2"
    assert "single cannot run: --strategy single runs on one process, not 2: use" in output
    assert command.main([*arguments.split(), "1e-6"]) == 1
    assert "nothing fits into 1e-06 GB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--world-size 0", "0 is not a positive number"),
        ("--memory nan", "--memory: nan is not a positive number"),
        ("--preset nano --strategy tp --world-size 3", "the 2 heads are not divisible by 3"),
        ("--strategy hsdp --world-size 3", "needs an even number of processes, not 3: start"),
        (
            "--strategy ddp --world-size 4 --batch-size 6",
            "6 is not a multiple of 4 = 4 rank",
        ),
        ("--strategy zero2 --optimizer torch-fp32", "shards --optimizer bf16 only"),
        ("--optimizer optimi", "--optimizer: invalid choice: 'optimi'"),
        ("--strategy ddp --step-in-backward", "--step-in-backward does not work with"),
        ("--config missing.json", "missing.json cannot be read"),
        ("--config {config}", "has vocab_size = None, not a positive integer"),
    ],
)
def test_usage_errors_print_one_line_and_return_2(tmp_path, capsys, arguments, message):
    config = tmp_path / "config.json"
    write_config(config, vocab_size=None)
    assert command.main(arguments.format(config=config).split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "describes biases or heads that do not make up the width: only"),
        ({"head_dim": 32}, "describes biases or heads that do not make up the width: only"),
        ({"model_type": "deepseek_v3", "n_routed_experts": 8}, "has model_type = 'deepseek_v3': "),
        ({"model_type": "phi"}, "has model_type = 'phi': only llama and mistral, with the layers"),
        ({"model_type": None}, "has model_type = None: "),
    ],
)
def test_config_of_another_architecture_is_an_error(tmp_path, capsys, changes, message):
    path = tmp_path / "config.json"
    write_config(path, **changes)
    assert command.main(["--config", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_live_bytes_follow_allocation_and_release():
    with LiveBytes() as live:
        x = torch.ones(1000)
        y = x.view(10, 100) + 1
        assert live.live_bytes == live.peak == 8000
        del y
        assert (live.live_bytes, live.peak) == (4000, 8000)
        x.untyped_storage().resize_(0)
        assert live.live_bytes == 0
        x.untyped_storage().resize_(12000)
        x.zero_()
        assert live.peak == 12000
        x.untyped_storage().resize_(0)  # as FSDP2 frees a parameter
        y = torch.ones(2000)
        x.untyped_storage().resize_(12000)
        x.zero_()
        assert live.peak == 20000
        del y
