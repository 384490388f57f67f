"""A lock on a root folder that one save at a time holds, so that a second job gets an error.

The lock is an ``flock``, which the kernel releases when the process dies. On a network file system
it may apply to all hosts or to one host only, or be unavailable. So saves do not rely on the lock
alone: their temporary names are unique.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
from contextlib import suppress
from pathlib import Path

LOCK = ".writer"
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.EBADF)


class RootLockedError(RuntimeError):
    """Another save holds the lock.

    Attributes:
        holder: process and machine of that save.
    """

    def __init__(self, message: str, holder: str) -> None:
        super().__init__(message)
        self.holder = holder

    def __reduce__(self) -> tuple[type[RootLockedError], tuple[str, str]]:
        return type(self), (str(self), self.holder)


class RootLock:
    """A lock on ``root``, held from construction until :meth:`release`.

    Raises:
        RootLockedError: another save holds the lock.
        OSError: the root cannot be written to, or its file system has no locks (an errno in
            ``_NO_LOCKS``).
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
                # else the previous holder removed the file after this process opened it
            except BlockingIOError:
                holder = _signature(descriptor)
                raise RootLockedError(
                    f"{holder} is saving to {root} now; give each job a root of its own, or remove "
                    f"{self._path} if that process no longer exists",
                    holder,
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
            pass  # another user's file, or a lost disk: harmless
        finally:
            with suppress(OSError):  # a lost file server: the save has ended all the same
                # closing is not enough: a forked process may hold a copy of the descriptor
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            with suppress(OSError):
                os.close(self._descriptor)


def lock_if_possible(root: Path) -> RootLock | None:
    """Lock ``root``; return None if its file system has no locks.

    Raises:
        RootLockedError: another save holds the lock.
    """
    try:
        return RootLock(root)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        if error.errno != errno.EBADF:  # EBADF: NFS cannot lock another user's file; keep it
            (root / LOCK).unlink(missing_ok=True)
        return None


def _open(path: Path) -> tuple[int, bool]:
    """Open the lock's file; return its descriptor and whether this user may write to it."""
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
    """Write the holder's process into the lock's file."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)


def _signature(descriptor: int) -> str:
    return os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
