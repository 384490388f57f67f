"""DCP's file writer and reader, with checksums of the files and a restricted unpickler.

The format is DCP's, so ``torch.distributed.checkpoint.load`` can read the tensors too. This reader
calls ``torch.load(weights_only=True)``, and reads repeated small tensors directly from their bytes
(see :mod:`.tensor_reader`). Everything that is not a tensor is JSON in the manifest.
"""

from __future__ import annotations

import io
import pickle
import queue
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, filesystem
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as TorchFuture

from ..sharding.dtensor import group_by
from .chunk_table import ChunkTable
from .file_checksums import ChecksummedFiles, FileRecord, crc32_text
from .gc_pause import gc_paused
from .metadata_pickle import dump_metadata
from .tensor_reader import TensorReader
from .tensor_writer import TensorWriter, without_crc32

METADATA = ".metadata"
CHUNKS = ".chunks"  # compact copy of METADATA's chunk table, written if there are many chunks
CHUNKS_FILE_THRESHOLD = 20_000  # chunks; reading more of them from METADATA takes over 0.1 s


class ChecksummedWriter(FileSystemWriter):
    """DCP writer into an empty folder that flushes every file to the disk.

    Args:
        path: the folder.

    Attributes:
        files: records of the files that this process has finished, by name.
    """

    def __init__(self, path: Path) -> None:
        # no sync_files: DCP calls fsync before the last bytes have left Python's buffer
        super().__init__(path, sync_files=False, overwrite=False)
        self.fs = ChecksummedFiles()
        self.files = self.fs.files

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        """Write this rank's files."""
        # DCP copies ahead with non_blocking, and then synchronizes the current device only.
        devices = {
            data.device
            for data in map(planner.resolve_data, plan.items)
            if isinstance(data, torch.Tensor)
        }
        gpus = devices - {torch.device("cpu")}
        only_cuda = {gpu.type for gpu in gpus} == {"cuda"}  # else current_device() may raise
        if not only_cuda or gpus != {torch.device("cuda", torch.cuda.current_device())}:
            self.per_thread_copy_ahead = 0
        with without_crc32():
            return super().write_data(plan, planner)

    def _write_data(
        self, planner: SavePlanner, file_queue: queue.Queue[Any]
    ) -> TorchFuture[list[WriteResult]]:
        """Write the files of DCP's queue; repeated small tensors bypass ``torch.save``.

        If torch stops calling this private method, torch writes the same bytes more slowly.
        """
        files = [file_queue.get_nowait() for _ in range(file_queue.qsize())]
        results: list[WriteResult] = []
        for path, name, items in files:
            tensors = _on_cpu(planner, items, self.per_thread_copy_ahead)
            writer = TensorWriter()
            with self.fs.create_stream(path, "wb") as stream:
                for tensor, item in tensors:
                    offset = stream.tell()
                    writer.write(tensor, stream)
                    length = stream.tell() - offset
                    location = _StorageInfo(name, offset, length)
                    results.append(WriteResult(item.index, length, location))
        written: TorchFuture[list[WriteResult]] = TorchFuture()
        written.set_result(results)
        return written

    def write_metadata(self, table: ChunkTable) -> None:
        """Write the metadata as DCP's ``finish`` does. Call it on rank 0 only."""
        metadata = Metadata(
            {}, table.planner_data, {}, self.storage_meta(), version=filesystem.CURRENT_DCP_VERSION
        )
        temporary = Path(self.path) / f"{METADATA}.tmp"
        with self.fs.create_stream(temporary, "wb") as stream:
            if table.chunks >= CHUNKS_FILE_THRESHOLD:
                dump_metadata(table, metadata, stream)
            else:
                of_chunks = table.to_metadata()
                metadata.state_dict_metadata = of_chunks.state_dict_metadata
                metadata.storage_data = of_chunks.storage_data
                pickle.dump(metadata, stream)
        self.fs.rename(temporary, Path(self.path) / METADATA)
        if table.chunks >= CHUNKS_FILE_THRESHOLD:
            with self.fs.create_stream(Path(self.path) / CHUNKS, "wb") as stream:
                stream.write(table.to_bytes())

    def storage_meta(self) -> StorageMeta:
        """Return DCP's ``StorageMeta`` without ``checkpoint_id``, which is the partial folder."""
        return StorageMeta(save_id=self.save_id)


def _on_cpu(
    planner: SavePlanner, items: list[WriteItem], copy_ahead: int
) -> Iterator[tuple[Tensor, WriteItem]]:
    """Yield the tensors of write items in CPU memory, in the order in which DCP writes them.

    Args:
        planner: resolves the items.
        items: tensors only.
        copy_ahead: bytes to copy ahead from the current GPU; 0 if another GPU has a tensor too.
    """
    assert all(item.type != WriteItemType.BYTE_IO for item in items)
    overlapping_loader = getattr(filesystem, "_OverlappingCpuLoader", None)
    if copy_ahead > 0 and overlapping_loader is not None:
        loader = overlapping_loader(planner.resolve_data, inflight_threshhold=copy_ahead)
        for item in items:
            loader.add(item.tensor_storage_size(), item)
        yield from loader.values()
    else:
        for item in items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            yield tensor.detach().cpu(), item


