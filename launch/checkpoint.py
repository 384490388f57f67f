"""Look at, verify, export, import and remove checkpoints: ``python launch/checkpoint.py inspect runs/a/checkpoints``.

Needs no GPU, no torchrun and not the model's code, and executes no pickle. Exit codes: 0 all is well; 1 a file is damaged, or does not fit;
2 an error of use (a path, an option). An error is one sentence on stderr.
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

from sharded_bf16_adamw.checkpoint import convert_fp32, export_fp32
from sharded_bf16_adamw.checkpoint.directory import (
    complete_checkpoints,
    find_checkpoint,
    incomplete_checkpoints,
    no_checkpoint,
    remove,
)
from sharded_bf16_adamw.checkpoint.foreign_formats import open_weights
from sharded_bf16_adamw.checkpoint.manifest import MANIFEST, find_damage, read_manifest
from sharded_bf16_adamw.checkpoint.reader import StoredCheckpoint
from sharded_bf16_adamw.checkpoint.state_dict import MODEL, STATE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class UsageError(Exception):
    """Something that the user can put right."""


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse_args(argv)
        return args.run(args)
    except (UsageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


# ------------------------------------------------------------------------------------------------------------------ commands


def inspect(args: argparse.Namespace) -> int:
    """Print what a checkpoint holds, from its manifest and metadata."""
    stored = StoredCheckpoint(args.path)
    manifest, groups = stored.manifest, stored.group_values()
    names = [key.removeprefix(MODEL) for key in stored.infos if key.startswith(MODEL)]
    state_bytes: dict[str, int] = {}
    for key, info in stored.infos.items():
        if key.startswith(STATE):
            name = key.removeprefix(STATE).rpartition(".")[0]
            state_bytes[name] = state_bytes.get(name, 0) + info.nbytes
    rows = [("tensor", "shape", "dtype", "parts", "weight", "state", "step", "lr")]
    for name in names:
        info = stored.infos[MODEL + name]
        step_key, lr = f"{STATE}{name}.step", groups.get(name, {}).get("lr")
        rows.append(
            (
                name,
                " x ".join(map(str, info.shape)) or "scalar",
                str(info.dtype).removeprefix("torch."),
                parts(stored, MODEL + name),
                human(info.nbytes),
                human(state_bytes[name]) if name in state_bytes else "-",
                f"{int(stored.read(step_key))}" if step_key in stored.infos else "-",
                "-" if lr is None else f"{float(lr):g}",
            )
        )
    weights = sum(stored.infos[MODEL + name].nbytes for name in names)
    on_disk = sum(record.bytes for record in manifest.files.values())
    elements = sum(math.prod(stored.infos[MODEL + name].shape) for name in names)
    facts = {
        "checkpoint": stored.path,
        "step": manifest.step,
        "saved by": f"{manifest.world_size} rank(s): {manifest.strategy}",
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
        "tensors": f"{len(names)} of {elements:,} elements: {human(weights)} of weights, {human(sum(state_bytes.values()))} of state",
        "on disk": f"{human(on_disk)} in {len(manifest.files)} files",
    }
    for fact, value in facts.items():
        print(f"{fact:12}{value}")
    print()
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:4], widths[:4], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[4:], widths[4:], strict=True)]
        print("  ".join([*left, *right]).rstrip())
    return 0


def verify(args: argparse.Namespace) -> int:
    """Read every file and compare checksums; of all checkpoints of a run with ``--all``."""
    found = find_checkpoint(args.path)
    root = Path(args.path)
    paths = complete_checkpoints(root) if args.all else [found] if found else []
    incomplete = incomplete_checkpoints(root) if args.all else []
    if not paths and not incomplete:
        raise no_checkpoint(args.path)
    damaged = bool(incomplete)
    report_incomplete(incomplete)
    for path in paths:
        problems = find_problems(path)
        damaged |= bool(problems)
        print(f"{path}: {'; '.join(problems) or 'ok'}", file=sys.stderr if problems else sys.stdout)
    return int(damaged)


def export(args: argparse.Namespace) -> int:
    """Write the weights as safetensors."""
    stored = StoredCheckpoint(args.path)
    widened = torch.bfloat16 if args.dtype == "float32" else None
    weights = [info for key, info in stored.infos.items() if key.startswith(MODEL)]
    total = sum(info.nbytes * (2 if info.dtype == widened else 1) for info in weights)
    with progress_bar("export", total) as progress:
        export_fp32(stored.path, args.out, DTYPES[args.dtype], args.max_shard_size, progress)
    print(f"{args.out}: weights of {stored.path} in {args.dtype}")
    return 0


def import_(args: argparse.Namespace) -> int:
    """Write a checkpoint of ours from the weights (and AdamW state) of another training."""
    total = 4 * sum(2 * math.prod(info.shape) for info in open_weights(args.source).infos.values())
    options = {
        key: value
        for key in ("lr", "betas", "eps", "weight_decay")
        if (value := getattr(args, key)) is not None
    }
    with progress_bar("import", total) as progress:
        path = convert_fp32(
            args.source, args.out, args.optimizer, fp32=args.fp32, buffers=args.buffer, progress=progress, **options
        )  # fmt: skip
    print(f"{path}: from {args.source}")
    return 0


def prune(args: argparse.Namespace) -> int:
    """Remove all checkpoints that are older than the newest ``--keep`` whole ones.

    Folders without a manifest are named and left alone: nobody can say how old they are, and a copy to one may be under way.
    """
    root = Path(args.root)
    report_incomplete(incomplete_checkpoints(root))
    checkpoints = complete_checkpoints(root)
    if not checkpoints:
        raise no_checkpoint(root)
    whole: list[Path] = []
    for path in reversed(checkpoints):
        problems = find_problems(path)
        if problems:
            print(f"{path}: damaged, so it does not count: {'; '.join(problems)}", file=sys.stderr)
            continue
        whole.append(path)
        if len(whole) == args.keep:
            break
    if not whole:
        raise ValueError(f"no checkpoint at {root} is whole, so none was removed")
    stuck = False
    for path in checkpoints[: checkpoints.index(whole[-1])]:
        if not readable(path):
            continue  # its place in the order is unknown; it has been named above, or is older than needed to be looked at
        try:
            if not args.dry_run:
                remove(path)
        except OSError as error:
            print(f"{path}: could not be removed: {error}", file=sys.stderr)
            stuck = True
        else:
            print(f"{path}: {'would be ' if args.dry_run else ''}removed")
    return int(stuck)


# --------------------------------------------------------------------------------------------------------------------- parts


def find_problems(path: Path) -> list[str]:
    """What is wrong with a checkpoint's files; empty where all is well."""
    try:
        files = read_manifest(path).files
    except (
        FileNotFoundError,
        ValueError,
    ) as error:  # it was removed in the meantime, or is damaged
        return [str(error)]
    with progress_bar(path.name, sum(record.bytes for record in files.values())) as progress:
        problems = []
        for name, record in files.items():
            problems += find_damage(path, {name: record})
            progress(record.bytes)
    return problems


