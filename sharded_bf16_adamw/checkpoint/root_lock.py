"""A lock that one save at a time holds on a root, so that a second job there gets an error.

It is an flock: the kernel releases it when its process dies. A network file system may pass it on
to other hosts, keep it on one host, or have no locks. So nothing relies on the lock alone: every
temporary name of a save is its own.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
from pathlib import Path

LOCK = ".writer"
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.EBADF)


class RootLock:
    """The lock on ``root``, held from construction until :meth:`release`.

    Raises:
        RuntimeError: another save holds it.
        OSError: the root cannot be written to. With an errno of ``_NO_LOCKS``, its file system has
        no locks.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / LOCK
        self._descriptor = -1
        while self._descriptor == -1:
            descriptor, writable = _open(self._path)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(descriptor, self._path):
                    if writable:
                        _sign(descriptor)
                    self._descriptor = descriptor
                # else the holder before removed the file after it was opened here
            except BlockingIOError:
                raise RuntimeError(
                    f"{_signature(descriptor)} is saving to {root} now; give each job a root of its own, "
                    f"or remove {self._path} if that process no longer exists"
                ) from None
            finally:
                if self._descriptor == -1:
                    os.close(descriptor)

    def release(self) -> None:
        """Release the lock and remove its file."""
        try:
            if _is_at(self._descriptor, self._path):
                os.unlink(self._path)
        except OSError:
            pass  # another user made the file, or its disk is gone: it does no harm
        finally:
            fcntl.flock(
                self._descriptor, fcntl.LOCK_UN
            )  # closing is not enough: a forked process may hold a copy
            os.close(self._descriptor)


def lock_if_possible(root: Path) -> RootLock | None:
    """Lock ``root``; return None if its file system has no locks.

    Raises:
        RuntimeError: another save holds the lock.
    """
    try:
        return RootLock(root)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        if (
            error.errno != errno.EBADF
        ):  # that one means another user's file on a network file system
            (root / LOCK).unlink(missing_ok=True)
        return None


def _open(path: Path) -> tuple[int, bool]:
    """Open the lock's file.

    Return its descriptor, and whether it may be written to: it may be another user's.
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666), True
    except PermissionError:
        if not os.path.exists(path):
            raise
        return os.open(path, os.O_RDONLY), False


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    """Write who holds the lock."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)


def _signature(descriptor: int) -> str:
    return os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
