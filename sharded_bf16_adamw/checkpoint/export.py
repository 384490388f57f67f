"""Weights out of a checkpoint as other programs read them, and weights and states of fp32 training in.

A bfloat16 weight of ours is the pair ``(p, correction)``; its value is ``p + correction``. Out: the sum, in float32. In: ``p`` is the value
rounded to the nearest bfloat16 and ``correction`` what is then missing, rounded the same way. Sixteen bits of the value survive: for every
finite ``x``,

    ``abs(export(import(x)) - x) <= 2**-17 * abs(x) + 2**-134``

because ``correction`` is at most half a unit of ``p``'s last place and keeps 8 bits of itself; the second term is half the smallest
bfloat16 subnormal. A value beyond the largest finite bfloat16 (3.39e38) becomes infinite, as in any rounding to bfloat16.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .async_save import wait_for_own_saves
from .directory import sync_folder
from .odd_values import PART
from .rank_errors import Group, call_on_rank_0_via_store, check_group
from .reader import StoredCheckpoint
from .safetensors_io import NAMES, TensorInfo, write_folder
from .state_dict import MODEL, STATE

Progress = Callable[[int], None]  # called with the bytes just done


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 tensor as ``(p, correction)``, both bfloat16."""
    p = x.bfloat16()
    rest = torch.where(p.isfinite(), x - p.float(), 0.0)
    return p, rest.bfloat16()


def joined(p: Tensor, correction: Tensor) -> Tensor:
    """Inverse of :func:`split`, up to the bound above: float32."""
    return p.float() + correction.float()


def export_fp32(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = 5_000_000_000,
    progress: Progress | None = None,
    group: Group = None,
) -> Path:
    """Write the weights of a checkpoint as safetensors in the Hugging Face layout: files and ``model.safetensors.index.json``.

    Needs no GPU, no process group and no model, and memory for a few times the largest tensor. The checkpoint is verified first. The
    folder appears at once when it is complete. An asynchronous save of this process is waited for.

    In a distributed run every rank may call it, or rank 0 alone. Rank 0 reads and writes, and waits for no other rank; the
    others return once it is done, and raise if it failed.

    Args:
        path: a checkpoint's folder, or the root of a run, which stands for its latest.
        out: a folder that does not exist yet.
        dtype: float32 writes ``p + correction`` for each bfloat16 parameter; bfloat16 writes ``p`` alone. What the model holds in other
            dtypes (float32 parameters, buffers) is written as it is.
        max_shard_bytes: size of a file, not counting its header; a larger tensor has a file to itself.
        progress: called on rank 0 with the number of bytes whenever a tensor was written.
        group: process group whose first rank writes; None for all ranks.

    Returns:
        ``out``.

    Raises:
        FileExistsError: ``out`` exists.
        FileNotFoundError: there is no checkpoint at ``path``.
        ValueError: the checkpoint is damaged, or an argument or a dtype in the model cannot be served. Nothing is written.
        OSError: the folder cannot be written; on the other ranks this is a RuntimeError.
        RuntimeError: an asynchronous save that was under way failed, or the rank that writes has not called within the
            timeout of the process group.
    """
    out = Path(out)
    check_group(group)

    def export() -> str:
        _export(path, out, dtype, max_shard_bytes, progress)
        return str(out)

    return Path(call_on_rank_0_via_store("export_fp32", out, export, group))


def _export(
    path: str | os.PathLike[str],
    out: Path,
    dtype: torch.dtype,
    max_shard_bytes: int,
    progress: Progress | None,
) -> None:
    wait_for_own_saves()  # else the root would stand for the checkpoint before
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"Invalid dtype: {dtype}; choose torch.float32 (p + correction) or torch.bfloat16 (p alone)"
        )
    if max_shard_bytes < 1:
        raise ValueError(f"Invalid max_shard_bytes: {max_shard_bytes}; it must be positive")
    if out.exists():
        raise FileExistsError(f"{out} exists already; give the name of a new folder")
    stored = StoredCheckpoint(path)
    stored.check()
    corrections = _corrections(stored) if dtype == torch.float32 else {}
    infos = {}
    for key, info in stored.infos.items():
        if key.startswith(MODEL):
            if PART in key:
                name = key.removeprefix(MODEL).partition(PART)[0]
                raise ValueError(
                    f"{name} is a quantised tensor, of which the checkpoint has the parts but not the class that joins them; "
                    "dequantise it in the model, save that and export it"
                )
            if info.dtype not in NAMES:
                raise ValueError(
                    f"{key.removeprefix(MODEL)} is {info.dtype}, which safetensors files cannot hold; export without it"
                )
            infos[key.removeprefix(MODEL)] = (
                TensorInfo(info.shape, torch.float32) if key in corrections else info
            )

    def tensor_of(name: str) -> Tensor:
        tensor = stored.read(MODEL + name)
        if MODEL + name in corrections:
            correction = corrections[MODEL + name]
            tensor = (
                tensor.float() if correction is None else joined(tensor, stored.read(correction))
            )
        if progress is not None:
            progress(tensor.nbytes)
        return tensor

    partial = out.with_name(
        f".exporting-{out.name}"
    )  # a name that no save takes for its own leftover
    shutil.rmtree(partial, ignore_errors=True)  # what a killed export left
    partial.mkdir(parents=True)
    try:
        write_folder(partial, infos, tensor_of, max_shard_bytes)
        sync_folder(partial)
        partial.rename(out)
        sync_folder(out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _corrections(stored: StoredCheckpoint) -> dict[str, str | None]:
    """For each bfloat16 tensor of the model the key of its correction, or None where it has none: it was never updated."""
    own = {}
    for key, info in stored.infos.items():
        if key.startswith(MODEL) and info.dtype == torch.bfloat16:
            correction = f"{STATE}{key.removeprefix(MODEL)}.correction"
            own[key] = correction if correction in stored.infos else None
    if stored.manifest.ties is None:
        return _with_guessed_ties(stored, own)
    for names in stored.manifest.ties:  # which have one state, under one of them
        shared = next(
            (own[MODEL + name] for name in names if own.get(MODEL + name) is not None), None
        )
        own.update({MODEL + name: shared for name in names if MODEL + name in own})
    return own


def _with_guessed_ties(
    stored: StoredCheckpoint, own: dict[str, str | None]
) -> dict[str, str | None]:
    """A save before ties were recorded: take a weight without a state for tied to one with a state if all their bits are the same.
    A constant (all ones, all zeros) proves nothing."""
    for key in [key for key, correction in own.items() if correction is None]:
        candidates = [
            other
            for other in own
            if own[other] is not None and stored.infos[other].shape == stored.infos[key].shape
        ]
        if candidates:
            weight = stored.read(key)
            if weight.numel() and bool((weight != weight.flatten()[0]).any()):
                own[key] = next(
                    (own[other] for other in candidates if torch.equal(stored.read(other), weight)),
                    None,
                )
    return own
