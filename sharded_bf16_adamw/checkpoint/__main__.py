"""Inspect, verify, export, import and prune checkpoints from the command line.

Example::

    python -m sharded_bf16_adamw.checkpoint inspect runs/a/checkpoints

Needs no GPU, no torchrun and no model code, and executes no pickle. Exit codes: 0 success; 1 a file
is damaged, does not fit or cannot be written; 2 wrong use (a path, an option). Errors go to stderr,
one sentence each.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch

from .convert import convert_fp32
from .directory import (
    complete_checkpoints,
    find_checkpoint,
    find_root,
    incomplete_checkpoints,
    no_checkpoint,
    remove,
)
from .export import export_fp32
from .file_checksums import find_damage
from .import_formats import open_weights
from .manifest import MANIFEST, read_manifest
from .reader import CheckpointReader
from .state_dict import MODEL, STATE, split_state_key

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# A full disk is an OSError too, but not wrong use.
PATH_ERRORS = (
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class UsageError(Exception):
    """An error in the command line."""


def main(argv: list[str] | None = None) -> int:
    """Run a command and return the exit code."""
    try:
        args = _parse_args(argv)
        return args.run(args)
    except (UsageError, *PATH_ERRORS) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


# ---------------------------------------------------------------------------------------- commands


def _inspect(args: argparse.Namespace) -> int:
    """Print what a checkpoint holds, from its manifest and metadata."""
    reader = CheckpointReader(args.path)
    manifest, hyperparams = reader.manifest, reader.hyperparams()
    names = [key.removeprefix(MODEL) for key in reader.infos if key.startswith(MODEL)]
    state_bytes: dict[str, int] = {}
    for key, info in reader.infos.items():
        if key.startswith(STATE):
            name, _ = split_state_key(key)
            state_bytes[name] = state_bytes.get(name, 0) + info.nbytes
    rows = [("tensor", "shape", "dtype", "parts", "weight", "state", "step", "lr")]
    for name in names:
        info = reader.infos[MODEL + name]
        step_key, lr = f"{STATE}{name}.step", hyperparams.get(name, {}).get("lr")
        rows.append(
            (
                name,
                " x ".join(map(str, info.shape)) or "scalar",
                str(info.dtype).removeprefix("torch."),
                _describe_blocks(reader, MODEL + name),
                _format_bytes(info.nbytes),
                _format_bytes(state_bytes[name]) if name in state_bytes else "-",
                f"{int(reader.read(step_key))}" if step_key in reader.infos else "-",
                "-" if lr is None else f"{float(lr):g}",
            )
        )
    weight_bytes = _format_bytes(sum(reader.infos[MODEL + name].nbytes for name in names))
    bytes_on_disk = _format_bytes(sum(record.bytes for record in manifest.files.values()))
    numel = sum(math.prod(reader.infos[MODEL + name].shape) for name in names)
    facts = {
        "checkpoint": reader.path,
        "step": manifest.step,
        "saved by": f"{manifest.world_size} rank(s): {manifest.strategy}",
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
        "tensors": f"{len(names)} of {numel:,} elements: {weight_bytes} of weights, "
        f"{_format_bytes(sum(state_bytes.values()))} of state",
        "on disk": f"{bytes_on_disk} in {len(manifest.files)} files",
    }
    for fact, value in facts.items():
        print(f"{fact:12}{value}")
    print()
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:4], widths[:4], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[4:], widths[4:], strict=True)]
        print("  ".join([*left, *right]).rstrip())
    return 0


def _verify(args: argparse.Namespace) -> int:
    """Verify the checksums of a checkpoint, or with ``--all`` of every checkpoint of the run."""
    latest = find_checkpoint(args.path)
    is_run = args.all and latest != Path(args.path)
    root = find_root(args.path)
    paths = complete_checkpoints(root) if is_run else [latest] if latest else []
    incomplete = incomplete_checkpoints(root) if is_run else []
    if not paths and not incomplete:
        raise no_checkpoint(args.path)
    _report_incomplete(incomplete)
    is_damaged = bool(incomplete)
    for path in paths:
        problems = _find_problems(path)
        is_damaged |= bool(problems)
        print(f"{path}: {'; '.join(problems) or 'ok'}", file=sys.stderr if problems else sys.stdout)
    return int(is_damaged)


def _export(args: argparse.Namespace) -> int:
    """Write the weights as safetensors."""
    reader = CheckpointReader(args.path)
    widened = torch.bfloat16 if args.dtype == "float32" else None
    weights = [info for key, info in reader.infos.items() if key.startswith(MODEL)]
    total = sum(info.nbytes * (2 if info.dtype == widened else 1) for info in weights)
    with _progress_bar("export", total) as progress:
        export_fp32(
            reader.path,
            args.out,
            DTYPES[args.dtype],
            args.max_shard_size,
            progress,
            ema=args.ema,
            config_from=args.config_from,
        )
    what = "average" if args.ema else "weights"
    print(f"{args.out}: {what} of {reader.path} in {args.dtype}")
    if args.config_from is None:
        print("note: no config.json, which from_pretrained() needs: see --config-from")
    return 0


def _import(args: argparse.Namespace) -> int:
    """Write a checkpoint from the weights (and AdamW state) of another training."""
    total = 4 * sum(2 * math.prod(info.shape) for info in open_weights(args.source).infos.values())
    options = {
        key: value
        for key in ("lr", "betas", "eps", "weight_decay")
        if (value := getattr(args, key)) is not None
    }
    with _progress_bar("import", total) as progress:
        path = convert_fp32(
            args.source,
            args.out,
            args.optimizer,
            fp32=args.fp32,
            buffers=args.buffer,
            progress=progress,
            **options,
        )
    print(f"{path}: from {args.source}")
    return 0


def _prune(args: argparse.Namespace) -> int:
    """Remove all checkpoints that are older than the newest ``--keep`` undamaged ones.

    Directories without a manifest are reported and kept: their age is unknown, and a copy into one
    may be in progress.
    """
    root = find_root(args.root)
    _report_incomplete(incomplete_checkpoints(root))
    checkpoints = complete_checkpoints(root)
    if not checkpoints:
        raise no_checkpoint(root)
    undamaged: list[Path] = []
    for path in reversed(checkpoints):
        problems = _find_problems(path)
        if problems:
            print(f"{path}: damaged, so it does not count: {'; '.join(problems)}", file=sys.stderr)
            continue
        undamaged.append(path)
        if len(undamaged) == args.keep:
            break
    if not undamaged:
        raise ValueError(f"every checkpoint at {root} is damaged, so none was removed")
    has_failed = False
    for path in checkpoints[: checkpoints.index(undamaged[-1])]:
        if not _has_readable_manifest(path):
            continue  # its age is unknown
        try:
            if not args.dry_run:
                remove(path)
        except OSError as error:
            print(f"{path}: could not be removed: {error}", file=sys.stderr)
            has_failed = True
        else:
            print(f"{path}: {'would be ' if args.dry_run else ''}removed")
    return int(has_failed)


# ----------------------------------------------------------------------------------------- helpers


def _find_problems(path: Path) -> list[str]:
    """Return a sentence for each problem with a checkpoint's files, or an empty list."""
    try:
        files = read_manifest(path).files
    except (FileNotFoundError, ValueError) as error:  # removed in the meantime, or damaged
        return [str(error)]
    with _progress_bar(path.name, sum(record.bytes for record in files.values())) as progress:
        problems = []
        for name, record in files.items():
            problems += find_damage(path, {name: record})
            progress(record.bytes)
    return problems