def report_incomplete(paths: list[Path]) -> None:
    """Name folders that have a checkpoint's name but no manifest."""
    for path in paths:
        print(
            f"{path}: has no {MANIFEST}, so it is no complete checkpoint; remove it if no copy to it is under way",
            file=sys.stderr,
        )


def readable(path: Path) -> bool:
    try:
        read_manifest(path)
    except ValueError:
        return False
    return True


def parts(stored: StoredCheckpoint, key: str) -> str:
    """Into how many blocks a tensor is cut on disk, and along which dimensions: ``"4 (dim 0)"``."""
    blocks = stored.blocks[key]
    cut = [
        str(dim)
        for dim, size in enumerate(stored.infos[key].shape)
        if any(block.sizes[dim] != size for block in blocks)
    ]
    return f"{len(blocks)} (dim {', '.join(cut)})" if cut else f"{len(blocks)}"


def human(count: float) -> str:
    """Bytes for people, in powers of 1000: ``"1.50 GB"``."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, where that is a terminal and tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda count: None
        return
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None, leave=False) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        yield advance


# ----------------------------------------------------------------------------------------------------------- the command line


class Parser(argparse.ArgumentParser):
    """Reports errors as every other error of use is reported."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def size(text: str) -> int:
    """``"5GB"`` -> 5 000 000 000."""
    number = text.rstrip("BKMGTbkmgt")
    unit = text[len(number) :].upper()
    try:
        value = float(number) * UNITS[unit]
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 500MB or 5GB") from None
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive size")
    return int(value)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="checkpoint.py", description="Look at, verify, export, import and remove checkpoints."
    )
    commands = parser.add_subparsers(
        required=True, metavar="inspect|verify|export|import|prune", parser_class=Parser
    )
    where = "a checkpoint's folder, or that of a run's checkpoints, which stands for the latest"

    command = commands.add_parser("inspect", help="print what a checkpoint holds")
    command.set_defaults(run=inspect)
    command.add_argument("path", help=where)

    command = commands.add_parser("verify", help="read every file and compare its checksum")
    command.set_defaults(run=verify)
    command.add_argument("path", help=where)
    command.add_argument("--all", action="store_true", help="all checkpoints of the run")

    command = commands.add_parser(
        "export", help="write the weights as safetensors, in the Hugging Face layout"
    )
    command.set_defaults(run=export)
    command.add_argument("path", help=where)
    command.add_argument("out", help="a new folder")
    command.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="float32: p + correction; bfloat16: p alone",
    )
    command.add_argument(
        "--max-shard-size",
        type=size,
        default="5GB",
        metavar="SIZE",
        help="of a file (default: 5GB)",
    )

    command = commands.add_parser(
        "import", help="write a checkpoint from the weights of another training"
    )
    command.set_defaults(run=import_)
    command.add_argument(
        "source", help="safetensors file, folder of them with an index, or torch file"
    )
    command.add_argument("out", help="folder for the checkpoints of a new run")
    command.add_argument(
        "--optimizer", metavar="FILE", help="torch file with the state of a torch.optim.AdamW"
    )
    command.add_argument(
        "--fp32",
        action="append",
        default=[],
        metavar="PATTERN",
        help="parameters that stay float32, such as '*norm*'",
    )
    command.add_argument(
        "--buffer",
        action="append",
        default=[],
        metavar="PATTERN",
        help="floating tensors that are no parameters",
    )
    command.add_argument("--lr", type=float, help="where no --optimizer brings it (default: 1e-3)")
    command.add_argument("--betas", type=float, nargs=2)
    command.add_argument("--eps", type=float)
    command.add_argument("--weight-decay", type=float)

    command = commands.add_parser(
        "prune", help="remove old checkpoints; never one of the newest whole ones"
    )
    command.set_defaults(run=prune)
    command.add_argument("root", help="folder of a run's checkpoints")
    command.add_argument(
        "--keep",
        type=positive,
        required=True,
        metavar="N",
        help="whole checkpoints to keep; damaged ones do not count",
    )
    command.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
