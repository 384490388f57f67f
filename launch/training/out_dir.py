"""The folder ``--out``: its lock, and the configuration stored in it."""

from __future__ import annotations

import argparse
import errno
import os
import time
from pathlib import Path

from sharded_bf16_adamw.checkpoint.root_lock import (
    LOCK,
    RootLock,
    RootLockedError,
    lock_if_possible,
)
from training.config import CONFIG_FILE, to_toml
from training.errors import UsageError

# The workers of a killed run hold the lock until the kernel has freed their memory.
LOCK_TIMEOUT_S = 10.0


def lock_out_dir(args: argparse.Namespace) -> RootLock | None:
    """Create ``--out`` and its ``checkpoints`` folder, and lock ``--out``.

    Returns:
        The lock, or None if the file system has no locks.

    Raises:
        UsageError: another run uses ``--out``, or the folder cannot be written to.
    """
    out_dir = Path(args.out)
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    try:
        checkpoints = out_dir / "checkpoints"
        checkpoints.mkdir(parents=True, exist_ok=True)
        if not os.access(checkpoints, os.W_OK):  # fail now, not at the first save
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(checkpoints))
        while True:
            try:
                return lock_if_possible(out_dir)
            except RootLockedError as error:
                if time.monotonic() > deadline:
                    raise UsageError(
                        f"--out {out_dir} is in use: {error.holder} is training there; give "
                        f"another --out, or remove {out_dir / LOCK} if that process no longer "
                        "exists."
                    ) from None
            time.sleep(0.1)
    except OSError as error:
        raise UsageError(
            f"--out {out_dir} cannot be used ({error.strerror}: {error.filename}): "
            "give a directory that you may read and write."
        ) from None


def store_config(args: argparse.Namespace) -> Path:
    """Write the configuration to ``config.toml`` in ``--out``.

    Raises:
        UsageError: it cannot be written.
    """
    path = Path(args.out) / CONFIG_FILE
    replacement = path.with_name(f".{path.name}.new")
    try:
        # TOML is UTF-8, but a path need not be.
        replacement.write_text(to_toml(args), encoding="utf-8", errors="replace")
        replacement.replace(path)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written ({error.strerror}): make it writable, free space, or give "
            "another --out."
        ) from error
    return path