def _report_incomplete(paths: list[Path]) -> None:
    for path in paths:
        print(
            f"{path}: has no {MANIFEST}, so it is not a complete checkpoint; remove it if no copy "
            "into it is in progress",
            file=sys.stderr,
        )


def _has_readable_manifest(path: Path) -> bool:
    try:
        read_manifest(path)
    except ValueError:
        return False
    return True


def _describe_blocks(reader: CheckpointReader, key: str) -> str:
    """Describe how a tensor is split on disk: "4 (dim 0)" if into 4 blocks along dim 0."""
    blocks = reader.blocks[key]
    sharded_dims = [
        str(dim)
        for dim, size in enumerate(reader.infos[key].shape)
        if any(block.sizes[dim] != size for block in blocks)
    ]
    return f"{len(blocks)} (dim {', '.join(sharded_dims)})" if sharded_dims else f"{len(blocks)}"


def _format_bytes(count: float) -> str:
    """Format in powers of 1000: "1.50 GB"."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"


@contextmanager
def _progress_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that advances a progress bar, if tqdm is installed and stderr a terminal."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda count: None
        return
    with tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=None, leave=False) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        yield advance


# ------------------------------------------------------------------------------------ command line


class Parser(argparse.ArgumentParser):
    """A parser that raises UsageError instead of exiting."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        raise UsageError(f"{message}; see --help")


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _size(text: str) -> int:
    """Parse a size: "5GB" -> 5 000 000 000."""
    number = text.rstrip("BKMGTbkmgt")
    unit = text[len(number) :].upper()
    try:
        value = float(number) * UNITS[unit]
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 500MB or 5GB") from None
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive size")
    return int(value)


