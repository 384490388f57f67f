"""Export the weights of a checkpoint in float32, and the arithmetic of exports and imports.

A bfloat16 weight is the pair ``(p, correction)`` with the value ``p + correction``. An export
writes the sum in float32. An import rounds the value to the nearest bfloat16, ``p``, and rounds the
remainder the same way, ``correction``. Sixteen bits of the value survive: for every finite ``x``,

    ``abs(export(import(x)) - x) <= 2**-17 * abs(x) + 2**-134``

because ``correction`` is at most half a unit in the last place of ``p`` and keeps 8 bits of itself.
The second term is half the smallest bfloat16 subnormal. A value beyond the largest finite bfloat16
(3.39e38) becomes infinite, as in any rounding to bfloat16.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from ..bf16_split import join
from .async_save import wait_for_own_saves
from .commit import check_folder_visible
from .directory import existing_checkpoint, sync_folder
from .extra_state import PART
from .object_collectives import Group, rank, world_size
from .rank_errors import call_on_rank_0, call_on_rank_0_via_store, check_group, raise_on_all_ranks
from .reader import CheckpointReader
from .safetensors_io import DTYPE_NAMES, TensorInfo, write_sharded
from .state_dict import MODEL, STATE

# Suffixes of a Hugging Face model's config, tokenizer and code.
CONFIG_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"}
NOT_CONFIG = (".index.json", "trainer_state.json")  # index of its weights, log of its training
Progress = Callable[[int], None]  # called with the number of bytes just done


def export_fp32(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = 5_000_000_000,
    progress: Progress | None = None,
    group: Group = None,
    *,
    ema: bool = False,
    config_from: str | os.PathLike[str] | None = None,
    parallel: bool = False,
) -> Path:
    """Write the weights of a checkpoint as safetensors files with an index, as Hugging Face does.

    Needs no GPU, no process group and no model. Needs memory for a few times the largest tensor.
    Waits for this thread's asynchronous save, then verifies the checkpoint. ``out`` appears only
    when it is complete.

    In a distributed run, call it on every rank or on rank 0 alone. Rank 0 does all the work and
    waits for no other rank. The others return when it is done, and raise if it failed. For one
    ``out``, call it always on every rank or always on rank 0 alone: a rank's n-th call gets the
    result of rank 0's n-th call. With ``parallel`` it is collective, and each rank reads and writes
    its share of the files.

    Args:
        path: a checkpoint's directory, or the root of a run, which stands for its latest.
        out: a directory that does not exist yet.
        dtype: of the bfloat16 tensors. Parameters are written as ``p + correction`` in
            torch.float32, as ``p`` in torch.bfloat16. Tensors of other dtypes keep theirs.
        max_shard_bytes: maximum size of a file in bytes, without its header. A larger tensor has a
            file to itself.
        progress: called with the number of bytes of each tensor that this rank has written.
        group: process group whose first rank writes (all with ``parallel``); None for all ranks.
        ema: write the average of :class:`EMA` instead of the weights. A tensor without one, such as
            a buffer, is written as it is.
        config_from: folder of a Hugging Face model whose config, tokenizer and code are copied to
            ``out``, so that ``from_pretrained(out)`` loads it. The dtype in ``config.json`` becomes
            that of the weights.
        parallel: write on all ranks; every rank must see ``out``.

    Returns:
        ``out``.

    Raises:
        FileExistsError: ``out`` exists.
        FileNotFoundError: there is no checkpoint at ``path``, or no config.json at ``config_from``.
        ValueError: the checkpoint is damaged or has no average, an argument is invalid, safetensors
            cannot hold a tensor, or a rank does not see ``out``. Nothing is written.
        OSError: ``out`` cannot be written; on the other ranks this is a RuntimeError.
        RuntimeError: an asynchronous save in flight failed, or the rank that writes has not called
            within the timeout of the process group. With ``parallel``, any of the above but
            ValueError, on all ranks.

    Examples:
        >>> import torch
        >>> from sharded_bf16_adamw import AdamW_BF16, export_fp32, save
        >>> model = torch.nn.Linear(4, 2, bias=False).bfloat16()
        >>> optimizer = AdamW_BF16(model.parameters(), lr=1e-3)
        >>> checkpoint = save("checkpoints", 0, model, optimizer)
        >>> sorted(file.name for file in export_fp32("checkpoints", "exported").iterdir())
        ['model-00001-of-00001.safetensors', 'model.safetensors.index.json']
    """
    out = Path(out)
    check_group(group)

    def export() -> str:
        _export(
            path,
            out,
            dtype,
            max_shard_bytes=max_shard_bytes,
            progress=progress,
            group=group,
            ema=ema,
            config_from=config_from,
            parallel=parallel,
        )
        return str(out)

    if parallel:
        return Path(export())
    return Path(call_on_rank_0_via_store("export_fp32", out, export, group))


def _export(
    path: str | os.PathLike[str],
    out: Path,
    dtype: torch.dtype,
    *,
    max_shard_bytes: int,
    progress: Progress | None,
    group: Group,
    ema: bool,
    config_from: str | os.PathLike[str] | None,
    parallel: bool,
) -> None:
    partial = out.with_name(f".exporting-{out.name}")  # save() does not clean up this name

    @contextmanager
    def raise_errors() -> Iterator[None]:
        with raise_on_all_ranks(f"cannot export to {out}", group) if parallel else nullcontext():
            try:
                yield
            except OSError as error:  # report the user's path, not the temporary one
                is_output = error.filename is None or str(partial) in str(error.filename)
                if error.errno is not None and is_output:
                    raise OSError(error.errno, error.strerror, str(out)) from error
                raise

    with raise_errors():
        wait_for_own_saves()  # otherwise a root could resolve to the previous checkpoint
        _check_arguments(dtype, max_shard_bytes)
        checkpoint = existing_checkpoint(path)
    if parallel:  # other ranks may see an older state of a network file system
        checkpoint = call_on_rank_0("cannot export", lambda: checkpoint, group)
    is_first = rank(group) == 0
    with raise_errors():
        if is_first and out.exists():
            raise FileExistsError(f"{out} exists already; give the name of a new directory")
        reader = CheckpointReader(checkpoint)
        reader.verify(rank(group), world_size(group))
        widened = torch.bfloat16 if dtype == torch.float32 else None  # dtype to write in float32
        corrections = _state_keys(reader, "correction") if widened else {}
        averages = _average_keys(reader) if ema else {}
        infos = _exported_infos(reader, widened)

    def get_tensor(name: str) -> Tensor:
        key = MODEL + name
        average = averages.get(key)
        tensor = reader.read(average or key)
        if tensor.dtype == widened:
            correction = None if average else corrections.get(key)
            tensor = join(tensor, reader.read(correction)) if correction else tensor.float()
        if progress is not None:
            progress(tensor.nbytes)
        return tensor

    try:
        with raise_errors():
            if is_first:
                shutil.rmtree(partial, ignore_errors=True)  # left by a killed export
                partial.mkdir(parents=True)
                if config_from is not None:
                    _copy_config(Path(config_from), partial, dtype)

        with raise_errors():
            if parallel:
                check_folder_visible(out.parent, partial, rank(group))
            share = (rank(group), world_size(group))
            write_sharded(partial, infos, get_tensor, max_shard_bytes, *share)
        with raise_errors():
            if is_first:
                sync_folder(partial)
                partial.rename(out)
                sync_folder(out.parent)
    except BaseException:
        if is_first:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _check_arguments(dtype: torch.dtype, max_shard_bytes: int) -> None:
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"Invalid dtype: {dtype}; choose torch.float32 (p + correction) or torch.bfloat16 (p)"
        )
    if max_shard_bytes < 1:
        raise ValueError(f"Invalid max_shard_bytes: {max_shard_bytes}; it must be positive")


def _average_keys(reader: CheckpointReader) -> dict[str, str | None]:
    """Map each weight to the key of its average; raise ValueError if no weight has one."""
    averages = _state_keys(reader, "ema")
    if not any(averages.values()):
        raise ValueError(
            f"the checkpoint {reader.path} has no average of the weights; build EMA(model, "
            "optimizer) before you train and save, or export without ema"
        )
    return averages


def _exported_infos(reader: CheckpointReader, widened: torch.dtype | None) -> dict[str, TensorInfo]:
    """Return shape and dtype of each tensor to write; raise ValueError if one cannot be written."""
    infos = {}
    for key, info in reader.infos.items():
        if not key.startswith(MODEL):
            continue
        name = key.removeprefix(MODEL)
        if PART in name:
            raise ValueError(
                f"{name.partition(PART)[0]} is a quantised tensor, and the checkpoint has its "
                "parts but not the class that joins them; dequantise it in the model, save that "
                "and export it"
            )
        if info.dtype not in DTYPE_NAMES:
            raise ValueError(
                f"{name} is {info.dtype}, which safetensors files cannot hold; convert it to "
                "another dtype in the model, save and export again"
            )
        infos[name] = info._replace(dtype=torch.float32) if info.dtype == widened else info
    return infos


def _copy_config(source: Path, out: Path, dtype: torch.dtype) -> None:
    """Copy config, tokenizer and code, and set the dtype in the config."""
    config = source / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"there is no {config}; give the folder of a Hugging Face model")
    for file in sorted(source.iterdir()):
        is_config = file.suffix in CONFIG_SUFFIXES and not file.name.endswith(NOT_CONFIG)
        if is_config and file.is_file():
            shutil.copyfile(file, out / file.name)
    content = json.loads(config.read_text())
    for key in {"dtype", "torch_dtype"} & content.keys():  # transformers before 4.56: torch_dtype
        content[key] = str(dtype).removeprefix("torch.")
    (out / "config.json").write_text(json.dumps(content, indent=2) + "\n")


def _state_keys(reader: CheckpointReader, name: str) -> dict[str, str | None]:
    """Map each weight to the key of its state ``name``, or to None if it has no such state."""
    keys: dict[str, str | None] = {}
    for key in reader.infos:
        if key.startswith(MODEL):
            state = f"{STATE}{key.removeprefix(MODEL)}.{name}"
            keys[key] = state if state in reader.infos else None
    if reader.manifest.ties is None:
        return _infer_ties(reader, keys)
    for names in reader.manifest.ties:  # tied names share one state, saved under one of them
        tied = [MODEL + name for name in names if MODEL + name in keys]
        shared = next((keys[key] for key in tied if keys[key] is not None), None)
        keys.update(dict.fromkeys(tied, shared))
    return keys


def _infer_ties(reader: CheckpointReader, keys: dict[str, str | None]) -> dict[str, str | None]:
    """Infer the tied names of an old checkpoint, whose manifest does not record them.

    A weight without a state is taken as tied to one with a state if all their elements are equal.
    Constant weights (all ones, all zeros) are skipped: they may be equal without being tied.
    """
    for key in [key for key, state in keys.items() if state is None]:
        info = reader.infos[key]
        candidates = [
            other
            for other, state in keys.items()
            if state is not None and reader.infos[other] == info
        ]
        if candidates:
            weight = reader.read(key)
            if weight.numel() and bool((weight != weight.flatten()[0]).any()):
                same = (other for other in candidates if torch.equal(reader.read(other), weight))
                keys[key] = next((keys[other] for other in same), None)
    return keys