class ChunkReader(FileSystemReader):
    """DCP reader of planned chunks from the files of :class:`ChecksummedWriter`.

    Args:
        path: the checkpoint's folder.
        metadata: result of :meth:`ChunkTable.plan_reads`.
    """

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self.storage_data = metadata.storage_data

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> TorchFuture[None]:
        """Read this rank's tensors in file order; repeated small ones bypass ``torch.load``."""
        pairs = [(self.storage_data[item.storage_index], item) for item in plan.items]
        reader = TensorReader()
        for name, located in group_by(pairs, lambda pair: pair[0].relative_path).items():
            with open(Path(self.path) / name, "rb") as file:
                for info, item in sorted(located, key=lambda pair: pair[0].offset):
                    tensor = reader.read(self._slice_file(file, info), info.length)
                    part = narrow_tensor_by_index(tensor, item.storage_offsets, item.lengths)
                    target = planner.resolve_tensor(item).detach()
                    if part.size() != target.size():
                        raise RuntimeError(
                            f"size mismatch for {item.storage_index} in {name}: saved "
                            f"{tuple(part.size())}, needed {tuple(target.size())}"
                        )
                    target.copy_(part)
                    planner.commit_tensor(item, target)
        done: TorchFuture[None] = TorchFuture()
        done.set_result(None)
        return done


def read_chunks(path: Path, files: dict[str, FileRecord]) -> bytes:
    """Return the chunk table of the checkpoint at ``path``, as :meth:`ChunkTable.to_bytes` does.

    Compares the file's checksum before it parses the content.

    Args:
        path: the checkpoint's folder.
        files: records of its files, from the manifest.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is missing in ``files`` or damaged, or is not the metadata of tensors.
    """
    unusable = f"the checkpoint {path} cannot be used"
    if METADATA not in files:
        raise ValueError(
            f"{unusable}: its manifest does not list {METADATA}; load another checkpoint"
        )
    name = CHUNKS if CHUNKS in files else METADATA
    content = (path / name).read_bytes()
    if FileRecord(len(content), crc32_text(zlib.crc32(content))) != files[name]:
        raise ValueError(
            f"{unusable}: {name} does not match its checksum in the manifest; load another "
            "checkpoint"
        )
    try:
        if name == METADATA:
            with gc_paused():
                table = ChunkTable.from_metadata(parse_metadata(content))
                content = table.to_bytes()
        else:
            table = ChunkTable.from_bytes(content)
    except MemoryError:
        raise
    except Exception as error:  # crafted metadata can raise anything
        raise ValueError(f"{unusable}: {name}: {error}; load another checkpoint") from error
    unchecked = set(table.files) - set(files)
    if unchecked:
        raise ValueError(
            f"{unusable}: {name} names {min(unchecked)}, which its manifest does not list; load "
            "another checkpoint"
        )
    return content


def parse_metadata(content: bytes) -> Metadata:
    """Unpickle DCP metadata, with only the classes that describe tensors.

    Raises:
        ValueError: ``content`` names other classes, is not a pickle, or is not the metadata of
            tensors alone.
    """
    try:
        with gc_paused():
            metadata = _MetadataUnpickler(io.BytesIO(content)).load()
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"it is not the metadata of a checkpoint ({error})") from error
    if not (
        isinstance(metadata, Metadata)
        and all(
            isinstance(part, dict) for part in (metadata.state_dict_metadata, metadata.storage_data)
        )
    ):
        raise ValueError("it is not the metadata of a checkpoint")
    pickled = [
        key
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, BytesStorageMetadata)
    ]
    if pickled:
        raise ValueError(f"{pickled[0]} is a pickled object; only tensors are loaded")
    return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """An unpickler of DCP's metadata classes and torch's dtypes, layouts and sizes only.

    Unpickling these has no side effects.
    """

    ALLOWED = frozenset(
        {
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            *(
                ("torch.distributed.checkpoint.metadata", name)
                for name in (
                    "BytesStorageMetadata",
                    "ChunkStorageMetadata",
                    "Metadata",
                    "MetadataIndex",
                    "StorageMeta",
                    "TensorProperties",
                    "TensorStorageMetadata",
                    "_MEM_FORMAT_ENCODING",
                )
            ),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.ALLOWED:
            return super().find_class(module, name)
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise pickle.UnpicklingError(
            f"it names {module}.{name}, which the metadata of tensors does not need"
        )
