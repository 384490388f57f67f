"""Checksums of a checkpoint's files: computed while a file is written, compared when it is read.

They are CRC-32 (``zlib.crc32``), cheaper than the cryptographic hashes of Python's standard
library. CRC-32 always detects damage that spans at most 32 bits, and misses other damage with a
probability of 2^-32. It protects from accidents, not from deliberate changes.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed.checkpoint.filesystem import FileSystem

_HASH_IN_THREAD = 1 << 20  # bytes from which hashing in a thread pays
_BLOCK = 1 << 22  # bytes read at a time


class FileRecord(NamedTuple):
    """Size in bytes and CRC-32 (8 hexadecimal digits) of a file."""

    bytes: int
    crc32: str


def crc32_text(crc: int) -> str:
    """Return a CRC-32 as 8 hexadecimal digits."""
    return f"{crc:08x}"


class ChecksummedFiles(FileSystem):
    """DCP's file system, with a checksum of every file that is written.

    Attributes:
        files: records of the files that are finished, by name.
    """

    def __init__(self) -> None:
        self.files: dict[str, FileRecord] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        """Open a new file; when it is closed, record its checksum in ``files``."""
        assert mode == "wb"
        with ThreadPoolExecutor(1) as pool, open(path, "xb") as file:
            stream = _ChecksummedStream(file, pool)
            try:
                yield stream
                stream.close()
            except Exception:
                # torch.save hides the OSError of a full disk behind an error about positions
                if stream.error is not None:
                    raise stream.error from None
                raise
        self.files[Path(path).name] = FileRecord(stream.count, crc32_text(stream.crc))

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Rename a file, also in ``files``."""
        super().rename(path, new_path)
        self.files[Path(new_path).name] = self.files.pop(Path(path).name)


class _ChecksummedStream(io.IOBase):
    """An append-only file with a CRC-32.

    A large buffer is hashed while it is written: both release the GIL.
    """

    def __init__(self, file: Any, pool: ThreadPoolExecutor) -> None:
        self._file = file
        self._pool = pool
        self.count = 0
        self.crc = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._write(memoryview(data).cast("B"))
        except OSError as error:
            self.error = self.error or error
            raise

    def _write(self, data: memoryview) -> int:
        hashing = self._hash_in_thread(data) if data.nbytes >= _HASH_IN_THREAD else None
        try:
            self._file.write(data)
        finally:  # the caller may change the buffer after this call
            self.crc = zlib.crc32(data, self.crc) if hashing is None else hashing.result()
        self.count += data.nbytes
        return data.nbytes

    def _hash_in_thread(self, data: memoryview) -> Future[int] | None:
        try:
            return self._pool.submit(zlib.crc32, data, self.crc)
        except RuntimeError:  # Python starts no threads after the main thread has ended
            return None

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.count

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def close(self) -> None:
        """Flush to the disk and close, so that an error of the flush is an error of the save."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        super().close()


def find_damage(path: Path, files: dict[str, FileRecord]) -> list[str]:
    """Compare files with their records. Each file is read once, as a stream.

    Returns:
        A sentence without a full stop for each file that is missing, unreadable or different; an
        empty list if there is none.
    """
    problems = []
    block = memoryview(bytearray(_BLOCK))
    for name, record in files.items():
        try:
            with open(path / name, "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if size != record.bytes:
                    problems.append(
                        f"{name} has {size} bytes, not the {record.bytes} that were written"
                    )
                    continue
                crc = 0
                while count := file.readinto(block):
                    crc = zlib.crc32(block[:count], crc)
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror or error})")
        else:
            if crc32_text(crc) != record.crc32:
                problems.append(
                    f"{name} is not what was written (CRC-32 {crc32_text(crc)}, not {record.crc32})"
                )
    return problems


def share_of(files: dict[str, FileRecord], rank: int, world_size: int) -> dict[str, FileRecord]:
    """Return a rank's share of the files: the largest first, each to the rank with fewest bytes."""
    loads = [0] * world_size
    share = {}
    for name, record in sorted(files.items(), key=lambda item: (-item[1].bytes, item[0])):
        least = loads.index(min(loads))
        loads[least] += record.bytes
        if least == rank:
            share[name] = record
    return share
