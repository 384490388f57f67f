"""Set up a run before its first step."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from training.build import build_model, make_optimizer, make_schedule, model_config, set_seeds
from training.config import shown
from training.data import TokenDataset, find_files, load_dataset
from training.errors import UsageError
from training.hugging_face import FolderTokenizer
from training.initial_weights import init_from
from training.options import model_name
from training.out_dir import lock_out_dir, store_config
from training.resume import resume
from training.run_state import Run
from training.signals_and_watchdog import Supervisor
from training.spikes import SpikeFilter
from training.strategies import STRATEGIES
from training.world import World, call_on_all_ranks, call_on_rank_0_only, init_world


@contextmanager
def set_up(args: argparse.Namespace, supervisor: Supervisor) -> Iterator[Run]:
    """Join the process group, lock ``--out``, build model and optimizer, and resume if possible.

    Yields:
        The run; ``--out`` is locked until the context ends.

    Raises:
        UsageError: on all ranks, if an argument is wrong on any rank.
    """
    world = init_world(args.device)
    if args.strategy is None:
        args.strategy = "fsdp2" if world.size > 1 else "single"
    mesh_shape = STRATEGIES[args.strategy].mesh_shape(world.size)
    world = replace(world, tp_size=mesh_shape.get("tensor", 1))
    check_world(args, world)
    set_seeds(args)
    config = call_on_all_ranks(model_config, args)
    files = call_on_all_ranks(find_files, args.data)
    tokenizer = None
    if args.model is not None and files.kind != ".bin":
        tokenizer = call_on_all_ranks(FolderTokenizer, args.model)
    lock = call_on_rank_0_only(lock_out_dir, args)
    try:
        data = call_on_all_ranks(
            lambda: load_dataset(
                files, args.seq_len, config.vocab_size, tokenizer, args.token_dtype, args.out
            )
        )
        yield build_run(args, config, world, data, supervisor)
    finally:
        if lock is not None:  # None on other ranks, and on a file system without locks
            lock.release()


def build_run(
    args: argparse.Namespace,
    config: Any,
    world: World,
    data: TokenDataset,
    supervisor: Supervisor,
) -> Run:
    """Build model and optimizer, load a checkpoint or initial weights, and print the options."""
    strategy = STRATEGIES[args.strategy]
    model, wrapped_model, num_params = build_model(args, config, world, strategy)
    schedule = make_schedule(args)
    run = Run(
        args=args,
        world=world,
        data=data,
        strategy=strategy,
        model=model,
        wrapped_model=wrapped_model,
        optimizer=make_optimizer(args, world, model, schedule),
        schedule=schedule,
        num_params=num_params,
        supervisor=supervisor,
        spike_filter=SpikeFilter(sigma=args.skip_spikes),
    )
    resume(run)
    if run.last_checkpoint is None:
        init_from(args, run.wrapped_model, run.optimizer)
    stored = call_on_rank_0_only(store_config, args)
    if world.rank == 0:
        print(
            f"{model_name(args)} ({num_params:,} parameters), "
            f"--optimizer {args.optimizer}, --strategy {args.strategy} "
            f"on {world.size} x {world.device.type}, "
            f"{data.num_train_tokens:,} training tokens, steps {run.step} to {args.steps}\n"
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
            f"--batch-size {args.batch_size} is not a multiple of {divisor} = {world.dp_size} "
            f"rank(s) x --grad-accum {args.grad_accum}: use a multiple of {divisor}, or another "
            "number of ranks."
        )
