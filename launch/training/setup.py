"""Set up a run before its first step."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from training.build import build_model, make_optimizer, make_schedule, model_config, set_seeds
from training.config import shown
from training.data import Text, find_files, load_text
from training.errors import UsageError
from training.hugging_face import FolderTokenizer
from training.initial import init_from
from training.options import model_name
from training.out_dir import lock_out_dir, store_config
from training.resume import resume
from training.run_state import Run
from training.signals_and_watchdog import Supervisor
from training.spikes import SpikeFilter
from training.strategies import STRATEGIES
from training.world import World, init_world, on_all_ranks, on_rank_0


@contextmanager
def set_up(args: argparse.Namespace, supervisor: Supervisor) -> Iterator[Run]:
    """Join the process group, lock ``--out``, build everything, and resume a run.

    Yields:
        The run; ``--out`` is locked until the context ends.

    Raises:
        UsageError: on all ranks, if an argument is wrong on any of them.
    """
    world = init_world(args.device)
    if args.strategy is None:
        args.strategy = "fsdp2" if world.size > 1 else "single"
    mesh_shape = STRATEGIES[args.strategy].mesh_shape(world.size)
    world = replace(world, tp_size=mesh_shape.get("tensor", 1))
    check_world(args, world)
    set_seeds(args)
    config = on_all_ranks(model_config, args)
    files = on_all_ranks(find_files, args.data)
    tokenizer = None
    if args.model is not None and files.kind != ".bin":
        tokenizer = on_all_ranks(FolderTokenizer, args.model)
    lock = on_rank_0(lock_out_dir, args)
    try:
        text = on_all_ranks(
            lambda: load_text(
                files, args.seq_len, config.vocab_size, tokenizer, args.token_dtype, args.out
            )
        )
        yield build_run(args, config, world, text, supervisor)
    finally:
        if lock is not None:
            lock.release()


def build_run(
    args: argparse.Namespace, config: Any, world: World, text: Text, supervisor: Supervisor
) -> Run:
    strategy = STRATEGIES[args.strategy]
    model, module, parameters = build_model(args, config, world, strategy)
    schedule = make_schedule(args)
    optimizer = make_optimizer(args, model, schedule)
    spikes = SpikeFilter(args.skip_spikes)
    run = Run(
        args,
        world,
        text,
        strategy,
        model,
        module,
        optimizer,
        schedule,
        parameters,
        supervisor,
        spikes,
    )
    resume(run)
    if run.saved is None:
        init_from(args, module, optimizer)
    stored = on_rank_0(store_config, args)
    if world.rank == 0:
        print(
            f"{model_name(args)} ({parameters:,} parameters), "
            f"--optimizer {args.optimizer}, --strategy {args.strategy} "
            f"on {world.size} x {world.device.type}, "
            f"{text.cut:,} training tokens, steps {run.step} to {args.steps}\n"
            f"options, also in {stored}:\n{shown(args)}",
            flush=True,
        )
    return run


def check_world(args: argparse.Namespace, world: World) -> None:
    if args.strategy == "single" and world.size > 1:
        raise UsageError(
            f"--strategy single runs on one process, not {world.size}: use --strategy ddp or fsdp2."
        )
    divisor = world.dp_size * args.grad_accum
    if args.batch_size % divisor:
        raise UsageError(
            f"--batch-size {args.batch_size} does not divide into {world.dp_size} rank(s) "
            f"x --grad-accum {args.grad_accum}: use a number of ranks that divides it, or a "
            f"multiple of {divisor} (with --resume auto, if the run was started with another one)."
        )