def _parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m sharded_bf16_adamw.checkpoint",
        description="Inspect, verify, export, import and prune checkpoints.",
    )
    commands = parser.add_subparsers(
        required=True, metavar="inspect|verify|export|import|prune", parser_class=Parser
    )

    def add_command(
        name: str, run: Callable[[argparse.Namespace], int], summary: str
    ) -> Callable[..., argparse.Action]:
        command = commands.add_parser(name, help=summary, description=summary)
        command.set_defaults(run=run)
        return command.add_argument

    path_help = "a checkpoint's directory, or a run's directory for its latest checkpoint"
    patterns: dict[str, object] = {"action": "append", "default": [], "metavar": "PATTERN"}

    add = add_command("inspect", _inspect, "print what a checkpoint holds")
    add("path", help=path_help)

    add = add_command("verify", _verify, "compare every file with its checksum")
    add("path", help=path_help)
    add("--all", action="store_true", help="verify all checkpoints of the run")

    add = add_command("export", _export, "write the weights as Hugging Face does: safetensors")
    add("path", help=path_help)
    add("out", help="a new directory")
    add(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="float32: p + correction; bfloat16: p alone",
    )
    add("--ema", action="store_true", help="write the EMA of the weights instead of the weights")
    add(
        "--max-shard-size",
        type=_size,
        default="5GB",
        metavar="SIZE",
        help="maximum size of a file (default: 5GB)",
    )

    add(
        "--config-from",
        metavar="FOLDER",
        help="a Hugging Face model: copy its config, tokenizer and code, for from_pretrained()",
    )

    add = add_command("import", _import, "write a checkpoint from weights of another training")
    add("source", help="a safetensors file, a directory of them with an index, or a torch file")
    add("out", help="directory for the checkpoints of a new run")
    add(
        "--optimizer",
        metavar="FILE",
        help="torch file with the state of a torch.optim.AdamW, keyed by names unless it has one "
        "parameter group and the weights are a torch file",
    )
    add("--fp32", **patterns, help="parameters that stay float32, such as '*norm*'")
    add("--buffer", **patterns, help="floating-point tensors that are not parameters")
    add("--lr", type=float, help="learning rate, unless --optimizer has it (default: 1e-3)")
    add("--betas", type=float, nargs=2)
    add("--eps", type=float)
    add("--weight-decay", type=float)

    add = add_command("prune", _prune, "remove old checkpoints, but keep the newest undamaged ones")
    add("root", help="directory of a run, or of its checkpoints")
    add(
        "--keep",
        type=_positive_int,
        required=True,
        metavar="N",
        help="number of undamaged checkpoints to keep",
    )
    add("--dry-run", action="store_true", help="only print what would be removed")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
