"""Pauses of Python's cyclic garbage collector while plans and metadata are built."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
from torch import nn
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner

from sharded_bf16_adamw import AdamW_BF16, load, save
from sharded_bf16_adamw.checkpoint import dcp_storage
from sharded_bf16_adamw.checkpoint.dcp_storage import ChecksummedWriter
from sharded_bf16_adamw.checkpoint.gc_pause import gc_paused


@pytest.mark.parametrize("enabled", [True, False])
def test_collector_is_as_before_after_a_pause_and_after_an_error(enabled):
    (gc.enable if enabled else gc.disable)()
    try:
        with gc_paused():
            with gc_paused():
                assert not gc.isenabled()
            assert not gc.isenabled()
        assert gc.isenabled() == enabled
        with pytest.raises(KeyError), gc_paused():
            raise KeyError
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


@pytest.mark.parametrize("first_out", ["thread", "main"])
def test_collector_is_enabled_when_the_last_thread_ends_its_pause(first_out):
    inside, leave = threading.Event(), threading.Event()

    def pause() -> None:
        with gc_paused():
            inside.set()
            assert leave.wait(60)

    thread = threading.Thread(target=pause)
    with gc_paused():
        thread.start()
        assert inside.wait(60)
        if first_out == "thread":
            leave.set()
            thread.join()
            assert not gc.isenabled()
    assert gc.isenabled() == (first_out == "thread")
    leave.set()
    thread.join()
    assert gc.isenabled()


def test_collector_is_paused_in_planning_finishing_and_parsing_only(tmp_path, monkeypatch):
    """It stays enabled while files are read and written, because that takes long."""
    seen: dict[str, bool] = {}

    def watch(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            seen[f"{owner.__name__}.{name}"] = gc.isenabled()
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    for owner, name in (
        (DefaultSavePlanner, "create_local_plan"),
        (ChecksummedWriter, "write_data"),
        (ChecksummedWriter, "write_metadata"),
        (dcp_storage._MetadataUnpickler, "find_class"),
        (DefaultLoadPlanner, "finish_plan"),
        (dcp_storage.ChunkReader, "read_data"),
    ):
        watch(owner, name)
    model = nn.Linear(4, 2).bfloat16()
    optimizer = AdamW_BF16(model.parameters(), lr=1e-3)
    load(save(tmp_path, 1, model, optimizer), model, optimizer)
    assert seen == {
        "DefaultSavePlanner.create_local_plan": False,
        "ChecksummedWriter.write_data": True,
        "ChecksummedWriter.write_metadata": False,
        "_MetadataUnpickler.find_class": False,
        "DefaultLoadPlanner.finish_plan": False,
        "ChunkReader.read_data": True,
    }
    assert gc.isenabled()
